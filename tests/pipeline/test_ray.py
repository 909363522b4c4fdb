"""The engine Ray: the rows of the default engine, whatever dies on the way."""

import contextlib
import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import pytest
from ray_cases import CRASHES, CRASHES_ONCE, load_small
from small_models import CASES, load_tokenizer

from elastic.pipeline import dataset, dataset_shards
from elastic.pipeline.dataset import list_inputs
from elastic.tokenizer import EncodeOptions
from elastic.tokens import TokenShards

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'elastictok[ray]'")
# Ray leaves sockets and files open, which elsewhere is an error.
pytestmark = pytest.mark.filterwarnings("default")

ROOT = pathlib.Path(__file__).resolve().parents[2]
OPTIONS = EncodeOptions(num_tokens=12, rate=4.0, max_frames=5)
SETTINGS = dict(files_per_shard=3, progress=False)


@pytest.fixture(scope="module")
def cluster():
    """One cluster for all tests of this module. Its processes have the tests' modules and the tests' settings of jax."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")]))
        ray.init(
            address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
            object_store_memory=100_000_000,
        )  # fmt: skip
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def clips(golden, tmp_path_factory):
    """Seven good files and a bad one, in three shards of three."""
    folder = tmp_path_factory.mktemp("clips")
    for name in ("0.png", "1.png", "2.png", CRASHES_ONCE, "x.png"):
        shutil.copy(golden / "media" / "img_101x67.png", folder / name)
    for name in ("a.mp4", "b.mp4"):
        shutil.copy(golden / "media" / "clip_160x120_30fps_97f.mp4", folder / name)
    (folder / "broken.mp4").write_text("not a film")
    return folder


@pytest.fixture(scope="module")
def tokenizer(golden):
    return load_tokenizer(golden, "fsq", model_id="m")


@pytest.fixture(scope="module")
def expected(tokenizer, clips, tmp_path_factory):
    """What the default engine writes."""
    folder = tmp_path_factory.mktemp("expected")
    dataset.tokenize_dataset(tokenizer, list_inputs(clips, folder), folder, OPTIONS, **SETTINGS)
    return folder


def files(folder):
    """{name: content} without what tells the time."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != ".plan.lock":
            lines = path.read_bytes().split(b"\n")
            if path.suffix == ".json":
                lines = [
                    line for line in lines if b'seconds"' not in line and b"per_second" not in line
                ]
            found[path.relative_to(folder).as_posix()] = lines
    return found


def with_ray(golden, clips, folder, marks, **settings):
    from elastic.pipeline import ray_engine
    from elastic.pipeline.engine_options import EngineOptions

    return ray_engine.tokenize_dataset(
        functools.partial(load_small, golden, marks),
        list_inputs(clips, folder),
        folder,
        OPTIONS,
        engine=EngineOptions(engine="ray", ray_actors=2),
        **SETTINGS | settings,
    )


def test_the_files_are_those_of_the_default_engine_also_where_one_begins_and_an_actor_dies(
    cluster, golden, tokenizer, clips, expected, tmp_path, monkeypatch
):
    folder = tmp_path / "out"

    class Stop(BaseException):
        pass

    def stop(*_, **__):
        raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(dataset_shards, "write_shard", stop)
        inputs = list_inputs(clips, folder)
        dataset.tokenize_dataset(tokenizer, inputs, folder, OPTIONS, **SETTINGS)
    assert list(folder.glob(".unfinished/shard-00000/*.npz"))
    outcome = with_ray(golden, clips, folder, tmp_path)
    assert (tmp_path / "once").exists()  # an actor was killed
    assert outcome.summary["totals"]["clips"] == 7 and outcome.summary["totals"]["bad_files"] == 1
    assert files(folder) == files(expected)


def test_a_clip_that_ends_its_actors_is_listed_and_ends_nothing_else(
    cluster, golden, clips, expected, tmp_path
):
    (tmp_path / "once").touch()
    more = shutil.copytree(clips, tmp_path / "clips")
    shutil.copy(more / "0.png", more / CRASHES)
    outcome = with_ray(golden, more, tmp_path / "out", tmp_path, batch=2)
    assert len((tmp_path / "crashes").read_text()) == 4  # once beside others, three times alone
    bad = [json.loads(line) for line in (tmp_path / "out/bad.jsonl").read_text().splitlines()]
    assert [line["id"] for line in bad] == ["broken.mp4", CRASHES]
    assert "ended the process that tokenizes it, 3 times" in bad[1]["reason"]
    assert outcome.summary["totals"]["clips"] == 7
    found, default = TokenShards(tmp_path / "out"), TokenShards(expected)
    assert sorted(found.ids) == sorted(default.ids)
    for name in default.ids:
        ours, theirs = found[found.find(name)], default[default.find(name)]
        assert ours.ids.tolist() == theirs.ids.tolist()


def test_rows_go_through_ray_data_and_are_shards_again(cluster, tokenizer, clips, tmp_path):
    import ray.data

    from elastic.pipeline.rows import clip_table

    names = ["0.png", "a.mp4"]
    table = clip_table(tokenizer, [(name, clips / name) for name in names], OPTIONS).table
    ray.data.from_arrow(table).write_parquet(str(tmp_path / "out"))
    (batch,) = ray.data.read_parquet(str(tmp_path / "out")).iter_batches(batch_format="numpy")
    assert sorted(batch) == sorted(table.column_names) and list(batch["id"]) == names
    shards = TokenShards(tmp_path / "out")
    assert shards[1] == tokenizer.encode(clips / "a.mp4", num_tokens=12, rate=4.0, max_frames=5)


# --- The script, with a cluster of its own -------------------------------------------------------


def start(golden, clips, folder):
    return subprocess.Popen(
        [
            sys.executable, ROOT / "scripts/tokenize_dataset.py", f"--input_path={clips}", f"--output_folder={folder}",
            f"--load_checkpoint=params::{golden}/fsq/ckpt/params_scan_fp32",
            "--load_elastic_config=debug", f"--update_elastic_config={CASES['fsq']}", "--n_codes=12", "--fps=4", "--max_frames=5",
            "--files_per_shard=3", "--engine=ray", "--ray_actors=2",
        ],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for_tokens(process, folder):
    """Returns when the process has tokenized a file: one of an earlier process does not count."""
    earlier = {path.stat().st_mtime_ns for path in folder.glob(".unfinished/*/*.npz")}
    while process.poll() is None:
        for path in folder.glob(".unfinished/*/*.npz"):
            with contextlib.suppress(FileNotFoundError):  # packed meanwhile
                if path.stat().st_mtime_ns not in earlier:
                    return
        time.sleep(0.02)
    raise AssertionError(process.communicate())


def wait_for_the_end_of_actors():
    """Actors outlive a killed driver by seconds, and would write tokens in the name of the next one."""
    alive = True
    while alive:
        time.sleep(0.1)
        alive = False
        for process in pathlib.Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                alive = alive or b"ray::ClipActor" in (process / "cmdline").read_bytes()


@pytest.mark.slow
def test_a_killed_driver_is_started_again_and_sigterm_leaves_with_143(golden, clips, tmp_path):
    folder = tmp_path / "out"
    process = start(golden, clips, folder)
    wait_for_tokens(process, folder)
    process.kill()
    process.communicate()
    wait_for_the_end_of_actors()
    process = start(golden, clips, folder)
    wait_for_tokens(process, folder)
    process.terminate()
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 143, errors
    assert "the same command goes on from here" in errors and "Traceback" not in errors
    process = start(golden, clips, folder)
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0 and "bad files  1, listed in bad.jsonl" in out, errors
    assert len(TokenShards(folder)) == 7 and not (folder / ".unfinished").exists()

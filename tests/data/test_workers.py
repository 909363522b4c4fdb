"""The processes that decode training data: they share the work, name bad files once, and end however it ends."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time
import types

import pytest
from level_clips import damaged_clip, make_folder, write_clip
from PIL import Image

from elastic.data import workers as data_workers
from elastic.data.packing import num_streams

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("clips"))


@pytest.mark.parametrize("num_rows", [1, 2, 5])
@pytest.mark.parametrize("num_workers", [1, 2, 3, 8])
def test_workers_share_the_rows_or_take_turns_with_them(num_rows, num_workers, caplog):
    groups, turns = data_workers._share(num_rows, num_workers, batch_size=5)
    assert [row for group in groups for row in group] == list(range(num_rows))
    assert len(groups) * turns <= num_workers < 2 * (len(groups) * turns) + num_rows
    assert (num_streams(5) // 5) % turns == 0  # then a worker keeps to its own lanes
    used = len(groups) * turns
    assert (f"{used} of {num_workers} workers are used" in caplog.text) == (used < num_workers)


def test_what_is_prepared_ahead_fits_into_shared_memory(monkeypatch, caplog):
    for free, expected in ((10**9, (4, False)), (700, (1, False)), (300, (1, True))):
        usage = types.SimpleNamespace(free=free)
        monkeypatch.setattr(data_workers.shutil, "disk_usage", lambda _, usage=usage: usage)
        assert data_workers._fit(4, 100) == expected
    assert caplog.text.count("--shm-size") == 2


# Programs that are ended in every way

PROGRAM = """
import contextlib, logging, os, sys, time
from elastic.config import ElasticTokConfig
from elastic.data.dataset import DataConfig, TrainingData, load_index


def main(folder, first, last, wait):
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    model = ElasticTokConfig(
        hidden_size=16, intermediate_size=16, num_encoder_layers=1, num_decoder_layers=1, num_attention_heads=1,
        frames_per_block=2, patch_size=(2, 8, 8), min_toks=2, max_toks=16, max_sequence_length=48,
    )
    config = DataConfig(path=folder, batch_size=4, workers=2)
    data = TrainingData(config, model, index=load_index(config, model))
    with contextlib.closing(data.batches(int(first), int(last))) as batches:
        for k, batch in enumerate(batches):
            if k == 0:
                print("first", flush=True)
                time.sleep(float(wait))
    print("bad", len(data.bad_files), "epochs", data.epoch_of(int(last)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
"""


class Run:
    """A program that reads a folder with two workers, in a process group of its own."""

    def __init__(self, tmp_path, folder, first=0, last=10, wait=0.0):
        script = tmp_path / "program.py"
        script.write_text(PROGRAM)
        env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        self.errors = open(tmp_path / "errors.txt", "w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, script, folder, str(first), str(last), str(wait)],
            env=env, stdout=subprocess.PIPE, stderr=self.errors, text=True, start_new_session=True,
        )  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()
        self.errors.close()

    def wait_for_first(self):
        assert self.process.stdout.readline() == "first\n", self.log()

    def workers(self):
        found = []
        for entry in pathlib.Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                command = (entry / "cmdline").read_bytes()
                group = int((entry / "stat").read_text().rpartition(")")[2].split()[2])
                if group == self.process.pid and b"spawn_main" in command:
                    found.append(int(entry.name))
        return found

    def end(self):
        out, _ = self.process.communicate(timeout=200)
        return self.process.returncode, out

    def log(self):
        self.errors.seek(0)
        return self.errors.read()

    def assert_nobody_is_left(self):
        deadline = time.monotonic() + 60
        while self.group() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert self.group() == []

    def group(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, 0)
            return [self.process.pid]
        return []


def shared_memory(pids):
    """The files of shared memory that these processes have mapped."""
    found = set()
    for pid in pids:
        for line in pathlib.Path(f"/proc/{pid}/maps").read_text().splitlines():
            if "/dev/shm/psm_" in line:
                found.add(pathlib.Path(line.split()[5]))
    return found


def test_a_hostile_folder_is_trained_on_its_good_files_and_each_bad_one_is_named_once(tmp_path):
    folder = tmp_path / 'it\'s a "folder"'
    (folder / ("d" * 250)).mkdir(parents=True)
    for name in (
        "a b.mp4",
        'quote\'s "x".mp4',
        "ünï☃.mp4",
        "n" * 240 + ".mp4",
        "d" * 250 + "/x.mp4",
    ):
        write_clip(folder / name, 100, 6)
    os.rename(folder / "a b.mp4", os.path.join(os.fsencode(folder), b"\xff\xfe.mp4"))
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    (folder / "photo.mp4").mkdir()
    Image.new("RGB", (40, 40), (9, 9, 9)).save(folder / "photo.mp4" / "picture.jpg")
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("not a film")
    (folder / "nothing.mp4").symlink_to("nowhere.mp4")
    (folder / "round.mp4").symlink_to("round.mp4")
    os.mkfifo(folder / "pipe.mp4")
    whole = (folder / "ünï☃.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    damaged_clip(folder / "damaged.mp4")
    bad = "empty text nothing round pipe cut damaged".split()

    with Run(tmp_path, folder, last=12) as run:
        code, out = run.end()
        assert (code, out.splitlines()[0]) == (0, "first"), run.log()
        words = out.splitlines()[1].split()
        assert int(words[1]) == len(bad) and float(words[3]) > 2, out
        named = {name: run.log().count(f"{name}.mp4'") for name in bad}
        assert named == dict.fromkeys(bad, 1), run.log()
        assert len(run.log().splitlines()) == len(bad), run.log()
        run.assert_nobody_is_left()


def test_workers_end_with_a_parent_that_is_killed(clips, tmp_path):
    with Run(tmp_path, clips, last=10**6, wait=60) as run:
        run.wait_for_first()
        assert len(run.workers()) == 2
        memory = shared_memory([run.process.pid, *run.workers()])
        assert memory
        run.process.kill()
        run.process.wait()
        run.assert_nobody_is_left()
        assert not [file for file in memory if file.exists()]


def test_a_worker_that_dies_is_an_error_that_says_so(clips, tmp_path):
    with Run(tmp_path, clips, last=10**6, wait=1) as run:
        run.wait_for_first()
        os.kill(run.workers()[0], signal.SIGKILL)
        code, _ = run.end()
        assert code == 1
        assert "ChildProcessError: A process that decodes training data died" in run.log()
        assert "exit code -9" in run.log()
        run.assert_nobody_is_left()


@pytest.mark.slow
def test_ctrl_c_is_the_parents_and_its_workers_end_silently(clips, tmp_path):
    with Run(tmp_path, clips, last=10**6, wait=60) as run:
        run.wait_for_first()
        os.killpg(run.process.pid, signal.SIGINT)
        code, _ = run.end()
        assert code != 0
        assert run.log().count("Traceback") == 1 and "KeyboardInterrupt" in run.log(), run.log()
        run.assert_nobody_is_left()

"""Data sets: files to shards, each once, whatever stops a process on the way."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from folder_hub import use_folder_as_hub
from PIL import Image

from elastic import media
from elastic.cli import app
from elastic.config import ElasticTokConfig
from elastic.io.atomic import locked
from elastic.pipeline import clip_files, dataset_shards
from elastic.pipeline.contact_sheet import sample_clips
from elastic.pipeline.dataset import list_inputs, tokenize_dataset
from elastic.pipeline.dataset_plan import _LATER_OPTIONS, DatasetPlan, FileStamp, write_or_check
from elastic.pipeline.push import push_dataset
from elastic.pipeline.rows import clip_row, clip_table
from elastic.pipeline.shard_numbers import ListedClip
from elastic.tokenizer import ElasticTokenizer, EncodeOptions
from elastic.tokens import TokenizedClip, TokenShards
from scripts import tokenize_dataset as script

ROOT = pathlib.Path(__file__).resolve().parents[2]
CLIP, PHOTO = "clip_160x120_30fps_97f.mp4", "img_101x67.png"
MODEL = dict(
    hidden_size=64, intermediate_size=96, num_attention_heads=2, num_encoder_layers=2, num_decoder_layers=2,
    rms_norm_eps=1e-5, min_toks=4, max_toks=32, max_sequence_length=128, bottleneck_type="fsq", patch_size=(1, 8, 8),
    frames_per_block=2, theta=5e7,
)  # fmt: skip
ENCODING = dict(num_tokens=12, rate=4.0, max_frames=5)
OPTIONS = dict(files_per_shard=4, progress=False) | ENCODING
BAD = ["b/broken.mp4", "b/empty.png"]


def run(tokenizer, inputs, folder, **given):
    """`tokenize_dataset` with the fields of `EncodeOptions` among its arguments."""
    fields = {field.name for field in dataclasses.fields(EncodeOptions)} & given.keys()
    options = EncodeOptions(**{name: given.pop(name) for name in fields})
    return tokenize_dataset(tokenizer, inputs, folder, options, **given)


@pytest.fixture(scope="module")
def tokenizer(golden):
    return ElasticTokenizer.from_pretrained(
        f"params::{golden}/fsq/ckpt/params_scan_fp32",
        config=ElasticTokConfig(**MODEL),
        model_id="m",
    )


@pytest.fixture(scope="module")
def clips(golden, tmp_path_factory):
    """Ten good files and two bad ones, in three shards of four."""
    folder = tmp_path_factory.mktemp("clips")
    for name in ("a", "b"):
        (folder / name).mkdir()
    for number in range(8):
        image = Image.open(golden / "media" / PHOTO).convert("RGB")
        image.rotate(10 * number).save(folder / "a" / f"{number}.png")
    for name in ("a/clip.mp4", "b/clip.mp4"):
        shutil.copy(golden / "media" / CLIP, folder / name)
    (folder / "b" / "broken.mp4").write_text("not a film")
    (folder / "b" / "empty.png").touch()
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def undisturbed(tokenizer, clips, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    outcome = run(tokenizer, list_inputs(clips, folder), folder, **OPTIONS)
    return folder, outcome


def files(folder):
    """{name: content} without what tells the time."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != ".plan.lock":
            data = path.read_bytes()
            if path.suffix == ".json":
                lines = data.split(b"\n")
                data = [
                    line for line in lines if b'seconds"' not in line and b"per_second" not in line
                ]
            found[path.relative_to(folder).as_posix()] = data
    return found


def test_every_good_file_is_a_row_and_every_bad_one_is_listed(undisturbed, tokenizer, clips):
    folder, outcome = undisturbed
    assert list(files(folder)) == sorted(
        ["bad.jsonl", "plan.json", "summary.json", "summary.png"]
        + [f"shard-0000{n}{ending}" for n in range(3) for ending in (".json", ".parquet")]
    )
    shards, inputs = TokenShards(folder), list_inputs(clips, folder)
    assert list(shards.ids) == [name for name in inputs if name not in BAD] and len(shards) == 10
    clip = shards[shards.find("a/clip.mp4")]
    assert clip == tokenizer.encode(clips / "a/clip.mp4", num_tokens=12, rate=4.0, max_frames=5)
    assert tokenizer.decode(clip).shape == (5, 32, 32, 3)
    lines = [json.loads(line) for line in (folder / "bad.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == BAD
    assert "empty.png' is empty" in lines[1]["reason"] and lines[1]["shard"] == "shard-00002"
    totals = outcome.summary["totals"]
    assert (totals["clips"], totals["images"], totals["frames"], totals["bad_files"]) == (
        10,
        8,
        18,
        2,
    )
    histogram = outcome.summary["tokens_per_block"]
    assert sum(histogram["blocks"]) == totals["blocks"] == 14
    assert histogram["blocks"][histogram["edges"].index(12) - 1] == 14
    assert json.loads((folder / "shard-00000.json").read_text())["histogram"] == {"12": 4}


def test_the_summary_tells_quality_rate_and_the_clips_at_both_ends(undisturbed, tokenizer, clips):
    folder, outcome = undisturbed
    summary, shards = outcome.summary, TokenShards(folder)
    losses = [block.loss for clip in shards for block in clip.blocks]
    levels = [int(np.floor(10 * np.log10(4 / loss))) for loss in losses]
    psnr = summary["psnr_per_block"]
    assert psnr["edges"][0] == min(levels) and psnr["edges"][-1] == max(levels) + 1
    assert psnr["blocks"] == [levels.count(level) for level in psnr["edges"][:-1]]
    # Two videos of 5 frames, 4 a second, in 3 blocks of 12 tokens.
    rates = summary["tokens_per_second"]
    assert rates["mean"] == 36 / (5 / 4) and rates["clips"] == [2]
    assert rates["edges"][0] <= rates["mean"] < rates["edges"][1]
    worst, best = summary["worst_clips"], summary["best_clips"]
    quality = {
        name: 10 * np.log10(4 / np.mean([block.loss for block in shards[shards.find(name)].blocks]))
        for name in shards.ids
    }
    listed = [entry["id"] for entry in worst + best[::-1]]
    assert len(worst) == len(best) == 4 and listed[0] == min(quality, key=quality.__getitem__)
    assert [quality[name] for name in listed] == sorted(quality[name] for name in listed)
    # Each is drawn as far as its original is there.
    inputs = list_inputs(clips, folder)
    del inputs[worst[0]["id"]]
    given = [ListedClip(**entry) for entry in worst[:2]]
    (sample,) = sample_clips(tokenizer, inputs, EncodeOptions(**ENCODING), folder, given)
    tokens = shards[shards.find(worst[1]["id"])]
    assert np.array_equal(sample.reconstruction, tokenizer.decode(tokens)[0])
    with media.open_clip(inputs[worst[1]["id"]], resolution=32) as reader:
        assert np.array_equal(sample.original, reader.read()[0])


@pytest.fixture
def hub(tmp_path, monkeypatch):
    return use_folder_as_hub(monkeypatch, tmp_path / "hub")


def test_a_data_set_is_pushed_with_a_card_and_is_read_from_there(undisturbed, hub, tmp_path):
    folder, _ = undisturbed
    made = push_dataset(folder, "me/mine", private=True)
    assert made == "commit: Card made from the summary"
    pushed = hub / "me" / "mine"
    assert (hub / "me" / "mine.kind").read_text() == "private dataset"
    assert {path.name for path in pushed.iterdir()} == {
        path.name for path in folder.iterdir() if path.suffix and path.name != "plan.json"
    } - {".plan.lock"} | {"README.md"}
    assert TokenShards(pushed).ids == TokenShards(folder).ids
    card = huggingface_hub.DatasetCard.load(pushed / "README.md")
    assert card.data.size_categories == ["n<1K"] and "elastictok" in card.data.tags
    for words in (
        'load_dataset("me/mine"',
        "| Clips | 10, of which 8 images; 18 frames |",
        "| `num_tokens` | 12 |",
        "| Files that could not be read | 2, listed in bad.jsonl |",
    ):
        assert words in card.text
    (pushed / "README.md").write_text("by hand")
    push_dataset(folder, "me/mine", private=True)
    assert (pushed / "README.md").read_text() == "by hand"
    with pytest.raises(ValueError, match=r"has no summary\.json: the run is not finished"):
        push_dataset(tmp_path, "me/mine")


def test_the_row_function_gives_the_rows_of_the_shards(undisturbed, tokenizer, clips, tmp_path):
    folder, _ = undisturbed
    options = EncodeOptions(**ENCODING)
    expected = pq.read_table(folder / "shard-00002.parquet")
    row = clip_row(tokenizer, clips / "b/clip.mp4", options, name="b/clip.mp4")
    assert pa.Table.from_pylist([row], schema=expected.schema).equals(expected.slice(1))
    names = ["a/clip.mp4", "b/broken.mp4", "b/clip.mp4"]
    made = clip_table(tokenizer, [(name, clips / name) for name in names], options)
    assert made.table is not None and made.table.equals(expected)
    assert made.table.schema.metadata == expected.schema.metadata
    assert [name for name, _ in made.bad] == names[1:2]
    with pytest.raises(media.MediaError, match="is empty"):
        clip_row(tokenizer, clips / "b/empty.png", options)


class Killed(BaseException):
    """Ends a run at once, as no handler expects it."""


STAGES = {
    "the first file": (TokenizedClip, "save", 0),
    "the sixth file": (TokenizedClip, "save", 5),
    "a file that is not yet noted as done": (clip_files, "write_json", 3),
    "packing": (TokenizedClip, "load", 2),
    "packing the last shard": (dataset_shards, "write_shard", 2),
    "a shard that is not yet noted as finished": (dataset_shards.Tally, "save", 1),
    "clearing up": (shutil, "rmtree", 1),
    "the summary": (dataset_shards, "write_summary", 0),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_killed_at_any_stage_goes_on_and_does_each_file_once(
    undisturbed, tokenizer, clips, tmp_path, monkeypatch, stage
):
    owner, name, calls = STAGES[stage]
    inputs, encoded = list_inputs(clips, tmp_path), []
    open_session = tokenizer.open_session

    def note(source, options):
        try:
            session = open_session(source, options)
        except media.MediaError:
            encoded.append(source)
            raise
        start = session.start  # one that is opened early, and not begun, is nothing lost
        session.start = lambda: encoded.append(source) or start()
        return session

    monkeypatch.setattr(tokenizer, "open_session", note)
    with monkeypatch.context() as patch:
        real, left = getattr(owner, name), [calls]

        def kill(*arguments, **named):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return real(*arguments, **named)

        patch.setattr(owner, name, kill)
        with pytest.raises(Killed):
            run(tokenizer, inputs, tmp_path, **OPTIONS)
    half = "summary.json" if stage == "the summary" else "shard-00002.parquet"
    (tmp_path / f".{half}.0a1b2c3d.tmp").touch()  # what a real kill leaves
    before = len(encoded)
    outcome = run(tokenizer, inputs, tmp_path, **OPTIONS)
    assert outcome.summary is not None and set(encoded) == set(inputs.values())
    lost = (
        1 if name in ("save", "write_json") and owner is not dataset_shards.Tally else 0
    )  # the file under way
    assert len(encoded) == len(inputs) + lost and before > 0
    assert files(tmp_path) == files(undisturbed[0])


def test_a_damaged_token_file_is_made_again(
    undisturbed, tokenizer, clips, tmp_path, monkeypatch, caplog
):
    inputs = list_inputs(clips, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(dataset_shards, "write_shard", lambda *_, **__: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            run(tokenizer, inputs, tmp_path, **OPTIONS)
    (tmp_path / ".unfinished/shard-00000/00001.npz").write_bytes(b"half")
    caplog.set_level("INFO")
    run(tokenizer, inputs, tmp_path, **OPTIONS)
    assert "4 of 12 files have been tokenized before" in caplog.text
    assert all(f"shard-0000{n} is finished ({n + 1} of 3)" in caplog.text for n in range(3))
    assert "Tokenized again" in caplog.text and files(tmp_path) == files(undisturbed[0])
    told = re.search(
        r"Files of this process: \d+, (\S+) clips/s, (\S+) frames/s, model waits (\d+)%",
        caplog.text,
    )
    assert told is not None and float(told[2]) > float(told[1]) > 0 and 0 < int(told[3]) < 100


def test_a_shard_in_other_hands_is_left_and_taken_up_when_these_are_gone(
    undisturbed, tokenizer, clips, tmp_path, monkeypatch
):
    monkeypatch.setattr(dataset_shards, "_WAIT_SECONDS", 0.02)
    inputs = list_inputs(clips, tmp_path)
    with locked(tmp_path / ".shard-00001.lock") as held:
        assert held
        outcome = run(tokenizer, inputs, tmp_path, **OPTIONS)
        assert outcome == (None, ("shard-00001",))
        assert not (tmp_path / "summary.json").exists()
    # Who is to wait does so while somebody works on it, and no longer.
    let_go = threading.Event()

    def hold():
        with locked(tmp_path / ".shard-00001.lock"):
            let_go.wait()

    other = threading.Thread(target=hold)
    other.start()
    threading.Timer(0.5, let_go.set).start()
    started = time.perf_counter()
    options = OPTIONS | dict(process_count=2, wait=True)
    assert run(tokenizer, inputs, tmp_path, **options).unfinished == ("shard-00001",)
    assert time.perf_counter() - started > 0.5
    other.join()
    # Another number of processes takes over; its first one has nothing to do.
    outcome = run(tokenizer, inputs, tmp_path, process_count=2, **OPTIONS)
    assert outcome.unfinished == ("shard-00001",)
    options = OPTIONS | dict(process_index=1, process_count=2)
    assert run(tokenizer, inputs, tmp_path, **options).summary is not None
    assert files(tmp_path) == files(undisturbed[0])


def test_another_run_in_the_same_folder_is_refused_with_what_differs(
    undisturbed, tokenizer, clips, tmp_path
):
    folder = shutil.copytree(undisturbed[0], tmp_path / "run")
    before, inputs = files(folder), list_inputs(clips, folder)
    fewer = dict(list(inputs.items())[1:]) | {"new.png": clips / "a/1.png"}
    other = tokenizer.with_params(
        {**tokenizer.params, "encoder": {**tokenizer.params["encoder"]}}, model_id="n"
    )
    gone = inputs | {"a/2.png": tmp_path / "nowhere.png"}
    for who, what, options, message in [
        (tokenizer, gone, {}, "1 files are missing, such as 'a/2.png'"),
        (tokenizer, inputs, {"num_tokens": 13}, r"num_tokens=13 \(then 12\)"),
        (tokenizer, inputs, {"files_per_shard": 5}, r"files_per_shard=5 \(then 4\)"),
        (
            tokenizer,
            fewer,
            {},
            r"1 files are new, such as 'new.png', which append=True .*; 1 files are missing",
        ),
        (other, inputs, {}, r"model_id=n \(then m\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(who, what, folder, **(OPTIONS | options))
    (folder / "plan.json").write_text("{}")
    with pytest.raises(ValueError, match=r"plan\.json is no plan"):
        run(tokenizer, inputs, folder, **OPTIONS)
    (folder / "plan.json").unlink()
    with pytest.raises(ValueError, match=r"bad\.jsonl but no plan\.json"):
        run(tokenizer, inputs, folder, **OPTIONS)
    assert files(folder) == {name: data for name, data in before.items() if name != "plan.json"}


def test_options_that_no_file_could_have_are_refused_before_anything_is_written(
    tokenizer, clips, tmp_path
):
    inputs, free = list_inputs(clips, tmp_path), OPTIONS | dict(num_tokens=None)
    for options, message in [
        (free | dict(threshold=0.1, psnr=30.0), "threshold"),
        (free | dict(threshold=-1.0), "threshold=-1"),
        (free | dict(bitrate=8.0), "bitrate=8.0 needs videos, but 9 files are images"),
        (OPTIONS | dict(files_per_shard=0), "files_per_shard=0"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(tokenizer, inputs, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_inputs_are_a_folder_a_file_or_a_list(clips, tmp_path):
    names = list(list_inputs(clips, tmp_path))
    assert names == sorted(names) and len(names) == 12 and "notes.txt" not in names
    assert list_inputs(clips / "a/1.png", tmp_path) == {"1.png": clips / "a/1.png"}
    listed = tmp_path / "files.txt"
    listed.write_text(f"# two\n{clips}/b/clip.mp4\n\nx/1.png\n")
    found = list_inputs(listed, tmp_path / "out")
    assert found == {f"{clips}/b/clip.mp4": clips / "b/clip.mp4", "x/1.png": tmp_path / "x/1.png"}
    listed.write_text("a.png\na.png\n")
    with pytest.raises(media.MediaError, match=r"names 'a\.png' twice"):
        list_inputs(listed, tmp_path)
    odd = tmp_path / os.fsdecode(b"odd-\xff.png")
    odd.touch()
    assert list(list_inputs(tmp_path, tmp_path / "out")) == ["odd-\\xff.png"]
    # Results are no input.
    assert list_inputs(clips, clips / "a").keys() == {
        name for name in names if name.startswith("b/")
    }
    os.mkfifo(tmp_path / "files.fifo.txt")
    with pytest.raises(media.MediaError, match="is no regular file"):
        list_inputs(tmp_path / "files.fifo.txt", tmp_path)


@pytest.mark.parametrize("name", ["summary.json", "summary.png", "bad.jsonl"])
def test_files_that_no_run_wrote_are_refused_and_stay(tokenizer, clips, tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=rf"holds {name} but no plan\.json"):
        run(tokenizer, list_inputs(clips, tmp_path), tmp_path, **OPTIONS)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def replace(path, other, *, keep_time=True):
    """Puts another picture into the place of a file, filled up to its size, with its time of change."""
    before, data = path.stat(), other.read_bytes()
    path.write_bytes(data + bytes(max(0, before.st_size - len(data))))
    if keep_time:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def same_tokens(shards, one, other):
    first, second = (shards[shards.find(name)].blocks for name in (one, other))
    return all(np.array_equal(x.values, y.values) for x, y in zip(first, second, strict=True))


@pytest.fixture
def copied(clips, tmp_path):
    """The clips, in a folder whose files a test may change: two of one size and time among them."""
    folder = shutil.copytree(clips, tmp_path / "in")
    Image.new("RGB", (40, 30), "red").save(folder / "a/0.png")
    return folder


def test_clips_that_were_replaced_are_tokenized_anew_and_named(
    tokenizer, copied, tmp_path, monkeypatch, caplog
):
    folder, inputs = tmp_path / "out", list_inputs(copied, tmp_path / "out")
    with monkeypatch.context() as patch:  # the last shard is not packed yet
        real = dataset_shards.write_shard
        patch.setattr(
            dataset_shards,
            "write_shard",
            lambda path, rows, **named: (
                real(path, rows, **named) if "2" not in path.name else kill()
            ),
        )

        def kill():
            raise Killed

        with pytest.raises(Killed):
            run(tokenizer, inputs, folder, **OPTIONS)
    old = TokenShards(folder)
    opened = old[old.find("a/1.png")]
    replace(
        copied / "a/1.png", copied / "a/0.png"
    )  # of the same size and time, in a finished shard
    replace(
        copied / "b/empty.png", copied / "a/0.png", keep_time=False
    )  # was bad, in the unfinished one
    os.utime(copied / "a/5.png", ns=(1, 1))  # touched, with the same content
    encoded = []
    open_session = tokenizer.open_session
    monkeypatch.setattr(
        tokenizer,
        "open_session",
        lambda source, options: encoded.append(source) or open_session(source, options),
    )
    with monkeypatch.context() as patch:
        patch.setattr(dataset_shards, "update_stamps", lambda *_: kill())
        patch.setattr(dataset_shards.Tally, "save", lambda *_: kill())
        with pytest.raises(Killed):  # nothing old is found in between
            run(tokenizer, inputs, folder, **OPTIONS)
    assert not (folder / "shard-00000.json").exists()
    assert "a/1.png" not in TokenShards([folder / "shard-00001.parquet"]).ids
    outcome = run(tokenizer, inputs, folder, **OPTIONS)
    assert "because 1 of 12 files have changed since: a/1.png" in caplog.text
    assert "b/empty.png has changed since it was tokenized" in caplog.text
    named = [source.name for source in encoded if not isinstance(source, np.ndarray)]
    assert sorted(named) == ["1.png", "empty.png"]
    assert outcome.summary["totals"]["bad_files"] == 1
    new = TokenShards(folder)
    assert new[new.find("a/1.png")] != opened
    assert same_tokens(new, "a/1.png", "a/0.png")
    fresh = tmp_path / "fresh"
    run(tokenizer, inputs, fresh, **OPTIONS)
    assert files(folder) == files(fresh)
    del encoded[:]
    run(tokenizer, inputs, folder, **OPTIONS)
    assert [source for source in encoded if not isinstance(source, np.ndarray)] == []


def test_a_file_that_changes_while_it_is_tokenized_is_read_again(
    tokenizer, copied, tmp_path, monkeypatch, caplog
):
    folder, real, left = tmp_path / "out", clip_files.content_digest, {"1.png": 1, "2.png": 99}

    def changed(path):
        if left.get(path.name, 0) > 0:
            left[path.name] -= 1
            os.utime(path, ns=(left[path.name], left[path.name]))
        return real(path)

    monkeypatch.setattr(clip_files, "content_digest", changed)
    inputs = {name: copied / name for name in ("a/1.png", "a/2.png", "a/3.png")}
    run(tokenizer, inputs, folder, **OPTIONS)
    assert caplog.text.count("a/1.png has changed while it was read; it is tokenized again") == 1
    assert list(TokenShards(folder).ids) == ["a/1.png", "a/3.png"]
    bad = json.loads((folder / "bad.jsonl").read_text())
    assert bad["id"] == "a/2.png" and "has changed 3 times while it was read" in bad["reason"]
    monkeypatch.undo()  # now that it is quiet
    run(tokenizer, inputs, folder, **OPTIONS)
    assert list(TokenShards(folder).ids) == list(inputs)


def test_a_folder_that_gained_files_gets_further_shards_for_them_alone(
    undisturbed, tokenizer, clips, copied, tmp_path
):
    folder = shutil.copytree(undisturbed[0], tmp_path / "out")
    inputs = list_inputs(clips, folder)
    # The plan of an earlier version knew names and sizes only, its shards no digests.
    plan = json.loads((folder / "plan.json").read_text()) | {"version": 1}
    plan["files"] = [entry[:2] for entry in plan["files"]]
    del plan["appended"]
    (folder / "plan.json").write_text(json.dumps(plan))
    for path in folder.glob("shard-*.json"):
        values = json.loads(path.read_text())
        del values["contents"]
        path.write_text(json.dumps(values))
    gained = {f"0/{n}.png": copied / f"a/{n}.png" for n in range(5)}  # first in the order of names
    before = files(folder)
    with pytest.raises(ValueError, match=r"5 files are new, such as '0/0\.png', which append=True"):
        run(tokenizer, inputs | gained, folder, **OPTIONS)
    assert files(folder) == before
    outcome = run(tokenizer, inputs | gained, folder, append=True, **OPTIONS)
    after = files(folder)
    assert all(after[name] == data for name, data in before.items() if name[:5] == "shard")
    assert outcome.summary["totals"]["files"] == 17 and outcome.summary["totals"]["clips"] == 15
    assert list(TokenShards(folder / "shard-00003.parquet").ids) == list(gained)[:4]
    assert list(TokenShards(folder / "shard-00004.parquet").ids) == list(gained)[4:]
    # The same command goes on, and an appended file is watched like any other.
    replace(gained["0/1.png"], gained["0/0.png"])
    run(tokenizer, inputs | gained, folder, **OPTIONS)
    shards = TokenShards(folder)
    assert same_tokens(shards, "0/1.png", "0/0.png")
    assert {name: data for name, data in files(folder).items() if name[6:11] <= "00002"} == {
        name: data for name, data in after.items() if name[6:11] <= "00002"
    }


# --- The script ------------------------------------------------------------------------------


def command(golden, clips, folder):
    return [
        f"--input_path={clips}", f"--output_folder={folder}", f"--load_checkpoint=params::{golden}/fsq/ckpt/params_scan_fp32",
        "--load_elastic_config=debug", f"--update_elastic_config={MODEL}", "--n_codes=12", "--fps=4", "--max_frames=5",
        "--files_per_shard=4",
    ]  # fmt: skip


def start(golden, clips, folder, process):
    share = ["--jax_distributed.num_processes=2", f"--jax_distributed.process_id={process}"]
    return subprocess.Popen(
        [sys.executable, ROOT / "scripts/tokenize_dataset.py", *command(golden, clips, folder), *share],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_two_processes_share_a_folder_and_one_that_is_killed_and_started_again_harms_none(
    golden, clips, tmp_path, undisturbed
):
    processes = [start(golden, clips, tmp_path, process) for process in range(2)]
    while not list(tmp_path.glob(".unfinished/shard-00000/*.npz")) and processes[0].poll() is None:
        time.sleep(0.02)
    processes[0].send_signal(signal.SIGKILL)
    processes[0].communicate()
    processes[0] = start(golden, clips, tmp_path, 0)
    ends = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ends
    assert any("bad files  2, listed in bad.jsonl" in out for out, _ in ends)
    done, expected = TokenShards(tmp_path), TokenShards(undisturbed[0])
    assert done.ids == expected.ids
    for ours, theirs in zip(done, expected, strict=True):
        assert (
            ours.counts.tolist() == theirs.counts.tolist() and ours.num_frames == theirs.num_frames
        )


def test_sigterm_leaves_with_143_and_says_how_to_go_on(golden, clips, tmp_path):
    process = start(golden, clips, tmp_path, 0)
    while not list(tmp_path.glob(".unfinished/shard-00000/*.npz")) and process.poll() is None:
        time.sleep(0.02)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143 and "the same command goes on from here" in errors


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--n_codes=0"], "Give --threshold=ERROR"),
        (["--files_per_shard=0"], "--files_per_shard=0 must be at least 1"),
        (["--input_path=nowhere"], "There is no file 'nowhere'"),
        (
            ["--jax_distributed.num_processes=2", "--jax_distributed.process_id=2"],
            "must lie in 0 to 1",
        ),
        (["--jax_distributed.coordinator_address=a:1"], "only share work need num_processes"),
        (["--push=mine"], "--push='mine' must be 'owner/name'"),
        (["--ray_actors=2"], "--ray_actors=2 is for --engine=ray"),
        (["--resolution=64"], "resolution=64, but the frames of this model have 32 rows"),
    ],
)
def test_flags_that_cannot_be_served_are_refused(golden, clips, tmp_path, capsys, flags, message):
    out = tmp_path / "out"
    assert app.run(script.DATASET, script.tokenize, [*command(golden, clips, out), *flags]) == 1
    assert message in capsys.readouterr().err and not out.exists()


def test_without_ray_its_engine_is_refused_with_the_way_out(
    golden, clips, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    arguments = [*command(golden, clips, tmp_path / "out"), "--engine=ray"]
    assert app.run(script.DATASET, script.tokenize, arguments) == 1
    assert "pip install 'elastictok[ray]'" in capsys.readouterr().err


def test_a_plan_of_an_older_run_is_gone_on_with(tmp_path):
    """Older plans have a model's absolute path, and no options for reading that change nothing by default."""
    about = dict(parts=({"a.png": FileStamp(9)},), files_per_shard=1)
    options = EncodeOptions(num_tokens=8, search_tolerance=0.012).to_json()
    now = DatasetPlan(model={"model_id": "fsq"}, options=options, **about)
    older = {name: value for name, value in options.items() if name not in _LATER_OPTIONS}
    before = DatasetPlan(model={"model_id": "/home/me/fsq"}, options=older, **about)
    (tmp_path / "plan.json").write_bytes(before.to_json())
    checks = dict(append=False, reopen=lambda *_: set())
    assert write_or_check(tmp_path, now, **checks).model == now.model
    exact = dataclasses.replace(now, options=options | {"exact_color": True})
    with pytest.raises(ValueError, match=r"exact_color=True \(then False\)"):
        write_or_check(tmp_path, exact, **checks)


def test_a_pipe_is_a_bad_file_and_is_not_waited_for(tokenizer, clips, tmp_path):
    (tmp_path / "in").mkdir()
    os.mkfifo(tmp_path / "in/a.mp4")
    shutil.copy(clips / "a/1.png", tmp_path / "in/b.png")
    inputs = list_inputs(tmp_path / "in", tmp_path / "out")
    run(tokenizer, inputs, tmp_path / "out", **OPTIONS)
    line = json.loads((tmp_path / "out/bad.jsonl").read_text())
    assert line["id"] == "a.mp4" and "a pipe or a device" in line["reason"]
    assert list(TokenShards(tmp_path / "out").ids) == ["b.png"]
    pipe = tmp_path / "in/a.mp4"
    assert list_inputs(pipe, tmp_path / "out") == {"a.mp4": pipe}


def test_a_data_set_without_one_good_file_is_an_error(golden, clips, tmp_path, capsys):
    arguments = [*command(golden, clips / "b/empty.png", tmp_path / "out")]
    assert app.run(script.DATASET, script.tokenize, arguments) == 1
    assert "None of the 1 files could be read" in capsys.readouterr().err
    assert (tmp_path / "out/summary.json").exists()

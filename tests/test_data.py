"""Batches from files: a function of the seed and the number, each file apart, bad ones named once."""

import contextlib
import json
import logging
import os
import pathlib
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
from PIL import Image

from elastic import data_index, data_workers, media
from elastic.config import ElasticTokConfig
from elastic.data import DataConfig, DataPosition, TrainingData, load_index, sequence_length
from elastic.data_plan import num_lanes
from elastic.patches import pad_block, unpatchify

ROOT = pathlib.Path(__file__).resolve().parents[1]
MODEL = ElasticTokConfig(
    hidden_size=16, intermediate_size=16, num_encoder_layers=1, num_decoder_layers=1, num_attention_heads=1,
    frames_per_block=2, patch_size=(2, 8, 8), min_toks=2, max_toks=16, max_sequence_length=48,
)  # fmt: skip
SIZE = 3  # blocks of a sequence


def write_clip(path, colour, num_frames):
    """Frame i is flat, of level `colour` + 2 i, so that a frame tells its file and its place."""
    frames = [np.full((40, 40, 3), colour + 2 * i, np.uint8) for i in range(num_frames)]
    media.write_video(path, frames, 24)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Clips of 1 to 9 blocks and images, in nested folders; the level tells which file it is."""
    folder = tmp_path_factory.mktemp("clips")
    (folder / "deep" / "er").mkdir(parents=True)
    for k, num_frames in enumerate((2, 5, 9, 18)):
        write_clip(folder / ("deep" if k % 2 else ".") / f"clip{k}.mp4", 20 + 50 * k, num_frames)
    for k in range(3):
        picture = np.full((64, 48, 3), 40 + 50 * k, np.uint8)
        media.write_image(folder / "deep" / "er" / f"image{k}.png", picture)
    (folder / "notes.txt").write_text("not media")
    return folder


def open_data(folder, **options):
    config = DataConfig(path=str(folder), **(dict(workers=0) | options))
    return TrainingData(config, MODEL, index=load_index(config, MODEL))


def frames_of(row, block):
    """The frames of one block of a row of `Sequences`."""
    patches = row.patches.reshape(SIZE, MODEL.tokens_per_block, -1)[block]
    return unpatchify(patches, MODEL.patch_size, 32, 32)


def take(data, first, last, rows=None):
    with contextlib.closing(data.batches(first, last, rows)) as batches:
        return list(batches)


def assert_equal(found, expected):
    for name in expected._fields:
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), name)


# What a batch is


def test_an_epoch_shows_every_block_once_as_inference_sees_it(clips):
    data = open_data(clips)
    expected = []
    for file in data.index.files:
        with media.open_clip(clips / file.name, resolution=32, rate=24) as clip:
            expected += [pad_block(block, 2) for block in clip.blocks(2)]
    for epoch in range(2):
        rows = [data.sequence(epoch * data.num_sequences + n) for n in range(data.num_sequences)]
        shown = [frames_of(row, n) for row in rows for n in range(SIZE) if row.filled[0, n]]
        assert len(shown) == len(expected) == data.blocks_per_epoch == 1 + 3 + 5 + 9 + 3
        ordered = [sorted(block.tobytes() for block in blocks) for blocks in (shown, expected)]
        assert ordered[0] == ordered[1]
    assert data.frames_per_epoch == 2 + 5 + 9 + 18 + 3 * 2
    assert data.fill == pytest.approx(21 / (SIZE * data.num_sequences))


def test_pieces_of_different_files_are_told_apart_and_start_at_position_zero(clips):
    data = open_data(clips)
    for n in range(data.num_sequences):
        row = data.sequence(n)
        ids, index = row.segment_ids[0], row.block_index[0]
        assert (np.diff(ids) >= 0).all()
        for segment in np.unique(ids):
            mine = ids == segment
            assert index[mine].tolist() == list(range(mine.sum()))
            if not row.filled[0][mine].all():
                assert mine.sum() == 1 and not row.patches.reshape(SIZE, -1)[mine].any()  # padding
                continue
            levels = np.concatenate(
                [frames_of(row, b).mean((1, 2, 3)) for b in np.flatnonzero(mine)]
            )
            assert (np.diff(levels) >= -1).all() and np.ptp(levels) < 40  # one file, in order


def test_a_batch_is_a_function_of_seed_and_number_whoever_prepares_it(clips):
    straight = take(open_data(clips, batch_size=3), 0, 6)
    for workers, rows in ((2, [0, 1, 2]), (2, [2])):
        data = open_data(clips, batch_size=3, workers=workers)
        resumed = take(data, 2, 6, rows)
        assert len(resumed) == 4 and data.wait_seconds > 0
        for batch, expected in zip(resumed, straight[2:], strict=True):
            assert_equal(batch, type(batch)(*(x[rows] for x in expected)))
    lone = open_data(clips, batch_size=3)
    assert_equal(lone.sequence(7), type(straight[0])(*(x[1:2] for x in straight[2])))
    other = take(open_data(clips, batch_size=3, seed=1), 0, 6)
    assert any((a.patches != b.patches).any() for a, b in zip(other, straight, strict=True))


def test_the_rows_of_hosts_are_disjoint_and_complete(clips):
    whole = take(open_data(clips, batch_size=4), 0, 5)
    hosts = [take(open_data(clips, batch_size=4), 0, 5, rows) for rows in ([0, 2], [1, 3])]
    for t, batch in enumerate(whole):
        for name in batch._fields:
            parts = [getattr(host[t], name) for host in hosts]
            woven = np.stack(parts, axis=1).reshape(getattr(batch, name).shape)
            np.testing.assert_array_equal(woven, getattr(batch, name))
    with pytest.raises(ValueError, match=r"rows=\[4\] must be rows of a batch of 4"):
        open_data(clips, batch_size=4).batches(0, 1, [4])


def test_memory_for_decoded_frames_changes_nothing_but_time(clips):
    for options in (dict(), dict(random_crop=True, image_blocks=2)):
        roomy, tight = open_data(clips, **options), open_data(clips, cache_gigabytes=0.0, **options)
        for n in range(2 * roomy.num_sequences):
            assert_equal(tight.sequence(n), roomy.sequence(n))
        assert len(tight._reader._spans._held) == 1


def test_max_frames_uses_the_first_ones(clips):
    data = open_data(clips, max_frames=4)
    assert data.blocks_per_epoch == 1 + 2 + 2 + 2 + 3
    assert data.frames_per_epoch == 2 + 4 + 4 + 4 + 3 * 2


def test_crops_are_drawn_anew_in_each_epoch_and_hold_for_a_piece(tmp_path):
    columns = np.linspace(0, 255, 64).astype(np.uint8)
    ramp = np.broadcast_to(columns[None, :, None], (64, 64, 3))
    media.write_video(tmp_path / "a.mp4", [ramp] * 6, 24)
    still, drawn = open_data(tmp_path), open_data(tmp_path, random_crop=True)
    assert (still.sequence(0).patches == still.sequence(1).patches).all()
    shown = [np.concatenate([frames_of(drawn.sequence(n), b) for b in range(3)]) for n in range(12)]
    for frames in shown:
        np.testing.assert_array_equal(frames, np.broadcast_to(frames[:1], frames.shape))
    assert len({frames.tobytes() for frames in shown}) == 12
    risings = [bool(frames[0, 0, -1, 0] > frames[0, 0, 0, 0]) for frames in shown]
    assert set(risings) == {True, False}  # mirrored or not


def test_an_image_is_one_still_block_or_as_many_with_a_moving_crop_as_asked_for(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    media.write_image(tmp_path / "a.png", picture)
    row = open_data(tmp_path).sequence(0)
    assert row.filled.tolist() == [[True, False, False]]
    assert (frames_of(row, 0)[0] == frames_of(row, 0)[1]).all()
    data = open_data(tmp_path, image_blocks=3)
    rows = [data.sequence(n) for n in range(8)]
    assert all(row.filled.all() and row.block_index.tolist() == [[0, 1, 2]] for row in rows)
    moved = [bool((frames_of(row, 0)[0] != frames_of(row, 2)[1]).any()) for row in rows]
    assert any(moved)


def test_sampled_patches_are_those_of_the_files_and_always_the_same(clips):
    data = open_data(clips)
    patches = data.sample_patches(500)
    assert len(patches) >= 500 and patches.dtype == np.uint8
    np.testing.assert_array_equal(patches, open_data(clips).sample_patches(500))
    every = {
        patch.tobytes() for n in range(data.num_sequences) for patch in data.sequence(n).patches[0]
    }
    assert {patch.tobytes() for patch in patches} <= every


@pytest.mark.parametrize("num_rows", [1, 2, 5])
@pytest.mark.parametrize("num_workers", [1, 2, 3, 8])
def test_workers_share_the_rows_or_take_turns_with_them(num_rows, num_workers):
    groups, turns = data_workers._share(num_rows, num_workers, batch_size=5)
    assert [row for group in groups for row in group] == list(range(num_rows))
    assert len(groups) * turns <= num_workers < 2 * (len(groups) * turns) + num_rows
    assert (num_lanes(5) // 5) % turns == 0  # then a worker keeps to its own lanes


def test_what_is_prepared_ahead_fits_into_shared_memory(monkeypatch, caplog):
    for free, expected in ((10**9, (4, False)), (700, (1, False)), (300, (1, True))):
        usage = types.SimpleNamespace(free=free)
        monkeypatch.setattr(data_workers.shutil, "disk_usage", lambda _, usage=usage: usage)
        assert data_workers._fit(4, 100) == expected
    assert caplog.text.count("--shm-size") == 2


# Positions


def test_a_position_is_exact_for_the_same_data_and_near_for_another(clips, tmp_path, caplog):
    data = open_data(clips, batch_size=2)
    data.position(5).after(2).save(tmp_path / "position.json")
    position = DataPosition.load(tmp_path / "position.json")
    assert position == data.position(7)
    assert DataPosition.from_json(json.loads(json.dumps(position.to_json()))) == position
    same = open_data(clips, batch_size=2, workers=3, max_prefetch=9, cache_gigabytes=1)
    assert position.for_data(same) == position and caplog.text == ""
    for options, why in (
        (dict(batch_size=4), "the batch size was 2 and is 4"),
        (dict(seed=5), "the seed was 0 and is 5"),
        (dict(max_frames=4), "options that cut them"),
        (dict(ext="mp4"), "files were added, removed or changed"),
    ):
        caplog.clear()
        changed = open_data(clips, **(dict(batch_size=2) | options))
        found = position.for_data(changed)
        assert why in caplog.text
        assert changed.position(found.batches) == found
        assert abs(changed.epoch_of(found.batches) - data.epoch_of(7)) < 0.8
    for text in ("{}", "[]", "not JSON", json.dumps(position.to_json() | {"batches": "x"})):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=r"bad\.json' is no saved position"):
            DataPosition.load(tmp_path / "bad.json")


# The index


def test_only_what_is_new_or_changed_is_measured_again(clips, tmp_path, monkeypatch, caplog):
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("clip0.mp4", "clip2.mp4"):
        (folder / name).write_bytes((clips / name).read_bytes())
    (folder / "text.mp4").write_text("not a film")
    opened = []

    def counting(path, original=media.open_clip, **options):
        opened.append(path.name)
        return original(path, **options)

    monkeypatch.setattr(data_index.media, "open_clip", counting)
    config, path = DataConfig(path=str(folder)), tmp_path / "index.json"
    first = load_index(config, MODEL, path=path)
    assert sorted(opened) == ["clip0.mp4", "clip2.mp4", "text.mp4"]
    assert [(file.name, file.num_frames) for file in first.files] == [
        ("clip0.mp4", 2),
        ("clip2.mp4", 9),
    ]
    assert caplog.text.count("text.mp4") == 1

    opened.clear()
    assert load_index(config, MODEL, path=path) == first and opened == []
    (folder / "new é 'x'.mp4").write_bytes((clips / "clip0.mp4").read_bytes())
    (folder / "text.mp4").write_bytes((clips / "clip0.mp4").read_bytes())
    (folder / "clip2.mp4").unlink()
    second = load_index(config, MODEL, path=path)
    assert sorted(opened) == ["new é 'x'.mp4", "text.mp4"]
    assert [file.name for file in second.files] == ["clip0.mp4", "new é 'x'.mp4", "text.mp4"]
    assert not second.bad and second.digest != first.digest

    path.write_text("damaged")
    assert load_index(config, MODEL, path=path) == second
    assert "is no index of files" in caplog.text


def test_a_folder_without_usable_files_is_an_error_at_once(tmp_path):
    with pytest.raises(ValueError, match="There is no image or video in"):
        open_data(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        open_data(tmp_path / "nowhere")
    (tmp_path / "a.mp4").write_text("not a film")
    with pytest.raises(ValueError, match="None of the 1 files in"):
        open_data(tmp_path)
    with pytest.raises(ValueError, match=r"no file that ends in \.avi in"):
        open_data(tmp_path, ext="avi")


def test_the_endings_choose_the_files(clips):
    names = [file.name for file in open_data(clips, ext=".PNG, webp").index.files]
    assert names == [f"deep/er/image{k}.png" for k in range(3)]


def test_a_bucket_is_read_like_a_folder(clips):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(clips), "/bucket", recursive=True)
    local = open_data(clips)
    for url in ("memory://bucket", f"file://{clips}"):
        remote = open_data(url)
        assert remote.index.digest == local.index.digest
        for n in range(local.num_sequences):
            assert_equal(remote.sequence(n), local.sequence(n))
    with pytest.raises(ValueError, match="There is no image or video in 'memory://empty'"):
        open_data("memory://empty")
    with pytest.raises(ValueError, match=r"(?i)install gcsfs"):
        open_data("gs://bucket/folder")
    with pytest.raises(ValueError, match="starts with 'nothing'"):
        open_data("nothing://bucket/folder")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(seq_length=20), "seq_length=20 is not a whole number of blocks of 16 tokens; use 16"),
        (dict(batch_size=0), "batch_size=0 must be 1 or more"),
        (dict(chunk_size=0), "chunk_size=0 must be 1 or more"),
        (dict(seed=-1), "seed=-1 must be 0 or more"),
        (dict(workers=-1), "workers=-1 must be 0 or more"),
        (dict(fps=0.0), "fps=0.0 must be above 0"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sequence_length(DataConfig(path="x", **options), MODEL)


# Bad files, and how it all ends

PROGRAM = """
import contextlib, logging, os, sys, time
from elastic.config import ElasticTokConfig
from elastic.data import DataConfig, TrainingData, load_index


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


def damaged_clip(path):
    """Measured as whole, as its packets are all there, but its second half cannot be decoded."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 40, 3)).astype(np.uint8)
    media.write_video(path, list(noise), 24)
    data = bytearray(path.read_bytes())
    data[-len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    path.write_bytes(data)


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


def test_a_damaged_file_gives_its_good_blocks_whatever_was_read_before(tmp_path, caplog):
    damaged_clip(tmp_path / "damaged.mp4")
    write_clip(tmp_path / "good.mp4", 100, 6)
    first, again = open_data(tmp_path), open_data(tmp_path, cache_gigabytes=0.0)
    numbers = range(2 * first.num_sequences)
    rows = {n: first.sequence(n) for n in numbers}
    for n in reversed(numbers):
        assert_equal(again.sequence(n), rows[n])
    filled = sum(int(row.filled.sum()) for row in rows.values()) // 2
    assert 3 < filled < first.blocks_per_epoch
    for row in rows.values():  # no good block stands behind a missing one of its piece
        for segment in np.unique(row.segment_ids):
            mine = row.filled[row.segment_ids == segment]
            assert (np.diff(mine.astype(int)) <= 0).all()
    warned = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(warned) == 2 and list(first.bad_files) == [str(tmp_path / "damaged.mp4")]


def test_files_that_vanish_are_named_and_an_epoch_without_any_is_an_error(clips, tmp_path, caplog):
    for name in ("clip0.mp4", "clip2.mp4"):
        (tmp_path / name).write_bytes((clips / name).read_bytes())
    data = open_data(tmp_path)
    (tmp_path / "clip0.mp4").unlink()
    assert sum(int(batch.filled.sum()) for batch in take(data, 0, 10)) > 0
    (tmp_path / "clip2.mp4").unlink()
    data = TrainingData(data.data, MODEL, index=data.index)
    with pytest.raises(ValueError, match="Not one block of the last"):
        take(data, 0, 100)
    assert len(data.bad_files) == 2 and caplog.text.count("clip2.mp4") == 1
    with pytest.raises(ValueError, match=r"Nothing in .* can be decoded"):
        data.sample_patches(10)


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
        assert "RuntimeError: A process that decodes training data died" in run.log()
        assert "exit code -9" in run.log()
        run.assert_nobody_is_left()


def test_ctrl_c_is_the_parents_and_its_workers_end_silently(clips, tmp_path):
    with Run(tmp_path, clips, last=10**6, wait=60) as run:
        run.wait_for_first()
        os.killpg(run.process.pid, signal.SIGINT)
        code, _ = run.end()
        assert code != 0
        assert run.log().count("Traceback") == 1 and "KeyboardInterrupt" in run.log(), run.log()
        run.assert_nobody_is_left()

"""Batches from files: a function of the seed and the number, each file apart, bad ones named once."""

import contextlib
import json
import logging
import os
import pathlib
import shutil

import numpy as np
import pytest
from level_clips import damaged_clip, make_folder, write_clip

from elastic import media
from elastic.config import ElasticTokConfig
from elastic.data import file_index
from elastic.data.config import DataConfig
from elastic.data.dataset import DataPosition, TrainingData, load_index
from elastic.data.packing import sequence_length
from elastic.patches import pad_block, unpatchify

ROOT = pathlib.Path(__file__).resolve().parents[2]
MODEL = ElasticTokConfig(
    hidden_size=16, intermediate_size=16, num_encoder_layers=1, num_decoder_layers=1, num_attention_heads=1,
    frames_per_block=2, patch_size=(2, 8, 8), min_toks=2, max_toks=16, max_sequence_length=48,
)  # fmt: skip
SIZE = 3  # blocks of a sequence


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("clips"))


def open_data(folder, **options):
    config = DataConfig(path=str(folder), **(dict(workers=0) | options))
    return TrainingData(config, MODEL, index=load_index(config, MODEL))


def frames_of(row, block):
    """The frames of one block of a row of `HostBatch`."""
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
        large, small = open_data(clips, **options), open_data(clips, cache_gigabytes=0.0, **options)
        for n in range(2 * large.num_sequences):
            assert_equal(small.sequence(n), large.sequence(n))
        assert len(small._reader._spans) == 1


def test_kept_frames_change_nothing_and_spare_decoding(clips, tmp_path, monkeypatch):
    """Also not where a kept file was cut short, or the clip has changed since."""
    folder = tmp_path / "clips"
    shutil.copytree(clips, folder)
    options = dict(cache_path=str(tmp_path / "kept"), random_crop=True, image_blocks=2)
    plain = open_data(folder, random_crop=True, image_blocks=2)
    expected = [plain.sequence(n) for n in range(plain.num_sequences)]
    opened = []
    open_clip = media.open_clip

    def decoded_by_a_new_reader():
        data = open_data(folder, **options)
        opened.clear()  # measuring the files is another matter
        for n, row in enumerate(expected):
            assert_equal(data.sequence(n), row)
        return sorted(pathlib.Path(place).name for place in opened)

    names = sorted(pathlib.Path(file.name).name for file in plain.index.files)
    monkeypatch.setattr(
        media, "open_clip", lambda *a, **k: opened.append(a[0]) or open_clip(*a, **k)
    )
    assert decoded_by_a_new_reader() == names
    assert decoded_by_a_new_reader() == []
    files = list((tmp_path / "kept").rglob("*.npy"))
    kept_bytes = sum(np.load(path).nbytes for path in files)
    assert kept_bytes == open_data(folder, **options)._reader.decoded_bytes()
    for kept in files:
        kept.write_bytes(kept.read_bytes()[:-1])
    assert decoded_by_a_new_reader() == names
    os.utime(folder / "clip0.mp4", (1, 1))
    assert decoded_by_a_new_reader() == ["clip0.mp4"]


def test_frames_that_cannot_be_kept_are_an_error_that_says_where(clips, tmp_path):
    (tmp_path / "file").touch()
    data = open_data(clips, cache_path=str(tmp_path / "file"))
    with pytest.raises(
        ValueError, match=r"cache_path='.*file' cannot take decoded frames: .*leave it out"
    ):
        data.sequence(0)


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


@pytest.mark.parametrize("fit", ["pad", "stretch"])
def test_whole_frames_are_shown_as_tokenizing_shows_them(tmp_path, fit):
    picture = np.random.default_rng(0).integers(0, 256, (48, 80, 3)).astype(np.uint8)
    media.write_image(tmp_path / "a.png", picture)
    shown = frames_of(open_data(tmp_path, fit=fit).sequence(0), 0)[0]
    with media.open_clip(tmp_path / "a.png", resolution=32, fit=fit) as clip:
        frame = clip.read()[0]
        expected = clip.layout.cut(frame[None], 0)[0] if fit == "pad" else None
    if expected is None:
        expected = media.scale_frame(frame, (32, 32))
    np.testing.assert_array_equal(shown, expected)


def test_tiles_are_cut_from_the_whole_frame_at_its_own_size_and_at_other_scales(tmp_path):
    """A video of 96x64 whose pixels tell their place; nothing but `random_crop` mirrors them."""
    rows, columns = np.mgrid[:64, :96]
    picture = np.stack([rows * 3, columns * 2, 0 * rows], axis=-1).astype(np.uint8)
    media.write_image(tmp_path / "a.png", picture)
    options = dict(fit="tile", cache_path=str(tmp_path / "kept"))
    data = open_data(tmp_path, **options)
    shown = [frames_of(data.sequence(n), 0)[0].astype(int) for n in range(40)]
    exact = [
        tile
        for tile in shown
        if (tile[0, 1, 1] - tile[0, 0, 1]) == 2
        and (tile == picture[tile[0, 0, 0] // 3 :, tile[0, 0, 1] // 2 :][:32, :32]).all()
    ]
    assert 10 <= len(exact) <= 30
    assert max(tile[0, 0, 1] for tile in exact) > 2 * 40  # the right part of the frame, too
    heights = [np.ptp(tile[:, 0, 0]) for tile in shown]
    assert max(heights) > 3 * 50  # nearly the whole height
    assert all(tile[0, -1, 1] > tile[0, 0, 1] for tile in shown)
    again = open_data(tmp_path, **options).sequence(3)
    assert_equal(again, data.sequence(3))


def test_tiles_are_cut_from_frames_that_are_no_larger_than_asked_for(tmp_path):
    """An image of 64 x 96 at half its size has the size of a tile in one direction: nothing moves along it."""
    rows, columns = np.mgrid[:64, :96]
    picture = np.stack([rows * 3, columns * 2, 0 * rows], axis=-1).astype(np.uint8)
    media.write_image(tmp_path / "a.png", picture)
    data = open_data(tmp_path, fit="tile", short_side=32)
    tiles = [frames_of(data.sequence(n), 0)[0].astype(int) for n in range(20)]
    assert all(np.ptp(tile[:, 0, 0]) > 3 * 55 and np.ptp(tile[0, :, 1]) > 2 * 55 for tile in tiles)
    with pytest.raises(ValueError, match="short_side=16 is less than the model's frame of 32"):
        open_data(tmp_path, fit="tile", short_side=16)
    with pytest.raises(ValueError, match="short_side=64 is for tiles: add fit=tile"):
        open_data(tmp_path, short_side=64)


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

    monkeypatch.setattr(file_index.media, "open_clip", counting)
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

    path.write_text("somebody's notes")
    with pytest.raises(ValueError, match="is no index of files"):
        load_index(config, MODEL, path=path)
    assert path.read_text() == "somebody's notes"


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


# Bad files


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


def test_files_of_high_dynamic_range_are_counted_in_one_line(golden, tmp_path, caplog):
    for name in ("a.mp4", "b.mp4"):
        shutil.copy(golden / "inputs" / "pq_grey.mp4", tmp_path / name)
    shutil.copy(golden / "media" / "clip_160x120_30fps_97f.mp4", tmp_path / "c.mp4")
    for _ in range(2):  # anew, and from an index that knows the files
        file_index.load_or_build(str(tmp_path), fps=24, path=tmp_path / "index.json")
        (line,) = [r.getMessage() for r in caplog.records if "high dynamic range" in r.getMessage()]
        assert line.endswith("2 of 3, such as a.mp4.")
        caplog.clear()


def test_exact_colours_reach_the_blocks_and_decoded_frames_on_disk_are_told_apart(golden, tmp_path):
    (tmp_path / "in").mkdir()
    path = shutil.copy(golden / "media" / "clip_160x120_30fps_97f.mp4", tmp_path / "in")
    seen = []
    for exact in (False, True, False):
        options = dict(max_frames=2, exact_color=exact, cache_path=str(tmp_path / "cache"))
        row = open_data(tmp_path / "in", **options).sequence(0)
        with media.open_clip(path, resolution=32, max_frames=2, exact_color=exact) as clip:
            np.testing.assert_array_equal(frames_of(row, 0), clip.read())
        seen.append(frames_of(row, 0))
    assert (seen[0] != seen[1]).any() and (seen[0] == seen[2]).all()

"""Batches from files: always the same, whole blocks of one file, bad files left out."""

import contextlib
import threading

import numpy as np
import pytest

from elastic import media
from elastic.config import ElasticTokConfig
from elastic.data import ClipSampler, DataConfig
from elastic.patches import unpatchify

MODEL = ElasticTokConfig(
    hidden_size=16, intermediate_size=16, num_encoder_layers=1, num_decoder_layers=1, num_attention_heads=1,
    frames_per_block=2, patch_size=(2, 8, 8), min_toks=2, max_toks=16, max_sequence_length=48,
)  # fmt: skip


def write_clip(path, colour, num_frames=9):
    frames = np.full((num_frames, 40, 40, 3), colour, np.uint8)
    media.write_video(path, list(frames), 24)


@pytest.fixture
def folder(tmp_path):
    """Two clips, an image in a folder inside, a file that is none, and one of another kind."""
    write_clip(tmp_path / "dark.mp4", 20)
    write_clip(tmp_path / "bright.mp4", 200)
    (tmp_path / "more").mkdir()
    media.write_image(tmp_path / "more" / "grey.png", np.full((64, 48, 3), 120, np.uint8))
    (tmp_path / "broken.mp4").write_bytes(b"\x00" * 100)
    (tmp_path / "notes.txt").write_text("not media")
    return tmp_path


def test_a_batch_is_a_function_of_the_seed_and_the_step(folder):
    first = ClipSampler(DataConfig(path=str(folder), seed=3), MODEL)
    again = ClipSampler(DataConfig(path=str(folder), seed=3), MODEL)
    batches = [first.batch(step) for step in range(4)]
    for step in (2, 0):  # in any order, from any start
        np.testing.assert_array_equal(again.batch(step), batches[step])
    with contextlib.closing(again.batches(1)) as running:
        for step in (1, 2, 3):
            np.testing.assert_array_equal(next(running), batches[step])
    other = ClipSampler(DataConfig(path=str(folder), seed=4), MODEL)
    assert any(not np.array_equal(other.batch(step), batches[step]) for step in range(4))


def test_a_sequence_is_whole_blocks_of_one_file(folder):
    sampler = ClipSampler(DataConfig(path=str(folder), batch_size=3), MODEL)
    seen = set()
    for step in range(6):
        batch = sampler.batch(step)
        assert batch.shape == (3, 48, MODEL.patch_dim) and batch.dtype == np.uint8
        for sequence in batch:
            frames = unpatchify(sequence.reshape(3, 16, -1), MODEL.patch_size, 32, 32)
            assert np.ptp(frames.astype(int)) <= 6  # one colour: one file
            seen.add(round(float(frames.mean()) / 10))
    assert seen == {2, 12, 20}


def test_a_file_that_cannot_be_read_is_named_counted_and_replaced(folder, caplog):
    sampler = ClipSampler(DataConfig(path=str(folder), image_share=0.0), MODEL)
    for step in range(6):
        sampler.batch(step)
    assert sampler.num_bad == 1
    assert [record.getMessage() for record in caplog.records].count("") == 0
    named = [
        record.getMessage() for record in caplog.records if "broken.mp4" in record.getMessage()
    ]
    assert len(named) == 1


def test_files_dropped_from_memory_give_the_same_batches(folder):
    roomy = ClipSampler(DataConfig(path=str(folder), batch_size=4), MODEL)
    tight = ClipSampler(DataConfig(path=str(folder), batch_size=4, cache_gigabytes=0.0), MODEL)
    for step in range(3):
        np.testing.assert_array_equal(tight.batch(step), roomy.batch(step))
    assert tight.num_bad == roomy.num_bad <= 1
    held = [frames for frames in tight._frames.values() if frames is not None]
    assert len(held) == 1


def test_the_endings_choose_the_files(folder):
    sampler = ClipSampler(DataConfig(path=str(folder), ext=".PNG, webp"), MODEL)
    assert not sampler.videos and [file.name for file in sampler.images] == ["grey.png"]
    with pytest.raises(ValueError, match=r"no file that ends in \.avi in"):
        ClipSampler(DataConfig(path=str(folder), ext="avi"), MODEL)


def test_a_folder_without_files_is_an_error_at_once(tmp_path):
    with pytest.raises(ValueError, match="There is no image or video in"):
        ClipSampler(DataConfig(path=str(tmp_path)), MODEL)
    with pytest.raises(ValueError, match="is not a folder"):
        ClipSampler(DataConfig(path=str(tmp_path / "nowhere")), MODEL)


def test_only_bad_files_end_the_iteration_with_an_error_and_leave_no_thread(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_text("not a film")
    sampler = ClipSampler(DataConfig(path=str(tmp_path)), MODEL)
    with (
        pytest.raises(ValueError, match="None of the 2 files"),
        contextlib.closing(sampler.batches(0)) as running,
    ):
        next(running)
    for thread in threading.enumerate():
        if thread.name.startswith("data"):
            thread.join(timeout=10)
            assert not thread.is_alive()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(seq_length=20), "seq_length=20 is not a whole number of blocks of 16 tokens; use 16"),
        (dict(batch_size=0), "batch_size=0 must be 1 or more"),
        (dict(seed=-1), "seed=-1 must be 0 or more"),
        (dict(fps=0.0), "fps=0.0 must be above 0"),
        (dict(image_share=1.5), "image_share=1.5 must lie in 0 to 1"),
    ],
)
def test_options_out_of_range_are_refused(folder, options, message):
    with pytest.raises(ValueError, match=message):
        ClipSampler(DataConfig(path=str(folder), **options), MODEL)

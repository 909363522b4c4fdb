"""Pixels <-> patches."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic import patches

SIZES = st.tuples(*[st.integers(1, 3)] * 3)


@given(patch_size=SIZES, grid=SIZES, leading=st.lists(st.integers(1, 2), max_size=2))
def test_patches_and_back_is_the_same_video(patch_size, grid, leading):
    frames, rows, columns = (p * g for p, g in zip(patch_size, grid, strict=True))
    shape = (*leading, frames, rows, columns, 3)
    video = np.arange(np.prod(shape)).reshape(shape)
    cut = patches.patchify(video, patch_size)
    assert cut.shape == (*leading, np.prod(grid), np.prod(patch_size) * 3)
    assert (patches.unpatchify(cut, patch_size, rows, columns) == video).all()


def test_tokens_run_over_time_rows_columns_and_a_patch_likewise():
    (pt, ph, pw), (t, h, w) = (2, 2, 3), (2, 2, 2)
    video = np.random.default_rng(0).integers(0, 256, (t * pt, h * ph, w * pw, 3), np.uint8)
    cut = patches.patchify(video, (pt, ph, pw))
    for i, j, k in itertools.product(range(t), range(h), range(w)):
        piece = video[i * pt :, j * ph :, k * pw :][:pt, :ph, :pw]
        assert (cut[(i * h + j) * w + k] == piece.ravel()).all()


def test_both_released_patchings_of_a_clip_hold_the_same_frames(golden):
    with np.load(golden / "unit" / "data_path.npz") as file:
        two_frames = patches.unpatchify(file["fsq/fps4/blocks"], (1, 8, 8), 32, 32)
        four_frames = patches.unpatchify(file["vae/fps4/blocks"], (2, 8, 8), 32, 32)
    two_frames, four_frames = (x.reshape(-1, 32, 32, 3) for x in (two_frames, four_frames))
    assert len(four_frames) > 0
    assert (two_frames[: len(four_frames)] == four_frames).all()


def test_a_partial_block_repeats_its_last_frame():
    frames = np.arange(3 * 2 * 2 * 3, dtype=np.uint8).reshape(3, 2, 2, 3)
    full = patches.pad_block(frames, 5)
    assert (full[:3] == frames).all() and (full[3:] == frames[2]).all() and len(full) == 5
    assert (patches.pad_block(frames, 3) == frames).all()


@pytest.mark.parametrize("num_frames", [0, 5])
def test_a_block_takes_no_other_number_of_frames(num_frames):
    with pytest.raises(ValueError, match=f"A block takes 1 to 4 frames, not {num_frames}"):
        patches.pad_block(np.zeros((num_frames, 2, 2, 3), np.uint8), 4)


def test_every_pixel_value_survives_the_way_to_the_model_and_back():
    pixels = np.arange(256, dtype=np.uint8)
    unit = patches.to_unit_range(pixels)
    assert unit.dtype == jnp.float32 and float(unit[0]) == -1 and float(unit[-1]) == 1
    assert (patches.to_uint8(unit) == pixels).all()


def test_pixels_are_rounded_and_clipped():
    x = np.array([-1.5, -1, 0.0, 0.999, 1.5], np.float32)
    assert patches.to_uint8(x).tolist() == [0, 0, 128, 255, 255]

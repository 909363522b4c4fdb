"""Tiles: any frame is covered, weights sum to one, a lossless stand-in gives the frame back to the bit, and errors are bounded."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.tiles import FITS, FrameLayout, crop_message, frame_size, layout_of, ramps, starts_of

sides = st.one_of(st.integers(1, 2000), st.integers(1, 300))
tiles = st.sampled_from([1, 8, 32, 33, 128, 256])


@given(length=sides, tile=tiles, share=st.floats(0, 0.99))
def test_the_fewest_tiles_cover_with_the_overlap_and_their_weights_sum_to_one(length, tile, share):
    overlap = int(tile * share)
    starts = starts_of(length, tile, overlap)
    covered = np.zeros(length)
    total = np.zeros(length)
    for start, weights in zip(starts, ramps(starts, tile, length), strict=True):
        inside = slice(max(0, start), min(length, start + tile))
        covered[inside] += 1
        total[inside] += weights[inside.start - start : inside.stop - start]
        assert weights.min() >= 0
        assert weights.max() > 0
        assert weights.sum() == pytest.approx(
            weights[inside.start - start : inside.stop - start].sum()
        )
    assert covered.min() >= 1
    np.testing.assert_allclose(total, 1, atol=1e-12)
    if len(starts) > 1:
        assert starts[0] == 0
        assert starts[-1] + tile == length
        assert max(np.diff(starts)) <= tile - overlap
        assert (len(starts) - 1) * (tile - overlap) + overlap < length  # one fewer would not do
    else:
        assert length <= tile


def put_together(layout, parts, order):
    blender = layout.blender(len(parts[0]))
    for number in order:
        assert not blender.is_complete
        blender.add(number, parts[number])
    assert blender.is_complete
    return blender.frames


@settings(max_examples=60)
@given(
    source=st.tuples(sides, sides),
    tile=st.sampled_from([16, 33, 128]),
    share=st.floats(0, 0.8),
    seed=st.integers(0, 9),
)
def test_a_perfect_codec_gives_the_frame_back_to_the_bit(source, tile, share, seed):
    """In any order of the tiles, and in float as in 8 bits."""
    rng = np.random.default_rng(seed)
    if max(source) * min(source) > 300_000:
        source = (source[0], max(1, 300_000 // source[0]))
    layout = layout_of(source, tile, fit="tile", resolution=0, overlap=int(tile * share))
    assert layout.frame == source
    frames = rng.integers(0, 256, (1, source[1], source[0], 3), dtype=np.uint8)
    parts = [layout.cut(frames, number) for number in range(layout.num_tiles)]
    assert {part.shape for part in parts} == {(1, tile, tile, 3)}
    order = rng.permutation(layout.num_tiles)
    np.testing.assert_array_equal(put_together(layout, parts, order), frames)
    assert sum(map(layout.share, range(layout.num_tiles))) == pytest.approx(1, abs=1e-5)


@settings(max_examples=40)
@given(
    source=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    share=st.floats(0, 0.8),
    seed=st.integers(0, 9),
)
def test_the_error_of_the_frame_is_at_most_the_largest_weighted_error_of_a_tile(
    source, share, seed
):
    """The inequality of the module's docstring, before rounding."""
    rng = np.random.default_rng(seed)
    layout = layout_of(source, 32, fit="tile", resolution=0, overlap=int(32 * share))
    width, height = source
    frame, total, mean = np.zeros((height, width)), np.zeros((height, width)), 0.0
    largest = 0.0
    for number, (top, left) in enumerate(layout.places):
        error = rng.normal(size=(32, 32)) * rng.uniform(0, 3)
        weights = np.outer(*map(np.float64, layout.weights(number)))
        own = np.sum(weights * error**2) / np.sum(weights)
        largest, mean = max(largest, own), mean + layout.share(number) * own
        rows, columns = (
            slice(max(0, a), min(b, a + 32)) for a, b in ((top, height), (left, width))
        )
        part = np.s_[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
        frame[rows, columns] += (weights * error)[part]
        total[rows, columns] += weights[part]
    np.testing.assert_allclose(total, 1, atol=1e-5)
    assert np.mean(frame**2) <= mean * (1 + 1e-5) <= largest * (1 + 2e-5)


@given(
    source=st.tuples(sides, sides),
    fit=st.sampled_from(FITS),
    resolution=st.sampled_from([None, 0, 64, 300]),
)
def test_a_frame_keeps_its_shape_unless_it_is_cropped(source, fit, resolution):
    if max(source) > 200 * min(source):
        source = (max(source) // 10, max(source))
    resolution = resolution if fit == "tile" else None
    layout = layout_of(source, 128, fit=fit, resolution=resolution)
    width, height = layout.frame
    if fit == "crop":
        assert (width, height) == (128, 128)
        return
    scale = max(layout.frame) / max(source)
    assert abs(width - source[0] * scale) <= 1
    assert abs(height - source[1] * scale) <= 1
    if fit == "pad":
        assert max(width, height) == 128
    if fit == "tile":
        assert min(width, height) == (128 if resolution is None else resolution or min(source))


def test_known_layouts():
    wide = layout_of((512, 288), 128, fit="tile")
    assert wide.frame == (228, 128)
    assert wide.places == ((0, 0), (0, 100))  # 16:9 at the short side takes two tiles
    assert layout_of((512, 288), 128, fit="tile", resolution=0).num_tiles == 15
    assert layout_of((64, 48), 128, fit="tile", resolution=0).places == ((-40, -32),)
    assert layout_of((512, 288), 128, fit="pad").frame == (128, 72)
    assert layout_of((512, 288), 128, fit="stretch").frame == (228, 128)
    assert frame_size((288, 512), 128) == (128, 228)


def test_what_does_not_fit_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"tile_overlap=128 .* below the 128 pixels"):
        layout_of((512, 288), 128, fit="tile", overlap=128)
    with pytest.raises(ValueError, match="smaller resolution="):
        layout_of((1, 2000), 256, fit="tile", resolution=256)
    for starts in ((), (0, 90), (1,), (0, 200), (-90,), (-128,)):
        with pytest.raises(ValueError, match="do not cover"):
            FrameLayout("tile", 128, (228, 128), (0,), starts)


def test_cropping_says_what_it_leaves():
    assert crop_message((512, 288), 128) == (
        "512x288: the middle 288x288, scaled to 128x128; --fit=tile keeps all"
    )
    assert crop_message((512, 128), 128) == "512x128: the middle 128x128; --fit=tile keeps all"
    assert crop_message((128, 128), 64) is None

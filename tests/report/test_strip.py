"""The report: numbers that come from the tokens, and pictures that show them."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from elastic.io.json_file import write_json
from elastic.report import build_report, plot_report, strip_frames, strip_picture
from elastic.report.strip import MET, NOT_MET, TileCounts, _bars
from elastic.tiles import FrameLayout
from elastic.tokens import BlockTokens, TokenizedClip


def make_clip(counts, losses, *, threshold, is_image=False) -> TokenizedClip:
    return TokenizedClip(
        blocks=tuple(
            BlockTokens(
                num_kept=n,
                loss=loss,
                met_threshold=threshold is not None and loss <= threshold,
                indices=np.arange(n),
            )
            for n, loss in zip(counts, losses, strict=True)
        ),
        bottleneck_type="fsq",
        codebook_size=64_000,
        tokens_per_block=64,
        frames_per_block=4,
        num_frames=1 if is_image else 4 * len(counts) - 3,
        is_image=is_image,
        resolution=32,
        source=(320, 240),
        rate=0.0 if is_image else 24.0,
        model_id="small",
        config_hash="0a",
        threshold=threshold,
        search="binary",
        window_blocks=4,
        context="carry",
    )


def frames(num, rows=32, columns=32, seed=0):
    rng = np.random.default_rng(seed)
    return list(rng.integers(0, 256, (num, rows, columns, 3), dtype=np.uint8))


def test_totals_are_those_of_the_tokens():
    clip = make_clip([10, 20, 64], [0.004, 0.005, 0.009], threshold=0.005)
    report = build_report(
        clip,
        per_block=[{"passes": 3, "seconds": 0.5, "kept": 1}, {"passes": 2}, {"passes": 7}],
        totals={"seconds": 2.0, "psnr": math.inf, "device": "cpu"},
    )
    totals = report["totals"]
    assert (totals["tokens"], totals["blocks"], totals["frames"]) == (94, 3, 9)
    assert totals["bits"] == 94 * 16 and totals["mean_tokens"] == pytest.approx(94 / 3)
    assert totals["bits_per_pixel"] == pytest.approx(94 * 16 / (9 * 32 * 32))
    assert totals["compression_ratio"] == pytest.approx(9 * 32 * 32 * 24 / (94 * 16))
    assert (totals["blocks_met"], totals["blocks_not_met"]) == (2, 1)
    assert (totals["passes"], totals["passes_per_block"]) == (12, 4)
    assert (totals["frames_per_second"], totals["device"]) == (4.5, "cpu")
    assert [block["kept"] for block in report["blocks"]] == [10, 20, 64]
    assert [block["met"] for block in report["blocks"]] == [True, True, False]
    assert report["clip"]["threshold"] == 0.005
    with pytest.raises(ValueError, match="2 entries for 3 blocks"):
        build_report(clip, per_block=[{}, {}], totals={})


def test_json_is_strict_and_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "report.json"
    write_json(path, {"a": math.nan, "b": [np.float32(0.5), -math.inf], "c": np.arange(2), 4: None})

    def strict(token):
        raise AssertionError(f"{token} is not JSON")

    read = json.loads(path.read_text(), parse_constant=strict)
    assert read == {"a": None, "b": [0.5, None], "c": [0, 1], "4": None}
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == read
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.parametrize(("rows", "columns"), [(32, 32), (33, 47), (256, 256), (300, 180)])
def test_every_frame_of_the_strip_has_one_even_size_and_large_panels(rows, columns):
    originals = frames(5, rows, columns)
    drawn = list(
        strip_frames(
            originals,
            frames(5, rows, columns, seed=1),
            counts=[3, 64],
            tokens_per_block=64,
            frames_per_block=4,
            losses=[0.1, math.nan],
            rate=24.0,
        )
    )
    assert len(drawn) == 5 and len({frame.shape for frame in drawn}) == 1
    height, width, _ = drawn[0].shape
    assert height % 2 == 0 and width % 2 == 0 and drawn[0].dtype == np.uint8
    assert height > 256 and width > 2 * 256
    if min(rows, columns) >= 256:  # shown as they are
        assert (drawn[4][30 : 30 + rows, 16 : 16 + columns] == originals[4]).all()


def test_the_strip_takes_one_frame_at_a_time():
    taken = []

    def source(name):
        for index, frame in enumerate(frames(8)):
            taken.append((name, index))
            yield frame

    drawn = strip_frames(
        source("a"), source("b"), counts=[5, 6], tokens_per_block=64, frames_per_block=4
    )
    assert taken == []
    for index in range(3):
        next(drawn)
        assert taken[-2:] == [("a", index), ("b", index)]


def area(picture, colour) -> int:
    return int((picture == np.array(colour)).all(-1).sum())


def last_frame(counts, met):
    flat = [np.full((32, 32, 3), 90, np.uint8)] * len(counts)
    options = {"tokens_per_block": 64, "frames_per_block": 1, "met": met}
    return list(strip_frames(flat, flat, counts=counts, **options))[-1]


def test_the_chart_shows_how_many_tokens_and_which_blocks_missed_the_threshold():
    few, many = last_frame([16] * 8, [True] * 8), last_frame([32] * 8, [True] * 8)
    assert area(many, MET) == pytest.approx(2 * area(few, MET), rel=0.05)
    assert area(few, NOT_MET) == area(many, NOT_MET) == 0
    mixed = last_frame([32] * 8, [False, True] * 4)
    assert area(mixed, NOT_MET) == pytest.approx(area(mixed, MET), rel=0.3)  # playhead, texts


@given(
    counts=st.lists(st.integers(0, 64), min_size=1, max_size=300),
    width=st.integers(20, 200),
)
def test_no_block_is_lost_however_narrow_the_chart(counts, width):
    met = [count != 64 for count in counts]
    filled, all_met = _bars(np.array(counts), np.array(met), 64)(width, 128)
    assert filled.shape == (128, width)
    heights = filled.sum(0)
    assert heights.max() == max(1, 2 * max(counts)) and all_met.all() == all(met)
    if width >= len(counts):
        assert set(heights) - {0} == {max(1, 2 * count) for count in counts}


def test_an_image_gets_one_picture_with_a_bar():
    original, reconstruction = frames(1)[0], frames(1, seed=1)[0]
    pictures = [
        strip_picture(original, reconstruction, count=n, tokens_per_block=64, loss=0.1)
        for n in (16, 32)
    ]
    assert pictures[0].shape == pictures[1].shape
    assert area(pictures[1], MET) == pytest.approx(2 * area(pictures[0], MET), rel=0.02)
    missed = strip_picture(original, original, count=64, tokens_per_block=64, met=False)
    assert area(missed, NOT_MET) > 0 and area(missed, MET) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": [65, 1]}, "0 to 64"),
        ({"counts": []}, "one count for each block"),
        ({"losses": [0.1]}, "1 losses for 2 blocks"),
        ({"met": [True] * 3}, "3 met for 2 blocks"),
        ({"frames_per_block": 0}, "frames_per_block=0"),
        ({"reconstructions": frames(3)}, "ends at frame 3"),
        ({"counts": [1]}, "Frame 2 is beyond 1 blocks of 2 frames"),
        ({"reconstructions": frames(4, 16)}, "like the first"),
        ({"originals": frames(3) + frames(1, 16)}, "like the first"),
    ],
)
def test_frames_and_numbers_that_do_not_fit_are_refused(change, message):
    options = {
        "originals": frames(4),
        "reconstructions": frames(4, seed=1),
        "counts": [1, 2],
        "tokens_per_block": 64,
        "frames_per_block": 2,
    } | change
    with pytest.raises(ValueError, match=message):
        list(strip_frames(options.pop("originals"), options.pop("reconstructions"), **options))


@pytest.mark.parametrize(
    ("losses", "threshold", "is_image"),
    [
        ([0.004, math.nan, 0.009], 0.005, False),
        ([math.nan, math.nan, math.nan], None, False),
        ([0.004], 0.005, True),
        ([0.0], 0.0, False),
    ],
)
def test_a_plot_is_drawn_of_every_report_as_read_from_its_file(
    tmp_path, losses, threshold, is_image
):
    clip = make_clip([10, 20, 64][: len(losses)], losses, threshold=threshold, is_image=is_image)
    write_json(
        tmp_path / "report.json",
        build_report(clip, per_block=[{} for _ in losses], totals={"psnr": math.inf}),
    )
    plot_report(json.loads((tmp_path / "report.json").read_text()), tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 400
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["plot.png", "report.json"]


def test_a_map_tints_each_tile_by_what_it_took():
    """Two tiles side by side, of which the second takes more in the second block; the map is the last picture."""
    layout = FrameLayout("tile", 128, (256, 128), (0,), (0, 128))
    counts = np.array([[8, 8], [8, 32]])
    frames = [np.full((128, 256, 3), 128, np.uint8)] * 2
    drawn = strip_frames(
        frames, frames, counts=counts.sum(1), tokens_per_block=64, frames_per_block=1, rate=1.0,
        tiles=TileCounts(layout, counts),
    )  # fmt: skip
    first, second = (picture[60:250].astype(int) for picture in drawn)
    changed = np.flatnonzero((first != second).any((0, 2)))
    right = first.shape[1] - 16  # where the map ends; its frame is shown twice as large
    assert changed.max() == right - 1
    assert (
        changed.min() == right - 256
    )  # the right half of the map alone: the left tile took as much
    np.testing.assert_allclose(TileCounts(layout, counts).tint(1, 4, 2), [[0, 0, 1, 1]] * 2)

"""Kinds of files that are easily read wrong: held-back frames, missing times, tiles, pixel shapes, high dynamic range."""

import importlib.util
import logging

import numpy as np
import pytest
from media_cases import CLIP, ffmpeg, gray_frames, numbers
from PIL import Image

from elastic.data.config import DataConfig
from elastic.evaluation.records import EvaluationConfig
from elastic.io.read_options import READ_DEFAULTS
from elastic.media import MediaError, find_media, images, open_clip, probe, timing, write_video
from elastic.media.color import tone_map
from elastic.tokenizer import EncodeOptions, clip_source


def frames_of(path, *, exact_color=False):
    """All frames at the source's own size."""
    source = images.open_source(path, exact_color=exact_color)
    return np.stack(
        [np.asarray(frame) for frame in source.frames(np.arange(source.info.num_frames))]
    )


def frames_of_ffmpeg(path, rows, columns):
    scale = "scale=flags=bicubic+accurate_rnd+full_chroma_int:interl=-1,format=rgb24"
    raw = ffmpeg("-i", path, "-fps_mode", "passthrough", "-vf", scale, "-f", "rawvideo", "-")
    return np.frombuffer(raw, np.uint8).reshape(-1, rows, columns, 3)


@pytest.mark.parametrize("name", ["audio_first_1.mp4", "audio_first_2.mkv"])
def test_frames_that_the_decoder_holds_back_are_shown_where_the_sound_comes_first(golden, name):
    path = golden / "inputs" / name
    expected = frames_of_ffmpeg(path, 64, 96)
    assert probe(path).num_frames == len(expected) == int(name[12])
    np.testing.assert_array_equal(frames_of(path, exact_color=True), expected)


def test_frames_without_times_of_display_come_in_its_order_from_any_start(golden, tmp_path):
    path = golden / "inputs" / "h264_b_8.avi"
    np.testing.assert_array_equal(frames_of(path, exact_color=True), frames_of_ffmpeg(path, 64, 96))
    write_video(tmp_path / "a.mp4", gray_frames(60), 24)
    coded = "-c:v libx264 -crf 8 -g 12 -bf 3 -x264-params b-adapt=0:scenecut=0".split()
    ffmpeg("-i", tmp_path / "a.mp4", *coded, tmp_path / "a.avi")
    clip = open_clip(tmp_path / "a.avi", resolution=48, rate=None)
    assert (clip.rate, clip.info.variable_rate) == (24, False)
    whole = clip.read()
    assert numbers(whole) == list(range(60))
    for start in (1, 11, 12, 13, 30, 59):
        np.testing.assert_array_equal(list(clip.frames(start)), whole[start:])


def test_a_picture_of_tiles_is_whole_or_refused(golden):
    path = golden / "inputs" / "grid.heic"
    if importlib.util.find_spec("pillow_heif") is None:
        with pytest.raises(MediaError, match=r"grid\.heic.* 2 tiles .*pillow-heif"):
            probe(path)
        return
    info = probe(path)
    assert (info.kind, info.width, info.height, info.num_frames) == ("image", 512, 256, 1)
    (picture,) = frames_of(path)
    assert picture[100, 100].tolist() == [255, 0, 0]
    assert picture[100, 400].tolist() == [0, 0, 255]


def test_heif_endings_are_media(tmp_path):
    names = ["a.heic", "b.HEIF", "c.hif", "d.avif", "e.avifs"]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in find_media(tmp_path)] == names


def test_transparency_of_an_animated_avif_is_composited_over_white(tmp_path):
    rgba = np.zeros((4, 48, 64, 4), np.uint8)
    rgba[..., 0], rgba[:, :, :20, 3] = 200, 255  # red, opaque on the left
    rgba[:, :, 44:, 3] = 60 * np.arange(4)[:, None, None]  # ever more so on the right
    first, *rest = map(Image.fromarray, rgba)
    first.save(tmp_path / "a.avif", save_all=True, append_images=rest, duration=100, quality=95)
    info = probe(tmp_path / "a.avif")
    assert (info.kind, info.num_frames, info.rate) == ("video", 4, pytest.approx(10))
    shown = frames_of(tmp_path / "a.avif").astype(int)
    assert np.abs(shown[:, 24, 8] - [200, 0, 0]).max() <= 8
    assert np.abs(shown[:, 24, 32] - 255).max() <= 8
    assert np.abs(shown[:, 24, 56, 1] - (255 - 60 * np.arange(4))).max() <= 10


def test_pixels_that_are_not_square_are_shown_square(golden, tmp_path):
    path = golden / "inputs" / "anam.mp4"
    info = probe(path)
    assert (info.width, info.height, info.pixel_aspect) == (853, 480, (32, 27))
    dark = frames_of(path)[0].mean(-1) < 128
    rows, columns = np.nonzero(dark if dark.mean() < 0.5 else ~dark)
    assert abs(np.ptp(rows) - np.ptp(columns)) <= 2  # a circle
    # Tall pixels are enlarged upwards; a quarter turn swaps both sides.
    tall = ("-vf", "setsar=2/3", "-c:v", "libx264", tmp_path / "tall.mp4")
    ffmpeg("-i", golden / CLIP, "-frames:v", 2, *tall)
    assert (probe(tmp_path / "tall.mp4").width, probe(tmp_path / "tall.mp4").height) == (160, 180)
    turn = ("-display_rotation", 90, "-i", tmp_path / "tall.mp4", "-c", "copy")
    ffmpeg(*turn, tmp_path / "turned.mp4")
    assert frames_of(tmp_path / "turned.mp4").shape == (2, 160, 180, 3)
    shapes = [probe(tmp_path / name).pixel_aspect for name in ("tall.mp4", "turned.mp4")]
    assert shapes == [(2, 3), (3, 2)] and probe(golden / CLIP).pixel_aspect == (1, 1)


def test_high_dynamic_range_is_tone_mapped_and_named(golden, caplog):
    path = golden / "inputs" / "pq_grey.mp4"
    with caplog.at_level(logging.WARNING):
        assert open_clip(path, resolution=16).info.transfer == "pq"
    expected = np.array([0, 36, 73, 109, 146, 182, 219, 255])  # of 203 cd/m2 = white
    shown = frames_of(path)[0][64, 8::16].astype(int)
    assert np.abs(shown - expected[:, None]).max() <= 6
    assert "(PQ) is tone-mapped" in caplog.text
    assert probe(golden / CLIP).transfer == "sdr"


def test_diffuse_white_of_both_transfers_is_white():
    pq, hlg = round(0.5807 * 65535), round(0.75 * 65535)  # 203 cd/m2, by BT.2408
    for level, transfer in ((pq, 16), (hlg, 18)):
        white = tone_map(np.full((1, 1, 3), level, np.uint16), transfer)[0, 0].astype(int)
        assert np.abs(white - 255).max() <= 2
        black = tone_map(np.zeros((1, 1, 3), np.uint16), transfer)
        assert black.max() == 0


def test_ten_bits_are_rounded_exactly(golden):
    path = golden / "inputs" / "bt709_lim_420p10_ffv1.mkv"
    shown = frames_of(path)
    assert shown.max() == 255
    np.testing.assert_array_equal(shown, frames_of_ffmpeg(path, 128, 128))


@pytest.mark.parametrize(
    "options",
    [
        "-c:v libx264 -pix_fmt yuv420p",
        "-c:v libx264 -pix_fmt yuv422p -color_range pc",
        "-c:v libx264 -pix_fmt yuv444p10le -colorspace bt709",
        "-c:v ffv1 -pix_fmt yuv420p10le",
        "-c:v mpeg2video -pix_fmt yuv420p",
        "-c:v mpeg2video -pix_fmt yuv422p -flags +ilme+ildct",
        "-c:v mpeg2video -pix_fmt yuv420p -flags +ilme+ildct",
        "-c:v libvpx-vp9 -pix_fmt yuv420p -deadline realtime -cpu-used 8",
        "-c:v mjpeg -pix_fmt yuvj420p",
    ],
)
def test_exact_colours_are_those_of_ffmpeg(golden, tmp_path, options):
    ffmpeg("-i", golden / CLIP, "-frames:v", 6, *options.split(), tmp_path / "a.mkv")
    shown = frames_of(tmp_path / "a.mkv", exact_color=True).astype(int)
    expected = frames_of_ffmpeg(tmp_path / "a.mkv", 120, 160)
    assert len(shown) == len(expected) == 6
    assert np.abs(shown - expected).mean() <= 1


RECORDS = pytest.mark.parametrize(
    "record",
    [
        lambda **options: EncodeOptions(num_tokens=8, **options),
        lambda **options: DataConfig(path="in", **options),
        lambda **options: EvaluationConfig(**options),
    ],
    ids=["tokenizing", "training", "evaluation"],
)


@RECORDS
def test_every_record_says_who_decodes_and_how_colours_are_converted(record, monkeypatch):
    defaults = dict(READ_DEFAULTS)
    if isinstance(record(), DataConfig):
        for name in (
            "fit",
            "resolution",
            "tile_overlap",
        ):  # training takes the middle square, or crops
            del defaults[name]
    assert {name: getattr(record(), name) for name in defaults} == defaults
    assert record(exact_color=True).exact_color
    with pytest.raises(ValueError, match="reader='opencv' must be one of pyav, decord"):
        record(reader="opencv")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"reader=decord is not installed here: pip install decord"
    ):
        record(reader="decord")
    assert record(reader="pyav").reader == "pyav"


def test_exact_colours_reach_the_tokenizer(golden):
    """Of a clip where they differ: 8-bit, 4:2:0, limited range."""
    plain, exact = (
        clip_source.open_clip(golden / CLIP, 32, rate=24, max_frames=1, exact_color=exact_color)
        for exact_color in (False, True)
    )
    frames = [next(clip.blocks(1)).astype(int) for clip in (plain, exact)]
    assert 0.2 < (frames[1] - frames[0]).mean() < 2  # the released conversion is darker
    assert plain.identity() != exact.identity()  # a run does not go on with other colours


@pytest.mark.skipif(importlib.util.find_spec("decord") is None, reason="decord is not installed")
@pytest.mark.parametrize(
    "name", [CLIP, "inputs/anam.mp4", "inputs/pq_grey.mp4", "inputs/h264_b_8.avi"]
)
def test_decord_gives_the_same_frames(golden, name):
    options = {"resolution": 64, "rate": 12}
    expected = open_clip(golden / name, **options)
    found = open_clip(golden / name, **options, reader="decord")
    assert (found.info, found.rate) == (expected.info, expected.rate)
    np.testing.assert_array_equal(found.read(), expected.read())
    np.testing.assert_array_equal(list(found.frames(2, 4)), list(expected.frames(2, 4)))


def test_a_reader_that_is_not_there_is_refused(golden):
    with pytest.raises(ValueError, match="reader='opencv' must be one of"):
        open_clip(golden / CLIP, resolution=16, reader="opencv")
    if importlib.util.find_spec("decord") is None:
        with pytest.raises(ValueError, match="pip install decord"):
            open_clip(golden / CLIP, resolution=16, reader="decord")


def test_a_pixel_shape_within_rounding_of_square_is_square(golden, tmp_path):
    ffmpeg("-i", golden / CLIP, "-frames:v", 2, "-vf", "setsar=640/639", tmp_path / "a.mp4")
    assert (probe(tmp_path / "a.mp4").width, probe(tmp_path / "a.mp4").height) == (160, 120)


def test_resampling_is_one_line_in_the_log(golden, caplog):
    timing.log_once.cache_clear()
    with caplog.at_level(logging.INFO):
        for _ in range(2):  # once, however often the clip is opened
            open_clip(golden / CLIP, resolution=16, rate=24)
    assert [record.getMessage() for record in caplog.records] == [
        f"{golden / CLIP} has 30 frames/s and is read at 24."
    ]

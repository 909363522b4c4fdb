"""Media: the released frame choice and pixels, any file as it is displayed, one error for bad ones."""

import gc
import json
import logging
import os
import pathlib
import subprocess
import tracemalloc

import av
import imageio_ffmpeg
import numpy as np
import pytest
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from elastic import media_read, media_video
from elastic.media import (
    MediaError,
    VideoWriter,
    find_media,
    fit_frame,
    frame_indices,
    is_media,
    open_clip,
    probe,
    write_image,
    write_video,
)
from elastic.patches import patchify

CLIP = "media/clip_160x120_30fps_97f.mp4"
PATCH = {"fsq": (1, 8, 8), "vae": (2, 8, 8)}


def ffmpeg(*arguments) -> bytes:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True).stdout


def gray_frames(num_frames, rows=48, columns=64):
    """Frame i is flat gray of level 4 i + 10, so that a decoded frame tells which one it is."""
    return [np.full((rows, columns, 3), 4 * i + 10, np.uint8) for i in range(num_frames)]


def numbers(frames):
    return np.rint((frames.mean(axis=(1, 2, 3)) - 10) / 4).astype(int).tolist()


def texture(rows, columns, seed=0):
    small = np.random.default_rng(seed).integers(0, 256, (rows // 8 + 2, columns // 8 + 2, 3))
    image = Image.fromarray(small.astype(np.uint8)).resize(
        (columns, rows), Image.Resampling.BICUBIC
    )
    return np.asarray(image)


def read_one(path, resolution=32):
    with open_clip(path, resolution=resolution) as clip:
        frames = clip.read()
    assert frames.shape == (1, resolution, resolution, 3)
    assert frames.dtype == np.uint8
    return frames[0]


def psnr(a, b):
    return 10 * np.log10(255**2 / max(np.mean((a.astype(float) - b) ** 2), 1e-9))


@pytest.fixture(scope="session")
def released(golden):
    facts = json.loads((golden / "unit/data_path.json").read_text())
    return facts, np.load(golden / "unit/data_path.npz")


# The released system's frames


def test_decoded_pixels_equal_the_released_readers(golden, released):
    _, arrays = released
    source = media_read.open_source(golden / CLIP)
    frames = [np.asarray(frame) for frame in source.frames(np.arange(97))]
    np.testing.assert_array_equal(frames[0], arrays["decoded_frame0_rgb"])
    np.testing.assert_array_equal(frames[50], arrays["decoded_frame50_rgb"])
    means = [frame.mean() for frame in frames]
    np.testing.assert_array_equal(means, arrays["decoded_frame_mean"])
    barcodes = [sum(int(f[4, 8 * k + 4, 1] > 127) << k for k in range(7)) for f in frames]
    assert barcodes == list(range(97))


@pytest.mark.parametrize("case", ["fsq/fps4", "fsq/fps24", "fsq/fps30", "fsq/fps60"])
def test_frame_choice_equals_the_released_rule(released, case):
    facts, _ = released
    picked = frame_indices(97, 30, int(case.partition("fps")[2]))
    assert len(picked) == facts[case]["n_target_frames"]
    used = facts[case]["frames_used"]
    assert picked[:used].tolist() == facts[case]["picked_source_frames"]


@pytest.mark.parametrize("model", ["fsq", "vae"])
@pytest.mark.parametrize("rate", [4, 24, 30])
def test_patches_of_the_clip_equal_the_released_ones(golden, released, model, rate):
    facts, arrays = released
    case = f"{model}/fps{rate}"
    frames_per_block = facts[case]["frames_per_block"]
    with open_clip(golden / CLIP, resolution=32, rate=rate) as clip:
        blocks = list(clip.blocks(frames_per_block))
    # Design 4.6: the tail that the released code drops is delivered, as a shorter last block.
    assert sum(map(len, blocks)) == facts[case]["n_target_frames"] == clip.num_frames
    whole = [patchify(b, PATCH[model]) for b in blocks if len(b) == frames_per_block]
    sums = [int(block.sum()) for block in whole]
    assert sums == arrays[f"{case}/block_sums"].tolist()
    if rate != 30:
        saved = facts[case].get("saved_blocks", range(len(whole)))
        np.testing.assert_array_equal([whole[i] for i in saved], arrays[f"{case}/blocks"])


@pytest.mark.parametrize("name", ["img_101x67.png", "img_160x120.jpg", "img_40x90_rgba.png"])
def test_resize_and_crop_equal_the_released_ones(golden, released, name):
    with Image.open(golden / "media" / name) as image:
        stored = np.asarray(image.convert("RGB"))  # the released code drops alpha; see below
    expected = released[1][f"fsq/{name}"]
    expected = rearrange(expected, "(t h w) (p q c) -> t (h p) (w q) c", t=2, h=4, p=8, q=8)
    np.testing.assert_array_equal(fit_frame(stored, 32), expected[0])
    if "rgba" not in name:
        np.testing.assert_array_equal(read_one(golden / "media" / name), expected[0])


# What is delivered, and at which rate


def test_a_picture_is_one_frame_and_not_a_repeated_one(golden):
    with open_clip(golden / "media/img_160x120.jpg", resolution=16) as clip:
        assert (clip.info.kind, clip.info.width, clip.info.height) == ("image", 160, 120)
        assert (clip.num_frames, clip.rate) == (1, 0.0)
        assert [block.shape for block in clip.blocks(4)] == [(1, 16, 16, 3)]


def test_blocks_are_the_frames_in_order_and_can_be_read_again(golden):
    with open_clip(golden / CLIP, resolution=8, rate=24) as clip:
        whole = clip.read()
        assert clip.num_frames == len(whole) == 77
        for frames_per_block in (1, 4, 76, 77, 100):
            blocks = list(clip.blocks(frames_per_block))
            assert all(len(block) == frames_per_block for block in blocks[:-1])
            np.testing.assert_array_equal(np.concatenate(blocks), whole)


def test_max_frames_takes_the_first_ones(golden):
    whole = open_clip(golden / CLIP, resolution=8, rate=24).read()
    part = open_clip(golden / CLIP, resolution=8, rate=24, max_frames=7).read()
    np.testing.assert_array_equal(part, whole[:7])


def test_a_rate_above_the_sources_is_limited_to_it(tmp_path, caplog):
    write_video(tmp_path / "a.mp4", gray_frames(10), 12)
    with caplog.at_level(logging.WARNING):
        clip = open_clip(tmp_path / "a.mp4", resolution=16, rate=60)
    assert "12 frames/s" in caplog.text
    assert clip.rate == 12
    assert numbers(clip.read()) == list(range(10))


def test_no_rate_keeps_every_frame_and_the_sources_rate(tmp_path, caplog):
    write_video(tmp_path / "a.mp4", gray_frames(10), 12.5)
    clip = open_clip(tmp_path / "a.mp4", resolution=16, rate=None)
    assert (clip.rate, numbers(clip.read()), caplog.text) == (12.5, list(range(10)), "")


def test_a_variable_rate_is_sampled_by_the_time_each_frame_is_shown(tmp_path):
    write_video(tmp_path / "even.mp4", gray_frames(60), 30)
    # Frames 10 to 39 are gone: frame 9 is shown for a second.
    keep = "select='not(between(n,10,39))'"
    ffmpeg("-i", tmp_path / "even.mp4", "-vf", keep, "-fps_mode", "vfr", tmp_path / "a.mp4")
    info = probe(tmp_path / "a.mp4")
    assert info.variable_rate
    assert info.num_frames == 30
    assert info.rate == pytest.approx(15, rel=0.05)
    shown = numbers(open_clip(tmp_path / "a.mp4", resolution=16, rate=10).read())
    assert shown == [0, 3, 6, *[9] * 11, 42, 45, 48, 51, 54, 57]
    assert len(open_clip(tmp_path / "a.mp4", resolution=16, rate=None).read()) == 30


def test_jitter_of_a_coarse_clock_is_not_a_variable_rate(tmp_path):
    write_video(tmp_path / "a.mkv", gray_frames(60), 29.97)  # Matroska counts milliseconds
    info = probe(tmp_path / "a.mkv")
    assert not info.variable_rate
    assert info.rate == pytest.approx(29.97, abs=0.01)


def test_frames_that_an_edit_list_cuts_away_are_not_counted(golden, tmp_path):
    ffmpeg("-ss", "1.05", "-i", golden / CLIP, "-c", "copy", tmp_path / "cut.mp4")
    info = probe(tmp_path / "cut.mp4")
    frames = open_clip(tmp_path / "cut.mp4", resolution=120, rate=None).read()
    whole = open_clip(golden / CLIP, resolution=120, rate=None).read()
    assert info.num_frames == len(frames) < 70
    np.testing.assert_array_equal(frames, whole[-len(frames) :])


@given(
    num_frames=st.integers(1, 3000),
    source_rate=st.sampled_from([10.0, 23.976, 24, 25, 29.97, 30, 60]),
    share=st.floats(1e-6, 1),
)
def test_a_lower_rate_never_repeats_a_frame(num_frames, source_rate, share):
    picked = frame_indices(num_frames, source_rate, source_rate * share)
    assert picked[0] == 0
    assert picked[-1] < num_frames
    assert (np.diff(picked) > 0).all()


# Pixels as displayed


def test_transparency_is_composited_over_white(tmp_path):
    rgba = np.zeros((32, 32, 4), np.uint8)
    rgba[:, :, 0] = 200  # red, opaque on the left, half, then invisible on the right
    rgba[:, :, 3] = np.repeat([255, 128, 0, 0], 8)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    frame = read_one(tmp_path / "a.png")
    assert frame[0, 0].tolist() == [200, 0, 0]
    assert np.abs(frame[0, 12].astype(int) - [227, 127, 127]).max() <= 1
    assert frame[0, 31].tolist() == [255, 255, 255]


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    gray = texture(32, 32)[..., 0]
    Image.fromarray(gray.astype(np.uint16) * 257).save(tmp_path / "gray16.png")
    frame = read_one(tmp_path / "gray16.png")
    np.testing.assert_array_equal(frame, np.repeat(gray[..., None], 3, axis=2))

    rgb = texture(32, 32)
    raw = tmp_path / "rgb48.raw"
    raw.write_bytes((rgb.astype(">u2") * 257).tobytes())
    size = ("-f", "rawvideo", "-pix_fmt", "rgb48be", "-s", "32x32")
    ffmpeg(*size, "-i", raw, tmp_path / "rgb48.png")
    ffmpeg(*size, "-i", raw, tmp_path / "rgb48.tiff")  # beyond Pillow: read through ffmpeg
    np.testing.assert_array_equal(read_one(tmp_path / "rgb48.png"), rgb)
    assert np.abs(read_one(tmp_path / "rgb48.tiff").astype(int) - rgb).max() <= 1


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1", "LA", "YCbCr"])
def test_every_pixel_mode_shows_the_same_picture(tmp_path, mode):
    gradient = np.broadcast_to(np.linspace(0, 255, 64, dtype=np.uint8)[:, None, None], (64, 64, 3))
    suffix = {"CMYK": "jpg", "YCbCr": "jpg"}.get(mode, "png")
    Image.fromarray(gradient).convert(mode).save(tmp_path / f"a.{suffix}")
    frame = read_one(tmp_path / f"a.{suffix}", resolution=8).astype(int)
    assert np.abs(frame - fit_frame(gradient, 8)).max() <= (40 if mode in "1P" else 4)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(tmp_path, orientation):
    upright = np.zeros((48, 32, 3), np.uint8)
    upright[:24, :16], upright[:24, 16:], upright[24:, :16] = (
        255,
        170,
        85,
    )  # four corners, four grays
    stored = {  # what a camera stores for each tag: the inverse of what the viewer applies
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.swapaxes(0, 1), 6: np.rot90(upright), 7: np.rot90(upright, 2).swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    info = probe(tmp_path / "a.png")
    assert (info.width, info.height) == (32, 48)
    np.testing.assert_array_equal(read_one(tmp_path / "a.png"), fit_frame(upright, 32))


@pytest.mark.parametrize(
    "turn", [("-display_rotation", 90), ("-display_rotation", -90), ("-display_rotation", 180),
             ("-display_hflip",), ("-display_rotation", 90, "-display_hflip")], ids=str,
)  # fmt: skip
def test_rotated_video_is_shown_as_ffmpeg_shows_it(golden, tmp_path, turn):
    ffmpeg(*turn, "-i", golden / CLIP, "-t", "0.2", "-c", "copy", tmp_path / "a.mp4")
    info = probe(tmp_path / "a.mp4")
    raw = ffmpeg(
        "-i", tmp_path / "a.mp4", "-frames:v", 1, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"
    )
    shown = np.frombuffer(raw, np.uint8).reshape(info.height, info.width, 3)
    frame = open_clip(tmp_path / "a.mp4", resolution=120, rate=None).read()[0]
    assert psnr(frame, fit_frame(shown, 120)) > 40


def test_rotation_is_found_beside_side_data_of_an_unknown_kind(golden, tmp_path):
    class Frame:
        def __init__(self, frame):
            self.rotation = frame.rotation

        @property
        def side_data(self):
            raise ValueError("31 is not a valid Type")

    pixels = Image.fromarray(texture(6, 4))
    for degrees in (90, -90, 180):
        turn = ("-display_rotation", degrees)
        ffmpeg(*turn, "-i", golden / CLIP, "-t", "0.2", "-c", "copy", tmp_path / "a.mp4")
        with av.open(str(tmp_path / "a.mp4")) as container:
            frame = next(container.decode(video=0))
        shown = []
        for turns in (media_video._turns(frame), media_video._turns(Frame(frame))):
            image = pixels
            for turn in turns:
                image = image.transpose(turn)
            shown.append(np.asarray(image))
        np.testing.assert_array_equal(*shown)


def test_animations_are_video_whatever_their_container(tmp_path):
    frames = [Image.fromarray(frame) for frame in gray_frames(6)]
    for name in ("a.gif", "a.webp", "a.png"):
        exact = {"lossless": True} if name == "a.webp" else {}
        frames[0].save(
            tmp_path / name, save_all=True, append_images=frames[1:], duration=100, **exact
        )
        clip = open_clip(tmp_path / name, resolution=16, rate=5)
        assert (clip.info.kind, clip.info.num_frames) == ("video", 6), name
        assert clip.info.rate == pytest.approx(10), name
        assert numbers(clip.read()) == [0, 2, 5], name


def test_the_bytes_decide_and_not_the_name(tmp_path):
    Image.fromarray(texture(48, 64)).save(tmp_path / "photo.jpg")
    os.rename(tmp_path / "photo.jpg", tmp_path / "photo.mp4")
    assert probe(tmp_path / "photo.mp4").kind == "image"
    write_video(tmp_path / "clip.mp4", gray_frames(3), 24)
    os.rename(tmp_path / "clip.mp4", tmp_path / "clip 100%:1.JPG")
    assert probe(tmp_path / "clip 100%:1.JPG").num_frames == 3


# Sizes


def test_an_extreme_aspect_ratio_needs_no_huge_picture(tmp_path):
    for shape in [(1000, 3), (3, 1000), (40, 200)]:
        picture = texture(*shape)
        short, long = sorted(shape)
        scale = int(32 * long / short)
        whole = (scale, 32) if shape[1] > shape[0] else (32, scale)
        resized = np.asarray(Image.fromarray(picture).resize(whole, Image.Resampling.BILINEAR))
        top, left = ((size - 32) // 2 for size in resized.shape[:2])
        expected = resized[top : top + 32, left : left + 32]
        assert np.abs(fit_frame(picture, 32).astype(int) - expected).max() <= 1
    tracemalloc.start()
    fit_frame(np.zeros((1, 100_000, 3), np.uint8), 256)  # resized whole: 25,600,000 columns
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()


def test_the_smallest_picture_is_read(tmp_path):
    Image.new("RGB", (1, 1), (9, 8, 7)).save(tmp_path / "a.png")
    assert (read_one(tmp_path / "a.png") == [9, 8, 7]).all()


def test_a_picture_beyond_the_limit_is_refused_before_it_is_decoded(tmp_path):
    Image.new("1", (10_000, 9_000)).save(tmp_path / "bomb.png")
    Image.new("1", (20_000, 9_000)).save(tmp_path / "bigger.png")
    for name in ("bomb.png", "bigger.png"):
        with pytest.raises(MediaError, match=r"too large|scale it down"):
            probe(tmp_path / name)


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 40), columns=st.integers(1, 40), resolution=st.integers(1, 24))
def test_any_size_fits_to_the_resolution(rows, columns, resolution):
    assert fit_frame(texture(rows, columns), resolution).shape == (resolution, resolution, 3)


# Bounded memory, lazy decoding


def test_only_the_block_at_hand_is_in_memory(tmp_path):
    write_video(tmp_path / "a.mp4", (np.full((128, 128, 3), 9, np.uint8) for _ in range(200)), 24)
    with open_clip(tmp_path / "a.mp4", resolution=128) as clip:
        tracemalloc.start()
        assert sum(len(block) for block in clip.blocks(4)) == 200
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 20 * 128 * 128 * 3  # 200 frames were read


def test_a_decoded_frame_is_released_without_garbage_collection(golden):
    source = media_read.open_source(golden / CLIP)
    gc.collect()
    gc.disable()
    try:
        for _ in source.frames(np.arange(97)):
            assert sum(isinstance(thing, av.VideoFrame) for thing in gc.get_objects()) < 8
    finally:
        gc.enable()


def test_decoding_stops_at_the_last_frame_needed(tmp_path):
    write_video(tmp_path / "a.mp4", [texture(64, 64, seed) for seed in range(100)], 24)
    damaged = bytearray((tmp_path / "a.mp4").read_bytes())  # the index stands in front
    damaged[-len(damaged) // 3 :] = bytes(len(damaged) // 3 + 1)
    (tmp_path / "damaged.mp4").write_bytes(damaged)
    first = open_clip(tmp_path / "damaged.mp4", resolution=16, max_frames=12).read()
    whole = open_clip(tmp_path / "a.mp4", resolution=16, max_frames=12).read()
    np.testing.assert_array_equal(first, whole)
    with pytest.raises(MediaError, match=r"damaged.*frame"):
        open_clip(tmp_path / "damaged.mp4", resolution=16).read()


SEEKS = {  # how a clip is written -> how it is read from a frame in its middle
    "a.mp4": "-c:v libx264 -g 12 -bf 3 -x264-params open-gop=1",
    "a.mkv": "-c:v libx265 -x265-params keyint=12:bframes=3:open-gop=1:log-level=none",
    "a.ts": "-c:v mpeg2video -g 12 -bf 2",
    "a.webm": "-c:v libvpx-vp9 -g 12 -deadline realtime -cpu-used 8",
    "short.mp4": "-c:v libx264 -g 2 -bf 1",
    "refresh.mp4": "-c:v libx264 -x264-params intra-refresh=1:keyint=24",
}


@pytest.mark.parametrize("name", SEEKS)
def test_reading_from_the_middle_gives_the_frames_of_reading_it_all(golden, tmp_path, name):
    ffmpeg("-i", golden / CLIP, "-t", "2", *SEEKS[name].split(), tmp_path / name)
    clip = open_clip(tmp_path / name, resolution=120, rate=None)
    whole = clip.read()
    for start in range(0, len(whole), 5):
        stop = min(start + 6, len(whole))
        np.testing.assert_array_equal(list(clip.frames(start, stop)), whole[start:stop])
    np.testing.assert_array_equal(np.concatenate(list(clip.blocks(7, first_block=4))), whole[28:])
    with pytest.raises(ValueError, match="start=60"):
        clip.frames(60, 61)


def test_reading_from_the_middle_decodes_little(golden, tmp_path, monkeypatch):
    ffmpeg("-i", golden / CLIP, *SEEKS["a.mp4"].split(), tmp_path / "a.mp4")
    clip = open_clip(tmp_path / "a.mp4", resolution=16, rate=None)
    decoded = []

    def counting(*arguments, original=media_video._frames_from):
        for frame in original(*arguments):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(media_video, "_frames_from", counting)
    list(clip.frames(90, 92))
    assert 2 <= len(decoded) <= 24


def test_a_url_is_read_like_a_file(golden):
    for path in (golden / CLIP, golden / "media/img_40x90_rgba.png"):
        expected = open_clip(path, resolution=16).read()
        found = open_clip(f"file://{path}", resolution=16)
        np.testing.assert_array_equal(found.read(), expected)
        assert found.info.path == f"file://{path}"
    with pytest.raises(MediaError, match=r"file:///no/such\.mp4.*No such file"):
        probe("file:///no/such.mp4")


def test_a_closed_reader_says_so(golden):
    clip = open_clip(golden / CLIP, resolution=8)
    blocks = clip.blocks(4)
    next(blocks)
    clip.close()
    assert list(blocks) == []
    with pytest.raises(ValueError, match="closed"):
        clip.blocks(4)


# Bad files: one sentence, no other exception


def audio_only(path):
    ffmpeg("-f", "lavfi", "-i", "sine=duration=0.3", "-f", "mp4", path)


def truncated(path, *, moov_first):
    flags = ("-movflags", "+faststart") if moov_first else ()
    noise = ("-f", "lavfi", "-i", "testsrc2=size=160x120:duration=2:rate=24")
    ffmpeg(*noise, "-c:v", "libx264", *flags, "-f", "mp4", path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 4 // 10])


def cut_picture(path):
    Image.fromarray(texture(64, 64)).save(path, format="png")
    path.write_bytes(path.read_bytes()[:900])


def playlist(path):
    path.write_text("#EXTM3U\n#EXTINF:10,\nother.mp4\n#EXT-X-ENDLIST\n")


BAD = {
    "empty": (lambda path: path.write_bytes(b""), "0 bytes"),
    "missing": (lambda path: None, "No such file"),
    "folder": (lambda path: path.mkdir(), "directory"),
    "text": (lambda path: path.write_text("not a video\n" * 99), "neither a picture nor a video"),
    "noise": (lambda path: path.write_bytes(np.random.default_rng(0).bytes(5000)), "neither"),
    "playlist": (playlist, "neither"),
    "audio only": (audio_only, "only sound"),
    "truncated": (lambda path: truncated(path, moov_first=True), r"truncated: \d+ of its 48"),
    "no index": (lambda path: truncated(path, moov_first=False), "cut-off or damaged MP4"),
    "cut picture": (cut_picture, "damaged or truncated"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_file_is_one_sentence_that_names_it(tmp_path, what):
    make, words = BAD[what]
    path = tmp_path / "clip.mp4"
    make(path)
    with pytest.raises(MediaError, match=words) as caught:
        open_clip(path, resolution=16).read()
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.webp", "a.jpg", "a.png"])
def test_a_file_cut_anywhere_is_read_or_refused_but_never_crashes(tmp_path, name):
    frames = [texture(40, 40, seed) for seed in range(3)]
    if name == "a.mp4":
        write_video(tmp_path / name, frames, 24)
    else:
        first, *rest = map(Image.fromarray, frames)
        more = {"save_all": True, "append_images": rest} if name in ("a.gif", "a.webp") else {}
        first.save(tmp_path / name, **more)
    whole = (tmp_path / name).read_bytes()
    for cut in np.linspace(1, len(whole) - 1, 25).astype(int):
        (tmp_path / name).write_bytes(whole[:cut])
        try:
            open_clip(tmp_path / name, resolution=16).read()
        except MediaError as error:
            assert name in str(error)


def test_an_option_out_of_range_is_named(golden):
    for options in ({"resolution": 0}, {"rate": 0}, {"rate": float("nan")}, {"max_frames": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            open_clip(golden / CLIP, **{"resolution": 32, **options})
    with pytest.raises(ValueError, match="frames_per_block"):
        open_clip(golden / CLIP, resolution=32).blocks(0)


# Writing


@pytest.mark.parametrize("shape", [(1, 1), (33, 33), (32, 47), (64, 48)], ids=str)
@pytest.mark.parametrize("num_frames", [1, 5])
def test_video_of_any_size_survives_writing_and_reading(tmp_path, shape, num_frames):
    smooth = np.linspace(30, 220, shape[0] * shape[1]).reshape(*shape, 1)
    frame = np.broadcast_to(smooth, (*shape, 3)).astype(np.uint8)
    write_video(tmp_path / "a.mp4", [frame] * num_frames, 24)
    info = probe(tmp_path / "a.mp4")
    assert (info.height, info.width) == tuple(
        size + size % 2 for size in shape
    )  # even, not cropped
    assert (info.num_frames, info.rate) == (num_frames, 24.0)
    source = media_read.open_source(tmp_path / "a.mp4")
    for read in source.frames(np.arange(num_frames)):
        assert psnr(np.asarray(read)[: shape[0], : shape[1]], frame) > 35


@pytest.mark.parametrize("rate", [23.976, 29.97, 24, 12.5, 60])
def test_the_rate_is_written_as_given(tmp_path, rate):
    write_video(tmp_path / "a.mp4", gray_frames(8), rate)
    assert probe(tmp_path / "a.mp4").rate == pytest.approx(rate, abs=1e-3)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")

    def breaks():
        yield from gray_frames(2)
        raise RuntimeError("the model failed")

    with pytest.raises(RuntimeError, match="the model failed"):
        write_video(path, breaks(), 24)
    with pytest.raises(MediaError, match="at least one"):
        write_video(path, [], 24)
    with pytest.raises(MediaError, match="size of its first"):
        write_video(path, [*gray_frames(1), *gray_frames(1, rows=50)], 24)
    with (
        pytest.raises(MediaError, match="ffmpeg ended with status"),
        VideoWriter(path, 24, output_options=("-no_such_option", "1")) as writer,
    ):
        writer.write(gray_frames(1)[0])
    assert os.listdir(tmp_path) == ["a.mp4"]
    assert path.read_bytes() == b"old"


def test_a_name_that_cannot_be_written_is_refused(tmp_path):
    frame = gray_frames(1)[0]
    with pytest.raises(MediaError, match=r"\.mp4"):
        write_video(tmp_path / "a.txt", [frame], 24)
    with pytest.raises(MediaError, match=r"\.png"):
        write_image(tmp_path / "a.txt", frame)
    (tmp_path / "file").write_text("")
    with pytest.raises(MediaError, match="Cannot write"):
        write_video(tmp_path / "file" / "a.mp4", [frame], 24)
    with pytest.raises(MediaError, match="rate"):
        write_video(tmp_path / "a.mp4", [frame], 0)


def test_a_picture_survives_writing_and_reading(tmp_path):
    picture = texture(32, 32)
    write_image(tmp_path / "new folder" / "a.png", picture)
    np.testing.assert_array_equal(read_one(tmp_path / "new folder" / "a.png"), picture)


# The clip of the README


def test_the_example_clip_has_the_shots_that_its_list_says():
    folder = pathlib.Path(__file__).parents[1] / "example"
    facts = json.loads((folder / "video.json").read_text())
    frames = open_clip(folder / "video.mp4", resolution=facts["size"], rate=facts["rate"]).read()
    change = np.abs(np.diff(frames.astype(np.int16), axis=0)).mean(axis=(1, 2, 3))
    assert len(frames) == facts["frames"] == facts["shots"][-1]["last_frame"] + 1
    expected_first = 0
    for shot in facts["shots"]:
        first, last = shot["first_frame"], shot["last_frame"]
        assert (first, first % 4, (last + 1) % 4) == (expected_first, 0, 0), shot
        inside = change[first:last]
        if shot["motion"] == "still":
            assert last - first + 1 >= facts["rate"]
            assert (inside == 0).all(), shot
        else:
            assert (inside > 1).all(), shot
        expected_first = last + 1
    fast = [s for s in facts["shots"] if s["motion"] == "fast"]
    assert all(change[s["first_frame"] : s["last_frame"]].min() > 15 for s in fast)


# Folders


def test_media_are_found_in_any_case_once_and_sorted(tmp_path):
    for name in ("b.JPG", "a.MP4", "deep/er/c.mov", "notes.txt", ".hidden.png", "deep/._c.mov"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "deep" / "loop").symlink_to(tmp_path, target_is_directory=True)
    found = [str(path.relative_to(tmp_path)) for path in find_media(tmp_path)]
    assert found == ["a.MP4", "b.JPG", "deep/er/c.mov"]
    with pytest.raises(MediaError, match="not a folder"):
        find_media(tmp_path / "b.JPG")
    assert is_media("x.WebM")
    assert not is_media("x.txt")

"""Reading without holding or decoding more than is needed, bad files, writing, and finding files."""

import gc
import json
import os
import pathlib
import resource
import tracemalloc

import av
import numpy as np
import pytest
from media_cases import CLIP, ffmpeg, gray_frames, psnr, read_one, texture
from PIL import Image

from elastic.media import (
    MediaError,
    VideoWriter,
    find_media,
    images,
    is_media,
    open_clip,
    probe,
    video,
    write_image,
    write_video,
)

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
    source = images.open_source(golden / CLIP)
    gc.collect()
    gc.disable()
    try:
        for number, _ in enumerate(source.frames(np.arange(97))):
            if number % 24:  # to look through all objects takes a while
                continue
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

    def counting(*arguments, original=video._frames_from):
        for frame in original(*arguments):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(video, "_frames_from", counting)
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
    "pipe": (os.mkfifo, "a pipe"),
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
    source = images.open_source(tmp_path / "a.mp4")
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
        pytest.raises(MediaError, match="no option 'no_such_option'"),
        VideoWriter(path, 24, codec_options={"no_such_option": "1"}) as writer,
    ):
        writer.write(gray_frames(1)[0])
    with (
        pytest.raises(MediaError, match="Cannot write"),
        VideoWriter(path, 24, codec_options={"preset": "no_such_preset"}) as writer,
    ):
        writer.write(gray_frames(1)[0])
    assert os.listdir(tmp_path) == ["a.mp4"]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("crf", [0, 30])  # the file grows as frames come, or at the end only
def test_a_file_that_cannot_grow_is_one_sentence(tmp_path, crf):
    noise = np.random.default_rng(0).integers(0, 256, (20, 128, 128, 3), np.uint8)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # like a disk that is full
    try:
        with pytest.raises(MediaError, match=r"Cannot write .*a\.mp4.*File too large"):
            write_video(tmp_path / "a.mp4", noise, 24, crf=crf)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == []


def test_equal_frames_give_a_file_of_equal_bytes_with_the_index_in_front(tmp_path):
    frames = [texture(48, 48, seed) for seed in range(12)]
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, frames, 24)
    data = (tmp_path / "a.mp4").read_bytes()
    assert data == (tmp_path / "b.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    with av.open(str(tmp_path / "a.mp4")) as container:
        coded = container.streams.video[0].codec_context
        assert (coded.name, coded.pix_fmt) == ("h264", "yuv420p")


def test_a_keyframe_stands_where_it_is_asked_for(tmp_path):
    with VideoWriter(tmp_path / "a.mp4", 24) as writer:
        for number, frame in enumerate(gray_frames(9)):
            writer.write(frame, keyframe=number in (0, 5))
    with av.open(str(tmp_path / "a.mp4")) as container:
        packets = [packet for packet in container.demux(video=0) if packet.pts is not None]
    assert sum(packet.is_keyframe for packet in packets) == 2


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
    folder = pathlib.Path(__file__).parents[2] / "example"
    facts = json.loads((folder / "video.json").read_text())
    frames = open_clip(folder / "video.mp4", resolution=facts["size"], rate=facts["rate"]).read()
    change = np.abs(np.diff(frames.astype(np.int16), axis=0)).mean(axis=(1, 2, 3))
    assert len(frames) == facts["frames"] == facts["shots"][-1]["last_frame"] + 1
    expected_first = 0
    mean_change: dict[str, list[float]] = {}
    for shot in facts["shots"]:
        first, last = shot["first_frame"], shot["last_frame"]
        assert (first, first % 16, (last + 1) % 16) == (expected_first, 0, 0), shot
        inside = change[first:last]
        if shot["motion"] == "still":
            assert last - first + 1 >= facts["rate"]
            assert (inside == 0).all(), shot
        elif shot["motion"] == "medium":  # text that moves in every second frame
            assert (np.maximum(inside[1:], inside[:-1]) > 1).all(), shot
        else:
            assert (inside > 1).all(), shot
        mean_change.setdefault(shot["motion"], []).append(inside.mean())
        expected_first = last + 1
    assert min(mean_change["fast"]) > max(mean_change["slow"] + mean_change["medium"])


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


@pytest.mark.parametrize(
    ("signature", "results"),
    [
        ("tokens.npz report.json", "viz.mp4 viz.png plot.png decoded.mp4 decoded.png"),
        ("plan.json summary.json", "summary.png"),
        ("evaluation.json summary.csv", "evaluation.png"),
        ("config.json metrics.jsonl", "eval/00000100/original.png"),
    ],
)
def test_results_of_earlier_runs_are_no_media_and_files_beside_them_are(
    tmp_path, caplog, signature, results
):
    for name in (*signature.split(), *results.split(), "mine.mp4", "below/viz.mp4"):
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).touch()
    caplog.set_level("INFO", "elastic")
    found = {str(path.relative_to(tmp_path)) for path in find_media(tmp_path)}
    assert found == {"out/mine.mp4", "out/below/viz.mp4"}
    told = "Results of earlier runs are left out" in caplog.text
    assert told or "eval/" in results
    assert [str(path) for path in find_media(tmp_path / "out", without=tmp_path)] == []
    (tmp_path / "out" / signature.split()[0]).unlink()
    assert len(find_media(tmp_path)) == 2 + len(results.split())  # then all may be the user's
    assert is_media("x.WebM")
    assert not is_media("x.txt")

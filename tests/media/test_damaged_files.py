"""Media that begin in the middle, break off or are damaged: what can be shown is, and the log says so."""

import logging
import types

import av
import numpy as np
import pytest
from media_cases import CLIP, ffmpeg

from elastic.media import MediaError, open_clip, probe
from elastic.media import video as media_video

CUTS = {  # file -> how it is written, and where it is cut: at a second, or at a share of its bytes
    "mpeg2.ts": ("-c:v mpeg2video -g 12 -bf 2", "0.7"),
    "mpeg2.mpg": ("-c:v mpeg2video -g 12 -bf 2", 0.3),
    "mpeg2.vob": ("-c:v mpeg2video -g 12 -bf 2", 0.55),
    "mpeg4.avi": ("-c:v mpeg4 -g 12 -bf 2", "0.7"),
    "open.ts": ("-c:v libx264 -g 12 -bf 3 -x264-params open-gop=1:scenecut=0", "0.7"),
    "open.mkv": ("-c:v libx264 -g 12 -bf 3 -x264-params open-gop=1:scenecut=0", "0.7"),
    "hevc.mkv": (
        "-c:v libx265 -x265-params keyint=12:bframes=3:open-gop=1:scenecut=0:log-level=none",
        "0.7",
    ),
    "middle.ts": ("-c:v libx264 -g 24 -bf 3", 0.3),
    "bare.h264": ("-c:v libx264 -g 24 -bf 3", 0.3),
}


def cut(path, place):
    """Cuts off the start of the file, as a copy from `place` on or between any two bytes."""
    made = path.with_stem("cut")
    if isinstance(place, str):
        ffmpeg("-ss", place, "-i", path, "-c", "copy", made)
    else:
        whole = path.read_bytes()
        made.write_bytes(whole[int(len(whole) * place) // 188 * 188 :])  # whole packets of a .ts
    return made


def count(path):
    """How many frames the command line of ffmpeg decodes."""
    listed = ffmpeg("-v", "quiet", "-i", path, "-fps_mode", "passthrough", "-f", "framemd5", "-")
    return sum(not line.startswith(b"#") for line in listed.splitlines())


def flip(path, start, stop=None, every=1):
    """Damages every so many bytes of the file."""
    data = np.frombuffer(path.read_bytes(), np.uint8).copy()
    data[start:stop:every] ^= 255
    path.write_bytes(data.tobytes())


def told(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# A start in the middle


@pytest.mark.parametrize("name", CUTS)
def test_frames_that_need_earlier_ones_are_left_out_and_all_others_shown(
    golden, tmp_path, caplog, name
):
    options, place = CUTS[name]
    ffmpeg("-i", golden / CLIP, "-t", "2", *options.split(), tmp_path / name)
    whole = open_clip(tmp_path / name, resolution=60, rate=None)
    assert told(caplog) == []
    made = cut(tmp_path / name, place)
    clip = open_clip(made, resolution=60, rate=None)
    (message,) = told(caplog)
    assert "left out" in message
    assert str(made) in message
    frames = clip.read()
    assert len(frames) == clip.info.num_frames == count(made) >= 24
    np.testing.assert_array_equal(frames, whole.read()[-len(frames) :])
    assert (clip.info.rate, clip.info.variable_rate) == (whole.info.rate, False)
    for start in range(0, len(frames), 5):
        np.testing.assert_array_equal(list(clip.frames(start)), frames[start:])
    assert len(told(caplog)) == 1  # however often it is read


def test_a_start_whose_parameters_are_far_away_is_left_out_too(tmp_path):
    # The first 5 MB are all that ffmpeg looks at for what a decoder needs.
    noise = ("-f", "lavfi", "-i", "testsrc2=size=640x480:duration=1:rate=24")
    coded = "-vf noise=alls=99:allf=t -c:v libx264 -preset ultrafast -qp 2 -g 16".split()
    ffmpeg(*noise, *coded, tmp_path / "a.ts")
    made = cut(tmp_path / "a.ts", 0.05)
    assert made.stat().st_size > 8e6
    assert open_clip(made, resolution=16).read().shape[0] == count(made) == 8


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.webm"])
def test_a_damaged_first_keyframe_leaves_the_frames_after_the_next(golden, tmp_path, name):
    options = "libvpx-vp9 -deadline realtime" if name == "a.webm" else "libx264 -bf 0"
    ffmpeg("-i", golden / CLIP, "-t", "1", "-c:v", *options.split(), "-g", 12, tmp_path / name)
    whole = open_clip(tmp_path / name, resolution=60, rate=None).read()
    with av.open(str(tmp_path / name)) as container:
        keyframe = bytes(next(container.demux(video=0)))
    start = (tmp_path / name).read_bytes().index(keyframe)
    flip(tmp_path / name, start, start + len(keyframe))
    frames = open_clip(tmp_path / name, resolution=60, rate=None).read()
    # H.264 may show one that follows the damage, which its decoder takes for recovered.
    assert 18 <= len(frames) == count(tmp_path / name) <= 19
    np.testing.assert_array_equal(frames[-18:], whole[12:])


def test_probing_decodes_no_further_than_the_first_frame(golden, tmp_path, monkeypatch):
    options, place = CUTS["open.mkv"]
    ffmpeg("-i", golden / CLIP, *options.split(), tmp_path / "a.mkv")
    given = []

    class Stream:
        def __init__(self, stream):
            self.stream = stream

        def __getattr__(self, name):
            return getattr(self.stream, name)

        def decode(self, packet):
            given.append(packet)
            return self.stream.decode(packet)

    monkeypatch.setattr(
        media_video,
        "_video_stream",
        lambda *arguments, original=media_video._video_stream: Stream(original(*arguments)),
    )
    assert probe(cut(tmp_path / "a.mkv", place)).num_frames > 70
    assert 1 <= len(given) < 12


@pytest.mark.parametrize(
    ("packets", "first", "fed", "shown"),
    [
        # Two frames before a keyframe, in the order of decoding; and with the rest of a frame.
        ([(12, 9, True), (10, 10, False), (11, 11, False), (15, 12, False)], 12, 4, [12, 15]),
        ([(12, 8, False), (12, 9, True), (11, 11, False), (15, 12, False)], 12, 4, [12, 15]),
        # A clock that is set back later: nothing before it is missing.
        ([(12, 12, True), (13, 13, False), (3, 3, True), (4, 4, False)], 12, 1, [12, 13, 3, 4]),
        # No stamps before zero, or none at all.
        ([(0, None, True), (None, None, False), (3, 0, False)], 0, 3, [0, 3]),
        ([(0, 0, True), (None, None, False), (3, 3, False)], 0, 1, [0, None, 3]),
        ([(None, None, False), (None, None, True)], None, 2, [None]),
        ([(None, None, False), (None, None, True)], None, 1, [None, None]),
    ],
)
def test_only_what_precedes_the_first_frame_is_its_lead(packets, first, fed, shown):
    walk = types.SimpleNamespace(
        packets=[media_video._Packet(*packet) for packet in packets],
        first=types.SimpleNamespace(pts=first),
        fed=fed,
        by_order=False,
    )
    assert [packet.pts for packet in media_video._without_lead(walk)] == shown


# Damage and missing ends


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_damaged_frames_are_shown_and_counted_in_one_warning(
    golden, tmp_path, caplog, monkeypatch, name
):
    # Threads that decode a frame each may see the damage of another's frame, or may not yet.
    monkeypatch.setattr(media_video, "decoder_threads", 1)
    ffmpeg("-i", golden / CLIP, "-c:v", "libx264", "-crf", 5, "-g", 24, tmp_path / name)
    size = (tmp_path / name).stat().st_size
    flip(tmp_path / name, size // 2, size * 3 // 4, every=3001)
    with av.open(str(tmp_path / name)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        damaged = sum(frame.is_corrupt for frame in container.decode(video=0))
    assert damaged > 2
    clip = open_clip(tmp_path / name, resolution=16, rate=None)
    assert len(list(clip.frames(0, 24))) == 24  # before the damage
    assert told(caplog) == []
    for _ in range(2):
        assert len(clip.read()) == 97
        (message,) = told(caplog)
        assert f"{damaged} of the 97" in message
        assert str(tmp_path / name) in message


@pytest.mark.parametrize("name", ["a.mkv", "a.webm", "a.flv"])
def test_a_file_shorter_than_its_header_states_is_told(golden, tmp_path, caplog, name):
    codec = "libvpx-vp9 -deadline realtime -cpu-used 8" if name == "a.webm" else "libx264"
    ffmpeg("-i", golden / CLIP, "-c:v", *codec.split(), tmp_path / name)
    sound = ("-f", "lavfi", "-i", "sine=duration=6", "-c:v", "copy")
    ffmpeg("-i", tmp_path / name, *sound, tmp_path / f"sound_{name}")  # it lasts longer
    for whole in (name, f"sound_{name}"):
        assert probe(tmp_path / whole).num_frames == 97
    assert told(caplog) == []
    for whole in (name, f"sound_{name}"):
        data = (tmp_path / whole).read_bytes()
        (tmp_path / f"cut_{whole}").write_bytes(data[: len(data) // 2])
        assert probe(tmp_path / f"cut_{whole}").num_frames < 70
        assert any(f"cut_{whole}: the header states" in message for message in told(caplog))


def test_damage_in_the_middle_that_costs_a_frame_is_an_error_still(golden, tmp_path):
    ffmpeg("-i", golden / CLIP, "-c:v", "libx264", "-g", 24, "-bf", 0, tmp_path / "a.mp4")
    with av.open(str(tmp_path / "a.mp4")) as container:
        packet = bytes(list(container.demux(video=0))[48])
    start = (tmp_path / "a.mp4").read_bytes().index(packet)
    flip(tmp_path / "a.mp4", start, start + len(packet))
    with pytest.raises(MediaError, match=r"can(not)? be decoded"):
        open_clip(tmp_path / "a.mp4", resolution=16, rate=None).read()

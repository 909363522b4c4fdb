"""Video through PyAV: counting and timing frames, seeking, decoding, turning them upright."""

import bisect
import contextlib
import logging
import pathlib
import struct
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

import av
import av.container
import av.error
import numpy as np
from av.stream import Disposition
from PIL import Image

from elastic.media_file import (
    Frames,
    MediaError,
    Place,
    Source,
    check_size,
    damaged,
    open_file,
    reason,
    timed_source,
    to_rgb,
)

log = logging.getLogger(__name__)

# No playlists, no text "videos": a file is decoded from its own bytes, not from what it points to.
_DEMUXERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif,apng,ivf,h264,hevc,m4v,"
    "mjpeg,mxf,nut,rm,dv,yuv4mpegpipe,obu,av1,tiff_pipe,png_pipe,jpegxl_pipe,dpx_pipe,exr_pipe"
)
_FFMPEG_OPTIONS = {"protocol_whitelist": "file", "format_whitelist": _DEMUXERS}
# Codecs whose frames after a keyframe need nothing from before it. (A GIF's "keyframes" do.)
_SEEKABLE_CODECS = frozenset(
    "h264 hevc av1 vp8 vp9 mpeg1video mpeg2video mpeg4 mjpeg prores dnxhd ffv1 theora".split()
)
_WORTH_A_SEEK = 8  # frames; fewer are decoded sooner than skipped
# Threads of one decoder; 0: as many as there are cores. Processes that share the cores set 1.
decoder_threads = 0
_QUARTERS = {  # degrees against the clock
    90: Image.Transpose.ROTATE_90,
    180: Image.Transpose.ROTATE_180,
    270: Image.Transpose.ROTATE_270,
}
_SWAPPING = {Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_270}


@contextlib.contextmanager
def _open_container(path: Place) -> Iterator[av.container.InputContainer]:
    with contextlib.ExitStack() as stack:
        if isinstance(path, pathlib.Path):
            source = f"file:{path}"  # keeps a name such as 'concat:x' or 'a:b.mp4' a name
        else:
            source = stack.enter_context(open_file(path))
        yield stack.enter_context(
            av.open(source, "r", options=_FFMPEG_OPTIONS, metadata_errors="replace")
        )


def video_source(path: Place, head: bytes) -> Source:
    """A video from its packets; `head`: the first bytes of the file.

    Counts packets and notes their times; decodes only until the first frame shows the size.
    """
    first, stamps, num_packets, last_duration = None, [], 0, 0
    keyframes: list[int] = []  # their stamps
    try:
        with _open_container(path) as container:
            stream = _video_stream(path, container)
            announced = sum(entry.size > 0 for entry in stream.index_entries)
            time_base = stream.time_base or Fraction(1, 1000)
            nominal_rate = stream.average_rate or stream.guessed_rate
            can_seek = stream.codec_context.codec.canonical_name in _SEEKABLE_CODECS
            for packet in container.demux(stream):
                if first is None:
                    first = next(iter(packet.decode()), None)
                if packet.size == 0 or packet.is_corrupt:
                    continue
                num_packets += 1
                if not packet.is_discard:  # an edit list cuts these; the decoder drops them too
                    if packet.is_keyframe and packet.pts is not None:
                        keyframes.append(packet.pts)
                    stamps.append(packet.pts)
                    last_duration = packet.duration or last_duration
    except (av.error.FFmpegError, OSError) as error:
        if head[4:8] == b"ftyp" and first is None:
            raise MediaError(
                f"{str(path)!r} is a cut-off or damaged MP4 ({reason(error)}); "
                "copy or download it again."
            ) from error
        if first is None:
            raise MediaError(
                f"{str(path)!r} is neither a picture nor a video that can be read "
                f"({reason(error)}); convert it to MP4 or PNG."
            ) from error
        raise damaged(path, error) from error
    if num_packets < announced:
        raise MediaError(
            f"{str(path)!r} is truncated: {num_packets} of its {announced} frames are there; "
            "copy or download it again."
        )
    if first is None or not stamps:
        raise MediaError(f"{str(path)!r} has a video stream but no frame that can be decoded.")
    check_size(path, first.width, first.height)

    # Without (usable) stamps frames are told by their order.
    position_of: dict[int | None, int] = {}
    times = np.zeros(len(stamps))
    if None not in stamps and len(set(stamps)) == len(stamps):
        stamps.sort()
        position_of = {stamp: position for position, stamp in enumerate(stamps)}
        times = np.array([float((stamp - stamps[0]) * time_base) for stamp in stamps])
    typical = float(np.median(np.diff(times))) if len(times) > 1 else 0.0
    duration = float(times[-1]) + (float(last_duration * time_base) or typical)

    # Asked once: a PyAV frame whose side data were touched lives until the next garbage collection.
    turns = _turns(first)
    usable = sorted(keyframes) if can_seek and position_of else []
    track = _Track(path, position_of, len(stamps), usable, turns)

    def frames(positions: np.ndarray) -> Frames:
        return _decode(track, positions)

    swapped = bool(_SWAPPING & set(turns))
    size = (first.height, first.width) if swapped else (first.width, first.height)
    rate = None if nominal_rate is None else float(nominal_rate)
    return timed_source(path, *size, times, duration, rate, frames)


def _video_stream(path: Place, container) -> av.VideoStream:
    stream = container.streams.best("video")
    if stream is None or stream.disposition & Disposition.attached_pic:
        what = "only sound" if container.streams.audio else "no video stream"
        raise MediaError(f"{str(path)!r} holds {what}; give a file with a picture.")
    if stream.codec_context is None:
        raise MediaError(f"{str(path)!r} uses a codec without a decoder here; convert it to H.264.")
    return stream


class _Track(NamedTuple):
    """What probing a video found that decoding needs."""

    path: Place
    position_of: dict[int | None, int]  # by time stamp; empty: told by order
    num_frames: int
    keyframes: list[int]  # ascending time stamps; empty: decoding starts at the first frame
    turns: list[Image.Transpose]


class _Seek(NamedTuple):
    """Where to start: a time stamp to ask for, and the last one at which the start is early enough."""

    stamp: int
    latest: int


class _SeekError(Exception):
    """Decoding from a keyframe did not give the frames that decoding from the start gives."""


def _decode(track: _Track, positions: np.ndarray) -> Frames:
    """Yields the frames at `positions` (ascending); decodes in order, no further than needed.

    Starts at the last keyframe before the first of them. Should that go wrong, at the keyframe
    before, and then at the very first frame: damage is only reported by the latter.
    """
    wanted, given = positions.tolist(), 0
    before = bisect.bisect_right(
        track.keyframes, wanted[0], key=lambda stamp: track.position_of[stamp]
    )
    usable = track.keyframes[:before]
    for stamp in reversed(usable[-2:]):
        if track.position_of[stamp] < _WORTH_A_SEEK:
            break
        try:
            for frame in _decode_from(track, _Seek(stamp, usable[-1]), wanted[given:]):
                yield frame
                given += 1
            return
        except _SeekError:
            log.debug("%s: decoding from stamp %d gave no good frames.", track.path, stamp)
    yield from _decode_from(track, None, wanted[given:])


def _decode_from(track: _Track, seek: _Seek | None, positions: list[int]) -> Frames:
    decoded, wanted = 0, iter(positions)
    target = next(wanted, None)
    try:
        with _open_container(track.path) as container:
            stream = _video_stream(track.path, container)
            stream.thread_type = "AUTO"
            stream.codec_context.thread_count = decoder_threads
            for frame in _frames_from(container, stream, seek):
                position_of = track.position_of
                here = position_of.get(frame.pts, -1) if position_of else decoded
                decoded += 1
                if here == target:
                    if seek is not None and frame.is_corrupt:
                        raise _SeekError
                    yield _frame_to_rgb(track.path, frame, track.turns)
                    target = next(wanted, None)
                elif target is not None and here > target:
                    if seek is not None:
                        raise _SeekError
                    raise MediaError(
                        f"{str(track.path)!r} is damaged: frame {target} of {track.num_frames} "
                        "cannot be decoded; copy or download it again."
                    )
                if target is None:
                    return
    except (av.error.FFmpegError, OSError) as error:
        if seek is None and decoded == 0:
            raise damaged(track.path, error) from error
    if seek is not None:
        raise _SeekError
    raise MediaError(
        f"{str(track.path)!r} is truncated or damaged: {decoded} of its {track.num_frames} frames "
        "can be decoded; copy or download it again."
    )


def _frames_from(
    container: av.container.InputContainer, stream: av.VideoStream, seek: _Seek | None
) -> Iterator[av.VideoFrame]:
    """All frames, or those from a keyframe on."""
    if seek is None:
        yield from container.decode(stream)
        return
    container.seek(seek.stamp, stream=stream)
    packets = container.demux(stream)
    first = next(packets)
    # A container that is indexed by decoding time may find the next keyframe instead.
    if first.pts is None or first.pts > seek.latest:
        raise _SeekError
    yield from first.decode()
    for packet in packets:
        yield from packet.decode()


def _frame_to_rgb(path: Place, frame: av.VideoFrame, turns: list[Image.Transpose]) -> Image.Image:
    """The frame as displayed, converted by its own colour matrix and range."""
    if frame.format.has_palette or any(component.is_alpha for component in frame.format.components):
        image = to_rgb(path, Image.fromarray(frame.to_ndarray(format="rgba")))
    else:
        image = Image.fromarray(frame.to_ndarray(format="rgb24"))
    for turn in turns:
        image = image.transpose(turn)
    return image


def _turns(frame: av.VideoFrame) -> list[Image.Transpose]:
    """What the container's display matrix asks for: quarter turns and mirrorings, in order."""
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV lists no side data when it does not know the name of one of them
        turn = _QUARTERS.get(frame.rotation % 360)
        return [] if turn is None else [turn]
    if matrix is None:
        return []
    # Shown x = a x + c y, shown y = b x + d y, y downwards; stored fixed-point: a b u c d v x y w.
    a, b, _, c, d = struct.unpack("=5i", bytes(matrix)[:20])
    turns = []
    if abs(b) > abs(a):
        turns.append(Image.Transpose.TRANSPOSE)
        a, d = c, b  # what now multiplies the shown x and y
    if a < 0:
        turns.append(Image.Transpose.FLIP_LEFT_RIGHT)
    if d < 0:
        turns.append(Image.Transpose.FLIP_TOP_BOTTOM)
    return turns

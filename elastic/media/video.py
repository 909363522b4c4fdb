"""Video through PyAV: counts and times frames, seeks, decodes, and applies rotation."""

import bisect
import collections
import contextlib
import dataclasses
import logging
import struct
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, NamedTuple, cast

import av
import av.container
import av.error
import numpy as np
from av.stream import Disposition
from PIL import Image

from elastic.media import decord_reader
from elastic.media.color import TRANSFERS, FrameConverter, to_rgb
from elastic.media.errors import MediaError, check_size, damaged, reason, warn_once
from elastic.media.location import Place, local_path, open_file
from elastic.media.source import Frames, MediaSource
from elastic.media.timing import nominal_rate, timed_source

log = logging.getLogger(__name__)

# Without playlists and text formats: a file is decoded from its own bytes, never from other files that it names.
_DEMUXERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif,apng,ivf,h264,hevc,m4v,"
    "mjpeg,mxf,nut,rm,dv,yuv4mpegpipe,obu,av1,tiff_pipe,png_pipe,jpegxl_pipe,dpx_pipe,exr_pipe"
)
# Metadata that are no UTF-8 are no reason to refuse a file. PyAV 19 has no such argument and never refuses them.
_LENIENT: dict[str, Any] = (
    {"metadata_errors": "replace"} if hasattr(av.container.Container, "metadata_errors") else {}
)
_FFMPEG_OPTIONS = {"protocol_whitelist": "file", "format_whitelist": _DEMUXERS}
# Codecs whose frames after a keyframe need no frame before it. (Those after a GIF's "keyframes" do.)
_SEEKABLE_CODECS = frozenset(
    "h264 hevc av1 vp8 vp9 mpeg1video mpeg2video mpeg4 mjpeg prores dnxhd ffv1 theora".split()
)
# Containers whose header states the duration; for others ffmpeg computes it from the last stamps.
_STATING_DURATION = frozenset(("matroska,webm", "flv", "avi", "asf"))
_MISSED_SECONDS = 0.5  # a file that ends so much earlier than stated may be cut off
# Decoders that decode the transparency of a WebM; ffmpeg's own ones skip it.
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
_REORDERING_CODECS = frozenset(("h264", "hevc"))
_DEPENDENT = Disposition.dependent  # a part of another stream, such as a tile of a picture
_PICTURE_BRANDS = frozenset((b"heic", b"heix", b"heim", b"heis", b"mif1", b"avif", b"miaf"))
_WORTH_A_SEEK = 8  # frames; decoding fewer is faster than seeking past them
# Threads of one decoder; 0: one per core. Worker processes, which share the cores, set 1.
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
        local = local_path(path)
        if local is not None:
            source = (
                f"file:{local}"  # so that a name such as 'concat:x' or 'a:b.mp4' is no protocol
            )
        else:
            source = stack.enter_context(open_file(path))
        yield stack.enter_context(av.open(source, "r", options=_FFMPEG_OPTIONS, **_LENIENT))


def video_source(
    path: Place, head: bytes, *, exact_color: bool = False, reader: str = "pyav"
) -> MediaSource:
    """A video from its packets.

    Counts packets and takes their times. Decodes only up to the first frame, which gives the size and the
    start of the clip: a cut or a recording may start with frames that need earlier ones.

    Args:
      path: the file.
      head: its first 12 bytes.
      exact_color: see `color.FrameConverter`.
      reader: who decodes; files that decord would show differently are left to PyAV.
    """
    try:
        walk = _walk(path)
    except _ProbeError as error:
        if head[4:8] == b"ftyp":
            raise MediaError(
                f"{str(path)!r} is a cut-off or damaged MP4 ({error}); copy or download it again."
            ) from error
        raise MediaError(
            f"{str(path)!r} is neither a picture nor a video that can be read ({error}); "
            "convert it to MP4 or PNG."
        ) from error
    first, packets = walk.first, _without_lead(walk)
    if first is None or not packets:
        raise MediaError(f"{str(path)!r} has a video stream but no frame that can be decoded.")
    check_size(path, first.width, first.height)

    # Without usable stamps frames are identified by their order.
    stamps = sorted({packet.pts for packet in packets if packet.pts is not None})
    position_of: dict[int | None, int] = {}
    times = np.zeros(len(packets))
    if len(stamps) == len(packets):
        position_of = {stamp: position for position, stamp in enumerate(stamps)}
        times = np.array([float((stamp - stamps[0]) * walk.time_base) for stamp in stamps])
    if walk.by_order:
        position_of = {}
    typical = float(np.median(np.diff(times))) if len(times) > 1 else 0.0
    duration = float(times[-1]) + (float(walk.last_duration * walk.time_base) or typical)
    _warn_of_missing_frames(path, walk, len(packets), max(_MISSED_SECONDS, 3 * typical))

    # Read once: a PyAV frame whose side data were read lives until the next garbage collection.
    turns = _turns(first)
    keyframes = []
    if walk.can_seek and position_of:
        keyframes = sorted(p.pts for p in packets if p.keyframe and p.pts is not None)
    size = _square_pixels(first.width, first.height, walk.pixel_aspect)
    check_size(path, *size)
    hdr = int(first.color_trc) in TRANSFERS
    track = _Track(path, position_of, len(packets), keyframes, turns, size, exact_color, hdr)

    by_decord = (
        reader == "decord"
        and local_path(path) is not None
        and decord_reader.decodes_alike(first)
        # Without times of display, decord jumps to other frames than those it counts to.
        and bool(position_of)
        and not (turns or exact_color or track.hdr or len(packets) < len(walk.packets))
    )
    if reader == "decord" and not by_decord:
        log.info("%s is read by PyAV: decord would show it differently.", path)

    def frames(positions: np.ndarray) -> Frames:
        return _decode_by_decord(track, positions) if by_decord else _decode(track, positions)

    shown = (size[1], size[0]) if _SWAPPING & set(turns) else size
    rate = nominal_rate(*walk.nominal_rates, stamps if position_of else [], walk.time_base)
    source = timed_source(path, *shown, times, duration, rate, frames)
    aspect = walk.pixel_aspect.as_integer_ratio()
    info = dataclasses.replace(
        source.info,
        transfer=TRANSFERS.get(int(first.color_trc), "sdr"),
        pixel_aspect=aspect[::-1] if _SWAPPING & set(turns) else aspect,
    )
    if head[4:8] == b"ftyp" and head[8:12] in _PICTURE_BRANDS and len(packets) == 1:
        picture = dataclasses.replace(info, kind="image", rate=0.0, variable_rate=False)
        return MediaSource(picture, None, 0.0, frames)
    return dataclasses.replace(source, info=info)


def _square_pixels(width: int, height: int, aspect: Fraction) -> tuple[int, int]:
    """Columns and rows with square pixels: the shorter axis is enlarged, so that no detail is lost."""
    if aspect >= 1:
        return round(width * aspect), height
    return width, round(height / aspect)


class _ProbeError(Exception):
    """Nothing in the file can be decoded; the text is the reason."""


class _Packet(NamedTuple):
    """What the container states about a frame."""

    pts: int | None  # when it is shown, in ticks
    dts: int | None  # when it is decoded: ascending, and never later
    keyframe: bool


class _Walk(NamedTuple):
    """What reading all packets of a file has shown."""

    packets: list[_Packet]  # as stored, without those that an edit list cuts away
    first: av.VideoFrame | None  # the first frame that the decoder gives
    fed: int  # packets that the decoder had received by then
    num_damaged: int  # packets that the container marks as such
    last_duration: int  # in ticks
    time_base: Fraction  # seconds per tick
    nominal_rates: tuple[Fraction | None, Fraction | None]  # the mean, and a guess at the intended
    can_seek: bool
    by_order: bool  # the stamps are not those of display
    pixel_aspect: Fraction  # width of a pixel over its height
    stated_seconds: float  # duration that the header states; 0.0: none
    end_seconds: float  # end of the last packet of any stream, if the header states a duration


def _walk(path: Place) -> _Walk:
    first, failure, fed, packets = None, None, 0, []
    num_packets, num_damaged, last_duration, end = 0, 0, 0, 0.0
    try:
        with _open_container(path) as container:
            stream = _video_stream(path, container)
            announced = sum(entry.size > 0 for entry in stream.index_entries)
            time_base = _fraction(stream.time_base) or Fraction(1, 1000)
            nominal_rates = (_fraction(stream.average_rate), _fraction(stream.guessed_rate))
            codec = stream.codec_context.codec.canonical_name
            can_seek = codec in _SEEKABLE_CODECS
            # AVI numbers frames in the order of decoding.
            by_order = container.format.name == "avi" and codec in _REORDERING_CODECS
            aspect = _fraction(stream.sample_aspect_ratio) or Fraction(1)
            # Within 1 % it stems from rounding a size, and resampling would only blur; beyond 8 it is damage.
            if abs(aspect - 1) < Fraction(1, 100) or not Fraction(1, 8) <= aspect <= 8:
                aspect = Fraction(1)
            states = container.format.name in _STATING_DURATION
            stated = (container.duration or 0) / av.time_base if states else 0.0
            # All streams, if the file states its duration, because the sound may be the longest stream.
            for packet in container.demux(*([] if stated else [stream])):
                if stated and packet.pts is not None and packet.time_base is not None:
                    end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
                # Not `stream_index`, which is 0 in the last, empty packet that flushes the decoder.
                if packet.stream.index != stream.index:
                    continue
                if first is None:
                    fed = len(packets) + 1
                    try:
                        first = next(iter(stream.decode(packet)), None)
                    except av.error.FFmpegError as error:  # a later one may be decodable
                        failure = failure or error
                if packet.size == 0 or packet.is_corrupt:
                    num_damaged += packet.is_corrupt
                    continue
                num_packets += 1
                if not packet.is_discard:  # an edit list cuts these; the decoder drops them too
                    packets.append(_Packet(packet.pts, packet.dts, packet.is_keyframe))
                    last_duration = packet.duration or last_duration
    except (av.error.FFmpegError, OSError) as error:
        if first is None:
            raise _ProbeError(reason(error)) from error
        raise damaged(path, error) from error
    if first is None and failure is not None:
        raise _ProbeError(reason(failure)) from failure
    if num_packets < announced:
        raise MediaError(
            f"{str(path)!r} is truncated: {num_packets} of its {announced} frames are there; "
            "copy or download it again."
        )
    return _Walk(
        packets, first, fed, num_damaged, last_duration, time_base, nominal_rates, can_seek,
        by_order, aspect, stated_seconds=stated, end_seconds=end,
    )  # fmt: skip


def _without_lead(walk: _Walk) -> list[_Packet]:
    """The packets without those whose frames would be shown before the first decoded frame."""
    first, packets = walk.first, walk.packets
    if first is None:
        return []
    if (
        first.pts is None or walk.by_order
    ):  # a bare stream, without stamps: its decoder waits for a keyframe
        start = next((i for i, packet in enumerate(packets) if packet.keyframe), 0)
        return packets[start:] if start < walk.fed else packets
    same = [i for i, packet in enumerate(packets[: walk.fed]) if packet.pts == first.pts]
    shown, before = [], True
    for number, packet in enumerate(packets):
        # A frame that is decoded later is shown later, unless the clock was set back, which is no lead.
        before = before and (packet.dts is None or packet.dts < first.pts)
        if packet.pts is None:  # Matroska has no times before zero
            early = packet.dts is None and number < walk.fed
        elif packet.pts == first.pts:  # the rest of a cut frame may carry the next frame's stamp
            early = not packet.keyframe and number in same[:-1]
        else:
            early = packet.pts < first.pts
        if not (before and early):
            shown.append(packet)
    return shown


def _warn_of_missing_frames(path: Place, walk: _Walk, num_frames: int, most_seconds: float) -> None:
    if num_frames < len(walk.packets):
        warn_once(
            path,
            "%s: the first %d of its %d frames cannot be decoded, most likely because they need "
            "earlier ones; they are left out.",
            len(walk.packets) - num_frames,
            len(walk.packets),
        )
    if walk.num_damaged:
        message = "%s: frames that the container marks as damaged are left out: %d."
        warn_once(path, message, walk.num_damaged)
    # An MP4's index lists every frame, so a short file is refused. A stated duration may be wrong, so it only warns.
    if walk.stated_seconds - walk.end_seconds > most_seconds:
        warn_once(
            path,
            "%s: the header states %.3g s, but the file holds %.3g s. If it was cut off, "
            "copy or download it again.",
            walk.stated_seconds,
            walk.end_seconds,
        )


def _video_stream(path: Place, container) -> av.VideoStream:
    tiles = [s for s in container.streams.video if s.disposition & _DEPENDENT]
    if tiles and container.format.name.startswith("mov"):
        raise MediaError(
            f"{str(path)!r} is a picture made of {len(tiles)} tiles (HEIF), which are not put together here; "
            "convert it to JPEG or PNG, or `pip install pillow-heif`."
        )
    stream = container.streams.best("video")
    if stream is None or stream.disposition & (Disposition.attached_pic | _DEPENDENT):
        what = "only sound" if container.streams.audio else "no video stream"
        raise MediaError(f"{str(path)!r} holds {what}; give a file with a picture.")
    if stream.codec_context is None:
        raise MediaError(f"{str(path)!r} uses a codec without a decoder here; convert it to H.264.")
    return stream


def _fraction(value: Any) -> Fraction | None:
    """A ratio of any version of PyAV; None if it is 0 or unknown."""
    if value is None or not value.denominator or not value.numerator:
        return None
    return Fraction(value.numerator, value.denominator)


class _Track(NamedTuple):
    """Facts from probing a video that decoding needs."""

    path: Place
    position_of: dict[int | None, int]  # by time stamp; empty: by order of decoding
    num_frames: int
    keyframes: list[int]  # ascending time stamps; empty: decoding starts at the first frame
    turns: list[Image.Transpose]
    size: tuple[int, int]  # columns and rows in square pixels, before the turns
    exact_color: bool
    hdr: bool


class _Seek(NamedTuple):
    """Where to start decoding: the time stamp to seek to, and the latest stamp that is early enough."""

    stamp: int
    latest: int


class _SeekError(Exception):
    """Decoding from a keyframe did not give the frames that decoding from the start gives."""


def _decode_by_decord(track: _Track, positions: np.ndarray) -> Frames:
    """Yields the frames at `positions` (ascending), decoded by decord."""
    frames = decord_reader.decode(
        track.path, positions, num_frames=track.num_frames, threads=decoder_threads
    )
    try:
        for frame in frames:
            yield _as_displayed(track, frame)
    finally:
        frames.close()


def _decode(track: _Track, positions: np.ndarray) -> Frames:
    """Yields the frames at `positions` (ascending); decodes in order, no further than needed.

    Decoding starts at the last keyframe before the first position. If that fails, it starts at the keyframe
    before, and then at the first frame of the file. Only the last attempt reports damage.
    """
    wanted, given = positions.tolist(), 0
    tally: collections.Counter[str] = collections.Counter()
    before = bisect.bisect_right(
        track.keyframes, wanted[0], key=lambda stamp: track.position_of[stamp]
    )
    usable = track.keyframes[:before]
    try:
        for stamp in reversed(usable[-2:]):
            if track.position_of[stamp] < _WORTH_A_SEEK:
                break
            try:
                for frame in _decode_from(track, _Seek(stamp, usable[-1]), wanted[given:], tally):
                    yield frame
                    given += 1
                return
            except _SeekError:
                log.debug("%s: decoding from stamp %d gave no good frames.", track.path, stamp)
        yield from _decode_from(track, None, wanted[given:], tally)
    finally:
        if tally["damaged"]:
            warn_once(
                track.path,
                "%s: damaged frames: %d of the %d read, and others may build on them; they are used "
                "as the decoder shows them. Copy or download the file again.",
                tally["damaged"],
                tally["read"],
            )


def _decode_from(
    track: _Track, seek: _Seek | None, positions: list[int], tally: collections.Counter[str]
) -> Frames:
    decoded, wanted = 0, iter(positions)
    target = next(wanted, None)
    try:
        with _open_container(track.path) as container:
            stream = _video_stream(track.path, container)
            stream.thread_type = "AUTO"
            stream.codec_context.thread_count = decoder_threads
            alpha = _alpha_decoder(track.path, stream)
            convert = FrameConverter(exact=track.exact_color, threads=decoder_threads)
            for frame in _frames_from(container, stream, seek, alpha):
                position_of = track.position_of
                here = position_of.get(frame.pts, -1) if position_of else decoded
                decoded += 1
                if here == target:
                    if seek is not None and frame.is_corrupt:
                        raise _SeekError
                    tally["read"] += 1
                    tally["damaged"] += frame.is_corrupt
                    yield _as_displayed(track, convert(frame))
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
    container: av.container.InputContainer,
    stream: av.VideoStream,
    seek: _Seek | None,
    alpha: av.VideoCodecContext | None,
) -> Iterator[av.VideoFrame]:
    """The frames of a video in order of display.

    Args:
      container: an open file.
      stream: its video stream.
      seek: where to start; None: at the first packet.
      alpha: decoder to use in place of the stream's own, if transparency needs one.
    """

    def decode(packet: av.Packet) -> list[av.VideoFrame]:
        if alpha is None:
            return stream.decode(packet)
        return alpha.decode(packet if packet.size else None)

    started = seek is not None
    if seek is not None:
        container.seek(seek.stamp, stream=stream)
    packets = container.demux(stream)
    if seek is not None:
        first = next(packets)
        # A container that is indexed by decoding time may find the next keyframe instead.
        if first.pts is None or first.pts > seek.latest:
            raise _SeekError
        yield from decode(first)
    for packet in packets:
        try:
            frames = decode(packet)
        except av.error.FFmpegError:
            if started:
                raise
            continue  # a frame before the first one decoded; probing left it out
        started = started or bool(frames)
        yield from frames


def _alpha_decoder(path: Place, stream: av.VideoStream) -> av.VideoCodecContext | None:
    """The decoder that keeps the stream's transparency; None if the stream's own decoder will do."""
    name = _ALPHA_DECODERS.get(stream.codec_context.codec.canonical_name)
    if name is None or stream.metadata.get("alpha_mode") != "1":
        return None
    if name not in av.codecs_available:
        warn_once(path, "%s: its transparency is left out; this PyAV has no decoder %s.", name)
        return None
    decoder = cast(av.VideoCodecContext, av.CodecContext.create(name, "r"))
    decoder.extradata = stream.codec_context.extradata
    decoder.thread_count = decoder_threads
    return decoder


def _as_displayed(track: _Track, image: Image.Image) -> Image.Image:
    """A converted frame over white, with square pixels, upright."""
    image = to_rgb(track.path, image)
    if image.size != track.size and track.size[0] * image.size[1] != track.size[1] * image.size[0]:
        image = image.resize(track.size, Image.Resampling.BICUBIC)
    for turn in track.turns:
        image = image.transpose(turn)
    return image


def _turns(frame: av.VideoFrame) -> list[Image.Transpose]:
    """The quarter turns and mirrorings of the container's display matrix, in order."""
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV raises if it does not know the name of some other side data
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

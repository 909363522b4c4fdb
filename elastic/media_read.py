"""Files -> frames at the source's own size and times: probing and decoding.

Bytes decide what a file is: Pillow knows pictures by their first bytes, ffmpeg (through PyAV)
probes the rest.
`elastic.media` is the door to this room.
"""

import logging
import os
import pathlib
import struct
import zlib
from collections.abc import Callable, Generator
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import av
import av.error
import numpy as np
from av.stream import Disposition
from PIL import Image, UnidentifiedImageError

log = logging.getLogger(__name__)

MAX_PIXELS = 89_478_485  # per frame: 268 MB as RGB, and Pillow's own limit for unannounced pictures

# Formats told by their first bytes that hold nothing but a picture (no scripts, no other files).
_IMAGE_FORMATS = (
    "AVIF",
    "BMP",
    "DIB",
    "GIF",
    "JPEG",
    "JPEG2000",
    "PNG",
    "PPM",
    "QOI",
    "TIFF",
    "WEBP",
)
# Of those, the ones whose further frames are an animation (in TIFF they are other pictures).
_ANIMATED_FORMATS = ("AVIF", "GIF", "PNG", "WEBP")
# No playlists, no text "videos": a file is decoded from its own bytes, not from what it points to.
_DEMUXERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif,apng,ivf,h264,hevc,m4v,"
    "mjpeg,mxf,nut,rm,dv,yuv4mpegpipe,obu,av1,tiff_pipe,png_pipe,jpegxl_pipe,dpx_pipe,exr_pipe"
)
_FFMPEG_OPTIONS = {"protocol_whitelist": "file", "format_whitelist": _DEMUXERS}
# What Pillow's decoders raise on damaged bytes; PyAV's errors share av.error.FFmpegError.
_PILLOW_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    TypeError,
    IndexError,
    KeyError,
    OverflowError,
)
_PILLOW_ERRORS += (
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
_UPRIGHT = {  # EXIF orientation -> what turns the stored picture into the displayed one
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_QUARTERS = {  # degrees against the clock
    90: Image.Transpose.ROTATE_90,
    180: Image.Transpose.ROTATE_180,
    270: Image.Transpose.ROTATE_270,
}
_SWAPPING = {Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_270}


class MediaError(ValueError):
    """A picture or video that cannot be read or written; the text names file, reason, way out."""


@dataclass(frozen=True)
class MediaInfo:
    """What a file holds, found without decoding it.

    Attributes:
      path: the file.
      kind: 'image' or 'video' (an animated GIF, PNG or WebP is a video), by content, not by name.
      width: columns as displayed, after rotation.
      height: rows as displayed.
      num_frames: how many frames it shows; exact, counted in the container.
      rate: frames per second, the mean one if it varies; 0.0 for an image.
      variable_rate: some frame is shown more than half a frame away from an even spacing.
    """

    path: pathlib.Path
    kind: Literal["image", "video"]
    width: int
    height: int
    num_frames: int
    rate: float
    variable_rate: bool


Frames = Generator[Image.Image, None, None]  # mode RGB, upright


@dataclass(frozen=True)
class Source:
    """A probed file: its facts, when each frame is shown, and how to get chosen frames."""

    info: MediaInfo
    times: np.ndarray | None  # seconds from the first frame, ascending; None: evenly spaced
    duration: float
    frames: Callable[[np.ndarray], Frames]  # ascending positions -> their frames


def open_source(path: str | os.PathLike[str]) -> Source:
    """Finds what `path` holds and how to read it; no more is decoded than a video's first frame.

    Raises:
      MediaError: as in `elastic.media.probe`.
    """
    path = pathlib.Path(path)
    try:
        with open(path, "rb") as file:
            head = file.read(12)
    except OSError as error:
        raise MediaError(f"Cannot read {str(path)!r}: {error.strerror}.") from error
    if not head:
        raise MediaError(f"{str(path)!r} is empty (0 bytes); copy or download it again.")
    try:
        with Image.open(path, formats=_IMAGE_FORMATS) as image:
            _check_size(path, *image.size)
            moving = image.format in _ANIMATED_FORMATS and getattr(image, "is_animated", False)
            if not moving:
                return _image_source(path, image)
            if image.format == "WEBP":  # ffmpeg's decoder reads still WebP only
                return _webp_source(path, image)
    except MediaError:
        raise
    except UnidentifiedImageError:
        pass
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise MediaError(f"{str(path)!r} is too large a picture: {error}") from error
    except _PILLOW_ERRORS as error:
        raise _damaged(path, error) from error
    return _video_source(path, head)


def _check_size(path: pathlib.Path, width: int, height: int) -> None:
    if not 0 < width * height <= MAX_PIXELS:
        raise MediaError(
            f"{str(path)!r} has {width} x {height} pixels, outside 1 to {MAX_PIXELS:,}; "
            "scale it down first."
        )


def _damaged(path: pathlib.Path, error: Exception) -> MediaError:
    return MediaError(
        f"{str(path)!r} is damaged or truncated ({error}); copy or download it again."
    )


def _image_source(path: pathlib.Path, image: Image.Image) -> Source:
    width, height = image.size
    if _orientation(image) >= 5:
        width, height = height, width

    def frames(positions: np.ndarray) -> Frames:
        try:
            with Image.open(path, formats=_IMAGE_FORMATS) as image:
                image.load()
                upright = _UPRIGHT.get(_orientation(image))
                picture = _to_rgb(path, image)
                picture = picture if upright is None else picture.transpose(upright)
        except MediaError:
            raise
        except _PILLOW_ERRORS as error:
            raise _damaged(path, error) from error
        yield picture

    info = MediaInfo(path, "image", width, height, num_frames=1, rate=0.0, variable_rate=False)
    return Source(info, None, 0.0, frames)


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(0x0112, 1)
    except _PILLOW_ERRORS as error:  # the picture is good, its notes are not
        log.warning(
            "%s: unreadable EXIF, taken as upright (%s).", getattr(image, "filename", ""), error
        )
        return 1


def _to_rgb(path: pathlib.Path, image: Image.Image) -> Image.Image:
    """Any mode -> RGB; transparency over white, 16 bits scaled to 8 (rounded)."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "F":
        raise MediaError(
            f"{str(path)!r} holds floating-point pixels of no known range; save it as 8 bits."
        )
    if image.mode.startswith("I"):  # Pillow's convert would clip them to white
        gray = np.asarray(image)
        if gray.size and not 0 <= gray.min() <= gray.max() <= 65535:
            raise MediaError(
                f"{str(path)!r} holds 32-bit pixels beyond 65535; save it as 8 or 16 bits."
            )
        return Image.fromarray(((gray.astype(np.uint32) + 128) // 257).astype(np.uint8)).convert(
            "RGB"
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")


def _webp_source(path: pathlib.Path, image: Image.Image) -> Source:
    durations = []
    with open(path, "rb") as file:
        file.seek(12)  # RIFF, its size, WEBP; then chunks: name, size, content, padded to even
        while len(header := file.read(8)) == 8:
            name, size = struct.unpack("<4sI", header)
            content = file.read(min(size, 16))
            if name == b"ANMF" and len(content) == 16:
                durations.append(max(1, int.from_bytes(content[12:15], "little")) / 1000)
            file.seek(size + size % 2 - len(content), os.SEEK_CUR)
    num_frames = getattr(image, "n_frames", 1)
    if len(durations) != num_frames:
        raise MediaError(
            f"{str(path)!r} is damaged: {len(durations)} of {num_frames} frames are there."
        )

    def frames(positions: np.ndarray) -> Frames:
        try:
            with Image.open(path, formats=("WEBP",)) as image:
                for position in positions:
                    image.seek(int(position))
                    yield _to_rgb(path, image).copy()  # decodes here, and survives the next seek
        except _PILLOW_ERRORS as error:
            raise _damaged(path, error) from error

    starts = np.concatenate([[0.0], np.cumsum(durations)])
    return _timed_source(path, *image.size, starts[:-1], float(starts[-1]), None, frames)


def _timed_source(path, width, height, times, duration, nominal_rate, frames) -> Source:
    """A video from the times of its frames; `nominal_rate`: what the container states, or None."""
    num_frames = len(times)
    variable, rate = False, nominal_rate or 25.0  # one frame, or no times at all
    if num_frames > 1 and times[-1] > 0:
        step = times[-1] / (num_frames - 1)
        variable = bool(np.abs(times - step * np.arange(num_frames)).max() > step / 2)
        if variable:
            rate = num_frames / duration
        elif nominal_rate is None or abs(nominal_rate * step - 1) > 0.01:
            rate = 1 / step  # the statement is missing or plainly wrong
    info = MediaInfo(path, "video", width, height, num_frames, float(rate), variable)
    return Source(info, times if variable else None, duration, frames)


def _open_container(path: pathlib.Path):
    # 'file:' keeps a name such as 'concat:x' or 'a:b.mp4' a name.
    return av.open(f"file:{path}", options=_FFMPEG_OPTIONS, metadata_errors="replace")


def _video_source(path: pathlib.Path, head: bytes) -> Source:
    """Counts packets and notes their times; decodes only until the first frame shows the size."""
    first, stamps, num_packets, last_duration = None, [], 0, 0
    try:
        with _open_container(path) as container:
            stream = _video_stream(path, container)
            announced = sum(entry.size > 0 for entry in stream.index_entries)
            time_base = stream.time_base or Fraction(1, 1000)
            nominal_rate = stream.average_rate or stream.guessed_rate
            for packet in container.demux(stream):
                if first is None:
                    first = next(iter(packet.decode()), None)
                if packet.size == 0 or packet.is_corrupt:
                    continue
                num_packets += 1
                if not packet.is_discard:  # an edit list cuts these; the decoder drops them too
                    stamps.append(packet.pts)
                    last_duration = packet.duration or last_duration
    except av.error.FFmpegError as error:
        if head[4:8] == b"ftyp" and first is None:
            raise MediaError(
                f"{str(path)!r} is a cut-off or damaged MP4 ({error.strerror}); "
                "copy or download it again."
            ) from error
        if first is None:
            raise MediaError(
                f"{str(path)!r} is neither a picture nor a video that can be read "
                f"({error.strerror}); convert it to MP4 or PNG."
            ) from error
        raise _damaged(path, error) from error
    if num_packets < announced:
        raise MediaError(
            f"{str(path)!r} is truncated: {num_packets} of its {announced} frames are there; "
            "copy or download it again."
        )
    if first is None or not stamps:
        raise MediaError(f"{str(path)!r} has a video stream but no frame that can be decoded.")
    _check_size(path, first.width, first.height)

    # Without (usable) stamps frames are told by their order.
    position_of: dict[int | None, int] = {}
    times = np.zeros(len(stamps))
    if None not in stamps and len(set(stamps)) == len(stamps):
        stamps.sort()
        position_of = {stamp: position for position, stamp in enumerate(stamps)}
        times = np.array([float((stamp - stamps[0]) * time_base) for stamp in stamps])
    typical = float(np.median(np.diff(times))) if len(times) > 1 else 0.0
    duration = float(times[-1]) + (float(last_duration * time_base) or typical)

    def frames(positions: np.ndarray) -> Frames:
        return _decode(path, positions, position_of, len(stamps), turns)

    # Asked once: a PyAV frame whose side data were touched lives until the next garbage collection.
    turns = _turns(first)
    swapped = bool(_SWAPPING & set(turns))
    size = (first.height, first.width) if swapped else (first.width, first.height)
    rate = None if nominal_rate is None else float(nominal_rate)
    return _timed_source(path, *size, times, duration, rate, frames)


def _video_stream(path: pathlib.Path, container) -> av.VideoStream:
    stream = container.streams.best("video")
    if stream is None or stream.disposition & Disposition.attached_pic:
        what = "only sound" if container.streams.audio else "no video stream"
        raise MediaError(f"{str(path)!r} holds {what}; give a file with a picture.")
    if stream.codec_context is None:
        raise MediaError(f"{str(path)!r} uses a codec without a decoder here; convert it to H.264.")
    return stream


def _decode(
    path: pathlib.Path,
    positions: np.ndarray,
    position_of: dict[int | None, int],
    num_frames: int,
    turns: list[Image.Transpose],
) -> Frames:
    """Yields the frames at `positions` (ascending); decodes in order, no further than needed."""
    decoded, wanted = 0, iter(positions.tolist())
    target = next(wanted, None)
    try:
        with _open_container(path) as container:
            stream = _video_stream(path, container)
            stream.thread_type = "AUTO"
            for frame in container.decode(stream):
                here = position_of.get(frame.pts, -1) if position_of else decoded
                decoded += 1
                if here == target:
                    yield _frame_to_rgb(path, frame, turns)
                    target = next(wanted, None)
                elif target is not None and here > target:
                    raise MediaError(
                        f"{str(path)!r} is damaged: frame {target} of {num_frames} "
                        "cannot be decoded; copy or download it again."
                    )
                if target is None:
                    return
    except av.error.FFmpegError as error:
        if decoded == 0:
            raise _damaged(path, error) from error
    raise MediaError(
        f"{str(path)!r} is truncated or damaged: {decoded} of its {num_frames} frames "
        "can be decoded; copy or download it again."
    )


def _frame_to_rgb(
    path: pathlib.Path, frame: av.VideoFrame, turns: list[Image.Transpose]
) -> Image.Image:
    """The frame as displayed, converted by its own colour matrix and range."""
    if frame.format.has_palette or any(component.is_alpha for component in frame.format.components):
        image = _to_rgb(path, Image.fromarray(frame.to_ndarray(format="rgba")))
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

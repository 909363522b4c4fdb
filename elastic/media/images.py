"""Opens a file of any kind as a `MediaSource`, and decodes pictures through Pillow.

The content decides what a file is, not its name: Pillow recognises pictures by their first bytes, and ffmpeg
(through PyAV) probes everything else.
"""

import dataclasses
import functools
import importlib
import importlib.util
import logging
import os
import stat
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from elastic.media.color import to_rgb
from elastic.media.errors import MediaError, check_size, damaged, reason
from elastic.media.location import ClipLocation, Place, local_path, open_file, place_of
from elastic.media.source import Frames, MediaInfo, MediaSource
from elastic.media.timing import timed_source
from elastic.media.video import video_source

log = logging.getLogger(__name__)

# Formats that Pillow recognises by their first bytes and that hold nothing but a picture: no scripts, no other files.
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
# Those whose further frames are an animation. In TIFF they are other pictures.
_ANIMATED_FORMATS = ("AVIF", "GIF", "PNG", "WEBP")
# Errors of Pillow's decoders on damaged bytes. PyAV's errors share av.error.FFmpegError.
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
_UPRIGHT = {  # EXIF orientation -> the transposition from the stored picture to the displayed one
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@functools.cache
def _formats() -> tuple[str, ...]:
    """The picture formats that Pillow may read; pillow-heif, if it is installed, adds HEIC made of tiles."""
    if importlib.util.find_spec("pillow_heif") is None:
        return _IMAGE_FORMATS
    importlib.import_module("pillow_heif").register_heif_opener()
    return (*_IMAGE_FORMATS, "HEIF")


def open_source(source: Any, *, exact_color: bool = False, reader: str = "pyav") -> MediaSource:
    """Probes the file and returns how to read it; at most the first frame of a video is decoded.

    Args:
      source: as `location.place_of` takes it.
      exact_color: see `color.FrameConverter`.
      reader: who decodes video.

    Raises:
      MediaError: as in `elastic.media.probe`.
    """
    path = place_of(source)
    if isinstance(path, ClipLocation) and path.problem:
        raise MediaError(f"{str(path)!r} cannot be read: {path.problem}.")
    try:
        local = local_path(path)
        if local is not None and not stat.S_ISREG(mode := os.stat(local).st_mode):
            # Opening a pipe would wait for ever.
            what = "a directory" if stat.S_ISDIR(mode) else "a pipe or a device, no regular file"
            raise MediaError(f"{str(path)!r} is {what}; give the file of a picture or a video.")
        with open_file(path) as file:
            head = file.read(12)
    except OSError as error:
        raise MediaError(f"Cannot read {str(path)!r}: {reason(error)}.") from error
    if not head:
        raise MediaError(f"{str(path)!r} is empty (0 bytes); copy or download it again.")
    try:
        with open_file(path) as file, Image.open(file, formats=_formats()) as image:
            check_size(path, *image.size)
            moving = image.format in _ANIMATED_FORMATS and getattr(image, "is_animated", False)
            if not moving:
                return _image_source(path, image)
            if image.format == "WEBP":  # ffmpeg's decoder reads still WebP only
                return _webp_source(path, image)
            if image.format == "AVIF" and image.has_transparency_data:  # for ffmpeg, another stream
                return _avif_source(path, head, exact_color)
    except MediaError:
        raise
    except UnidentifiedImageError:
        pass
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise MediaError(f"{str(path)!r} is too large a picture: {error}") from error
    except _PILLOW_ERRORS as error:
        raise damaged(path, error) from error
    return video_source(path, head, exact_color=exact_color, reader=reader)


def _image_source(path: Place, image: Image.Image) -> MediaSource:
    # A TIFF's size as stored: some versions of Pillow have turned the other one already.
    tags = getattr(image, "tag_v2", {})
    width, height = tags.get(256, image.size[0]), tags.get(257, image.size[1])
    if _orientation(path, image) >= 5:
        width, height = height, width

    def frames(positions: np.ndarray) -> Frames:
        try:
            with open_file(path) as file, Image.open(file, formats=_formats()) as image:
                image.load()
                upright = _UPRIGHT.get(_orientation(path, image))
                picture = to_rgb(path, image)
                picture = picture if upright is None else picture.transpose(upright)
        except MediaError:
            raise
        except _PILLOW_ERRORS as error:
            raise damaged(path, error) from error
        yield picture

    info = MediaInfo(path, "image", width, height, num_frames=1, rate=0.0, variable_rate=False)
    return MediaSource(info, None, 0.0, frames)


def _orientation(path: Place, image: Image.Image) -> int:
    try:
        return image.getexif().get(0x0112, 1)
    except _PILLOW_ERRORS as error:  # the picture itself is fine
        log.warning("%s: unreadable EXIF, taken as upright (%s).", path, error)
        return 1


def _avif_source(path: Place, head: bytes, exact_color: bool) -> MediaSource:
    """An animation with transparency: its times through ffmpeg, its frames through Pillow."""
    source = video_source(path, head, exact_color=exact_color)
    return dataclasses.replace(source, frames=_seeking_frames(path, "AVIF"))


def _seeking_frames(path: Place, kind: str) -> Callable[[np.ndarray], Frames]:
    """Decodes chosen frames of an animation through Pillow."""

    def frames(positions: np.ndarray) -> Frames:
        try:
            with open_file(path) as file, Image.open(file, formats=(kind,)) as image:
                for position in positions:
                    image.seek(int(position))
                    yield to_rgb(path, image).copy()  # decodes here, and survives the next seek
        except _PILLOW_ERRORS as error:
            raise damaged(path, error) from error

    return frames


def _webp_source(path: Place, image: Image.Image) -> MediaSource:
    durations = []
    with open_file(path) as file:
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

    starts = np.concatenate([[0.0], np.cumsum(durations)])
    return timed_source(
        path, *image.size, starts[:-1], float(starts[-1]), None, _seeking_frames(path, "WEBP")
    )

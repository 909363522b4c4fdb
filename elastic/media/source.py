"""What a media file is: a path or a URL, its facts, how to get its frames, and how it is refused.

A file is a local path, or a URL (a string with `://`) that fsspec opens.
"""

import logging
import os
import pathlib
import re
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import BinaryIO, Literal, cast

import numpy as np
from PIL import Image

log = logging.getLogger(__name__)

MAX_PIXELS = 89_478_485  # per frame: 268 MB as RGB, and Pillow's own limit for unannounced pictures

Place = pathlib.Path | str  # a string is a URL
_URL = re.compile(r"[a-zA-Z][\w+.-]*://")
_told: set[tuple[str, str]] = set()


class MediaError(ValueError):
    """A picture or video that cannot be read or written; the text names file, reason, way out."""


@dataclass(frozen=True)
class MediaInfo:
    """What a file holds, found without decoding it.

    Attributes:
      path: the file; a string if it is a URL.
      kind: 'image' or 'video' (an animated GIF, PNG or WebP is a video), by content, not by name.
      width: columns as displayed, after rotation.
      height: rows as displayed.
      num_frames: how many frames it shows; exact, counted in the container.
      rate: frames per second, the mean one if it varies; 0.0 for an image.
      variable_rate: some frame is shown more than half a frame away from an even spacing.
    """

    path: Place
    kind: Literal["image", "video"]
    width: int
    height: int
    num_frames: int
    rate: float
    variable_rate: bool


Frames = Generator[Image.Image, None, None]  # mode RGB, upright


@dataclass(frozen=True)
class MediaSource:
    """A probed file: its facts, when each frame is shown, and how to get chosen frames."""

    info: MediaInfo
    times: np.ndarray | None  # seconds from the first frame, ascending; None: evenly spaced
    duration: float
    frames: Callable[[np.ndarray], Frames]  # ascending positions -> their frames


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether `path` names something that fsspec opens, such as 'gs://bucket/clip.mp4'."""
    return isinstance(path, str) and _URL.match(path) is not None


def open_file(path: Place) -> BinaryIO:
    """Opens the bytes of a file for reading."""
    if isinstance(path, pathlib.Path):
        return open(path, "rb")
    import fsspec  # only who has URLs waits for it

    file = cast(fsspec.core.OpenFile, fsspec.open(path, "rb"))
    return cast(BinaryIO, file.open())


def reason(error: Exception) -> str:
    """What went wrong, without numbers and names that the message has already."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def check_size(path: Place, width: int, height: int) -> None:
    """Refuses a frame without pixels or with more than memory should hold."""
    if not 0 < width * height <= MAX_PIXELS:
        raise MediaError(
            f"{str(path)!r} has {width} x {height} pixels, outside 1 to {MAX_PIXELS:,}; "
            "scale it down first."
        )


def damaged(path: Place, error: Exception) -> MediaError:
    """The error of a file whose bytes make no sense."""
    return MediaError(
        f"{str(path)!r} is damaged or truncated ({error}); copy or download it again."
    )


def warn_once(path: Place, message: str, *values: object) -> None:
    """Warns of a file, once in a process: a file is opened anew for each part that is read of it.

    The first place in `message` is the path's.
    """
    if (str(path), message) not in _told:
        _told.add((str(path), message))
        log.warning(message, path, *values)


def to_rgb(path: Place, image: Image.Image) -> Image.Image:
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


def timed_source(
    path: Place,
    width: int,
    height: int,
    times: np.ndarray,
    duration: float,
    nominal_rate: float | None,
    frames: Callable[[np.ndarray], Frames],
) -> MediaSource:
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
    return MediaSource(info, times if variable else None, duration, frames)


def nominal_rate(
    mean: Fraction | None, intended: Fraction | None, stamps: Sequence[int], time_base: Fraction
) -> float | None:
    """The container's mean rate; or the intended one, as ffmpeg guesses it, if it explains `stamps`.

    A mean of stamps that were rounded to a coarse clock is off by the rounding: 36 frames at 24
    frames/s, copied from a file that counts milliseconds, have 24.012 or so.
    """
    if mean is None or intended is None or mean == intended or len(stamps) < 3:
        rate = mean or intended
        return None if rate is None else float(rate)
    since = np.array(stamps, np.int64) - stamps[0]
    clock, step = int(np.gcd.reduce(since)), float(1 / (intended * time_base))  # both in ticks
    # A clock that can state the intended step was not rounded to: then the mean is right.
    coarse = clock < step / 8 and abs(step / clock - round(step / clock)) > 1e-3
    explained = np.abs(since - step * np.arange(len(since))).max() <= clock
    return float(intended if coarse and explained else mean)

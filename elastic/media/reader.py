"""Files <-> frames: pictures through Pillow, video through PyAV.

Why PyAV: it decodes bit for bit what decord and decord2 decode, about as fast and in a fraction of
the memory, and it alone shows packets and rotation (`scripts/bench/readers.py` prints the numbers).

What a frame is: 8-bit RGB as displayed, so rotation (EXIF, display matrix) is applied, transparency
is composited over white, and 16-bit pictures are scaled. Pixels are taken as square and fields are
not deinterlaced, like the released code. A still picture is one frame, not a repeated one.

A recording or a cut may start with frames that need earlier ones: these are left out. Damaged frames
that the decoder shows are used. The log tells both, and a file that ends before its header says. A
frame in the middle that cannot be decoded, or one missing that an index lists, is an error.
"""

import logging
import math
import os
import pathlib
import weakref
from collections.abc import Generator, Iterator
from typing import Self

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from elastic.media.images import open_source
from elastic.media.source import MediaError, MediaInfo, MediaSource
from elastic.media.writer import VideoWriter, write_image, write_video

__all__ = [
    "IMAGE_SUFFIXES",
    "VIDEO_SUFFIXES",
    "ClipReader",
    "MediaError",
    "MediaInfo",
    "VideoWriter",
    "find_media",
    "fit_frame",
    "frame_indices",
    "is_media",
    "open_clip",
    "probe",
    "write_image",
    "write_video",
]

log = logging.getLogger(__name__)

# fmt: off
IMAGE_SUFFIXES = frozenset((
    ".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".ppm", ".pgm",
    ".pnm", ".jp2", ".avif", ".qoi",
))
VIDEO_SUFFIXES = frozenset((
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".m2ts", ".mts",
    ".flv", ".wmv", ".3gp", ".ogv", ".mxf", ".gif", ".apng",
))
# fmt: on
# Beyond this aspect ratio `fit_frame` crops before it resizes.
_EXTREME_ASPECT = 4


def probe(path: str | os.PathLike[str]) -> MediaInfo:
    """Reads what `path` holds. The container is walked, only the first frame of a video is decoded.

    Raises:
      MediaError: the file is missing, empty, truncated, audio-only, or not media that can be read.
    """
    return open_source(path).info


def open_clip(
    path: str | os.PathLike[str],
    *,
    resolution: int,
    rate: float | int | None = 24.0,
    max_frames: int | None = None,
    tell_rate: bool = True,
) -> "ClipReader":
    """Opens an image or a video for reading as square frames.

    Args:
      path: the file; its bytes decide what it is.
      resolution: rows and columns of the frames.
      rate: frames per second to deliver, by the released rule (`frame_indices`), or by timestamps
        (the frame shown at time k / rate) if the source's rate varies. Never above the source's:
        that is logged and limited. None: every frame once, at the source's (mean) rate.
      max_frames: deliver at most the first so many.
      tell_rate: whether the log is told of a rate above the source's.

    Raises:
      MediaError: as in `probe`.
      ValueError: an option is out of range.
    """
    if resolution < 1:
        raise ValueError(f"{resolution=} must be at least 1.")
    if rate is not None and not (math.isfinite(rate) and rate > 0):
        raise ValueError(
            f"{rate=} must be a positive number of frames/s, or None for the source's."
        )
    if max_frames is not None and max_frames < 1:
        raise ValueError(f"{max_frames=} must be at least 1, or None for all.")
    source = open_source(path)
    delivered_rate, picks = _choose_frames(source, rate, tell_rate=tell_rate)
    return ClipReader(source, resolution=resolution, rate=delivered_rate, picks=picks[:max_frames])


def frame_indices(
    num_frames: int, source_rate: float | int, rate: float | int
) -> Int[np.ndarray, "picked"]:
    """The released rule for a fixed rate: which frames of an evenly spaced video to take.

    `int(num_frames * rate / source_rate)` positions spread evenly from the first frame to the
    last and rounded down; at least one. (Above the source's rate it repeats frames, but `open_clip`
    never asks for that.)
    """
    # The tiny addition keeps a whole number whole when the division falls just short of it.
    picked = max(1, int(num_frames * rate / source_rate + 1e-9))
    return np.linspace(0, num_frames - 1, picked).astype(np.int64)


def fit_frame(
    frame: UInt8[np.ndarray, "rows columns 3"], resolution: int
) -> UInt8[np.ndarray, "resolution resolution 3"]:
    """Resizes the shortest side to `resolution` (bilinear, antialiased), then crops the middle.

    The same pixels as the released code. Only a frame more than 4 times as long as wide is cropped
    as it is resized, as its resized whole has no bound: the same sampling positions, but for the
    rounding of the crop's edge to float32 (at most one level).
    """
    return _fit(Image.fromarray(frame), resolution)


def _fit(image: Image.Image, resolution: int) -> np.ndarray:
    columns, rows = image.size
    if columns < rows:
        new_columns, new_rows = resolution, int(resolution * rows / columns)
    else:
        new_columns, new_rows = int(resolution * columns / rows), resolution
    left, top = (new_columns - resolution) // 2, (new_rows - resolution) // 2
    if max(rows, columns) > _EXTREME_ASPECT * min(rows, columns):
        across, down = columns / new_columns, rows / new_rows
        box = (left * across, top * down, (left + resolution) * across, (top + resolution) * down)
        return np.asarray(
            image.resize((resolution, resolution), Image.Resampling.BILINEAR, box=box)
        )
    if (new_columns, new_rows) != (columns, rows):
        image = image.resize((new_columns, new_rows), Image.Resampling.BILINEAR)
    return np.asarray(image)[top : top + resolution, left : left + resolution]


class ClipReader:
    """The frames of one file, decoded when asked for and never all at once; made by `open_clip`.

    Attributes:
      info: what the file holds.
      rate: frames per second as delivered (0.0 for an image).
      num_frames: how many frames are delivered.
      resolution: rows and columns of each.
    """

    def __init__(self, source: MediaSource, *, resolution: int, rate: float, picks: np.ndarray):
        self.info = source.info
        self.rate = rate
        self.num_frames = len(picks)
        self.resolution = resolution
        self._source = source
        self._picks = picks
        self._running: weakref.WeakSet[Generator] = weakref.WeakSet()
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Ends every running iteration and closes its file."""
        self._closed = True
        for running in list(self._running):
            running.close()

    def frames(self, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """Yields delivered frames `start` to `stop` (not included), uint8 [rows, columns, 3] each.

        Decoding starts at the last keyframe before `start`, where the file has keyframes that can
        be found, is sequential, and stops at the last frame needed.

        Raises:
          MediaError: a needed frame cannot be decoded; says how many could.
        """
        stop = self.num_frames if stop is None else stop
        if not 0 <= start < stop <= self.num_frames:
            raise ValueError(
                f"{start=}, {stop=} must be frames of {str(self.info.path)!r}, which delivers "
                f"{self.num_frames}, and at least one."
            )
        return self._run(self._frames(start, stop))

    def blocks(self, frames_per_block: int, *, first_block: int = 0) -> Iterator[np.ndarray]:
        """Yields uint8 [frames_per_block, resolution, resolution, 3]; the last one may be shorter.

        Each call starts again, at `first_block`; see `frames` on decoding.

        Raises:
          MediaError: a needed frame cannot be decoded; says how many could.
        """
        if frames_per_block < 1:
            raise ValueError(f"{frames_per_block=} must be at least 1.")
        num_blocks = -(-self.num_frames // frames_per_block)
        if not 0 <= first_block < num_blocks:
            raise ValueError(f"{first_block=} must be one of the {num_blocks} blocks.")
        return self._run(self._blocks(frames_per_block, first_block * frames_per_block))

    def read(self) -> UInt8[np.ndarray, "frames resolution resolution 3"]:
        """All frames at once: `num_frames * resolution**2 * 3` bytes."""
        return next(iter(self.blocks(self.num_frames)))

    def _run(self, running: Generator[np.ndarray, None, None]) -> Iterator[np.ndarray]:
        if self._closed:
            raise ValueError(
                f"The reader of {str(self.info.path)!r} is closed; open the clip again."
            )
        self._running.add(running)
        return running

    def _frames(self, start: int, stop: int) -> Generator[np.ndarray, None, None]:
        # Timestamps of a variable rate may show one frame for several steps: it is decoded once.
        positions, repeats = np.unique(self._picks[start:stop], return_counts=True)
        frames = self._source.frames(positions)
        try:
            for frame, count in zip(frames, repeats, strict=True):
                fitted = _fit(frame, self.resolution)
                for _ in range(count):
                    yield fitted
        finally:
            frames.close()

    def _blocks(self, frames_per_block: int, start: int) -> Generator[np.ndarray, None, None]:
        block, filled, left = None, 0, self.num_frames - start
        frames = self._frames(start, self.num_frames)
        try:
            for fitted in frames:
                if block is None:
                    block = np.empty((min(frames_per_block, left), *fitted.shape), np.uint8)
                block[filled] = fitted
                filled += 1
                if filled == len(block):
                    left -= filled
                    yield block
                    block, filled = None, 0
        finally:
            frames.close()


def is_media(path: str | os.PathLike[str]) -> bool:
    """Whether the name ends like an image or a video, in any case. Opening decides by content."""
    return pathlib.Path(path).suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES


def find_media(
    folder: str | os.PathLike[str], *, without: str | os.PathLike[str] | None = None
) -> list[pathlib.Path]:
    """All files below `folder` that `is_media` knows, sorted; links are followed, each folder once.

    Left out are names that start with a dot (unfinished or system files), and what lies in the folder
    `without`, such as results.

    Raises:
      MediaError: `folder` is not a folder that can be read.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise MediaError(
            f"{str(folder)!r} is not a folder; give the folder that holds the media files."
        )
    found, seen = [], set()

    def unreadable(error: OSError) -> None:
        log.warning("Leaving out a folder: %s", error)

    for root, folders, files in os.walk(folder, followlinks=True, onerror=unreadable):
        here = os.stat(root)
        if (here.st_dev, here.st_ino) in seen:  # reached again through a link
            folders.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [
            pathlib.Path(root, name)
            for name in files
            if not name.startswith(".") and is_media(name)
        ]
    if without is not None:
        apart = pathlib.Path(without).resolve()
        found = [file for file in found if apart not in file.resolve().parents]
    return sorted(found)


def _choose_frames(
    source: MediaSource, rate: float | int | None, *, tell_rate: bool
) -> tuple[float, np.ndarray]:
    """The rate to deliver, and the position in the source of each delivered frame."""
    info = source.info
    everything = np.arange(info.num_frames)
    if info.kind == "image" or rate is None:
        return info.rate, everything
    # A screen recording pauses and bursts: its mean rate says nothing about what it can give.
    limit = (
        info.rate
        if source.times is None
        else max(info.rate, 1 / float(np.median(np.diff(source.times))))
    )
    if rate > limit:
        level = (
            logging.WARNING if tell_rate and rate > 1.01 * limit else logging.DEBUG
        )  # 23.976 for 24 is no news
        message = "%s has %.6g frames/s, fewer than the %.6g asked for; it is read at its own rate."
        log.log(level, message, info.path, limit, rate)
        rate = limit
    if source.times is not None:
        steps = np.arange(max(1, int(source.duration * rate + 1e-9)))
        shown = np.searchsorted(source.times, steps / rate + 1e-6, side="right") - 1
        return float(rate), shown
    if rate == info.rate:
        return float(rate), everything
    return float(rate), frame_indices(info.num_frames, info.rate, rate)

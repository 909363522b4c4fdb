"""Reads pictures and videos as frames of one size.

A frame is 8-bit RGB as displayed: rotation (EXIF, display matrix) is applied, transparency is composited over
white, and 16-bit pictures are scaled. Pixels that are not square are resampled, high dynamic range is
tone-mapped, and fields are not deinterlaced. A picture is one frame, not a repeated one.

A recording or a cut may start with frames that need earlier ones; these are left out. Damaged frames that the
decoder shows are used. The log reports both, and a file that ends earlier than its header states. A frame in the
middle that cannot be decoded is an error, and so is a missing frame that an index lists.
"""

import math
import weakref
from collections.abc import Generator, Iterator
from typing import Self

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from elastic.io.read_options import READERS
from elastic.media.errors import MediaError, warn_once
from elastic.media.location import ClipFile, ClipLocation
from elastic.media.source import MediaInfo, MediaSource
from elastic.tiles import Fit, FrameLayout, layout_of

_HDR = "%s: its high dynamic range (%s) is tone-mapped to SDR: 203 cd/m2 becomes white, and brighter light is clipped."
# Beyond this aspect ratio `fit_frame` crops before it resizes.
_EXTREME_ASPECT = 4


def probe(source: ClipFile) -> MediaInfo:
    """The facts of a media file. All packets are counted, but only the first frame of a video is decoded.

    Args:
      source: a path, a URL, a `ClipLocation`, bytes, or a file that is open for reading, which is read into memory.

    Raises:
      MediaError: the file is missing, empty, truncated, audio-only, or not media that can be read.
    """
    from elastic.media.images import open_source  # PyAV is loaded with the first file

    return open_source(source).info


def open_clip(
    source: ClipFile,
    *,
    resolution: int,
    fit: Fit = "crop",
    short_side: int | None = None,
    overlap: int | None = None,
    rate: float | int | None = 24.0,
    max_frames: int | None = None,
    tell_rate: bool = True,
    exact_color: bool = False,
    reader: str = "pyav",
) -> "ClipReader":
    """Opens an image or a video for reading as frames of one size, square ones unless `fit` says otherwise.

    Args:
      source: a path, a URL, a `ClipLocation`, bytes, or a file that is open for reading, which is read into memory. Its bytes
        decide what it is. Of a location with a start and an end, the frames between them are delivered.
      resolution: rows and columns of a square frame, or of a tile.
      fit: 'crop' gives the middle square; the others give whole frames, as `elastic.tiles.layout_of` says.
      short_side: with 'tile', the short side that frames are scaled to; 0: the file's own size; None: that of a tile.
      overlap: with 'tile', the fewest pixels that neighbouring tiles share; None: an eighth of a tile.
      rate: frames per second to deliver, by the released rule (`frame_indices`), or by timestamps
        (the frame shown at time k / rate) if the source's rate varies. A rate above the source's is
        lowered to it, with a warning. None: the source's rate, every frame once; if the source's rate varies,
        the rate of its usual step, so that every frame is delivered as long as it is shown.
      max_frames: deliver at most this many frames, from the first on.
      tell_rate: whether the log names a rate that differs from the source's, and high dynamic range.
      exact_color: round the colours of every video exactly; see `color.FrameConverter`.
      reader: who decodes video: 'pyav', or 'decord' if it is installed; both give the same frames.

    Raises:
      MediaError: as in `probe`.
      ValueError: an option is out of range.
    """
    from elastic.media import decord_reader  # PyAV is loaded with the first file
    from elastic.media.images import open_source
    from elastic.media.timing import choose_frames

    if resolution < 1:
        raise ValueError(f"{resolution=} must be at least 1.")
    if rate is not None and not (math.isfinite(rate) and rate > 0):
        raise ValueError(
            f"{rate=} must be a positive number of frames/s, or None for the source's."
        )
    if max_frames is not None and max_frames < 1:
        raise ValueError(f"{max_frames=} must be at least 1, or None for all.")
    if reader not in READERS:
        raise ValueError(f"{reader=} must be one of {', '.join(READERS)}.")
    if reader == "decord":
        decord_reader.check_installed()
    opened = open_source(source, exact_color=exact_color, reader=reader)
    path = opened.info.path
    if opened.info.transfer != "sdr" and tell_rate:
        warn_once(path, _HDR, opened.info.transfer.upper())
    try:
        shown = (opened.info.width, opened.info.height)
        layout = layout_of(shown, resolution, fit=fit, resolution=short_side, overlap=overlap)
    except ValueError as error:
        raise MediaError(f"{str(path)!r}: {error}") from error
    delivered_rate, picks = choose_frames(opened, rate, tell_rate=tell_rate)
    if isinstance(path, ClipLocation) and opened.info.kind == "video":
        picks = _between(path, picks, delivered_rate)
    return ClipReader(opened, layout=layout, rate=delivered_rate, picks=picks[:max_frames])


def _between(location: ClipLocation, picks: np.ndarray, rate: float) -> np.ndarray:
    """The delivered frames from a location's start to its end; frame k is shown at k / `rate`."""
    if not location.start and location.end is None:
        return picks
    # The tiny subtraction keeps a frame whose time comes out of a division just above its own.
    first = math.ceil(location.start * rate - 1e-6)
    stop = len(picks) if location.end is None else math.ceil(location.end * rate - 1e-6)
    if not len(chosen := picks[first:stop]):
        end = "its end" if location.end is None else f"{location.end:g} s"
        raise MediaError(
            f"{str(location)!r} lasts {len(picks) / rate:.6g} s and has no frame from {location.start:g} s to {end}; "
            "correct the list."
        )
    return chosen


def fit_frame(
    frame: UInt8[np.ndarray, "rows columns 3"], resolution: int
) -> UInt8[np.ndarray, "resolution resolution 3"]:
    """Resizes the shortest side to `resolution` (bilinear, antialiased), then crops the middle.

    The same pixels as the released code. Only a frame more than 4 times as long as wide is cropped
    as it is resized, as its resized whole has no bound: the same sampling positions, but for the
    rounding of the crop's edge to float32 (at most one level).
    """
    return _fit(Image.fromarray(frame), resolution)


def scale_frame(
    frame: UInt8[np.ndarray, "rows columns 3"], size: tuple[int, int]
) -> UInt8[np.ndarray, "height width 3"]:
    """The whole frame at another size (width, height), bilinear and antialiased."""
    return _scaled(Image.fromarray(frame), size)


def _scaled(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(
        image if image.size == size else image.resize(size, Image.Resampling.BILINEAR)
    )


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
    """The frames of one file, decoded when they are asked for and never all at once; made by `open_clip`.

    Attributes:
      info: the facts of the file.
      rate: frames per second as delivered (0.0 for an image).
      num_frames: how many frames are delivered.
      resolution: rows and columns of a square frame, or of a tile.
      layout: the size of the frames, and how they lie in tiles.
    """

    def __init__(self, source: MediaSource, *, layout: FrameLayout, rate: float, picks: np.ndarray):
        self.info = source.info
        self.rate = rate
        self.num_frames = len(picks)
        self.resolution, self.layout = layout.tile, layout
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
        """Yields uint8 [frames_per_block, rows, columns, 3]; the last one may be shorter.

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

    def read(self) -> UInt8[np.ndarray, "frames rows columns 3"]:
        """All frames at once."""
        return next(iter(self.blocks(self.num_frames)))

    def _run(self, running: Generator[np.ndarray, None, None]) -> Iterator[np.ndarray]:
        if self._closed:
            raise ValueError(
                f"The reader of {str(self.info.path)!r} is closed; open the clip again."
            )
        self._running.add(running)
        return running

    def _frames(self, start: int, stop: int) -> Generator[np.ndarray, None, None]:
        # With a variable rate one frame may be shown for several steps; it is decoded once.
        positions, repeats = np.unique(self._picks[start:stop], return_counts=True)
        frames = self._source.frames(positions)
        try:
            for frame, count in zip(frames, repeats, strict=True):
                crop = self.layout.fit == "crop"
                fitted = _fit(frame, self.resolution) if crop else _scaled(frame, self.layout.frame)
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

"""Reads a clip as blocks of frames, from a file, an array or an iterator of live frames."""

import concurrent.futures
import dataclasses
import functools
import itertools
import math
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, TypeVar, cast

import numpy as np
from jaxtyping import UInt8

from elastic import media
from elastic.media.location import ClipFile, is_place, location_of
from elastic.tiles import Fit, FrameLayout, layout_of
from elastic.tokenizer.arrays import ArrayLike, as_frames, as_live_frames, is_array

Frames = Iterable[ArrayLike]
ClipLike = ClipFile | ArrayLike | media.ClipReader | Frames
_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class Clip:
    """A clip, its frames scaled as its layout says.

    Attributes:
      is_image: whether the clip is a still picture of one frame.
      rate: frames per second; 0 for an image.
      num_frames: None: unknown, because the frames come from an iterator.
      source: (width, height) of the original as displayed, in square pixels.
      layout: the size of the frames, and how they lie in tiles.
      pixel_aspect: width and height of a stored pixel, (32, 27) for instance; (1, 1) if it is square.
      transfer: 'pq' or 'hlg' for a file of high dynamic range, which is tone-mapped; else 'sdr'.
      source_rate: frames per second of the original; 0 for an image.
    """

    is_image: bool
    rate: float
    num_frames: int | None
    source: tuple[int, int]
    layout: FrameLayout
    _reader: media.ClipReader | None
    _frames: Iterable[np.ndarray] | None
    pixel_aspect: tuple[int, int] = (1, 1)
    transfer: str = "sdr"
    exact_color: bool = False
    source_rate: float = 0.0

    def blocks(
        self, frames_per_block: int, first_block: int = 0
    ) -> Iterator[UInt8[np.ndarray, "n rows columns 3"]]:
        """The blocks from `first_block` on. Only the last block may be short. Frames of an iterator can be read once only.

        Raises:
          MediaError: a frame of the file cannot be decoded.
          ValueError: a frame of the iterator differs from the first one in shape or dtype.
        """
        if self.num_frames is not None and first_block * frames_per_block >= self.num_frames:
            return
        if self._reader is not None:
            with self._reader:
                yield from self._reader.blocks(frames_per_block, first_block=first_block)
            return
        frames = iter(self._frames if self._frames is not None else ())
        frames = itertools.islice(frames, first_block * frames_per_block, self.num_frames)
        while block := [
            self._fitted(frame) for frame in itertools.islice(frames, frames_per_block)
        ]:
            yield np.stack(block)

    @property
    def is_file(self) -> bool:
        """Whether frames are decoded, so that reading them early takes them from nobody."""
        return self._reader is not None

    def identity(self) -> dict[str, Any] | None:
        """Values by which a later run recognizes the same clip; None: an iterator cannot be recognized."""
        about: dict[str, Any] = {
            "source": list(self.source),
            "rate": self.rate,
            "num_frames": self.num_frames,
        }
        if self._reader is not None:
            size, changed = location_of(self._reader.info.path).facts
            if self.exact_color:
                about["exact_color"] = True
            if isinstance(self._reader.info.path, media.ClipLocation):
                about["identity"] = self._reader.info.path.identity
            return about | {"size": size, "modified": changed}
        if isinstance(self._frames, np.ndarray):
            return about | {"crc": zlib.crc32(np.ascontiguousarray(self._frames).data)}
        return None

    def _fitted(self, frame: np.ndarray) -> np.ndarray:
        width, height = self.source
        _check(frame, (height, width, 3))
        if frame.shape[1::-1] == self.layout.frame:
            return frame
        if self.layout.fit == "crop":
            return media.fit_frame(frame, self.layout.tile)
        return media.scale_frame(frame, self.layout.frame)


def open_clip(
    source: ClipLike,
    resolution: int,
    *,
    rate: float | None,
    max_frames: int | None,
    reader: str = "pyav",
    exact_color: bool = False,
    fit: Fit = "crop",
    short_side: int | None = None,
    overlap: int | None = None,
) -> Clip:
    """Opens a clip.

    Args:
      source: a file as `media.open_clip` takes it, frames as `arrays.as_frames` takes them, a reader, or an iterable of frames.
      resolution: rows and columns of the model's frames, or of a tile.
      rate: for a file, the frames per second to read, None: its own. For frames, the rate that they have, None: 24.
      max_frames: read the first frames only; None: all.
      reader, exact_color: for a file, as in `media.open_clip`.
      fit, short_side, overlap: how frames lie in tiles, as in `media.open_clip`.

    Raises:
      ValueError: there is no frame, the source is of another type, or `rate` or `max_frames` is out of range.
    """
    if max_frames is not None and max_frames < 1:
        raise ValueError(f"{max_frames=} must be at least 1, or None for all.")
    if rate is not None and not (math.isfinite(rate) and rate > 0):
        raise ValueError(f"{rate=} must be a positive number of frames/s, or None.")
    if is_place(source) and not is_array(source):
        source = media.open_clip(
            cast(ClipFile, source),
            resolution=resolution,
            rate=rate,
            max_frames=max_frames,
            reader=reader,
            exact_color=exact_color,
            fit=fit,
            short_side=short_side,
            overlap=overlap,
        )

    lay_out = functools.partial(
        layout_of, tile=resolution, fit=fit, resolution=short_side, overlap=overlap
    )
    if isinstance(source, media.ClipReader):
        if source.resolution != resolution:
            raise ValueError(
                f"The reader of {str(source.info.path)!r} gives {source.resolution} rows; open it with {resolution=}."
            )
        if source.layout != lay_out((source.info.width, source.info.height)):
            raise ValueError(
                f"The reader of {str(source.info.path)!r} was opened with fit={source.layout.fit!r} and gives frames of "
                f"{source.layout.frame[0]}x{source.layout.frame[1]}; open it with {fit=}, {short_side=}, {overlap=}."
            )
        return _of_reader(source, exact_color=exact_color)
    own_rate = 24.0 if rate is None else float(rate)
    if is_array(source):
        return _of_array(as_frames(source), own_rate, max_frames, lay_out)
    if not isinstance(source, Iterable):
        raise ValueError(
            f"A clip of type {type(source).__name__} cannot be tokenized; give a path, uint8 frames, or a reader."
        )
    live = as_live_frames(source, value_range=None, layout=None)
    return _of_live_frames(live, own_rate, max_frames, lay_out)


def _of_reader(reader: media.ClipReader, *, exact_color: bool) -> Clip:
    info = reader.info
    return Clip(
        info.kind == "image",
        reader.rate,
        reader.num_frames,
        (info.width, info.height),
        reader.layout,
        reader,
        None,
        pixel_aspect=info.pixel_aspect,
        transfer=info.transfer,
        exact_color=exact_color,
        source_rate=info.rate,
    )


def _of_array(
    array: np.ndarray,
    rate: float,
    max_frames: int | None,
    lay_out: Callable[[tuple[int, int]], FrameLayout],
) -> Clip:
    is_image = array.ndim != 4
    frames = (array[None] if is_image else array)[:max_frames]
    if not len(frames):
        raise ValueError("A clip of no frames cannot be tokenized.")
    _check(frames[0])
    size = (frames.shape[2], frames.shape[1])
    return Clip(is_image, 0.0 if is_image else rate, len(frames), size, lay_out(size), None, frames)


def _of_live_frames(
    live: Iterator[np.ndarray],
    rate: float,
    max_frames: int | None,
    lay_out: Callable[[tuple[int, int]], FrameLayout],
) -> Clip:
    first = next(live, None)
    if first is None:
        raise ValueError("No frame came; there is nothing to tokenize.")
    _check(first)
    frames = itertools.islice(itertools.chain([first], live), max_frames)
    size = (first.shape[1], first.shape[0])
    return Clip(False, rate, None, size, lay_out(size), None, frames)


class Ahead(Iterator[_T]):
    """The items, produced up to `count` in advance by a thread, from now on: decoding continues while the model runs."""

    def __init__(self, items: Iterator[_T], count: int):
        self._items, self._end = items, object()
        self._pool: concurrent.futures.ThreadPoolExecutor | None = (
            concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="ahead")
        )
        self._futures: deque[concurrent.futures.Future[Any]] = deque()
        for _ in range(count):
            self._submit()

    def _submit(self) -> None:
        assert self._pool is not None
        self._futures.append(self._pool.submit(next, self._items, self._end))

    def __next__(self) -> _T:
        if not self._futures:
            raise StopIteration
        try:
            item = self._futures.popleft().result()
        except BaseException:
            self.close()
            raise
        if item is self._end:
            self.close()
            raise StopIteration
        self._submit()
        return item

    def close(self) -> None:
        """Ends the thread, and the generator that it reads."""
        if self._pool is None:
            return
        for future in self._futures:
            future.cancel()
        self._futures.clear()
        if isinstance(self._items, Generator):
            self._pool.submit(self._items.close)
        self._pool.shutdown()
        self._pool = None


def _check(frame: np.ndarray, shape: tuple[int, ...] | None = None) -> None:
    """Refuses an array that is not a frame, or does not have the shape."""
    if (
        frame.dtype != np.uint8
        or frame.ndim != 3
        or shape not in (None, frame.shape)
        or 0 in frame.shape
        or frame.shape[-1] != 3
    ):
        raise ValueError(
            f"Frames of type {frame.dtype} and shape {frame.shape} must be uint8 [height, width, 3], all of one size."
        )

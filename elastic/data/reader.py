"""Pieces of files -> the patches of a training sequence: decoding, cropping, remembering.

Decoded frames are held, the ones used longest ago are dropped first. Files are decoded in spans
that do not depend on what was asked for before: what a sequence holds is a function of its number,
damaged files included.
"""

import collections
import dataclasses
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Bool, Int32, UInt8
from PIL import Image

from elastic import media
from elastic.data.frame_cache import FrameCache
from elastic.data.packing import PackingPlan, Piece
from elastic.media.files import Place
from elastic.patches import pad_block, patchify

# Videos are held this much larger than a crop, images twice as large: room to move in.
_VIDEO_MARGIN, _IMAGE_MARGIN = 1.25, 2.0
# Decoding starts at a keyframe, often 250 frames away: a span of so many blocks makes that pay.
_SPAN_BLOCKS = 64
_MAX_OPEN = 64  # files whose frames' places are remembered
_NUM_LOCKS = 64


class HostBatch(NamedTuple):
    """Training sequences, each a row of blocks.

    Attributes:
      patches: the pixels, block by block; zeros where not filled.
      segment_ids: per block; equal ids are one piece of one file, in order. Padding has ids of its own.
      block_index: the place of the block in its piece, which gives its positions.
      filled: False for padding and for a block that could not be decoded: no loss is taken there.
    """

    patches: UInt8[np.ndarray, "b l p"]
    segment_ids: Int32[np.ndarray, "b n"]
    block_index: Int32[np.ndarray, "b n"]
    filled: Bool[np.ndarray, "b n"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeSpec:
    """How the files' frames become blocks.

    Attributes:
      places: the files.
      num_frames: how many frames are used of each; 0: it is an image.
      fps: frames per second taken from a video.
      resolution, frames_per_block, patch_size: the model's.
      image_blocks: blocks of an image; more than one show a moving crop of it.
      random_crop: draw a crop, a flip and a small shift in time for each piece.
      seed: draws them.
      cache_bytes: memory for decoded frames.
      cache_path: folder for decoded frames; '' is none.
      stamps: what tells a file from a later one of its name.
      blocks_per_sequence: the longest piece.
    """

    places: Sequence[Place]
    num_frames: np.ndarray
    fps: float
    resolution: int
    frames_per_block: int
    patch_size: tuple[int, int, int]
    image_blocks: int
    random_crop: bool
    seed: int
    cache_bytes: float
    cache_path: str
    stamps: Sequence[str]
    blocks_per_sequence: int


class _Span(NamedTuple):
    """The decoded frames of a span: fewer than it has where it is damaged."""

    frames: np.ndarray
    error: str


_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


class _Recent(Generic[_Key, _Value]):
    """Things that may be dropped: those used longest ago, once all together are too large."""

    def __init__(self, most: float, size: Callable[[_Value], float]):
        self._most, self._size, self._total = most, size, 0.0
        self._held: collections.OrderedDict[_Key, _Value] = collections.OrderedDict()

    def get(self, key: _Key) -> _Value | None:
        if key in self._held:
            self._held.move_to_end(key)
        return self._held.get(key)

    def put(self, key: _Key, value: _Value) -> None:
        """The newest always stays: it is in use."""
        self._held[key] = value
        self._total += self._size(value)
        while len(self._held) > 1 and self._total > self._most:
            self._total -= self._size(self._held.popitem(last=False)[1])


class DecodeCancelled(Exception):
    """Decoding was told to stop."""


class SequenceReader:
    """Decodes sequences. May be used by several threads; a copy in another process starts empty.

    Attributes:
      stopped: asked after every frame; True ends the decoding with `DecodeCancelled`.
    """

    def __init__(self, pictures: DecodeSpec, plan: PackingPlan, *, whole_spans: bool = True):
        """`whole_spans=False` decodes just what is asked for: for few, scattered sequences."""
        self.pictures, self.plan = pictures, plan
        self._whole_spans = whole_spans
        self._start()

    def _start(self) -> None:
        self._locks = [threading.Lock() for _ in range(_NUM_LOCKS)]  # a file is decoded by one
        self._lock = threading.Lock()  # of what follows
        self._spans: _Recent[tuple[int, int, int], _Span] = _Recent(
            self.pictures.cache_bytes, lambda span: span.frames.nbytes + 1000
        )
        self._open: _Recent[int, media.ClipReader] = _Recent(_MAX_OPEN, lambda _: 1)
        path = self.pictures.cache_path
        self._files = FrameCache(path) if path and self._whole_spans else None
        self._bad: dict[str, str] = {}
        self.stopped: Callable[[], bool] = lambda: False

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("pictures", "plan", "_whole_spans")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def read(self, number: int, batch_size: int) -> HostBatch:
        """One row: the sequence with this number in the endless stream."""
        epoch, sequence = self.plan.locate(number, batch_size)
        row = self.empty_row()
        patches = row.patches.reshape(self.plan.blocks_per_sequence, -1, row.patches.shape[-1])
        ids = row.segment_ids[0]
        start = 0
        for segment, piece in enumerate(self.plan.pieces(sequence)):
            rng = np.random.default_rng((self.pictures.seed, 2, epoch, sequence, segment))
            blocks = self._piece(piece, rng)
            good, stop = start + len(blocks), start + piece.num_blocks
            if len(blocks):
                patches[start:good] = patchify(blocks, self.pictures.patch_size)
            ids[start:stop] = start  # so is an id of its own for each block of padding
            row.block_index[0, start:stop] = np.arange(piece.num_blocks)
            row.filled[0, start:good] = True
            start = stop
        return row

    def empty_row(self) -> HostBatch:
        """One row of padding."""
        pictures, size = self.pictures, self.plan.blocks_per_sequence
        patch_dim = math.prod(pictures.patch_size) * 3
        numbers = size * pictures.frames_per_block * pictures.resolution**2 * 3
        patches = np.zeros((1, numbers // patch_dim, patch_dim), np.uint8)
        ids = np.arange(size, dtype=np.int32)[None]
        return HostBatch(patches, ids, 0 * ids, np.zeros((1, size), bool))

    def decoded_bytes(self) -> int:
        """What the frames of all files take once they are decoded."""
        num_frames = np.maximum(self.pictures.num_frames, 1).tolist()
        return sum(3 * n * self._side(file) ** 2 for file, n in enumerate(num_frames))

    def take_bad_files(self) -> dict[str, str]:
        """The files found bad since the last call, and why."""
        with self._lock:
            bad, self._bad = self._bad, {}
        return bad

    def _piece(self, piece: Piece, rng: np.random.Generator) -> np.ndarray:
        """The blocks up to the first one that cannot be decoded."""
        pictures, size = self.pictures, self.pictures.frames_per_block
        if pictures.num_frames[piece.file] == 0:
            source = self._decode(piece.file, 0, 1).frames
            if not len(source):
                return source[:0, None]
            num_frames = piece.num_blocks * size
            moving = pictures.image_blocks > 1
            if moving or pictures.random_crop:
                index = np.zeros(num_frames, int)
                frames = _crop(source, index, pictures.resolution, rng, moving=moving)
            else:
                frames = np.repeat(source, num_frames, axis=0)
            return frames.reshape(-1, size, *frames.shape[1:])
        span, first = divmod(piece.first_block, self._span_blocks)
        first *= size
        wanted = min(
            piece.num_blocks * size,
            int(pictures.num_frames[piece.file]) - piece.first_block * size,
        )
        if self._whole_spans:
            span_frames = self._span_blocks * size
            start = span * span_frames
            stop = min(start + span_frames, int(pictures.num_frames[piece.file]))
            source = self._decode(piece.file, start, stop).frames
        else:
            start = piece.first_block * size
            source, first = self._decode(piece.file, start, start + wanted).frames, 0
        good = min(wanted, max(0, len(source) - first))
        if good < wanted:
            good -= good % size
        if not good:
            return source[:0, None]
        if pictures.random_crop:
            index = _shifted(first, good, len(source), size, rng)
            frames = _crop(source, index, pictures.resolution, rng, moving=False)
        else:
            frames = source[first : first + good]
        whole = good - good % size
        blocks = frames[:whole].reshape(-1, size, *frames.shape[1:])
        if whole < good:
            blocks = np.concatenate([blocks, pad_block(frames[whole:], size)[None]])
        return blocks

    @property
    def _span_blocks(self) -> int:
        longest = self.pictures.blocks_per_sequence
        return longest * max(1, _SPAN_BLOCKS // longest)

    def _decode(self, file: int, start: int, stop: int) -> _Span:
        key = (file, start, stop)
        with self._locks[file % _NUM_LOCKS]:
            with self._lock:
                span = self._spans.get(key)
            if span is None:
                span = self._from_disk(*key)
                with self._lock:
                    self._spans.put(key, span)
                    if span.error:
                        self._bad[str(self.pictures.places[file])] = span.error
            return span

    def _from_disk(self, file: int, start: int, stop: int) -> _Span:
        """The span as a process before left it; else decoded, and left there if it is whole."""
        if self._files is None:
            return self._decode_anew(file, start, stop)
        pictures, side = self.pictures, self._side(file)
        place, stamp = str(pictures.places[file]), pictures.stamps[file]
        key = (place, stamp, pictures.fps, side, start, stop)
        frames = self._files.get(key, (stop - start, side, side, 3))
        if frames is not None:
            return _Span(frames, "")
        span = self._decode_anew(file, start, stop)
        if not span.error:
            self._files.put(key, span.frames)
        return span

    def _decode_anew(self, file: int, start: int, stop: int) -> _Span:
        place = self.pictures.places[file]
        frames = np.empty((0, 1, 1, 3), np.uint8)
        found = 0
        try:
            with self._lock:
                clip = self._open.get(file)
            if clip is None:
                clip = self._open_clip(file)
                with self._lock:
                    self._open.put(file, clip)
            frames = np.empty((stop - start, clip.resolution, clip.resolution, 3), np.uint8)
            if clip.num_frames < stop:
                raise media.MediaError(
                    f"{str(place)!r} has fewer frames than when it was measured; start anew."
                )
            for frame in clip.frames(start, stop):
                frames[found] = frame
                found += 1
                if self.stopped():
                    raise DecodeCancelled
        except (media.MediaError, OSError) as error:
            return _Span(frames[:found].copy(), str(error))
        return _Span(frames, "")

    def _open_clip(self, file: int) -> media.ClipReader:
        pictures = self.pictures
        return media.open_clip(
            pictures.places[file],
            resolution=self._side(file),
            rate=pictures.fps,
            tell_rate=False,
        )

    def _side(self, file: int) -> int:
        """Rows and columns that a file's frames are held with."""
        pictures = self.pictures
        is_image = pictures.num_frames[file] == 0
        margin = 1.0
        if pictures.random_crop or (is_image and pictures.image_blocks > 1):
            margin = _IMAGE_MARGIN if is_image else _VIDEO_MARGIN
        return round(pictures.resolution * margin)


def _shifted(
    first: int, count: int, total: int, frames_per_block: int, rng: np.random.Generator
) -> np.ndarray:
    """The frames of a piece, shifted by less than a block within the span, or a still clip."""
    most = frames_per_block - 1
    shift = int(rng.integers(-min(most, first), min(most, total - first - count) + 1))
    stride = 0 if rng.random() < 0.1 else 1
    return first + shift + stride * np.arange(count)


def _crop(
    source: np.ndarray, index: np.ndarray, size: int, rng: np.random.Generator, *, moving: bool
) -> np.ndarray:
    """Square crops of frames `index` of a clip or an image, uint8 [n, size, size, 3], maybe flipped.

    The crop is held, or (`moving`) held, panned or zoomed.
    """
    side = source.shape[1]
    width = side * rng.uniform(size / side, 1.0)
    velocity = np.zeros(2)
    zoom = 0.0
    if moving and rng.random() < 0.75:
        # 0.1 % to 5 % of the picture in a frame.
        velocity = rng.normal(size=2) * side * 10 ** rng.uniform(-3, -1.3)
        zoom = rng.normal() * 0.004
    centre = rng.uniform(width / 2, side - width / 2, size=2)
    flip = rng.random() < 0.5
    out = np.empty((len(index), size, size, 3), np.uint8)
    for k, i in enumerate(index):
        if k and i == index[k - 1] and not velocity.any() and not zoom:
            out[k] = out[k - 1]
            continue
        w = float(np.clip(width * (1 + zoom) ** k, size / 2, side))
        x, y = _reflect(centre + velocity * k, w / 2, side - w / 2) - w / 2
        box = (max(0.0, x), max(0.0, y), min(float(side), x + w), min(float(side), y + w))
        picture = Image.fromarray(source[i])
        out[k] = np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC, box=box))
    return out[:, :, ::-1] if flip else out


def _reflect(x: np.ndarray, low: float, high: float) -> np.ndarray:
    """Keeps positions inside [low, high] by turning back at the ends."""
    span = max(high - low, 1e-6)
    folded = np.abs((x - low) % (2 * span))
    return low + np.where(folded > span, 2 * span - folded, folded)

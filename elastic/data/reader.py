"""Pieces of files -> the patches of a training sequence: decoding, cropping, caching.

Decoded frames are kept in a cache of limited size (least recently used). Files are decoded in spans
that do not depend on earlier requests: the content of a sequence is a function of its number, also
where files are damaged.
"""

import dataclasses
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
from cachetools import LRUCache
from jaxtyping import Bool, Int32, UInt8
from PIL import Image

from elastic import media
from elastic.data.frame_cache import FrameCache
from elastic.data.packing import PackingPlan, Piece
from elastic.media.location import Place
from elastic.patches import TokenOrder, pad_block, patchify
from elastic.tiles import Fit

# Videos are decoded this much larger than a crop, and images twice as large, so that a crop can move.
_VIDEO_MARGIN, _IMAGE_MARGIN = 1.25, 2.0
_TILE_SCALE = 4  # the short side of frames that tiles are cut from is at most that of so many tiles
_WIDE = 16 / 9  # the usual shape of a frame
# Decoding starts at a keyframe, often 250 frames earlier: a span is long enough to make up for that.
_SPAN_BLOCKS = 64
_MAX_OPEN = 64  # files that stay open, with their tables of frames
_NUM_LOCKS = 64


class HostBatch(NamedTuple):
    """Training sequences, each a row of blocks.

    Attributes:
      patches: the pixels, block by block; zeros where not filled.
      segment_ids: one per block; blocks with equal ids are successive blocks of one file. Each block of padding has its own id.
      block_index: the index of the block in its piece, which determines its position ids.
      filled: False for padding and for blocks that could not be decoded; the loss leaves them out.
    """

    patches: UInt8[np.ndarray, "b l p"]
    segment_ids: Int32[np.ndarray, "b n"]
    block_index: Int32[np.ndarray, "b n"]
    filled: Bool[np.ndarray, "b n"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeSpec:
    """How frames of files become blocks.

    Attributes:
      places: the files.
      num_frames: frames used of each file; 0 marks an image.
      fps: frames per second taken from a video.
      resolution: rows and columns of a block's frames in pixels.
      frames_per_block: frames of a block.
      patch_size: frames, rows and columns of a patch.
      token_order: of the patches of a slice.
      image_blocks: blocks made of an image; if more than one, they show a moving crop.
      random_crop: draw a crop, a flip and a small shift in time for each piece.
      seed: seed of these draws.
      cache_bytes: memory for decoded frames.
      cache_path: folder for decoded frames; '' is none.
      reader: who decodes video.
      exact_color: convert the colours of every video with correct rounding.
      short_side: of frames that tiles are cut from, at most; 0 is four tiles.
      fit: what is shown of a frame that is not square.
      stamps: size and time of change of each file; a changed file is decoded again.
      blocks_per_sequence: blocks of the longest piece.
    """

    places: Sequence[Place]
    num_frames: np.ndarray
    fps: float
    resolution: int
    frames_per_block: int
    patch_size: tuple[int, int, int]
    token_order: TokenOrder
    image_blocks: int
    random_crop: bool
    seed: int
    cache_bytes: float
    cache_path: str
    reader: str
    exact_color: bool
    short_side: int
    fit: str
    stamps: Sequence[str]
    blocks_per_sequence: int


class _Span(NamedTuple):
    """The decoded frames of a span; fewer than its length if the file is damaged."""

    frames: np.ndarray
    error: str


class DecodeCancelled(Exception):
    """Decoding was cancelled."""


class SequenceReader:
    """Decodes sequences. May be used by several threads; a copy in another process starts empty.

    Attributes:
      cancelled: called after every frame; True ends the decoding with `DecodeCancelled`.
    """

    def __init__(self, spec: DecodeSpec, plan: PackingPlan, *, whole_spans: bool = True):
        """Makes a reader with an empty cache.

        Args:
          spec: how files are decoded.
          plan: which pieces make a sequence.
          whole_spans: decode and cache whole spans. False decodes only the requested frames, which
            suits few, scattered sequences.
        """
        self.spec, self.plan = spec, plan
        self._whole_spans = whole_spans
        self._start()

    def _start(self) -> None:
        self._locks = [
            threading.Lock() for _ in range(_NUM_LOCKS)
        ]  # a file is decoded by one thread at a time
        self._lock = threading.Lock()  # for the attributes below
        # A span larger than the whole cache counts as its size: it is in use, so it is kept alone.
        most = max(self.spec.cache_bytes, 1)
        self._spans: LRUCache[tuple[int, int, int], _Span] = LRUCache(
            most, getsizeof=lambda span: min(span.frames.nbytes + 1000, most)
        )
        self._open: LRUCache[int, media.ClipReader] = LRUCache(_MAX_OPEN)
        path = self.spec.cache_path
        self._files = FrameCache(path) if path and self._whole_spans else None
        self._bad: dict[str, str] = {}
        self.cancelled: Callable[[], bool] = lambda: False

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("spec", "plan", "_whole_spans")}

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
            rng = np.random.default_rng((self.spec.seed, 2, epoch, sequence, segment))
            blocks = self._piece(piece, rng)
            good, stop = start + len(blocks), start + piece.num_blocks
            if len(blocks):
                patches[start:good] = patchify(blocks, self.spec.patch_size, self.spec.token_order)
            ids[start:stop] = start  # differs from the ids that `empty_row` gave to padding
            row.block_index[0, start:stop] = np.arange(piece.num_blocks)
            row.filled[0, start:good] = True
            start = stop
        return row

    def empty_row(self) -> HostBatch:
        """One row of padding."""
        spec, size = self.spec, self.plan.blocks_per_sequence
        patch_dim = math.prod(spec.patch_size) * 3
        numbers = size * spec.frames_per_block * spec.resolution**2 * 3
        patches = np.zeros((1, numbers // patch_dim, patch_dim), np.uint8)
        ids = np.arange(size, dtype=np.int32)[None]
        return HostBatch(patches, ids, 0 * ids, np.zeros((1, size), bool))

    def decoded_bytes(self) -> int:
        """Bytes of all files' decoded frames."""
        num_frames = np.maximum(self.spec.num_frames, 1).tolist()
        wide = _WIDE if self.spec.fit == "tile" else 1  # a guess: sizes are not known here
        return sum(round(3 * n * wide * self._side(file) ** 2) for file, n in enumerate(num_frames))

    def take_bad_files(self) -> dict[str, str]:
        """Name and reason of each file found bad since the last call."""
        with self._lock:
            bad, self._bad = self._bad, {}
        return bad

    def _piece(self, piece: Piece, rng: np.random.Generator) -> np.ndarray:
        """The blocks up to the first one that cannot be decoded."""
        spec, size = self.spec, self.spec.frames_per_block
        if spec.num_frames[piece.file] == 0:
            source = self._decode(piece.file, 0, 1).frames
            if not len(source):
                return source[:0, None]
            num_frames = piece.num_blocks * size
            moving = spec.image_blocks > 1
            if moving or self._draws:
                index = np.zeros(num_frames, int)
                frames = self._crop(source, index, rng, moving=moving)
            else:
                frames = np.repeat(source, num_frames, axis=0)
            return frames.reshape(-1, size, *frames.shape[1:])
        span, first = divmod(piece.first_block, self._span_blocks)
        first *= size
        wanted = min(
            piece.num_blocks * size,
            int(spec.num_frames[piece.file]) - piece.first_block * size,
        )
        if self._whole_spans:
            span_frames = self._span_blocks * size
            start = span * span_frames
            stop = min(start + span_frames, int(spec.num_frames[piece.file]))
            source = self._decode(piece.file, start, stop).frames
        else:
            start = piece.first_block * size
            source, first = self._decode(piece.file, start, start + wanted).frames, 0
        good = min(wanted, max(0, len(source) - first))
        if good < wanted:
            good -= good % size
        if not good:
            return source[:0, None]
        if self._draws:
            index = first + np.arange(good)
            if spec.random_crop:
                index = _shifted(first, good, len(source), size, rng)
            frames = self._crop(source, index, rng, moving=False)
        else:
            frames = source[first : first + good]
        whole = good - good % size
        blocks = frames[:whole].reshape(-1, size, *frames.shape[1:])
        if whole < good:
            blocks = np.concatenate([blocks, pad_block(frames[whole:], size)[None]])
        return blocks

    @property
    def _draws(self) -> bool:
        """Whether each piece has a crop of its own."""
        return self.spec.random_crop or self.spec.fit == "tile"

    def _crop(
        self, source: np.ndarray, index: np.ndarray, rng: np.random.Generator, *, moving: bool
    ) -> np.ndarray:
        spec = self.spec
        tiles, mirrors = spec.fit == "tile", spec.random_crop or moving
        return _crop(
            source, index, spec.resolution, rng, moving=moving, tiles=tiles, mirrors=mirrors
        )

    @property
    def _span_blocks(self) -> int:
        longest = self.spec.blocks_per_sequence
        return longest * max(1, _SPAN_BLOCKS // longest)

    def _decode(self, file: int, start: int, stop: int) -> _Span:
        key = (file, start, stop)
        with self._locks[file % _NUM_LOCKS]:
            with self._lock:
                span = self._spans.get(key)
            if span is None:
                span = self._from_disk(*key)
                with self._lock:
                    self._spans[key] = span
                    if span.error:
                        self._bad[str(self.spec.places[file])] = span.error
            return span

    def _from_disk(self, file: int, start: int, stop: int) -> _Span:
        """The span from the folder of decoded frames; if it is not there, it is decoded, and stored there if it is complete."""
        if self._files is None:
            return self._decode_anew(file, start, stop)
        spec, side = self.spec, self._side(file)
        place, stamp = str(spec.places[file]), spec.stamps[file]
        key = (place, stamp, spec.fps, side, start, stop)
        if spec.exact_color:  # other pixels; without it the key is that of older caches
            key = (*key, "exact_color")
        rows = columns = side
        if spec.fit != "crop":
            key = (*key, spec.fit)
        if spec.fit == "tile":
            try:
                columns, rows = self._opened(file).layout.frame
            except (media.MediaError, OSError):
                return self._decode_anew(file, start, stop)
        frames = self._files.get(key, (stop - start, rows, columns, 3))
        if frames is not None:
            return _Span(frames, "")
        span = self._decode_anew(file, start, stop)
        if not span.error:
            self._files.put(key, span.frames)
        return span

    def _decode_anew(self, file: int, start: int, stop: int) -> _Span:
        place = self.spec.places[file]
        frames = np.empty((0, 1, 1, 3), np.uint8)
        found = 0
        try:
            clip = self._opened(file)
            side = (clip.resolution, clip.resolution)
            shape = clip.layout.frame[::-1] if self.spec.fit == "tile" else side
            frames = np.empty((stop - start, *shape, 3), np.uint8)
            if clip.num_frames < stop:
                raise media.MediaError(
                    f"{str(place)!r} has fewer frames than when it was measured; start anew."
                )
            for frame in clip.frames(start, stop):
                frames[found] = self._fitted(clip, frame)
                found += 1
                if self.cancelled():
                    raise DecodeCancelled
        except (media.MediaError, OSError) as error:
            return _Span(frames[:found].copy(), str(error))
        return _Span(frames, "")

    def _opened(self, file: int) -> media.ClipReader:
        """The file, opened once."""
        with self._lock:
            clip = self._open.get(file)
        if clip is None:
            clip = self._open_clip(file)
            if self.spec.fit == "tile":
                # Its own size, but no smaller than a tile, and no larger than memory for decoded frames allows.
                short = min(clip.layout.frame)
                wanted = min(max(short, self.spec.resolution), self._side(file))
                if wanted != short:
                    clip = self._open_clip(file, short_side=wanted)
            with self._lock:
                self._open[file] = clip
        return clip

    def _open_clip(self, file: int, *, short_side: int = 0) -> media.ClipReader:
        spec = self.spec
        tile: dict[str, Any] = {"short_side": short_side} if spec.fit == "tile" else {}
        return media.open_clip(
            spec.places[file],
            resolution=spec.resolution if tile else self._side(file),
            fit=cast(Fit, spec.fit),
            rate=spec.fps,
            tell_rate=False,
            reader=spec.reader,
            exact_color=spec.exact_color,
            **tile,
        )

    def _fitted(self, clip: media.ClipReader, frame: np.ndarray) -> np.ndarray:
        """A frame as it is kept: a square, but a whole frame for tiles."""
        if self.spec.fit == "pad":
            return clip.layout.cut(frame[None], 0)[0]
        if self.spec.fit == "stretch":
            return media.scale_frame(frame, (clip.resolution, clip.resolution))
        return frame

    def _side(self, file: int) -> int:
        """Rows and columns that a file is decoded to; for tiles, the most of its short side."""
        spec = self.spec
        if spec.fit == "tile":
            return spec.short_side or _TILE_SCALE * spec.resolution
        is_image = spec.num_frames[file] == 0
        margin = 1.0
        if spec.random_crop or (is_image and spec.image_blocks > 1):
            margin = _IMAGE_MARGIN if is_image else _VIDEO_MARGIN
        return round(spec.resolution * margin)


def _shifted(
    first: int, count: int, total: int, frames_per_block: int, rng: np.random.Generator
) -> np.ndarray:
    """Indices of a piece's frames, shifted by less than a block within the span; one in ten is a still clip."""
    most = frames_per_block - 1
    shift = int(rng.integers(-min(most, first), min(most, total - first - count) + 1))
    stride = 0 if rng.random() < 0.1 else 1
    return first + shift + stride * np.arange(count)


def _crop(
    source: np.ndarray,
    index: np.ndarray,
    size: int,
    rng: np.random.Generator,
    *,
    moving: bool,
    tiles: bool = False,
    mirrors: bool = True,
) -> np.ndarray:
    """Square crops of frames of a clip or an image.

    Args:
      source: the decoded frames, uint8 [frames, rows, columns, 3], no smaller than a crop.
      index: which of them to crop, [n].
      size: rows and columns of the result in pixels.
      rng: draws crop, flip and motion.
      moving: pan and zoom the crop in three of four cases; otherwise it stays where it is.
      tiles: half of the crops that stay have the size of the result, and are cut out as tokenizing cuts tiles; the others have any scale.
      mirrors: flip half of the crops.

    Returns:
      uint8 [n, size, size, 3].
    """
    bounds = np.array(source.shape[2:0:-1])  # columns, rows
    side = int(bounds.min())
    if tiles:
        if not moving and rng.random() < 0.5:
            left, top = (int(rng.integers(most + 1)) for most in bounds - size)
            out = source[index, top : top + size, left : left + size]
            return out[:, :, ::-1] if mirrors and rng.random() < 0.5 else out
        width = size * (side / size) ** rng.random()  # all scales alike
    else:
        width = side * rng.uniform(size / side, 1.0)
    velocity = np.zeros(2)
    zoom = 0.0
    if moving and rng.random() < 0.75:
        # 0.1 % to 5 % of the picture per frame.
        velocity = rng.normal(size=2) * side * 10 ** rng.uniform(-3, -1.3)
        zoom = rng.normal() * 0.004
    centre = rng.uniform(width / 2, bounds - width / 2)
    flip = mirrors and rng.random() < 0.5
    out = np.empty((len(index), size, size, 3), np.uint8)
    for k, i in enumerate(index):
        if k and i == index[k - 1] and not velocity.any() and not zoom:
            out[k] = out[k - 1]
            continue
        w = float(np.clip(width * (1 + zoom) ** k, size / 2, side))
        x, y = _reflect(centre + velocity * k, w / 2, bounds - w / 2) - w / 2
        right, bottom = map(float, bounds)
        box = (max(0.0, x), max(0.0, y), min(right, x + w), min(bottom, y + w))
        picture = Image.fromarray(source[i])
        out[k] = np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC, box=box))
    return out[:, :, ::-1] if flip else out


def _reflect(x: np.ndarray, low: float, high: np.ndarray) -> np.ndarray:
    """Keeps positions inside [low, high] by reflecting them at the ends."""
    span = np.maximum(high - low, 1e-6)
    folded = np.abs((x - low) % (2 * span))
    return low + np.where(folded > span, 2 * span - folded, folded)

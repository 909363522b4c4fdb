"""A frame of any size <-> square tiles of the model's size: sizes, positions, and the blending of overlapping tiles.

Every tile is a clip of its own for the model. Where tiles overlap, the frame is their weighted mean; the weights of a pixel sum to one.
So the error of the frame is bounded by the errors of the tiles. With weights w_k(p) and tile errors e_k(p) at a pixel p,

    (sum_k w_k(p) e_k(p))^2 <= sum_k w_k(p) e_k(p)^2      (the square is convex)

and summed over the pixels of the frame, with W_k = sum_p w_k(p) and E_k = sum_p w_k(p) e_k(p)^2 / W_k,

    mean squared error of the frame <= sum_k W_k E_k / sum_k W_k <= max_k E_k.

If the weighted error E_k of every tile is at most the threshold, the error of the frame is too. The frame is rounded to 8 bits once, after
blending, which adds at most the mean square of that rounding.

NumPy alone is used, so that processes that decode training data and readers of token files may import this module.
"""

import dataclasses
import functools
import itertools
import math
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float, Shaped, UInt8

Fit = Literal["crop", "pad", "stretch", "tile"]
FITS: tuple[Fit, ...] = get_args(Fit)

# The fewest pixels that neighbouring tiles share, as a part of a tile. With an eighth, seams are as good as the inside of a tile
# (scripts/bench/README.md). A quarter takes more tiles, and less shows.
_OVERLAP_SHARE = 8
MAX_FRAME_PIXELS = 89_478_485  # of a frame after scaling, as of a file's frame


@dataclasses.dataclass(frozen=True)
class FrameLayout:
    """How the frames of a clip lie in tiles.

    Attributes:
      fit: 'crop': the middle square in one tile; 'pad': the whole frame in one tile with its border repeated around it;
        'stretch': the whole frame squeezed into one tile; 'tile': the whole frame in as many tiles as it takes.
      tile: rows and columns of a tile: the model's resolution.
      frame: (width, height) of the frames, as they are read and as decoding gives them.
      tops: the first row of each row of tiles. It is negative where a tile is larger than the frame.
      lefts: the first column of each column of tiles.

    Raises:
      ValueError: the tiles do not cover the frame.
    """

    fit: Fit
    tile: int
    frame: tuple[int, int]
    tops: tuple[int, ...] = (0,)
    lefts: tuple[int, ...] = (0,)

    def __post_init__(self):
        if self.fit not in FITS:
            raise ValueError(f"fit={self.fit!r} must be one of {', '.join(FITS)}.")
        if self.tile < 1 or len(self.frame) != 2 or min(self.frame) < 1:
            raise ValueError(
                f"A frame of {self.frame} and a tile of {self.tile} pixels must be positive."
            )
        if self.fit != "tile" and self.num_tiles != 1:
            raise ValueError(f"fit={self.fit!r} has one tile, not {self.num_tiles}.")
        for starts, length in ((self.tops, self.covered[1]), (self.lefts, self.covered[0])):
            if not _covers(starts, self.tile, length):
                raise ValueError(
                    f"Tiles of {self.tile} pixels at {starts} do not cover {length} pixels."
                )

    @property
    def covered(self) -> tuple[int, int]:
        """(width, height) of what the tiles cover: the frame, but a stretched one is one tile."""
        return (self.tile, self.tile) if self.fit in ("crop", "stretch") else self.frame

    @property
    def num_tiles(self) -> int:
        """Tiles of a frame."""
        return len(self.tops) * len(self.lefts)

    @property
    def places(self) -> tuple[tuple[int, int], ...]:
        """(top, left) of each tile in pixels, row after row: the order of tiles everywhere."""
        return tuple((top, left) for top in self.tops for left in self.lefts)

    @property
    def is_weighted(self) -> bool:
        """Whether some pixels of a tile count less than others, or not at all."""
        return self.fit in ("pad", "tile")

    def weights(
        self, number: int
    ) -> tuple[Float[np.ndarray, "tile"], Float[np.ndarray, "tile"]] | None:
        """What the rows and the columns of a tile weigh, float32: a pixel weighs their product. None: all count alike."""
        if not self.is_weighted:
            return None
        row, column = divmod(number, len(self.lefts))
        return self._row_weights[row], self._column_weights[column]

    def share(self, number: int) -> float:
        """A tile's share of the frame: the sum of its weights over the sum of all weights."""
        weights = self.weights(number)
        if weights is None:
            return 1.0
        rows, columns = (float(part.sum(dtype=np.float64)) for part in weights)
        return rows * columns / (self.covered[0] * self.covered[1])

    @functools.cached_property
    def _row_weights(self) -> Float[np.ndarray, "n tile"]:
        return ramps(self.tops, self.tile, self.covered[1]).astype(np.float32)

    @functools.cached_property
    def _column_weights(self) -> Float[np.ndarray, "n tile"]:
        return ramps(self.lefts, self.tile, self.covered[0]).astype(np.float32)

    def cut(
        self, frames: Shaped[np.ndarray, "n rows columns c"], number: int
    ) -> Shaped[np.ndarray, "n tile tile c"]:
        """The frames of one tile. Beyond the frame its border pixels are repeated."""
        top, left = self.places[number]
        width, height = self.covered
        if frames.shape[1:3] != (height, width):
            raise ValueError(
                f"Frames of {frames.shape[2]}x{frames.shape[1]} must be {width}x{height} like the first."
            )
        if top >= 0 and left >= 0 and top + self.tile <= height and left + self.tile <= width:
            return frames[:, top : top + self.tile, left : left + self.tile]
        rows = np.clip(np.arange(top, top + self.tile), 0, height - 1)
        columns = np.clip(np.arange(left, left + self.tile), 0, width - 1)
        return frames[:, rows[:, None], columns]

    def blender(self, num_frames: int) -> "Blender":
        """What puts the tiles of `num_frames` frames together."""
        return Blender(self, num_frames)


class Blender:
    """The frames of a block, put together from their tiles.

    Memory holds the 8-bit frames and, in float32, the rows of tiles that are not complete: not the whole frame.

    Args:
      layout: where the tiles lie.
      num_frames: frames of a tile.
    """

    def __init__(self, layout: FrameLayout, num_frames: int):
        self._layout = layout
        width, height = layout.covered
        self.frames: UInt8[np.ndarray, "n rows columns 3"] = np.empty(
            (num_frames, height, width, 3), np.uint8
        )
        self._bands: dict[int, np.ndarray] = {}  # rows of tiles: the weighted sum of their tiles
        self._missing = [len(layout.lefts)] * len(layout.tops)
        self._next = 0  # the first row of tiles that is not in `frames`

    @property
    def is_complete(self) -> bool:
        """Whether all tiles are in `frames`."""
        return self._next == len(self._missing)

    def add(self, number: int, tile: Shaped[np.ndarray, "n tile tile 3"]) -> None:
        """Adds a tile: levels of 0 to 255, whole or not."""
        layout = self._layout
        row, column = divmod(number, len(layout.lefts))
        left, (width, _) = layout.lefts[column], layout.covered
        weights = layout._column_weights[column]
        first, stop = max(0, left), min(width, left + layout.tile)
        part = slice(first - left, stop - left)
        if row not in self._bands:
            shape = (len(self.frames), layout.tile, width, 3)
            self._bands[row] = np.zeros(shape, np.float32)
        self._bands[row][:, :, first:stop] += (
            tile[:, :, part].astype(np.float32) * weights[part, None]
        )
        self._missing[row] -= 1
        while not self.is_complete and not self._missing[self._next]:
            self._finish_row(self._next)
            self._next += 1

    def _finish_row(self, row: int) -> None:
        """Rounds the pixels that no later row of tiles covers."""
        layout, tops = self._layout, self._layout.tops
        height = layout.covered[1]
        first = max(0, tops[row])
        stop = min(height, tops[row + 1] if row + 1 < len(tops) else tops[row] + layout.tile)
        total = np.zeros((len(self.frames), stop - first, layout.covered[0], 3), np.float32)
        for other, band in list(self._bands.items()):
            top = tops[other]
            low, high = max(first, top), min(stop, top + layout.tile)
            if other <= row and low < high:
                weights = layout._row_weights[other][low - top : high - top]
                total[:, low - first : high - first] += (
                    band[:, low - top : high - top] * weights[:, None, None]
                )
            if other <= row and top + layout.tile <= stop:
                del self._bands[other]
        self.frames[:, first:stop] = np.rint(total).clip(0, 255)


def _covers(starts: tuple[int, ...], tile: int, length: int) -> bool:
    """Whether tiles start where they may: each shows a part of the frame, and together they show all of it."""
    if len(starts) == 1:
        return -tile < starts[0] <= 0 and starts[0] + tile >= length
    gaps = [later - earlier for earlier, later in itertools.pairwise(starts)]
    return (
        bool(starts)
        and starts[0] == 0
        and starts[-1] + tile == length
        and all(0 < gap <= tile for gap in gaps)
    )


def starts_of(length: int, tile: int, overlap: int) -> tuple[int, ...]:
    """Where the fewest tiles start that cover a length and share at least `overlap` pixels with their neighbours.

    They are spread evenly. One tile of a shorter length has it in its middle, so that it starts before the frame.

    Args:
      length: of the frame, in pixels.
      tile: of a tile.
      overlap: fewest pixels that two neighbours share, below `tile`.
    """
    if length <= tile:
        return (-((tile - length) // 2),)
    count = -(-(length - overlap) // (tile - overlap))
    return tuple(round(k * (length - tile) / (count - 1)) for k in range(count))


def ramps(starts: tuple[int, ...], tile: int, length: int) -> Float[np.ndarray, "n tile"]:
    """The weights of tiles along one axis, float64 [tiles, tile]. At each pixel of the frame they sum to one, outside they are 0.

    Each tile comes in over the pixels that it shares with the one before, in a linear ramp, and so the earlier tiles go out.
    """
    whole = np.zeros((len(starts), length))
    for k, start in enumerate(starts):
        inside = slice(max(0, start), min(length, start + tile))
        ramp = np.ones(length)
        if k:
            shared = starts[k - 1] + tile - start
            place = np.arange(length) - start
            ramp = ((place + 0.5) / shared).clip(0, 1) if shared else (place >= 0).astype(float)
        else:
            ramp[: inside.start] = 0
        whole[:k] *= 1 - ramp
        whole[k, inside] = ramp[inside]
    weights = np.zeros((len(starts), tile))
    for k, start in enumerate(starts):
        inside = slice(max(0, start), min(length, start + tile))
        weights[k, inside.start - start : inside.stop - start] = whole[k, inside]
    return weights


def default_overlap(tile: int) -> int:
    """The fewest pixels that neighbouring tiles share where none is given."""
    return tile // _OVERLAP_SHARE


def frame_size(source: tuple[int, int], short_side: int) -> tuple[int, int]:
    """(width, height) of a source scaled to a short side; its shape stays, and the long side is even where that is no other shape.

    Args:
      source: (width, height) of the original as displayed.
      short_side: pixels; 0: the source's own.
    """
    width, height = source
    short, long = min(source), max(source)
    if short_side in (0, short):
        return source
    exact = short_side * long / short
    scaled = max(short_side, 2 * round(exact / 2))
    return (scaled, short_side) if width > height else (short_side, scaled)


def layout_of(
    source: tuple[int, int],
    tile: int,
    *,
    fit: Fit = "crop",
    resolution: int | None = None,
    overlap: int | None = None,
) -> FrameLayout:
    """How frames of a size lie in tiles.

    Args:
      source: (width, height) of the original as displayed.
      tile: rows and columns of a tile: the model's resolution.
      fit: see `FrameLayout`.
      resolution: for 'tile', the short side that frames are scaled to; 0: the source's own size; None: that of a tile.
      overlap: for 'tile', the fewest pixels that neighbours share; None: an eighth of a tile.

    Raises:
      ValueError: the overlap leaves nothing of a tile, or the scaled frame is too large.
    """
    if fit == "crop":
        return FrameLayout(fit, tile, (tile, tile))
    if fit == "stretch":
        return FrameLayout(fit, tile, _checked(source, tile))
    if fit == "pad":
        long = max(source)
        width, height = (max(1, round(tile * side / long)) for side in source)
        return FrameLayout(
            fit, tile, (width, height), starts_of(height, tile, 0), starts_of(width, tile, 0)
        )
    overlap = default_overlap(tile) if overlap is None else overlap
    if not 0 <= overlap < tile:
        raise ValueError(
            f"tile_overlap={overlap} must be 0 or more, and below the {tile} pixels of a tile."
        )
    width, height = _checked(source, tile if resolution is None else resolution)
    tops, lefts = (starts_of(side, tile, overlap) for side in (height, width))
    return FrameLayout(fit, tile, (width, height), tops, lefts)


def _checked(source: tuple[int, int], short_side: int) -> tuple[int, int]:
    size = frame_size(source, short_side)
    if math.prod(size) > MAX_FRAME_PIXELS:
        raise ValueError(
            f"A frame of {source[0]}x{source[1]} pixels scaled to {size[0]}x{size[1]} has more than {MAX_FRAME_PIXELS:,} pixels; "
            "give a smaller resolution= (0: the file's own size), or fit='crop'."
        )
    return size


def crop_message(source: tuple[int, int], resolution: int) -> str | None:
    """What 'crop' does with a frame, in one line; None: it keeps all of it."""
    width, height = source
    if width == height:
        return None
    side = min(source)
    scaled = "" if side == resolution else f", scaled to {resolution}x{resolution}"
    return f"{width}x{height}: the middle {side}x{side}{scaled}; --fit=tile keeps all"

"""Frames of a clip <-> the square tiles that the model sees, and the result of a block on the whole frame."""

import time

import numpy as np
from jaxtyping import Shaped, UInt8

from elastic import media
from elastic.patches import round_levels
from elastic.tiles import Blender, FrameLayout
from elastic.tokenizer.result import BlockResult, TileResult
from elastic.tokens import tokens_of_tiles


def to_tile(
    layout: FrameLayout, frames: UInt8[np.ndarray, "n rows columns 3"], number: int = 0
) -> UInt8[np.ndarray, "n tile tile 3"]:
    """The frames of a tile as the model sees them: squeezed into it with 'stretch', with a border where it is larger than the frame."""
    if layout.fit == "stretch":
        return _scaled(frames, layout.covered)
    return layout.cut(frames, number)


def from_tile(
    layout: FrameLayout, tile: Shaped[np.ndarray, "n tile tile 3"]
) -> UInt8[np.ndarray, "n rows columns 3"]:
    """The inverse for a frame of one tile: the border is cut off, or the shape of the original restored."""
    if layout.fit == "crop":
        return tile
    if layout.fit == "stretch":
        return _scaled(round_levels(tile), layout.frame)
    width, height = layout.frame
    top, left = -layout.tops[0], -layout.lefts[0]
    return round_levels(tile[:, top : top + height, left : left + width])


class TileGatherer:
    """The frames of a block, from its tiles in any order.

    They are blended in one order, because a sum of floats depends on it. A tile that comes before its turn is kept until then.

    Args:
      layout: where the tiles lie.
    """

    def __init__(self, layout: FrameLayout):
        self._layout = layout
        self._blender: Blender | None = None
        self._early: dict[int, np.ndarray] = {}
        self._next = 0

    def add(self, number: int, tile: Shaped[np.ndarray, "n tile tile 3"]) -> None:
        """Adds a tile; float levels where there are several."""
        self._early[number] = tile
        while self._next in self._early:
            part = self._early.pop(self._next)
            if self._layout.num_tiles == 1:
                self._whole = from_tile(self._layout, part)
            else:
                if self._blender is None:
                    self._blender = self._layout.blender(len(part))
                self._blender.add(self._next, part)
            self._next += 1

    @property
    def is_complete(self) -> bool:
        """Whether all tiles have come."""
        return self._next == self._layout.num_tiles

    @property
    def frames(self) -> UInt8[np.ndarray, "n rows columns 3"]:
        """The frames, when all tiles have come."""
        return self._whole if self._blender is None else self._blender.frames


class BlockGatherer:
    """The result of a block, from those of its tiles in any order.

    Args:
      layout: where the tiles lie.
      frames: the whole frames of the block.
    """

    def __init__(self, layout: FrameLayout, frames: UInt8[np.ndarray, "n rows columns 3"]):
        self._layout, self._frames = layout, frames
        self._tiles = TileGatherer(layout)
        self._started = time.perf_counter()
        self.results: dict[int, TileResult] = {}

    def add(self, number: int, result: BlockResult) -> None:
        """Adds the model's result of a tile."""
        self._tiles.add(number, result.reconstruction)
        self.results[number] = result.parts[0]

    @property
    def is_complete(self) -> bool:
        """Whether all tiles have come."""
        return self._tiles.is_complete

    def result(self) -> BlockResult:
        """The result of the block, with whole frames."""
        layout, frames = self._layout, self._frames
        parts = tuple(self.results[number] for number in range(layout.num_tiles))
        if len(parts) == 1:
            return BlockResult(frames, self._tiles.frames, *parts[0])
        return BlockResult(
            frames=frames,
            reconstruction=self._tiles.frames,
            tokens=tokens_of_tiles(layout, (part.tokens for part in parts)),
            passes=sum(part.passes for part in parts),
            seconds=time.perf_counter() - self._started,
            tried={},
            drafts=sum(part.drafts for part in parts),
            tiles=parts,
        )


def _scaled(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.stack([media.scale_frame(frame, size) for frame in frames])

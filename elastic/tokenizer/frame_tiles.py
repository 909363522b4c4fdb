"""Frames of a clip <-> the square tile that the model sees, and the result of a block on the whole frame."""

import numpy as np
from jaxtyping import Shaped, UInt8

from elastic import media
from elastic.patches import round_levels
from elastic.tiles import FrameLayout
from elastic.tokenizer.result import BlockResult


def to_tile(
    layout: FrameLayout, frames: UInt8[np.ndarray, "n rows columns 3"]
) -> UInt8[np.ndarray, "n tile tile 3"]:
    """The frames as the model sees them: squeezed into the tile with 'stretch', with a border around them with 'pad'."""
    if layout.fit == "stretch":
        return _scaled(frames, layout.covered)
    return layout.cut(frames, 0)


def from_tile(
    layout: FrameLayout, tile: Shaped[np.ndarray, "n tile tile 3"]
) -> UInt8[np.ndarray, "n rows columns 3"]:
    """The inverse: the border is cut off, or the shape of the original restored."""
    if layout.fit == "stretch":
        return _scaled(round_levels(tile), layout.frame)
    width, height = layout.frame
    top, left = -layout.tops[0], -layout.lefts[0]
    return round_levels(tile[:, top : top + height, left : left + width])


def whole_result(
    layout: FrameLayout, frames: UInt8[np.ndarray, "n rows columns 3"], result: BlockResult
) -> BlockResult:
    """A block's result with whole frames; the model's result has those of the tile."""
    if layout.fit == "crop":
        return result
    return result._replace(frames=frames, reconstruction=from_tile(layout, result.reconstruction))


def _scaled(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.stack([media.scale_frame(frame, size) for frame in frames])

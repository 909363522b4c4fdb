"""What tokenizing one block gives."""

from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from elastic.metrics import squared_error
from elastic.tokens import BlockTokens


class TileResult(NamedTuple):
    """One tile of a block, tokenized."""

    tokens: BlockTokens
    passes: int  # runs of encoder and decoder over this tile of the block
    seconds: float
    tried: dict[int, float]  # every count evaluated, with its loss
    drafts: int  # counts that were drafted to find the first ones to try


class BlockResult(NamedTuple):
    """One block, tokenized."""

    frames: UInt8[
        np.ndarray, "n rows columns 3"
    ]  # the original at the model's resolution, or whole; real frames only
    reconstruction: UInt8[np.ndarray, "n rows columns 3"]
    # Of several tiles: all their tokens, tile after tile, with the mean of their losses, weighted by their shares of the frame. The
    # error of the frame is at most that mean.
    tokens: BlockTokens
    passes: int  # runs of encoder and decoder over this block
    seconds: float
    tried: dict[int, float]  # every count evaluated, with its loss; empty for several tiles
    drafts: int  # counts that were drafted to find the first ones to try
    tiles: tuple[TileResult, ...] = ()  # of a frame of several tiles, row after row

    @property
    def parts(self) -> tuple[TileResult, ...]:
        """The tiles; where the frame is one tile, the block itself."""
        own = TileResult(self.tokens, self.passes, self.seconds, self.tried, self.drafts)
        return self.tiles or (own,)

    @property
    def squares(self) -> int:
        """Sum of the squared differences of 8-bit levels: what the PSNR of a whole clip is made of."""
        return squared_error(self.frames, self.reconstruction)

    @property
    def frame_loss(self) -> float:
        """The mean squared error of the decoded 8-bit frames, pixels in [-1, 1]."""
        return self.squares / self.frames.size * (2 / 255) ** 2

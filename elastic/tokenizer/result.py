"""What tokenizing one block gives."""

from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from elastic.tokens import BlockTokens


class BlockResult(NamedTuple):
    """One block, tokenized."""

    frames: UInt8[
        np.ndarray, "n rows columns 3"
    ]  # the original at the model's resolution; real frames only
    reconstruction: UInt8[np.ndarray, "n rows columns 3"]
    tokens: BlockTokens
    passes: int  # runs of encoder and decoder over this block
    seconds: float
    tried: dict[int, float]  # every count evaluated, with its loss

    @property
    def squares(self) -> int:
        """Sum of the squared differences of 8-bit levels: what the PSNR of a whole clip is made of."""
        difference = self.frames.astype(np.int32) - self.reconstruction
        return int(np.sum(np.square(difference), dtype=np.int64))

"""What tokenizing one block gives, and what its loss may be."""

import functools
from collections.abc import Callable
from typing import NamedTuple, SupportsFloat

import jax
import numpy as np
from jaxtyping import UInt8

from elastic.metrics.lpips import lpips_of_frames
from elastic.metrics.lpips_weights import load_lpips_weights
from elastic.tokens.clip import BlockTokens

# What a block's loss is instead of the mean squared error: of original and reconstruction, uint8
# [n, rows, columns, 3], real frames only; 0 or above, less is better.
Metric = Callable[[np.ndarray, np.ndarray], SupportsFloat]


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


def make_metric(metric: str | Metric) -> tuple[str, Metric | None]:
    """A metric and its name: 'mse' (None: the codec measures it), 'lpips' (the mean of the frames) or a function.

    Raises:
      ValueError: the name is unknown, or there are no LPIPS weights.
    """
    if callable(metric):
        return getattr(metric, "__name__", type(metric).__name__), metric
    if metric == "mse":
        return metric, None
    if metric == "lpips":
        return metric, _lpips_metric()
    raise ValueError(f"metric={metric!r} must be 'mse', 'lpips' or a function of two clips.")


@functools.cache  # the weights are read once, not for every clip
def _lpips_metric() -> Metric:
    distance = functools.partial(lpips_of_frames, jax.device_put(load_lpips_weights()))
    return lambda a, b: np.mean(distance(a, b))

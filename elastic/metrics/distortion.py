"""The metrics that a block's loss may be: squared error, LPIPS, or any function. A new metric is added here."""

import functools
from collections.abc import Callable
from typing import SupportsFloat

import jax
import numpy as np

from elastic.metrics.lpips import lpips_of_frames
from elastic.metrics.lpips_weights import load_lpips_weights

# A distortion: (original, reconstruction) -> a number of 0 or above, smaller is better. Both are uint8
# [frames, rows, columns, 3] without padding frames.
Metric = Callable[[np.ndarray, np.ndarray], SupportsFloat]


def make_metric(metric: str | Metric) -> tuple[str, Metric | None]:
    """The name of a metric and its function.

    Args:
      metric: 'mse' (its function is None: the codec measures it), 'lpips' (the mean over the frames) or a function.

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

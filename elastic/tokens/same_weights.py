"""Compares fingerprints of weights; needs NumPy only, so that readers of tokens load no jax."""

from collections.abc import Sequence

import numpy as np

_MOST_APART = 0.2  # largest distance of equal weights in different float types, relative to the fingerprint's length


def are_apart(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether two fingerprints (16 numbers each) belong to different weights."""
    first, second = np.asarray(a), np.asarray(b)
    return not np.linalg.norm(first - second) <= _MOST_APART * np.linalg.norm(second)

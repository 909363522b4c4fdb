"""Whether two fingerprints belong to the same weights; NumPy alone."""

from collections.abc import Sequence

import numpy as np

_MOST_APART = 0.2  # of the length of a fingerprint


def are_apart(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether two fingerprints are of different weights."""
    first, second = np.asarray(a), np.asarray(b)
    return not np.linalg.norm(first - second) <= _MOST_APART * np.linalg.norm(second)

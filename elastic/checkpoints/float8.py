"""Weights in float8 (e4m3): which parameters, how they are stored, and rounding during training.

Only the matrices of attention and feed-forward, which are most of a model, are stored in float8; all
else in bfloat16. Three bits of mantissa change a weight by 2.6 % (root mean square). Training with
rounded weights makes up for most of the loss.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from elastic.io.tensors import BFLOAT16, FLOAT8
from elastic.io.tree import CheckpointError, KeyPath, flatten, path_name, unflatten

_MAX_CHANGE = 0.05  # of a matrix by rounding, root mean square


def is_matrix(path: KeyPath) -> bool:
    """Whether the parameter of this name is stored in float8."""
    return "attention" in path or "feed_forward" in path


def rounded(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters with matrices rounded to float8, in their own dtype.

    Gradients ignore the rounding (the straight-through estimator, Bengio et al. 2013, section 3).
    """
    flat = flatten(params)
    for path, x in flat.items():
        if is_matrix(path):
            flat[path] = x + lax.stop_gradient(x.astype(jnp.float8_e4m3fn).astype(x.dtype) - x)
    return unflatten(flat)


def as_stored(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters as NumPy arrays: matrices in float8, all else in bfloat16.

    Raises:
      CheckpointError: a matrix's values are too large or too small for float8.
    """
    flat = {}
    for path, leaf in flatten(params).items():
        values = np.asarray(leaf, np.float32)
        flat[path] = values.astype(FLOAT8 if is_matrix(path) else BFLOAT16)
        if is_matrix(path):
            change = _size(flat[path].astype(np.float32) - values) / _size(values)
            if not change <= _MAX_CHANGE:  # NaN, too, which values above 448 become
                raise CheckpointError(
                    f"'{path_name(path)}' would lose too much in float8, which holds 0.002 to 448: rounding changes it by "
                    f"{change:.1%}, at most {_MAX_CHANGE:.0%} is allowed; store it as 'bf16'."
                )
    return unflatten(flat)


def _size(values: np.ndarray) -> float:
    return max(float(np.sqrt(np.mean(np.square(values)))), 1e-38)

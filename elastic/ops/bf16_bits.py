"""bfloat16 arrays held as uint16, for loops on the CPU.

XLA:CPU cannot slice bfloat16 in a loop: before the loop it converts the whole array to float32. Stacked weights and a
KV cache would then be in memory a second time, at twice the size. It slices integers without conversion.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax


def to_bits(x: Any) -> Any:
    """A bfloat16 array as uint16 (a view, for NumPy arrays); any other array unchanged."""
    if isinstance(x, np.ndarray):
        return x.view(np.uint16) if x.dtype == jnp.bfloat16 else x
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def from_bits(x: Any) -> Any:
    """The inverse of `to_bits`: uint16 as bfloat16; any other array unchanged."""
    return lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x

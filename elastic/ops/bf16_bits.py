"""bfloat16 arrays as their bits, for loops on the CPU.

XLA:CPU cannot slice bfloat16: it converts the whole array that is sliced to float32, before the loop that slices it. Stacked weights and a
cache would be held once more, twice as large. Integers are sliced as they are.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax


def to_bits(x: Any) -> Any:
    """A bfloat16 array as uint16 (NumPy's as a view); any other array as it is."""
    if isinstance(x, np.ndarray):
        return x.view(np.uint16) if x.dtype == jnp.bfloat16 else x
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def from_bits(x: Any) -> Any:
    """The inverse of `hide`: uint16 as bfloat16; any other array as it is."""
    return lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x

"""A number of each array that changes with any of its bits, computed on the devices where the array lies.

The chunks of a checkpoint hold none (a bit flipped in a file is read as it is), and no host has the whole of a sharded array.
Integers wrap around, so the sum is the same in any order, on any mesh.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Shaped, UInt32

from elastic.io.tree import flatten, path_name

_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def checksums(tree: dict[str, Any]) -> dict[str, int]:
    """The checksum of each array by its path, `'params/encoder/...'`; on many hosts all call this.

    Args:
      tree: nested dicts of arrays whose items have 1, 2 or 4 bytes.
    """
    sums = jax.device_get(_sums(tree))
    return {path_name(path): int(value) for path, value in flatten(sums).items()}


@jax.jit
def _sums(tree: dict[str, Any]) -> dict[str, Any]:
    return jax.tree.map(_sum, tree)


def _sum(x: Shaped[Array, "..."]) -> UInt32[Array, ""]:
    """Sum of bits_i (2i + 1) modulo 2^32: an odd factor loses no bit, and values that change places tell."""
    bits = lax.bitcast_convert_type(x, _UNSIGNED[x.dtype.itemsize]).astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)

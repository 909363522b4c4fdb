"""Inputs of the attention kernels: pieces of a sequence, as a ring or a cache gives them."""

import jax.numpy as jnp
import numpy as np

from elastic.ops.attention.base import MaskArgs, StaticArgs


def normal(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def piece(
    *, queries, keys, dim, block, q_start=0, kv_start=0, kv_length=None, segments=False, hidden=False,
    q_tile=16, kv_tile=32,
):  # fmt: skip
    """q, k, v, a cotangent, what may be seen, options; two heads of two batch elements."""
    rng = np.random.default_rng(queries + keys)
    q, k, v, dout = (normal(rng, 4, n, dim) for n in (queries, keys, keys, queries))
    kv_length = kv_start + keys if kv_length is None else kv_length
    scope = MaskArgs(*map(jnp.int32, (q_start, kv_start, kv_length, 0)))
    if segments:
        ids = (jnp.asarray(rng.integers(0, 2, (2, n))) for n in (queries, keys))
        scope = scope._replace(**dict(zip(("q_segments", "kv_segments"), ids, strict=True)))
    if hidden:
        scope = scope._replace(valid=jnp.asarray(rng.random((2, keys)) < 0.6))
    return (q, k, v, dout), scope, StaticArgs(block, q_tile, kv_tile, 2)

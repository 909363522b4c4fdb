"""Block-causal attention in plain jax.numpy: the truth that every fast implementation is held to.

Makes an array of queries x keys; for tests, and for those who ask for it by name (`scan_attention=False`).
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from elastic.ops.attention import block_mask


def attend(
    q: Float[Array, "b q h d"],
    k: Float[Array, "b k h d"],
    v: Float[Array, "b k h d"],
    *,
    block_size: int,
    q_start: Int[Array, ""],
    kv_length: Int[Array, ""],
    q_segments: Int[Array, "b q"] | None = None,
    kv_segments: Int[Array, "b k"] | None = None,
    valid: Bool[Array, "b k"] | None = None,
) -> tuple[Float[Array, "b q h d"], Float[Array, "b h q"]]:
    """Output in float32, and the natural logsumexp of each query's logits.

    A query that sees no key gives 0 and -inf (the released code averages over keys it must not see).
    """
    logits = _product("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    j = jnp.arange(k.shape[1])
    seen = (
        block_mask.visible(q_start + jnp.arange(q.shape[1]), j, block_size=block_size)
        & (j < kv_length)[None, :]
    )
    seen = seen[None, None]
    if q_segments is not None and kv_segments is not None:
        seen &= q_segments[:, None, :, None] == kv_segments[:, None, None, :]
    if valid is not None:
        seen &= valid[:, None, None, :]
    logits = jnp.where(seen, logits, -jnp.inf)
    top = jnp.maximum(
        jnp.max(logits, axis=-1, keepdims=True), -1e30
    )  # finite where nothing is seen
    weights = jnp.where(seen, jnp.exp(logits - top), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / jnp.where(total > 0, total, 1.0)
    out = _product("bhqk,bkhd->bqhd", weights.astype(v.dtype), v)
    log_total = jnp.log(jnp.where(total > 0, total, 1.0))
    return out, jnp.where(total > 0, top + log_total, -jnp.inf)[..., 0]


def _product(subscripts: str, a: Array, b: Array) -> Array:
    """In float32, where products of 16-bit numbers are exact."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.einsum(subscripts, a, b, precision="highest")

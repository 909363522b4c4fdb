"""Block-causal attention in plain jax.numpy: the definition that tests compare every fast implementation with.

It makes an array of queries x keys, so it is for tests and for those who ask for it by name (`scan_attention=False`).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from elastic.ops.attention import block_mask
from elastic.ops.attention.base import MaskArgs


def attend(
    q: Float[Array, "b q h d"],
    k: Float[Array, "b k h d"],
    v: Float[Array, "b k h d"],
    mask: MaskArgs,
    *,
    block_size: int,
) -> tuple[Float[Array, "b q h d"], Float[Array, "b h q"]]:
    """`softmax(q k^T / sqrt(d)) v` over the keys that each query sees (Vaswani et al. 2017, eq. 1).

    Args:
      q: queries [b, q, h, d], float32 or bfloat16.
      k: keys [b, k, h, d].
      v: values [b, k, h, d].
      mask: what each query may see. Keys begin at 0; `kv_start` and `first_row` are not read.
      block_size: tokens per block.

    Returns:
      The output in float32, and the natural logsumexp of each query's logits. A query that sees no key gives 0 and
      -inf; the released code averages over keys that such a query must not see.
    """
    logits = _product("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    j = jnp.arange(k.shape[1])
    seen = (
        block_mask.visible(mask.q_start + jnp.arange(q.shape[1]), j, block_size=block_size)
        & (j < mask.kv_length)[None, :]
    )
    seen = seen[None, None]
    if mask.q_segments is not None and mask.kv_segments is not None:
        seen &= mask.q_segments[:, None, :, None] == mask.kv_segments[:, None, None, :]
    if mask.valid is not None:
        seen &= mask.valid[:, None, None, :]
    logits = jnp.where(seen, logits, -jnp.inf)
    # Finite where no key is seen, so that no nan arises.
    top = jnp.maximum(jnp.max(logits, axis=-1, keepdims=True), -1e30)
    weights = jnp.where(seen, jnp.exp(logits - top), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / jnp.where(total > 0, total, 1.0)
    out = _product("bhqk,bkhd->bqhd", weights.astype(v.dtype), v)
    log_total = jnp.log(jnp.where(total > 0, total, 1.0))
    return out, jnp.where(total > 0, top + log_total, -jnp.inf)[..., 0]


def _product(subscripts: str, a: Array, b: Array) -> Array:
    """An einsum in float32, which represents products of 16-bit numbers exactly."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.einsum(subscripts, a, b, precision="highest")

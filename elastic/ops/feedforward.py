"""The SwiGLU feed-forward network, on whole sequences or in chunks of tokens."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from elastic.ops import bf16_bits
from elastic.ops.dense import dense

SAVED = "feed_forward"  # the name under which policies of jax.checkpoint find the gate's operands


def feedforward(
    x: Float[Array, "b l d"],
    w1: Float[Array, "d m"],
    w2: Float[Array, "m d"],
    w3: Float[Array, "d m"],
    *,
    dtype: DTypeLike,
    chunk_size: int | None = None,
    num_parts: int = 1,
) -> Float[Array, "b l d"]:
    """`w2(silu(w1 x) * w3 x)` (SwiGLU, Shazeer 2020, eq. 6).

    Args:
      x: activations [b, l, d], float32.
      w1: the gate's weights [d, m].
      w2: the output weights [m, d].
      w3: the weights of the other factor [d, m].
      dtype: the products' operands are rounded to it; sums are float32.
      chunk_size: tokens computed at a time, so that at most `chunk_size x m` inner activations per sequence exist. The
        last chunk may be shorter. None: all tokens at once.
      num_parts: devices that the sequence is split over evenly. Each device chunks its own part, because a chunk that
        lay on several devices would be gathered.

    Returns:
      [b, l, d], float32.
    """
    dtype = jnp.dtype(dtype)

    def gated(x: Array) -> Array:
        return dense(_gate(dense(x, w1, dtype), dense(x, w3, dtype), dtype), w2, dtype)

    batch, length, width = x.shape
    length //= num_parts
    if chunk_size is None or chunk_size >= length:
        return gated(x)
    parts = x.reshape(batch, num_parts, length, width)
    whole = length // chunk_size * chunk_size
    chunks = parts[:, :, :whole].reshape(batch, num_parts, -1, chunk_size, width)
    out = lax.map(jax.checkpoint(gated), jnp.moveaxis(chunks, 2, 0))
    out = jnp.moveaxis(out, 0, 2).reshape(batch, num_parts, whole, width)
    if whole < length:
        out = jnp.concatenate([out, gated(parts[:, :, whole:])], axis=2)
    return out.reshape(x.shape)


def _silu_times(a: Array, b: Array, dtype: jnp.dtype) -> Array:
    """silu(a) * b."""
    return jax.nn.silu(a) * b


_gate = jax.custom_vjp(_silu_times, nondiff_argnums=(2,))


def _gate_fwd(a: Array, b: Array, dtype: jnp.dtype):
    # The operands are saved rounded, like operands of products, and as uint16, because a scan over layers stacks them. The
    # result derives from the saved arrays, so that the backward pass can recompute it without the products.
    saved = [checkpoint_name(bf16_bits.to_bits(x.astype(dtype)), SAVED) for x in (a, b)]
    kept_a, kept_b = (bf16_bits.from_bits(x).astype(a.dtype) for x in saved)
    return _silu_times(kept_a, kept_b, dtype), saved


def _gate_bwd(dtype: jnp.dtype, saved, gradient: Array):
    a, b = (bf16_bits.from_bits(x).astype(gradient.dtype) for x in saved)
    share = jax.nn.sigmoid(a)
    return gradient * b * share * (1 + a * (1 - share)), gradient * a * share


_gate.defvjp(_gate_fwd, _gate_bwd)

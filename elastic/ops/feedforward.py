"""The gated feed-forward network, all at once or in chunks of tokens."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from elastic.ops.dense import dense


def feedforward(
    x: Float[Array, "b l d"],
    w1: Float[Array, "d m"],
    w2: Float[Array, "m d"],
    w3: Float[Array, "d m"],
    *,
    dtype: DTypeLike,
    chunk_size: int | None = None,
) -> Float[Array, "b l d"]:
    """`w2(silu(w1 x) * w3 x)`.

    Args:
      dtype: type of the products' operands; sums are float32.
      chunk_size: tokens at a time, so that only `chunk_size x m` numbers are alive; the last chunk may be shorter. None: all at once.
    """

    def gated(x: Array) -> Array:
        return dense(jax.nn.silu(dense(x, w1, dtype)) * dense(x, w3, dtype), w2, dtype)

    length = x.shape[1]
    if chunk_size is None or chunk_size >= length:
        return gated(x)
    whole = length // chunk_size * chunk_size
    chunks = x[:, :whole].reshape(x.shape[0], -1, chunk_size, x.shape[2]).swapaxes(0, 1)
    out = (
        lax.map(jax.checkpoint(gated), chunks).swapaxes(0, 1).reshape(x.shape[0], whole, x.shape[2])
    )
    return out if whole == length else jnp.concatenate([out, gated(x[:, whole:])], axis=1)

"""Kept masks and the block-causal rule."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped


def kept_mask(num_kept: Int[Array, "*b"], tokens_per_block: int) -> Bool[Array, "*b tokens"]:
    """True for the first `num_kept` tokens of each block: exactly that many (the released code keeps one more)."""
    position = lax.broadcasted_iota(jnp.int32, (*num_kept.shape, tokens_per_block), num_kept.ndim)
    return position < num_kept[..., None]


def drop_tail(
    codes: Float[Array, "*b tokens d"], kept: Bool[Array, "*b tokens"]
) -> Float[Array, "*b tokens d"]:
    """Zeroes the codes that are not kept."""
    return jnp.where(kept[..., None], codes, jnp.zeros((), codes.dtype))


def sample_num_kept(
    key: Shaped[Array, "*k"],
    shape: tuple[int, ...],
    *,
    min_kept: int,
    max_kept: int,
    keep_fraction: float | None = None,
    full_fraction: float = 0.0,
    log_uniform: bool = False,
) -> Int[Array, "..."]:
    """How many tokens each block keeps in training.

    Args:
      shape: the batch of blocks.
      keep_fraction: the fixed share of `mask_type='fixed_F'`; None draws from `min_kept + 1` to `max_kept`, both
        included, as the released models were trained.
      full_fraction: the share of blocks that keep every token whatever was drawn.
      log_uniform: draw the logarithm of the count uniformly: more of the short lengths.
    """
    if keep_fraction is not None:
        return jnp.full(shape, max(min_kept, round(keep_fraction * max_kept)), jnp.int32)
    draw_key, full_key = jax.random.split(key)
    low, high = min(min_kept + 1, max_kept), max_kept
    if log_uniform:
        share = jax.random.uniform(draw_key, shape)
        count = jnp.exp(jnp.log(low) + share * (jnp.log(high + 1.0) - jnp.log(low))).astype(
            jnp.int32
        )
        count = jnp.clip(count, low, high)
    else:
        count = jax.random.randint(draw_key, shape, low, high + 1)
    return jnp.where(jax.random.uniform(full_key, shape) < full_fraction, high, count).astype(
        jnp.int32
    )

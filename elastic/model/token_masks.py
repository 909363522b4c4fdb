"""Which tokens of a block are kept: masks, and the counts that training draws."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped


def kept_mask(num_kept: Int[Array, "*b"], tokens_per_block: int) -> Bool[Array, "*b tokens"]:
    """True for the first `num_kept` tokens of each block. Exactly that many; the released code keeps one more."""
    position = lax.broadcasted_iota(jnp.int32, (*num_kept.shape, tokens_per_block), num_kept.ndim)
    return position < num_kept[..., None]


def drop_tail(
    codes: Float[Array, "*b tokens d"], kept: Bool[Array, "*b tokens"]
) -> Float[Array, "*b tokens d"]:
    """The codes with zeros where tokens are not kept."""
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
      key: a JAX random key.
      shape: the shape of the result, one count for each block.
      min_kept: no drawn count is lower, in tokens; uniform draws begin at `min_kept + 1`.
      max_kept: the highest count: the tokens of a block.
      keep_fraction: keep this fixed fraction of `max_kept` (`mask_type='fixed_F'`). None draws uniformly from
        `min_kept + 1` to `max_kept`, both included, as the released models were trained.
      full_fraction: the fraction of blocks that keep all tokens, whatever was drawn.
      log_uniform: draw the logarithm of the count uniformly, which favours low counts.
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

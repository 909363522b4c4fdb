"""Rotary position embedding (RoPE, Su et al. 2021)."""

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int

from elastic.config import ElasticTokConfig
from elastic.patches import token_places

# Positions after which fixed point begins. Up to a million tokens, angles are those of the released code.
_FAR = 1 << 20


def rope_angles(
    position_ids: Int[Array, "*b l"], head_dim: int, theta: float
) -> tuple[Float[Array, "*b l 1 p"], Float[Array, "*b l 1 p"]]:
    """Cosine and sine of `position * theta^(-2 i / d)` in float32, one for each pair of channels (Su et al. 2021, eq. 15).

    In float32 the error of the product grows with the position, up to whole turns, and an endless video gets that far.
    So from position `_FAR` on, the angle of the last multiple of `_FAR` is computed in 32-bit fixed point. Before
    `_FAR` that part is 0.

    Args:
      position_ids: int32 positions, in tokens.
      head_dim: channels of a head.
      theta: the base of the frequencies.
    """
    # In NumPy: at position 10^6 an accelerator's rounding of the power would change the angle visibly.
    frequency = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    turns = frequency.astype(np.float64) * _FAR / (2 * np.pi) % 1  # of `_FAR` positions
    steps = np.round(turns * 2.0**32).astype(np.uint64).astype(np.uint32)
    shape = (1,) * position_ids.ndim + (-1,)
    far, near = (x[..., None] for x in jnp.divmod(position_ids, _FAR))
    # Whole turns overflow, which does not change the angle.
    far_turns = far.astype(jnp.uint32) * steps.reshape(shape)
    angle = far_turns.astype(jnp.float32) * np.float32(2 * np.pi / 2**32)
    angle = (angle + near.astype(jnp.float32) * frequency.reshape(shape))[..., None, :]
    return jnp.cos(angle), jnp.sin(angle)


def model_angles(
    position_ids: Int[Array, "*b l"], config: ElasticTokConfig
) -> tuple[Float[Array, "*b l 1 p"], Float[Array, "*b l 1 p"]]:
    """Cosine and sine for tokens with these numbers in their sequence, by the config's `rope`.

    '1d' rotates by the number itself; in another order than raster by the number that the token's place has in raster
    order. '3d' gives each pair of channels to one of three axes, as M-RoPE does (Wang et al. 2024, Qwen2-VL): the slices
    since the start of the sequence, the row and the column of the patch.
    """
    rows, columns = config.slice_shape
    time, number = jnp.divmod(position_ids, rows * columns)
    places = token_places(rows, columns, config.token_order)
    place = number if places is None else jnp.asarray(places)[number]
    if config.rope == "1d":
        position = position_ids if places is None else time * (rows * columns) + place
        return rope_angles(position, config.head_dim, config.theta)
    angles = [
        rope_angles(position, 2 * pairs, base)
        for position, pairs, base in zip(
            (time, place // columns, place % columns),
            config.rope_pairs,
            config.rope_bases,
            strict=True,
        )
        if pairs
    ]
    cos, sin = (jnp.concatenate(parts, axis=-1) for parts in zip(*angles, strict=True))
    return cos, sin


def apply_rope(
    x: Float[Array, "*b l h d"], angles: tuple[Float[Array, "*b l 1 p"], Float[Array, "*b l 1 p"]]
) -> Float[Array, "*b l h d"]:
    """Rotates each pair of channels by its angle, in float32; pair i is channels i and d / 2 + i (`deinterleave_rope`)."""
    cos, sin = angles
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)


def deinterleave_rope(kernel: Float[Array, "i o"], head_dim: int) -> Float[Array, "i o"]:
    """A query or key projection with the output channels of pair i moved from 2i and 2i + 1 to i and d / 2 + i.

    The checkpoints interleave the pairs. Logits do not depend on the order of channels if queries and keys have the
    same. Two halves can be rotated without gathering every second channel, and moving the columns of a matrix is
    cheaper than moving every activation.
    """
    return rearrange(kernel, "i (h p two) -> i (h two p)", p=head_dim // 2, two=2)

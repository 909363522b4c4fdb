"""Patch groups: the tokens of a square of patches code it together, each what the ones before it have missed.

The order 'coarse_to_fine' takes one token of every group, then a second one of every group, and so on. The k-th token of
a group is its *stage* k. With `patch_group` above 1 a token does not code the patch at its place: stage 0 codes the
strongest components of the whole group, and each later stage codes more of it and corrects the stages before it, as in
residual quantization (Juang and Gray 1982). So any prefix of a block's tokens has the whole picture.
"""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from jaxtyping import Array, Bool, Float, Int, Shaped

from elastic.config import ElasticTokConfig
from elastic.model.bottleneck import FSQ
from elastic.patches import token_numbers


def by_stage(x: Shaped[Array, "b l c"], config: ElasticTokConfig) -> Shaped[Array, "b s k n c"]:
    """Tokens of whole blocks as slices, stages and groups."""
    per_slice = config.tokens_per_block // config.slices_per_block
    return rearrange(
        x, "b (s k n) c -> b s k n c", k=config.patch_group, n=per_slice // config.patch_group
    )


def join(patches: Float[Array, "b l p"], config: ElasticTokConfig) -> Float[Array, "b g w"]:
    """Patches of whole blocks -> groups, each with its pixels in the order that one large patch has."""
    frames, rows, columns = config.patch_size
    down, right = config.group_shape
    x = by_stage(patches, config)[:, :, _stage_of_place(config)]
    return rearrange(
        x,
        "b s (down right) n (t h w c) -> b (s n) (t down h right w c)",
        down=down, right=right, t=frames, h=rows, w=columns,
    )  # fmt: skip


def split(groups: Float[Array, "b g w"], config: ElasticTokConfig) -> Float[Array, "b l p"]:
    """The inverse of `join`."""
    frames, rows, columns = config.patch_size
    down, right = config.group_shape
    x = rearrange(
        groups,
        "b (s n) (t down h right w c) -> b s (down right) n (t h w c)",
        n=config.tokens_per_block // config.slices_per_block // config.patch_group,
        down=down, right=right, t=frames, h=rows, w=columns,
    )  # fmt: skip
    return rearrange(x[:, :, np.argsort(_stage_of_place(config))], "b s k n c -> b (s k n) c")


def spread(groups: Float[Array, "b g d"], config: ElasticTokConfig) -> Float[Array, "b l d"]:
    """The vector of each group, for each of its tokens."""
    per_slice = config.tokens_per_block // config.slices_per_block
    return repeat(
        groups,
        "b (s n) d -> b (s k n) d",
        k=config.patch_group,
        n=per_slice // config.patch_group,
    )


def total(
    x: Float[Array, "b l d"], kept: Bool[Array, "b l"], config: ElasticTokConfig
) -> Float[Array, "b g d"]:
    """For each group the sum over its kept tokens and its stage 0, which stands in for a group without tokens."""
    counts = by_stage(kept[..., None], config).at[:, :, 0].set(True)
    x = jnp.where(counts, by_stage(x, config), 0.0)
    return rearrange(jnp.sum(x, axis=2), "b s n d -> b (s n) d")


def correct(
    latents: Float[Array, "b l c"],
    weights: Float[Array, "k e c"],
    fsq: FSQ,
    config: ElasticTokConfig,
) -> Float[Array, "b l c"]:
    """Latents of FSQ, where each stage's are corrected for the codes of the stages before it.

    Args:
      latents: before quantization.
      weights: for each stage a matrix from the codes of all stages, one after another, to its latents. The rows of its
        own stage and of later ones are not used.
      fsq: quantizes.
      config: the model.
    """
    staged = by_stage(latents, config).astype(jnp.float32)
    corrected = [staged[:, :, 0]]
    codes = jnp.zeros((*corrected[0].shape[:-1], 0), jnp.float32)
    for stage in range(1, config.patch_group):
        codes = jnp.concatenate([codes, fsq.quantize(corrected[-1])], axis=-1)
        change = jnp.dot(
            codes, weights[stage, : codes.shape[-1]], precision=jax.lax.Precision.HIGHEST
        )
        corrected.append(staged[:, :, stage] + change)
    return jnp.stack(corrected, axis=2).reshape(latents.shape)


def _stage_of_place(config: ElasticTokConfig) -> Int[np.ndarray, "k"]:
    """The stage of the patch at each place of a group, in raster order."""
    rows, columns = config.slice_shape
    down, right = config.group_shape
    numbers = token_numbers(rows, columns, config.token_order)
    assert numbers is not None, "A config with groups has the order coarse_to_fine."
    return numbers.reshape(rows, columns)[:down, :right].reshape(-1) // (
        rows * columns // config.patch_group
    )

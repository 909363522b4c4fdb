"""Patch groups: the tokens of a square of patches code it together, each what the ones before it have missed.

The order 'coarse_to_fine' takes one token of every group, then a second one of every group, and so on. The k-th token of
a group is its *stage* k. With `patch_group` above 1 a token does not code the patch at its place: stage 0 codes the
strongest components of the whole group, and each later stage codes more of it and corrects the stages before it, as in
residual quantization (Juang and Gray 1982). So any prefix of a block's tokens has the whole picture.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from jaxtyping import Array, Bool, Float, Int, Shaped

from elastic.config import ElasticTokConfig
from elastic.model.bottleneck import FSQ
from elastic.patches import token_numbers, token_places

_LARGEST_LOG_GAIN = 5.0


def by_stage(x: Shaped[Array, "b l c"], config: ElasticTokConfig) -> Shaped[Array, "b s k n c"]:
    """Tokens of whole blocks as slices, stages and groups."""
    return rearrange(
        x, "b (s k n) c -> b s k n c", k=config.patch_group, n=math.prod(config.grid_shape)
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
        n=math.prod(config.grid_shape),
        down=down, right=right, t=frames, h=rows, w=columns,
    )  # fmt: skip
    return rearrange(x[:, :, np.argsort(_stage_of_place(config))], "b s k n c -> b (s k n) c")


def spread(groups: Float[Array, "b g d"], config: ElasticTokConfig) -> Float[Array, "b l d"]:
    """The vector of each group, for each of its tokens."""
    return repeat(
        groups, "b (s n) d -> b (s k n) d", k=config.patch_group, n=math.prod(config.grid_shape)
    )


def total(
    x: Float[Array, "b l d"],
    kept: Bool[Array, "b l"],
    scale: Float[Array, "m d"],
    config: ElasticTokConfig,
) -> Float[Array, "b g d"]:
    """For each group the sum over its kept tokens.

    A group without any gets its stage 0, which has seen the others, plus the mean of the groups that have some, by the
    inverse fourth power of their distance (Shepard 1968).

    Args:
      x: the tokens of whole blocks.
      kept: which of them are kept.
      scale: factors of the tokens' numbers, for every stage; the last two are for a group without tokens: of its stage 0,
        and of the mean of the others, which says more of brightness than of details.
      config: the model.
    """
    blocks = kept.shape[1] // config.tokens_per_block
    staged, marks = by_stage(x, config), by_stage(kept[..., None], config)
    known = jnp.any(marks, axis=2)
    scaled = staged * scale[None, None, :-2, None]
    sums = jnp.sum(jnp.where(marks, scaled, 0.0), axis=2)
    sums, known = (rearrange(a, "b (k s) n d -> (b k) (s n) d", k=blocks) for a in (sums, known))
    weights = jnp.asarray(_nearness(config))
    around, among = (
        jnp.einsum("gh,bhd->bgd", weights, a.astype(jnp.float32)) for a in (sums, known)
    )
    first = rearrange(staged[:, :, 0], "b (k s) n d -> (b k) (s n) d", k=blocks)
    others = around / jnp.maximum(among, jnp.finfo(jnp.float32).tiny)
    guess = first * scale[None, None, -2] + others * scale[None, None, -1]
    return rearrange(jnp.where(known, sums, guess), "(b k) g d -> b (k g) d", k=blocks)


class Steps(NamedTuple):
    """How a code of FSQ becomes a number: gain * (code + cube * code^3).

    Codes are evenly spaced, but the boundaries between them are not, because FSQ bounds by a tanh; the cube makes up for
    it. The gain follows the codes of the stages before. Large codes mean that there is much to say, so the steps become
    larger; small codes make them finer. No bit is spent on it. This is backward adaptive quantization (Jayant 1973).

    Attributes:
      gain: for each stage a matrix from the absolute codes of all stages, one after another, to the logarithms of its
        gains, and as its last row what these are added to. The rows of its own stage and of later ones are not used.
      cube: for each channel of each stage.
    """

    gain: Float[Array, "k f c"]
    cube: Float[Array, "k c"]

    def gain_of(self, stage: int, before: Float[Array, "b s n e"]) -> Float[Array, "b s n c"]:
        """The gains of a stage, by the codes of the stages before it."""
        weights = self.gain[stage]
        logarithm = _product(jnp.abs(before), weights[: before.shape[-1]])
        logarithm = logarithm + weights[None, None, None, -1]
        return jnp.exp(jnp.clip(logarithm, -_LARGEST_LOG_GAIN, _LARGEST_LOG_GAIN))

    def numbers(
        self, stage: int, codes: Float[Array, "b s n c"], gain: Float[Array, "b s n c"]
    ) -> Float[Array, "b s n c"]:
        """What the codes of a stage stand for."""
        return gain * (codes + self.cube[stage][None, None, None] * codes**3)


def correct(
    latents: Float[Array, "b l c"],
    weights: Float[Array, "k e c"],
    steps: Steps,
    fsq: FSQ,
    config: ElasticTokConfig,
) -> Float[Array, "b l c"]:
    """Latents of FSQ, where each stage's are corrected for the stages before it, and divided by its gain.

    Args:
      latents: before quantization.
      weights: for each stage a matrix to its latents from the numbers of all stages, one after another. The rows of its
        own stage and of later ones are not used.
      steps: make numbers of codes.
      fsq: quantizes.
      config: the model.
    """
    staged = by_stage(latents, config).astype(jnp.float32)
    numbers = codes = jnp.zeros((*staged[:, :, 0].shape[:-1], 0), jnp.float32)
    corrected = []
    for stage in range(config.patch_group):
        change = _product(numbers, weights[stage, : numbers.shape[-1]])
        gain = steps.gain_of(stage, codes)
        corrected.append((staged[:, :, stage] + change) / gain)
        code = fsq.quantize(corrected[-1])
        codes = jnp.concatenate([codes, code], axis=-1)
        numbers = jnp.concatenate([numbers, steps.numbers(stage, code, gain)], axis=-1)
    return rearrange(corrected, "k b s n c -> b (s k n) c")


def numbers_of(
    codes: Float[Array, "b l c"], steps: Steps, config: ElasticTokConfig
) -> Float[Array, "b l c"]:
    """What codes of FSQ stand for; zero where tokens are dropped, as the codes are."""
    staged = by_stage(codes, config).astype(jnp.float32)
    codes_of_group = rearrange(staged, "b s k n c -> b s n (k c)")
    numbers = []
    for stage in range(config.patch_group):
        before = codes_of_group[..., : stage * config.code_dim]
        numbers.append(steps.numbers(stage, staged[:, :, stage], steps.gain_of(stage, before)))
    return rearrange(numbers, "k b s n c -> b (s k n) c")


def _product(x: Float[Array, "b s n e"], weights: Float[Array, "e c"]) -> Float[Array, "b s n c"]:
    """In float32 on every device: encoder and decoder must find the same."""
    return jnp.dot(x, weights, precision=jax.lax.Precision.HIGHEST)


@functools.cache
def _nearness(config: ElasticTokConfig) -> Float[np.ndarray, "g g"]:
    """The weights of the groups of a block for each other; 0 for themselves. A slice counts as half a group's side."""
    down, right = config.grid_shape
    places = token_places(down, right, config.token_order)
    assert places is not None, "A config with groups has the order coarse_to_fine."
    time = np.repeat(np.arange(config.slices_per_block) * 0.5, down * right)
    place = np.tile(places, config.slices_per_block)
    where = np.stack([time, place // right, place % right], axis=1)
    square = ((where[:, None] - where[None]) ** 2).sum(axis=-1)
    return np.where(square > 0, 1 / np.maximum(square, 1e-6) ** 2, 0.0).astype(np.float32)


def _stage_of_place(config: ElasticTokConfig) -> Int[np.ndarray, "k"]:
    """The stage of the patch at each place of a group, in raster order."""
    rows, columns = config.slice_shape
    down, right = config.group_shape
    numbers = token_numbers(rows, columns, config.token_order)
    assert numbers is not None, "A config with groups has the order coarse_to_fine."
    return numbers.reshape(rows, columns)[:down, :right].reshape(-1) // math.prod(config.grid_shape)

"""Patch groups: the tokens of a square of patches code it together, each what the ones before it have missed.

The order 'coarse_to_fine' takes one token of every group, then a second one of every group, and so on. The k-th token of
a group is its *stage* k. With `patch_group` above 1 a token does not code the patch at its place: stage 0 codes the
strongest components of the whole group, and each later stage codes more of it and corrects the stages before it, as in
residual quantization (Juang and Gray 1982). So any prefix of a block's tokens has the whole picture.

With `haar_groups`, what two by two groups show goes through a Haar transform, and each of the four codes one *band* of it:
their mean, or a difference from top to bottom, from left to right, or crosswise. The token order takes the mean first. The
tokens of the four are then stages of one picture, `4 * patch_group` of them.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from jaxtyping import Array, Bool, Float, Int, Shaped

from elastic.config import ElasticTokConfig
from elastic.model.bottleneck import FSQ
from elastic.patches import token_numbers, token_places

_LARGEST_LOG_GAIN = 5.0
# With haar_groups a gain sees all codes of so many first stages. Of the other stages it sees the mean.
_SEEN_WHOLE = 8
AnyArray = Any  # NumPy's or JAX's; jaxtyping checks shape and dtype


def by_stage(x: Shaped[Array, "b l c"], config: ElasticTokConfig) -> Shaped[Array, "b s k n c"]:
    """Tokens of whole blocks as slices, stages, and the groups, or two by two groups, that stages belong to."""
    return _in_slices(x, config.num_stages, config)


def by_group(x: Shaped[Array, "b l c"], config: ElasticTokConfig) -> Shaped[Array, "b s k n c"]:
    """Tokens of whole blocks as slices, tokens of a group, and groups; without `haar_groups` these are stages."""
    return _in_slices(x, config.patch_group, config)


def _in_slices(
    x: Shaped[Array, "b l c"], in_turn: int, config: ElasticTokConfig
) -> Shaped[Array, "b s k n c"]:
    slices = x.shape[1] // math.prod(config.slice_shape)
    return rearrange(x, "b (s k n) c -> b s k n c", s=slices, k=in_turn)


def join(patches: Float[Array, "b l p"], config: ElasticTokConfig) -> Float[Array, "b g w"]:
    """Patches of whole blocks -> groups, each with its pixels in the order that one large patch has."""
    frames, rows, columns = config.patch_size
    down, right = config.group_shape
    x = by_group(patches, config)[:, :, _number_of_place(config)]
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
    return rearrange(x[:, :, np.argsort(_number_of_place(config))], "b s k n c -> b (s k n) c")


def first_tokens(config: ElasticTokConfig) -> Int[np.ndarray, "g"]:
    """The number in the block of each group's token of stage 0, in the order of groups."""
    numbers = np.arange(config.tokens_per_block, dtype=np.int32)
    return rearrange(
        numbers, "(s k n) -> k (s n)", k=config.patch_group, s=config.slices_per_block
    )[0]


def to_bands(
    groups: Float[Array, "b g d"], exchange: Float[Array, "e e"], config: ElasticTokConfig
) -> Float[Array, "b g d"]:
    """Turns the vectors of groups into the vectors of bands. There is one band for each group.

    Args:
      groups: the vectors.
      exchange: a matrix that mixes the first channels of the four bands, so that the first code can have the strongest
        numbers of all four; the identity leaves the Haar transform.
      config: the model.
    """
    x = jnp.einsum("rq,bsqmd->bsrmd", BANDS_OF_GROUPS, _by_four(groups, config), precision=_EXACT)
    return exchanged(x, exchange).reshape(groups.shape)


def from_bands(
    bands: Float[Array, "b g d"], exchange: Float[Array, "e e"], config: ElasticTokConfig
) -> Float[Array, "b g d"]:
    """The inverse of `to_bands` for the transposed matrix, if that is orthogonal."""
    x = exchanged(_by_four(bands, config), exchange)
    x = jnp.einsum("rq,bsrmd->bsqmd", BANDS_OF_GROUPS, x, precision=_EXACT)
    return x.reshape(bands.shape)


def num_exchanged(config: ElasticTokConfig) -> int:
    """The number of channels of each band that the exchange mixes: as many as two codes have."""
    return min(2 * config.code_dim, config.hidden_size)


_EXACT = jax.lax.Precision.HIGHEST  # encoder and decoder must find the same on every device
# Among two by two groups the order of tokens takes the places (0, 0), (1, 1), (0, 1), (1, 0). Rows are bands.
BANDS_OF_GROUPS = (
    np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, -1, -1, 1], [1, 1, -1, -1]], np.float32) / 2
)


def _by_four(x: Float[Array, "b g d"], config: ElasticTokConfig) -> Float[Array, "b s 4 m d"]:
    return rearrange(x, "b (s q m) d -> b s q m d", q=4, m=math.prod(config.grid_shape) // 4)


def exchanged(
    bands: Float[AnyArray, "*b 4 m d"], exchange: Float[AnyArray, "e e"]
) -> Float[Array, "*b 4 m d"]:
    """The vectors of four bands with their first channels mixed."""
    first, rest = bands[..., : len(exchange) // 4], bands[..., len(exchange) // 4 :]
    first = rearrange(first, "... q m c -> ... m (q c)")
    first = jnp.dot(first, exchange, precision=_EXACT)
    return jnp.concatenate([rearrange(first, "... m (q c) -> ... q m c", q=4), rest], axis=-1)


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
    inverse fourth power of their distance (Shepard 1968). With `haar_groups` so does the mean of four groups; another
    band without tokens is zero.

    Args:
      x: the tokens of whole blocks.
      kept: which of them are kept.
      scale: factors of the tokens' numbers, for every stage; the last two are for a group without tokens: of its stage 0,
        and of the mean of the others, which says more of brightness than of details.
      config: the model.
    """
    blocks = kept.shape[1] // config.tokens_per_block
    scaled = by_stage(x, config) * scale[None, None, :-2, None]
    scaled = by_group(scaled.reshape(x.shape), config)
    marks = by_group(kept[..., None], config)
    known = jnp.any(marks, axis=2)
    sums = jnp.sum(jnp.where(marks, scaled, 0.0), axis=2)
    sums, known = (rearrange(a, "b (k s) n d -> (b k) (s n) d", k=blocks) for a in (sums, known))
    weights = jnp.asarray(_nearness(config))
    around, among = (
        jnp.einsum("gh,bhd->bgd", weights, a.astype(jnp.float32)) for a in (sums, known)
    )
    first = rearrange(by_group(x, config)[:, :, 0], "b (k s) n d -> (b k) (s n) d", k=blocks)
    others = around / jnp.maximum(among, jnp.finfo(jnp.float32).tiny)
    guess = first * scale[None, None, -2] + others * scale[None, None, -1]
    guessed = jnp.asarray(_has_guess(config))[None, :, None]
    found = jnp.where(known, sums, jnp.where(guessed, guess, 0.0))
    return rearrange(found, "(b k) g d -> b (k g) d", k=blocks)


class Steps(NamedTuple):
    """How a code of FSQ becomes a number: gain * (code + cube * code^3).

    Codes are evenly spaced, but the boundaries between them are not, because FSQ bounds by a tanh; the cube makes up for
    it. The gain follows the codes of the stages before. Large codes mean that there is much to say, so the steps become
    larger; small codes make them finer. No bit is spent on it. This is backward adaptive quantization (Jayant 1973).

    Attributes:
      gain: for each stage a matrix from `gain_features` to the logarithms of its gains, and as its last row what these are
        added to.
      cube: for each channel of each stage.
    """

    gain: Float[Array, "k f c"]
    cube: Float[Array, "k c"]


def num_gain_features(config: ElasticTokConfig) -> int:
    """How many numbers `gain_features` gives."""
    shared = _SEEN_WHOLE * config.code_dim + config.num_stages if config.haar_groups else 0
    return config.patch_group * config.code_dim + shared


def gain_features(
    sizes: Float[AnyArray, "*b k c"], stage: int | Int[Array, ""], config: ElasticTokConfig
) -> Float[AnyArray, "*b f"]:
    """What the gains of a stage follow: the absolute codes of the stages before it.

    Args:
      sizes: absolute codes of all stages; zero for the stage itself and later ones. NumPy's or JAX's, and so is the result.
      stage: its number.
      config: the model.

    Returns:
      The sizes of the group's own tokens, one after another. With `haar_groups` the sizes of the first stages of all four
      groups follow, and then the mean size of each stage.
    """
    before = sizes.shape[:-2]
    found = [_own(sizes, stage, config).reshape(*before, -1)]
    if config.haar_groups:
        found += [sizes[..., :_SEEN_WHOLE, :].reshape(*before, -1), sizes.mean(axis=-1)]
    return (jnp if isinstance(sizes, jax.Array) else np).concatenate(found, axis=-1)


def _own(
    stages: Float[AnyArray, "*b k c"], stage: int | Int[Array, ""], config: ElasticTokConfig
) -> Float[AnyArray, "*b m c"]:
    """The stages of the group, or of the band, that this stage belongs to."""
    bands = config.num_stages // config.patch_group
    by_band = stages.reshape(*stages.shape[:-2], config.patch_group, bands, stages.shape[-1])
    return by_band[..., stage % bands, :]


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
      weights: for each stage a matrix to its latents from the numbers of the group's tokens, one after another. The rows
        of its own token and of later ones meet zeros.
      steps: make numbers of codes.
      fsq: quantizes.
      config: the model.
    """
    staged = rearrange(by_stage(latents, config), "b s k n c -> k b s n c").astype(jnp.float32)
    nothing = jnp.zeros((*staged.shape[1:-1], config.num_stages, config.code_dim), jnp.float32)

    # A loop, because a program of 64 stages one after another takes minutes to compile.
    def code(before, now):
        numbers, sizes = before
        stage, latent, matrix, step = now
        own = rearrange(_own(numbers, stage, config), "b s n m c -> b s n (m c)")
        gain = _gain(step, sizes, stage, config)
        corrected = (latent + _product(own, matrix)) / gain
        codes = fsq.quantize(corrected)
        numbers = _with_stage(numbers, _numbers(step, codes, gain), stage)
        return (numbers, _with_stage(sizes, jnp.abs(codes), stage)), corrected

    stages = jnp.arange(config.num_stages), staged, weights, steps
    _, corrected = jax.lax.scan(code, (nothing, nothing), stages)
    return rearrange(corrected, "k b s n c -> b (s k n) c")


def numbers_of(
    codes: Float[Array, "b l c"], steps: Steps, config: ElasticTokConfig
) -> Float[Array, "b l c"]:
    """What codes of FSQ stand for; zero where tokens are dropped, as the codes are."""
    staged = rearrange(by_stage(codes, config), "b s k n c -> k b s n c").astype(jnp.float32)
    sizes = jnp.moveaxis(jnp.abs(staged), 0, -2)

    def number(now):
        stage, codes, step = now
        earlier = jnp.arange(config.num_stages) < stage
        before = jnp.where(earlier[None, None, None, :, None], sizes, 0.0)
        return _numbers(step, codes, _gain(step, before, stage, config))

    numbers = jax.lax.map(number, (jnp.arange(config.num_stages), staged, steps))
    return rearrange(numbers, "k b s n c -> b (s k n) c")


def _gain(
    step: Steps,
    sizes: Float[Array, "b s n k c"],
    stage: Int[Array, ""],
    config: ElasticTokConfig,
) -> Float[Array, "b s n c"]:
    """The gains of a stage; `step` is its part of `Steps`."""
    logarithm = _product(gain_features(sizes, stage, config), step.gain[:-1])
    logarithm = logarithm + step.gain[None, None, None, -1]
    return jnp.exp(jnp.clip(logarithm, -_LARGEST_LOG_GAIN, _LARGEST_LOG_GAIN))


def _numbers(
    step: Steps, codes: Float[Array, "b s n c"], gain: Float[Array, "b s n c"]
) -> Float[Array, "b s n c"]:
    """What the codes of a stage stand for; `step` is its part of `Steps`."""
    return gain * (codes + step.cube[None, None, None] * codes**3)


def _with_stage(
    stages: Float[Array, "b s n k c"], new: Float[Array, "b s n c"], stage: Int[Array, ""]
) -> Float[Array, "b s n k c"]:
    return jax.lax.dynamic_update_index_in_dim(stages, new, stage, axis=3)


def _product(x: Float[Array, "b s n e"], weights: Float[Array, "e c"]) -> Float[Array, "b s n c"]:
    return jnp.dot(x, weights, precision=_EXACT)


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
    counts = (square > 0) & _has_guess(config)
    return np.where(counts, 1 / np.maximum(square, 1e-6) ** 2, 0.0).astype(np.float32)


@functools.cache
def _has_guess(config: ElasticTokConfig) -> Bool[np.ndarray, "g"]:
    """The groups of a block that are guessed if they have no tokens: all; with `haar_groups` the means of four."""
    groups = math.prod(config.grid_shape)
    first = groups // 4 if config.haar_groups else groups
    return np.tile(np.arange(groups) < first, config.slices_per_block)


def _number_of_place(config: ElasticTokConfig) -> Int[np.ndarray, "k"]:
    """Which token of its group has the patch at each place of the group, in raster order."""
    rows, columns = config.slice_shape
    down, right = config.group_shape
    numbers = token_numbers(rows, columns, config.token_order)
    assert numbers is not None, "A config with groups has the order coarse_to_fine."
    return numbers.reshape(rows, columns)[:down, :right].reshape(-1) // math.prod(config.grid_shape)

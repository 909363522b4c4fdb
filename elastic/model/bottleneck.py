"""The bottlenecks, FSQ and VAE, with one interface: latents -> codes, their sizes, an auxiliary loss, and statistics.

A new bottleneck is a class with `num_latents`, `code_dim`, `codes`, `sizes`, `aux_loss` and `statistics`; `make_bottleneck` chooses it.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from elastic.config import ElasticTokConfig

_EPS = 1e-3  # shrinks the range a little, so that tanh reaches the outermost FSQ level
_KL_WEIGHT = 1e-8
# Sizes of the VAE's numbers: the exponent of a float32 and the first bit of its fraction count half octaves.
_BITS_BELOW_HALF_OCTAVES = 22
_SMALLEST_SIZE = (127 - 4) * 2  # 1/16
_LARGEST_SIZE = 16  # from 16 up
# From here on an array with a number for each code takes more than the tokens.
_LARGE_CODEBOOK = 1 << 20


class FSQ:
    """Finite scalar quantization (Mentzer et al. 2023): each channel is rounded to one of a few levels.

    A code is a vector of levels scaled to [-1, 1]. Its index is the integer whose digits, in a mixed base, are the
    levels.
    """

    def __init__(self, levels: tuple[int, ...]):
        self.levels = levels
        self.num_latents = self.code_dim = len(levels)
        self.codebook_size = math.prod(levels)
        self.basis = tuple(math.prod(levels[:i]) for i in range(len(levels)))

    def _row(self, values: tuple[float, ...], like: Array) -> Array:
        return jnp.asarray(values, jnp.float32).reshape((1,) * (like.ndim - 1) + (-1,))

    def _half_width(self, like: Array) -> Array:
        return self._row(tuple(level // 2 for level in self.levels), like)

    def sizes(self, codes: Float[Array, "*b d"]) -> Int[Array, "*b d"]:
        """How many levels each code is from the middle one: whole numbers, the same on every device."""
        return jnp.abs(jnp.round(codes * self._half_width(codes))).astype(jnp.int32)

    def bound(self, latents: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """Latents bounded to the range of their levels, with boundaries between levels at half-integers (appendix A.1)."""
        levels = self._row(self.levels, latents)
        half = (levels - 1) * (1 - _EPS) / 2
        offset = jnp.where(levels % 2 == 1, 0.0, 0.5)
        return jnp.tanh(latents + jnp.tan(offset / half)) * half - offset

    def quantize(self, latents: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """Codes in [-1, 1], with the gradient of `bound` (a straight-through estimator for the rounding)."""
        bounded = self.bound(latents.astype(jnp.float32))
        rounded = bounded + lax.stop_gradient(jnp.round(bounded) - bounded)
        return rounded / self._half_width(rounded)

    def codes_to_indices(self, codes: Float[Array, "*b d"]) -> Int[Array, "*b"]:
        """The index of each code. Each level is rounded, because truncating floats gives wrong levels for some level counts."""
        digits = jnp.round(codes * self._half_width(codes)).astype(jnp.int32) + jnp.asarray(
            [level // 2 for level in self.levels], jnp.int32
        ).reshape((1,) * (codes.ndim - 1) + (-1,))
        basis = jnp.asarray(self.basis, jnp.int32).reshape((1,) * (codes.ndim - 1) + (-1,))
        return jnp.sum(digits * basis, axis=-1)

    def indices_to_codes(self, indices: Int[Array, "*b"]) -> Float[Array, "*b d"]:
        """The inverse of `codes_to_indices`."""
        shape = (1,) * indices.ndim + (-1,)
        basis, levels = (
            jnp.asarray(x, jnp.int32).reshape(shape) for x in (self.basis, self.levels)
        )
        digits = (indices[..., None].astype(jnp.int32) // basis) % levels
        half_width = jnp.asarray([level // 2 for level in self.levels], jnp.float32).reshape(shape)
        return (digits.astype(jnp.float32) - half_width) / half_width

    def codes(
        self, latents: Float[Array, "*b d"], *, key: Shaped[Array, "*k"] | None = None
    ) -> Float[Array, "*b d"]:
        """The quantized latents, float32. The key is not used; it is part of the interface."""
        del key
        return self.quantize(latents)

    def aux_loss(
        self,
        latents: Float[Array, "b l d"],
        kept: Bool[Array, "b l"],
        *,
        counted: Bool[Array, "b l"] | None = None,
        tokens_per_block: int = 0,
    ) -> Float[Array, ""]:
        """0: FSQ has no auxiliary loss."""
        del latents, kept, counted, tokens_per_block
        return jnp.zeros((), jnp.float32)

    def statistics(
        self, codes: Float[Array, "*b d"], kept: Bool[Array, "*b"]
    ) -> dict[str, Float[Array, ""]]:
        """Perplexity of the codes of kept tokens, and the fraction of the codebook that they use; no one-hot array is made."""
        if self.codebook_size > _LARGE_CODEBOOK:
            return self._statistics_of_large(self.codes_to_indices(codes), kept)
        counts = (
            jnp.zeros(self.codebook_size, jnp.float32)
            .at[self.codes_to_indices(codes)]
            .add(kept.astype(jnp.float32))
        )
        share = counts / jnp.maximum(jnp.sum(counts), 1.0)
        entropy = -jnp.sum(share * jnp.log(share + 1e-10))
        return {
            "perplexity": jnp.exp(entropy),
            "codebook_usage": jnp.mean((counts > 0).astype(jnp.float32)),
        }

    def _statistics_of_large(
        self, indices: Int[Array, "*b"], kept: Bool[Array, "*b"]
    ) -> dict[str, Float[Array, ""]]:
        """The same without a number for each code: every kept token finds its code's count in the sorted indices."""
        none = jnp.iinfo(jnp.int32).max  # no index is as large
        indices, kept = jnp.where(kept, indices, none).reshape(-1), kept.reshape(-1)
        ordered = jnp.sort(indices)
        first, last = (jnp.searchsorted(ordered, indices, side=side) for side in ("left", "right"))
        counts, total = (last - first).astype(jnp.float32), jnp.maximum(jnp.sum(kept), 1)
        entropy = -jnp.sum(jnp.where(kept, jnp.log(counts / total), 0.0)) / total
        distinct = jnp.sum(jnp.where(kept, 1 / counts, 0.0))
        return {
            "perplexity": jnp.exp(entropy),
            "codebook_usage": distinct / self.codebook_size,
        }


class VAE:
    """A diagonal Gaussian (Kingma and Welling 2014). The mean is transmitted; training decodes a sample."""

    def __init__(self, code_dim: int):
        self.code_dim = code_dim
        self.num_latents = 2 * code_dim

    def _mean_and_logvar(
        self, latents: Float[Array, "*b z"]
    ) -> tuple[Float[Array, "*b d"], Float[Array, "*b d"]]:
        mean, logvar = jnp.split(latents.astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def codes(
        self, latents: Float[Array, "*b z"], *, key: Shaped[Array, "*k"] | None = None
    ) -> Float[Array, "*b d"]:
        """With a key a sample, else the mean; float32.

        Args:
          latents: means, then log variances.
          key: a JAX random key for the sample; None: the mean.
        """
        mean, logvar = self._mean_and_logvar(latents)
        if key is None:
            return mean
        return mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)

    def sizes(self, codes: Float[Array, "*b d"]) -> Int[Array, "*b d"]:
        """How large each number is, in half octaves above 1/16: whole numbers, the same on every device.

        They are read off the bits of a float32: a logarithm could be rounded in two ways.
        """
        bits = lax.bitcast_convert_type(jnp.abs(codes.astype(jnp.float32)), jnp.int32)
        return jnp.clip((bits >> _BITS_BELOW_HALF_OCTAVES) - _SMALLEST_SIZE, 0, _LARGEST_SIZE)

    def aux_loss(
        self,
        latents: Float[Array, "b l z"],
        kept: Bool[Array, "b l"],
        *,
        counted: Bool[Array, "b l"] | None = None,
        tokens_per_block: int,
    ) -> Float[Array, ""]:
        """The weighted KL divergence to N(0, 1).

        It is summed over channels and over the kept tokens of a block, then averaged over blocks. (The released code uses
        blocks of 2048 tokens for every model.) Tokens that are not counted add nothing, and blocks of only such tokens are
        left out of the average.

        Args:
          latents: means, then log variances.
          kept: True for transmitted tokens.
          counted: False for padding; None: all tokens count.
          tokens_per_block: tokens in a block.
        """
        mean, logvar = self._mean_and_logvar(latents)
        kl = 0.5 * jnp.sum(jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar, axis=-1)
        if counted is not None:
            kept = kept & counted
        blocks = (kl.shape[0], -1, tokens_per_block)
        per_block = jnp.sum(jnp.where(kept, kl, 0.0).reshape(blocks), axis=-1)
        if counted is None:
            return _KL_WEIGHT * jnp.mean(per_block)
        num_blocks = jnp.sum(jnp.any(counted.reshape(blocks), axis=-1))
        return _KL_WEIGHT * jnp.sum(per_block) / jnp.maximum(num_blocks, 1)

    def statistics(
        self, codes: Float[Array, "*b d"], kept: Bool[Array, "*b"]
    ) -> dict[str, Float[Array, ""]]:
        """The mean square of the codes of kept tokens."""
        square = jnp.where(kept[..., None], jnp.square(codes), 0.0)
        return {"code_power": jnp.sum(square) / jnp.maximum(jnp.sum(kept) * codes.shape[-1], 1)}


def make_bottleneck(config: ElasticTokConfig) -> FSQ | VAE:
    """The bottleneck that the config names."""
    return (
        FSQ(config.fsq_quant_levels)
        if config.bottleneck_type == "fsq"
        else VAE(config.vae_bottleneck_dim)
    )

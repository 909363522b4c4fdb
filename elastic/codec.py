"""The jitted block steps: try candidates against a cached past, commit one of them, decode.

One *pass* is one run of encoder and decoder over one block for one candidate count: the unit of cost. A trial keeps what its passes
computed (new keys and values, codes, pixels), so that committing a candidate moves them into the past instead of computing them again.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, UInt8

from elastic import masks, ops
from elastic.bottleneck import FSQ, make_bottleneck
from elastic.config import ElasticTokConfig
from elastic.mesh import platform_of
from elastic.model import Batch, ElasticTok
from elastic.ops import bits
from elastic.patches import to_unit_range


class Past(NamedTuple):
    """What is remembered of the blocks so far: bounded, the oldest block is overwritten first."""

    encoder: ops.Past
    decoder: ops.Past
    num_blocks: Int[
        Array, ""
    ]  # committed since the context began; gives positions and the place of the next block


class Trial(NamedTuple):
    """Candidates of one block. n = batch * candidates, the candidates of an element side by side."""

    losses: Float[Array, "b k"]  # mean squared error, reconstruction clipped to [-1, 1]
    pixel_losses: Float[
        Array, "b k"
    ]  # the same after rounding to 8 bits: what a viewer of the decoded frames gets
    codes: Float[Array, "n l c"]
    pixels: UInt8[Array, "n l p"]
    encoder_new: (
        tuple[Array, Array] | None
    )  # keys and values, [layers, n, heads, l, head_dim]; None: not kept
    decoder_new: tuple[Array, Array] | None


class Committed(NamedTuple):
    """The block that was appended."""

    tokens: Array  # int32 indices [b, l] (FSQ) or float32 vectors [b, l, c] (VAE)
    pixels: UInt8[Array, "b l p"]


class Codec:
    """The programs of one model shape, compiled once each and shared by all clips.

    Args:
      config: the model.
      dtype: type of products' operands and of the cached past.
      mesh: where the arrays lie; None: the default device.
      window_blocks: blocks in one context, the current one included. The past holds one less.
    """

    def __init__(
        self,
        config: ElasticTokConfig,
        *,
        dtype: Any = jnp.float32,
        mesh: Mesh | None = None,
        window_blocks: int = 4,
    ):
        if window_blocks < 1:
            raise ValueError(
                f"window_blocks={window_blocks} must be 1 or more: the current block is one of them."
            )
        self.config, self.dtype, self.mesh, self.window_blocks = (
            config,
            jnp.dtype(dtype),
            mesh,
            window_blocks,
        )
        # Gradients are never taken here, and rematerialization only matters to them.
        self.model = ElasticTok(
            config.replace(remat_attention="", remat_mlp="", remat_block=""),
            dtype=self.dtype,
            mesh=mesh,
        )
        self.bottleneck = make_bottleneck(config)
        self._hides = platform_of(mesh) == "cpu"
        self._cache_sharding = self._whole = out = None
        if mesh is not None:
            self._cache_sharding = NamedSharding(
                mesh, ops.past_spec(mesh, config.num_attention_heads)
            )
            self._whole = NamedSharding(mesh, P())
            layers: Any = ops.Past(*(self._cache_sharding,) * 2, self._whole)  # type: ignore[arg-type]
            # A committed past lies where a new one does: else the second block would compile again.
            out = (Past(layers, layers, self._whole), None)  # type: ignore[arg-type]
        self._try = jax.jit(self._try_impl, static_argnames="keep")
        self._commit = jax.jit(self._commit_impl, donate_argnames="past", out_shardings=out)
        self._decode = jax.jit(self._decode_impl, donate_argnames="past", out_shardings=out)

    def past_bytes(self, batch: int = 1) -> int:
        """Bytes of the whole past of encoder and decoder."""
        return (self.window_blocks - 1) * self.trial_bytes(batch)

    def trial_bytes(self, candidates: int = 1) -> int:
        """Bytes of the keys and values that a trial of so many candidates keeps."""
        config = self.config
        layers = config.num_encoder_layers + config.num_decoder_layers
        return (
            2
            * layers
            * candidates
            * config.tokens_per_block
            * config.hidden_size
            * self.dtype.itemsize
        )

    def stored(self, params: dict[str, Any]) -> dict[str, Any]:
        """Parameters as the programs want them: on the CPU bfloat16 as its bits (see ops/bits.py). Others work, and cost copies."""
        return jax.tree.map(bits.hide, params) if self._hides else params

    def new_past(self, batch: int = 1) -> Past:
        """An empty past: zeros that no query sees."""
        config = self.config
        return self._empty(config.num_encoder_layers, config.num_decoder_layers, batch)

    def new_decoder_past(self, batch: int = 1) -> Past:
        """An empty past for decoding alone, which needs no encoder."""
        return self._empty(0, self.config.num_decoder_layers, batch)

    def try_counts(
        self,
        params: dict[str, Any],
        past: Past,
        patches: UInt8[Array | np.ndarray, "b l p"],
        counts: Int[Array | np.ndarray, "b k"],
        *,
        shown: Bool[Array | np.ndarray, "l p"] | None = None,
        keep: bool = True,
    ) -> Trial:
        """Evaluates the candidate counts of one block at once; the past is read where it lies, neither copied nor changed.

        Args:
          shown: which numbers of the patches belong to real frames; the losses are means over these. None: all.
          keep: whether the trial can be committed; without, it holds the losses alone and needs less memory.
        """
        if shown is None:
            shown = np.ones(patches.shape[1:], bool)
        return self._try(params, past, patches, counts, shown, keep=keep)

    def commit(
        self, past: Past, trial: Trial, choice: Int[Array | np.ndarray, "b"]
    ) -> tuple[Past, Committed]:
        """Appends the chosen candidate of each element. The past given is used up; nothing is computed again.

        Raises:
          ValueError: the trial was made with `keep=False`.
        """
        if trial.encoder_new is None:
            raise ValueError("This trial kept nothing to commit; call try_counts with keep=True.")
        return self._commit(past, trial, choice)

    def decode(
        self,
        params: dict[str, Any],
        past: Past,
        tokens: Array | np.ndarray,
        num_kept: Int[Array | np.ndarray, "b"],
    ) -> tuple[Past, UInt8[Array, "b l p"]]:
        """Pixels of one block of tokens ([b, l] indices or [b, l, c] vectors; what lies after `num_kept` is ignored).

        The past given is used up.
        """
        return self._decode(params, past, tokens, num_kept)

    def _empty(self, encoder_layers: int, decoder_layers: int, batch: int) -> Past:
        config = self.config
        capacity = (self.window_blocks - 1) * config.tokens_per_block

        def layers(count: int) -> ops.Past:
            shape = (count, batch, config.num_attention_heads, capacity, config.head_dim)
            dtype = jnp.uint16 if self._hides and self.dtype == jnp.bfloat16 else self.dtype
            cache = jnp.zeros(shape, dtype, device=self._cache_sharding)
            return ops.Past(cache, jnp.zeros_like(cache), zero())

        def zero() -> Array:
            return jnp.zeros((), jnp.int32, device=self._whole)

        return Past(layers(encoder_layers), layers(decoder_layers), zero())

    def _positions(self, past: Past, count: int) -> Int[Array, "n l"]:
        length = self.config.tokens_per_block
        return repeat(past.num_blocks * length + jnp.arange(length), "l -> n l", n=count)

    def _try_impl(self, params, past: Past, patches, counts, shown, *, keep: bool) -> Trial:
        num_candidates = counts.shape[1]
        x = repeat(to_unit_range(patches), "b l p -> (b k) l p", k=num_candidates)
        kept = masks.kept_mask(counts.reshape(-1), self.config.tokens_per_block)
        batch = Batch(x, kept, position_ids=self._positions(past, len(kept)))
        if self.config.condition_encoder:
            encoded = self._apply("encode", params, batch, past.encoder)
            codes = encoded.codes
        else:  # the encoder gives all candidates the same: it runs once for all
            first = jax.tree.map(lambda y: y[::num_candidates], batch)
            whole = first._replace(kept=jnp.ones_like(first.kept))
            encoded = self._apply("encode", params, whole, past.encoder)
            codes = repeat(encoded.codes, "b l c -> (b k) l c", k=num_candidates)
        codes = masks.drop_tail(self._snapped(codes), kept)
        out, decoder_new = self._apply("decode", params, codes, batch, past.decoder)
        out = jnp.clip(out, -1.0, 1.0)
        levels = jnp.round((out + 1) * 127.5)

        def mean_over_shown(error: Array) -> Array:
            total = jnp.sum(jnp.where(shown[None], jnp.square(error), 0.0), axis=(1, 2))
            return rearrange(total / jnp.sum(shown), "(b k) -> b k", k=num_candidates)

        return Trial(
            losses=mean_over_shown(out - x),
            pixel_losses=mean_over_shown(levels / 127.5 - 1 - x),
            codes=codes,
            pixels=levels.astype(jnp.uint8),
            encoder_new=encoded.new if keep else None,
            decoder_new=decoder_new if keep else None,
        )

    def _commit_impl(self, past: Past, trial: Trial, choice) -> tuple[Past, Committed]:
        batch = choice.shape[0]

        def choose(x: Array, axis: int) -> Array:
            num_candidates = x.shape[axis] // batch
            if num_candidates == 1:
                return x
            return jnp.take(x, jnp.arange(batch) * num_candidates + choice, axis=axis)

        encoder = self._append(
            past.encoder, [choose(x, 1) for x in trial.encoder_new or ()], past.num_blocks
        )
        decoder = self._append(
            past.decoder, [choose(x, 1) for x in trial.decoder_new or ()], past.num_blocks
        )
        tokens = self._to_tokens(choose(trial.codes, 0))
        return Past(encoder, decoder, past.num_blocks + 1), Committed(
            tokens, choose(trial.pixels, 0)
        )

    def _decode_impl(self, params, past: Past, tokens, num_kept) -> tuple[Past, Array]:
        kept = masks.kept_mask(num_kept, self.config.tokens_per_block)
        batch = Batch(
            jnp.zeros((*kept.shape, 0)), kept, position_ids=self._positions(past, len(kept))
        )
        codes = masks.drop_tail(self._from_tokens(tokens), kept)
        out, new = self._apply("decode", params, codes, batch, past.decoder)
        decoder = self._append(past.decoder, list(new), past.num_blocks)
        pixels = jnp.round((jnp.clip(out, -1.0, 1.0) + 1) * 127.5).astype(jnp.uint8)
        return past._replace(decoder=decoder, num_blocks=past.num_blocks + 1), pixels

    def _append(self, past: ops.Past, new: list[Array], num_blocks: Array) -> ops.Past:
        """Writes a block over the oldest one. Keys carry their positions, so that their order in the cache does not matter."""
        slots = self.window_blocks - 1
        if slots == 0:
            return past

        def write(old: Array, x: Array) -> Array:
            start = (num_blocks % slots) * x.shape[3]
            x = bits.hide(x) if old.dtype == jnp.uint16 else x.astype(old.dtype)
            return lax.dynamic_update_slice_in_dim(old, x, start, axis=3)

        if self._cache_sharding is not None:  # each device has its part of every block
            spec = self._cache_sharding.spec
            write = jax.shard_map(
                write, mesh=self.mesh, in_specs=(spec, spec), out_specs=spec, check_vma=False
            )
        keys, values = (write(old, x) for old, x in zip(past[:2], new, strict=True))
        length = self.config.tokens_per_block
        return ops.Past(keys, values, jnp.minimum(num_blocks + 1, slots) * length)

    def _apply(self, method: str, params, *arguments) -> Any:
        return self.model.apply({"params": params}, *arguments, method=method)

    def _snapped(self, codes: Array) -> Array:
        """FSQ codes exactly as their indices give them, so that decoding from a file repeats the same numbers."""
        return self._from_tokens(self._to_tokens(codes))

    def _to_tokens(self, codes: Array) -> Array:
        return (
            self.bottleneck.codes_to_indices(codes) if isinstance(self.bottleneck, FSQ) else codes
        )

    def _from_tokens(self, tokens: Array) -> Array:
        return (
            self.bottleneck.indices_to_codes(tokens) if isinstance(self.bottleneck, FSQ) else tokens
        )

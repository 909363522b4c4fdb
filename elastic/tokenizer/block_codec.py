"""The jitted programs of one block: try candidate counts against a cache, commit one of them, decode.

One *pass* is one run of encoder and decoder over one block for one candidate count: the unit of cost. Without `condition_encoder` the
encoder does not depend on the count, so it runs once for all passes over a block. A *draft* is a pass without the decoder's layers over
tokens, which tells about what the pass would. A trial keeps the results of its passes (new keys and
values, codes, pixels), so that committing a candidate copies them into the cache and computes nothing again.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, UInt8

from elastic import ops
from elastic.config import ElasticTokConfig
from elastic.distributed.mesh import memory_limit, platform_of
from elastic.model import Batch, ElasticTok, make_bottleneck, token_masks
from elastic.model.bottleneck import FSQ
from elastic.model.flops import draft_share
from elastic.ops import bf16_bits
from elastic.patches import patchify, to_levels, to_uint8, to_unit_range, to_unrounded_levels

_MOST_OF_A_DRAFT = 1 / 4  # of the FLOPs of a pass; a draft that costs more saves nothing


class CodecCache(NamedTuple):
    """The KV caches of encoder and decoder. They are bounded: the oldest block is overwritten first.

    They are as long as the clips need, at most a window without the current block.
    Each batch element is a clip of its own, with its own number of blocks.
    """

    encoder: ops.KVCache
    decoder: ops.KVCache
    # Blocks committed since the context began: gives the position ids and the place of the next block.
    num_blocks: Int[Array, "b"]

    def forget(self, elements: Bool[np.ndarray, "b"]) -> "CodecCache":
        """The cache with an empty context for these elements. Their keys and values stay in place, and no query sees them."""

        def zeroed(x: Array) -> Array:
            return jax.device_put(jnp.where(elements, 0, x), x.sharding)

        encoder, decoder = (
            part._replace(length=zeroed(part.length)) for part in (self.encoder, self.decoder)
        )
        return CodecCache(encoder, decoder, zeroed(self.num_blocks))


class EncodedBlock(NamedTuple):
    """What an encoder without `condition_encoder` gives for one block of each element. It serves every count."""

    codes: Float[Array, "b l c"]  # of all tokens, as computed from their indices
    new_kv: tuple[Array, Array] | None  # keys and values, [layers, b, heads, l, head_dim]


class Trial(NamedTuple):
    """k candidates of one block of each element. n = batch * k; the candidates of an element are adjacent."""

    losses: Float[Array, "b k"]  # mean squared error, reconstruction clipped to [-1, 1]
    pixel_losses: Float[
        Array, "b k"
    ]  # the same after rounding to 8 bits: the error of the decoded frames
    codes: Float[Array, "n l c"]
    pixels: Array  # uint8 [n, l, p]; with weights, float32 levels
    # Keys and values, [layers, n, heads, l, head_dim]; None: not kept. Without `condition_encoder` the encoder's are the same for
    # all candidates of an element: [layers, b, ...].
    encoder_new: tuple[Array, Array] | None
    decoder_new: tuple[Array, Array] | None


class Committed(NamedTuple):
    """The block that was appended."""

    tokens: Array  # int32 indices [b, l] (FSQ) or float32 vectors [b, l, c] (VAE)
    pixels: Array  # as in `Trial`, [b, l, p]


class Codec:
    """The programs of one model shape, compiled once each and shared by all clips.

    Args:
      config: the model.
      dtype: type of products' operands and of the cache.
      mesh: where the arrays lie; None: the default device.
      window_blocks: blocks in one context, the current one included. The cache holds one less.

    Attributes:
      can_draft: whether `draft` is worth while: the encoder runs once for all counts, and a draft costs little.
      model_seconds: how long the calls of `BatchScheduler` have taken so far. At any other time the model waits: for frames, or for
        what becomes of its tokens.
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
        # No gradients are taken here, and rematerialization serves them alone.
        self.model_seconds = 0.0
        self.model = ElasticTok(
            config.replace(remat_attention="", remat_mlp="", remat_block=""),
            dtype=self.dtype,
            mesh=mesh,
        )
        self.bottleneck = make_bottleneck(config)
        # Without groups of patches only the layers over tokens know what a dropped token shows.
        shared_codes = config.patch_group > 1 and not config.condition_encoder
        self.can_draft = shared_codes and draft_share(config) <= _MOST_OF_A_DRAFT
        self._stores_bits = platform_of(mesh) == "cpu"
        self._encode = jax.jit(self._encode_impl)
        self._try = jax.jit(self._try_impl, static_argnames="keep")
        self._draft = jax.jit(self._draft_impl)
        self._select = jax.jit(self._select_impl, donate_argnames="selected")
        self._commit = jax.jit(self._commit_impl, donate_argnames="cache")
        self._decode = jax.jit(
            self._decode_impl, donate_argnames="cache", static_argnames="rounded"
        )
        self._lengthen = jax.jit(self._lengthen_impl, static_argnames="more")

    def cache_bytes(self, batch: int = 1) -> int:
        """Bytes of the cache of encoder and decoder for a whole window."""
        return (self.window_blocks - 1) * self.trial_bytes(batch)

    def cache_shards(self, batch: int = 1) -> int:
        """Number of parts that the mesh splits the cache into."""
        cache_at, _ = self._shardings(batch)
        if cache_at is None:
            return 1
        shape = (1, batch, self.config.num_attention_heads, self.config.tokens_per_block, 1)
        return math.prod(shape) // math.prod(cache_at.shard_shape(shape))

    def trial_bytes(self, candidates: int = 1) -> int:
        """Bytes of the keys and values that a trial keeps."""
        layers = self.config.num_encoder_layers + self.config.num_decoder_layers
        return self._block_bytes(layers, candidates)

    def _block_bytes(self, layers: int, batch: int) -> int:
        """Bytes of the keys and values of one block in these layers."""
        numbers = self.config.tokens_per_block * self.config.hidden_size
        return 2 * layers * batch * numbers * self.dtype.itemsize

    def _check_memory(self, layers: int, batch: int, cached_blocks: int) -> None:
        """Refuses a cache that cannot fit, before it is allocated."""
        limit = None if self.mesh is None else memory_limit(self.mesh)
        shards = 1 if platform_of(self.mesh) == "cpu" else self.cache_shards(batch)
        block = self._block_bytes(layers, batch) / shards
        needed = cached_blocks * block
        if limit is not None and needed > limit:
            fewer_clips = "" if batch == 1 else "take fewer clips at once (--batch), "
            raise ValueError(
                f"A cache of {cached_blocks} blocks takes {needed / 1e9:.1f} GB, and there are {limit / 1e9:.1f}; hold fewer than "
                f"{1 + int(limit / block)} blocks (window_blocks=, on the command line --max_blocks_per_chunk), {fewer_clips}or "
                "split it over more devices."
            )

    def stored(self, params: dict[str, Any]) -> dict[str, Any]:
        """The parameters as the programs take them without a copy: on the CPU, bfloat16 as its bits (see ops/bf16_bits.py)."""
        return jax.tree.map(bf16_bits.to_bits, params) if self._stores_bits else params

    def new_cache(self, batch: int = 1, *, num_blocks: int | None = None) -> CodecCache:
        """An empty cache: zeros that no query sees.

        Args:
          batch: clips.
          num_blocks: blocks of the longest clip; None: not known, so that the cache serves a whole window.

        Raises:
          ValueError: the cache is larger than the memory.
        """
        layers = self.config.num_encoder_layers, self.config.num_decoder_layers
        return self._empty(*layers, batch, self.cached_blocks(num_blocks, batch))

    def new_decoder_cache(self, batch: int = 1, *, num_blocks: int | None = None) -> CodecCache:
        """An empty cache for decoding alone, which needs no encoder. Arguments and errors as for `new_cache`."""
        cached = self.cached_blocks(num_blocks, batch)
        return self._empty(0, self.config.num_decoder_layers, batch, cached)

    def cached_blocks(self, num_blocks: int | None, batch: int = 1) -> int:
        """Blocks that the cache for a clip of this many blocks holds: no fewer than all but the last one, or a whole window.

        The count is 0, a power of two or that of a window, so that few programs are compiled. It is a multiple of a kernel's tile,
        so that a kernel reads the same tiles, and gives the same bits, as with a whole window.
        """
        window = self.window_blocks - 1
        needed = window if num_blocks is None else min(window, num_blocks - 1)
        if needed in (0, window):
            return needed
        blocks = 1 << (needed - 1).bit_length()
        tile, parts = self.config.scan_key_chunk_size, self._cache_parts(batch)
        while blocks < window and blocks * self.config.tokens_per_block // parts % tile:
            blocks *= 2
        return min(blocks, window)

    def lengthened(self, cache: CodecCache, num_blocks: int | None) -> CodecCache:
        """The cache with space for clips of this many blocks. One that has it is given back as it is.

        Raises:
          ValueError: the cache is larger than the memory.
        """
        batch, layers = len(cache.num_blocks), len(cache.encoder.keys) + len(cache.decoder.keys)
        cached = self.cached_blocks(num_blocks, batch)
        more = cached - self._slots(cache.decoder)
        if more <= 0:
            return cache
        self._check_memory(layers, batch, cached)
        return self._lengthen(cache, more=more)

    def encode(
        self,
        params: dict[str, Any],
        cache: CodecCache,
        patches: UInt8[Array | np.ndarray, "b l p"],
    ) -> EncodedBlock | None:
        """What the encoder gives for one block of each element, for `try_counts`; None: it depends on the count.

        Args:
          params: the parameters as `stored` gives them.
          cache: of the blocks so far; read only.
          patches: uint8 [batch, tokens, numbers of a patch], one block of each element.
        """
        return None if self.config.condition_encoder else self._encode(params, cache, patches)

    def try_counts(
        self,
        params: dict[str, Any],
        cache: CodecCache,
        patches: UInt8[Array | np.ndarray, "b l p"],
        counts: Int[Array | np.ndarray, "b k"],
        *,
        num_frames: Int[Array | np.ndarray, "b"] | None = None,
        weights: tuple[np.ndarray, np.ndarray] | None = None,
        encoded: EncodedBlock | None = None,
        keep: bool = True,
    ) -> Trial:
        """Evaluates k candidate counts of one block of each element at once. The cache is read in place, neither copied nor changed.

        Args:
          params: the parameters as `stored` gives them.
          cache: of the blocks so far; read only.
          patches: uint8 [batch, tokens, numbers of a patch], one block of each element.
          counts: int32 [batch, k], the candidate counts.
          num_frames: int32 [batch], the real frames of each block; the losses are means over them. None: all are real.
          weights: float32 [batch, rows] and [batch, columns], what rows and columns of a frame weigh in the losses. With them the
            pixels are float32 levels that are not rounded, to be blended. None: all weigh the same, and pixels are 8-bit.
          encoded: what `encode` gave for these blocks and this cache; None: the encoder runs.
          keep: whether the trial can be committed. False keeps no keys and values, which takes less memory.
        """
        if num_frames is None:
            num_frames = np.full(len(counts), self.config.frames_per_block, np.int32)
        # Where the cache of the only clip has no space for a block, nothing is appended to it.
        keep = keep and (self._slots(cache.encoder) > 0 or len(counts) > 1)
        return self._try(params, cache, patches, counts, num_frames, weights, encoded, keep=keep)

    def draft(
        self,
        params: dict[str, Any],
        patches: UInt8[Array | np.ndarray, "b l p"],
        counts: Int[Array | np.ndarray, "b k"],
        encoded: EncodedBlock,
        *,
        num_frames: Int[Array | np.ndarray, "b"],
        weights: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> tuple[Float[Array, "b k"], Float[Array, "b k"]]:
        """The losses of a decoder without its layers over tokens. They are near those that `try_counts` measures for these arguments."""
        return self._draft(params, patches, counts, encoded.codes, num_frames, weights)

    def select(
        self,
        selected: Trial | None,
        trial: Trial,
        choice: Int[Array | np.ndarray, "b"],
        elements: Bool[np.ndarray, "b"],
    ) -> Trial:
        """Selects one candidate of each element, to be committed later.

        Args:
          selected: the earlier selection; donated to the program. None: there is none.
          trial: the latest candidates.
          choice: int32 [batch], the candidate of `trial` that is selected.
          elements: bool [batch]; where False, the earlier selection stays.
        """
        if elements.all():
            selected = None
        if selected is None and trial.losses.shape[1] == 1:
            return trial
        return self._select(selected, trial, choice, elements)

    def commit(
        self,
        cache: CodecCache,
        trial: Trial,
        choice: Int[Array | np.ndarray, "b"],
        elements: Bool[np.ndarray, "b"] | None = None,
    ) -> tuple[CodecCache, Committed]:
        """Appends one candidate of each element to the cache. Nothing is computed again.

        Args:
          cache: of the blocks so far; donated to the program.
          trial: has the candidates.
          choice: int32 [batch], the candidate of each element.
          elements: bool [batch], the elements to append to; None: all.

        Raises:
          ValueError: the trial was made with `keep=False`, and the cache has space for a block.
        """
        if trial.encoder_new is None and self._slots(cache.encoder):
            raise ValueError("This trial kept nothing to commit; call try_counts with keep=True.")
        return self._commit(cache, trial, choice, elements)

    def decode(
        self,
        params: dict[str, Any],
        cache: CodecCache,
        tokens: Array | np.ndarray,
        num_kept: Int[Array | np.ndarray, "b"],
        *,
        rounded: bool = True,
    ) -> tuple[CodecCache, Array]:
        """The pixels of one block of tokens of each element, uint8 [batch, tokens, numbers of a patch].

        Args:
          params: the parameters as `stored` gives them.
          cache: of the blocks so far; donated to the program.
          tokens: int32 indices [batch, tokens] (FSQ) or float32 vectors [batch, tokens, channels] (VAE).
          num_kept: int32 [batch], the tokens to decode; those after them are ignored.
          rounded: False gives float32 levels that are not rounded, to be blended.
        """
        return self._decode(params, cache, tokens, num_kept, rounded=rounded)

    def _empty(
        self, encoder_layers: int, decoder_layers: int, batch: int, cached_blocks: int
    ) -> CodecCache:
        config = self.config
        capacity = cached_blocks * config.tokens_per_block
        self._check_memory(encoder_layers + decoder_layers, batch, cached_blocks)
        cache_at, numbers_at = self._shardings(batch)

        def layers(count: int) -> ops.KVCache:
            shape = (count, batch, config.num_attention_heads, capacity, config.head_dim)
            dtype = jnp.uint16 if self._stores_bits and self.dtype == jnp.bfloat16 else self.dtype
            cache = jnp.zeros(shape, dtype, device=cache_at)
            return ops.KVCache(cache, jnp.zeros_like(cache), zero())

        def zero() -> Array:
            return jnp.zeros(batch, jnp.int32, device=numbers_at)

        return CodecCache(layers(encoder_layers), layers(decoder_layers), zero())

    def _slots(self, cache: ops.KVCache) -> int:
        """Blocks that a cache has space for."""
        return cache.keys.shape[3] // self.config.tokens_per_block

    def _cache_parts(self, batch: int) -> int:
        """Parts into which the mesh splits the positions of a cache."""
        cache_at, _ = self._shardings(batch)
        parts = None if cache_at is None else cache_at.spec[3]
        return 1 if parts is None or self.mesh is None else self.mesh.shape[parts]

    def _lengthen_impl(self, cache: CodecCache, *, more: int) -> CodecCache:
        """The cache with space for more blocks after those that it has."""
        batch = len(cache.num_blocks)
        cache_at, _ = self._shardings(batch)
        extra = more * self.config.tokens_per_block // self._cache_parts(batch)

        def longer(x: Array) -> Array:
            return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, extra), (0, 0)))

        if cache_at is not None:  # each device lengthens its part of every block
            at = cache_at.spec
            longer = jax.shard_map(
                longer, mesh=self.mesh, in_specs=at, out_specs=at, check_vma=False
            )
        encoder, decoder = (
            part._replace(keys=longer(part.keys), values=longer(part.values))
            for part in (cache.encoder, cache.decoder)
        )
        return cache._replace(encoder=encoder, decoder=decoder)

    def _shardings(self, batch: int) -> tuple[NamedSharding | None, NamedSharding | None]:
        """The shardings of the cache of a batch, and of arrays with one number for each element."""
        if self.mesh is None:
            return None, None
        spec = ops.cache_spec(self.mesh, batch, self.config.num_attention_heads)
        return NamedSharding(self.mesh, spec), NamedSharding(self.mesh, P(spec[1]))

    def _positions(self, cache: CodecCache, num_candidates: int = 1) -> Int[Array, "n l"]:
        length = self.config.tokens_per_block
        first = repeat(cache.num_blocks * length, "b -> (b k) 1", k=num_candidates)
        return first + jnp.arange(length)[None]

    def _real_pixels(self, num_frames: Array) -> Bool[Array, "n l p"]:
        """True for the numbers of a block's patches that belong to its first `num_frames` frames."""
        config = self.config
        deep, rows, columns = config.patch_size
        a_frame = (
            config.tokens_per_block * deep // config.frames_per_block
        )  # patches that share frames
        token_frame = jnp.arange(config.tokens_per_block) // a_frame * deep
        pixel_frame = jnp.arange(config.patch_dim) // (rows * columns * 3)
        frame = token_frame[:, None] + pixel_frame[None]
        return frame[None] < num_frames[:, None, None]

    def _pixel_weights(self, rows: Array, columns: Array) -> Float[Array, "b l p"]:
        """What each number of a block's patches weighs."""
        config = self.config
        plane = rows[:, None, :, None, None] * columns[:, None, None, :, None]
        shape = (len(rows), config.frames_per_block, rows.shape[1], columns.shape[1], 3)
        return patchify(jnp.broadcast_to(plane, shape), config.patch_size, config.token_order)

    def _encode_impl(self, params, cache: CodecCache, patches) -> EncodedBlock:
        whole = jnp.ones(patches.shape[:2], bool)
        batch = Batch(to_unit_range(patches), whole, position_ids=self._positions(cache))
        return self._encoded(params, cache, batch)

    def _encoded(self, params, cache: CodecCache, batch: Batch) -> EncodedBlock:
        encoded = self._apply("encode", params, batch, cache.encoder)
        return EncodedBlock(self._snapped(encoded.codes), encoded.new_kv)

    def _try_impl(
        self,
        params,
        cache: CodecCache,
        patches,
        counts,
        num_frames,
        weights=None,
        encoded: EncodedBlock | None = None,
        *,
        keep: bool,
    ) -> Trial:
        num_candidates = counts.shape[1]
        x, kept = self._candidates(patches, counts)
        batch = Batch(x, kept, position_ids=self._positions(cache, num_candidates))
        if self.config.condition_encoder:
            encoded = self._encoded(params, cache, batch)
        elif encoded is None:
            encoded = self._encode_impl(params, cache, patches)
        alike = len(kept) // len(encoded.codes)  # candidates that share their codes
        codes = repeat(encoded.codes, "b l c -> (b k) l c", k=alike)
        codes = token_masks.drop_tail(codes, kept)
        out, decoder_new = self._apply("decode", params, codes, batch, cache.decoder)
        out = jnp.clip(out, -1.0, 1.0)
        levels = to_levels(out)
        losses, pixel_losses = self._losses(out, levels, x, num_frames, weights)
        return Trial(
            losses=losses,
            pixel_losses=pixel_losses,
            codes=codes,
            pixels=levels.astype(jnp.uint8) if weights is None else to_unrounded_levels(out),
            encoder_new=encoded.new_kv if keep else None,
            decoder_new=decoder_new if keep else None,
        )

    def _draft_impl(
        self, params, patches, counts, codes, num_frames, weights=None
    ) -> tuple[Float[Array, "b k"], Float[Array, "b k"]]:
        x, kept = self._candidates(patches, counts)
        codes = repeat(codes, "b l c -> (b k) l c", k=counts.shape[1])
        codes = token_masks.drop_tail(codes, kept)
        out, _ = self._apply("decode", params, codes, Batch(x, kept), draft=True)
        out = jnp.clip(out, -1.0, 1.0)
        return self._losses(out, to_levels(out), x, num_frames, weights)

    def _candidates(self, patches, counts) -> tuple[Float[Array, "n l p"], Bool[Array, "n l"]]:
        """The pixels of each candidate, and which of its tokens are kept."""
        x = repeat(to_unit_range(patches), "b l p -> (b k) l p", k=counts.shape[1])
        return x, token_masks.kept_mask(counts.reshape(-1), self.config.tokens_per_block)

    def _losses(
        self, out: Array, levels: Array, x: Array, num_frames, weights
    ) -> tuple[Float[Array, "b k"], Float[Array, "b k"]]:
        """The mean squared errors of pixels, and of 8-bit levels, for each candidate."""
        num_candidates = len(out) // len(num_frames)
        is_real = self._real_pixels(jnp.repeat(num_frames, num_candidates))
        weighed, counted = None, is_real
        if weights is not None:
            weighed = repeat(self._pixel_weights(*weights), "b l p -> (b k) l p", k=num_candidates)
            counted = jnp.where(is_real, weighed, 0.0)

        def mean_over_real(error: Array) -> Array:
            square = jnp.square(error)
            if (
                weighed is not None
            ):  # without weights, the program of the released behaviour to the bit
                square = square * weighed
            total = jnp.sum(jnp.where(is_real, square, 0.0), axis=(1, 2))
            return rearrange(
                total / jnp.sum(counted, axis=(1, 2)), "(b k) -> b k", k=num_candidates
            )

        return mean_over_real(out - x), mean_over_real(to_unit_range(levels) - x)

    def _chosen(self, trial: Trial, choice) -> Trial:
        """The trial with one candidate of each element."""
        num_candidates = trial.losses.shape[1]

        def chosen(x: Array, axis: int) -> Array:
            if x.shape[axis] == len(choice):  # one of each element
                return x
            rows = jnp.arange(len(choice)) * num_candidates + choice
            return jnp.take(x, rows, axis=axis)

        def losses(x: Array) -> Array:
            return jnp.take_along_axis(x, choice[:, None], axis=1)

        def layers(new: tuple[Array, Array] | None) -> tuple[Array, Array] | None:
            return None if new is None else (chosen(new[0], 1), chosen(new[1], 1))

        return Trial(
            losses=losses(trial.losses),
            pixel_losses=losses(trial.pixel_losses),
            codes=chosen(trial.codes, 0),
            pixels=chosen(trial.pixels, 0),
            encoder_new=layers(trial.encoder_new),
            decoder_new=layers(trial.decoder_new),
        )

    def _select_impl(self, selected: Trial | None, trial: Trial, choice, elements) -> Trial:
        one = self._chosen(trial, choice)
        if selected is None:
            return one

        def newer(old: Array, new: Array) -> Array:
            shape = (1, -1, 1, 1, 1) if new.ndim == 5 else (-1, *(1,) * (new.ndim - 1))
            return jnp.where(jnp.reshape(elements, shape), new, old)

        return jax.tree.map(newer, selected, one)

    def _commit_impl(
        self, cache: CodecCache, trial: Trial, choice, elements
    ) -> tuple[CodecCache, Committed]:
        one = self._chosen(trial, choice)
        encoder = self._append(cache.encoder, one.encoder_new, cache.num_blocks, elements)
        decoder = self._append(cache.decoder, one.decoder_new, cache.num_blocks, elements)
        new = self._counted(cache, encoder, decoder, elements)
        return new, Committed(self._to_tokens(one.codes), one.pixels)

    def _decode_impl(
        self, params, cache: CodecCache, tokens, num_kept, *, rounded: bool
    ) -> tuple[CodecCache, Array]:
        kept = token_masks.kept_mask(num_kept, self.config.tokens_per_block)
        batch = Batch(jnp.zeros((*kept.shape, 0)), kept, position_ids=self._positions(cache))
        codes = token_masks.drop_tail(self._from_tokens(tokens), kept)
        out, new = self._apply("decode", params, codes, batch, cache.decoder)
        decoder = self._append(cache.decoder, new, cache.num_blocks, None)
        pixels = to_uint8(out) if rounded else to_unrounded_levels(jnp.clip(out, -1.0, 1.0))
        return self._counted(cache, cache.encoder, decoder, None), pixels

    def _append(
        self, cache: ops.KVCache, new: Any, num_blocks: Array, elements: Array | None
    ) -> ops.KVCache:
        """Writes a block over the oldest one. Keys are rotated by their positions, so their order in the cache does not matter."""
        slots = self._slots(cache)
        if slots == 0:
            return cache
        batch = len(num_blocks)
        if elements is None and batch > 1:
            elements = jnp.ones(batch, bool)

        def write(old: Array, x: Array, number: Array, wanted: Array | None) -> Array:
            x = bf16_bits.to_bits(x) if old.dtype == jnp.uint16 else x.astype(old.dtype)
            for i in range(old.shape[1]):  # each element has its own place
                piece = x[:, i : i + 1]
                start = (0, i, 0, (number[i] % slots) * x.shape[3], 0)
                if wanted is not None:
                    there = lax.dynamic_slice(old, start, piece.shape)
                    piece = jnp.where(wanted[i], piece, there)
                old = lax.dynamic_update_slice(old, piece, start)
            return old

        cache_at, numbers_at = self._shardings(batch)
        if (
            cache_at is not None and numbers_at is not None
        ):  # each device writes its part of every block
            cached, numbers = cache_at.spec, numbers_at.spec
            write = jax.shard_map(
                write,
                mesh=self.mesh,
                in_specs=(cached, cached, numbers, None if elements is None else numbers),
                out_specs=cached,
                check_vma=False,
            )
        keys, values = (
            write(old, x, num_blocks, elements) for old, x in zip(cache[:2], new, strict=True)
        )
        return cache._replace(keys=keys, values=values)

    def _counted(
        self, cache: CodecCache, encoder: ops.KVCache, decoder: ops.KVCache, elements: Array | None
    ) -> CodecCache:
        """The cache with one block more in these elements; None: in all.

        It has the sharding of a new cache: with another one, the next block would compile again.
        """
        more = 1 if elements is None else elements.astype(jnp.int32)
        num_blocks = cache.num_blocks + more
        slots = self._slots(decoder)
        length = jnp.minimum(num_blocks, slots) * self.config.tokens_per_block
        _, numbers_at = self._shardings(len(num_blocks))
        if numbers_at is not None:
            num_blocks, length = (
                lax.with_sharding_constraint(x, numbers_at) for x in (num_blocks, length)
            )
        return CodecCache(
            encoder._replace(length=length), decoder._replace(length=length), num_blocks
        )

    def _apply(self, method: str, params, *arguments, **options) -> Any:
        return self.model.apply({"params": params}, *arguments, method=method, **options)

    def _snapped(self, codes: Array) -> Array:
        """FSQ codes as computed from their indices, so that decoding from a file repeats them to the bit."""
        return self._from_tokens(self._to_tokens(codes))

    def _to_tokens(self, codes: Array) -> Array:
        return (
            self.bottleneck.codes_to_indices(codes) if isinstance(self.bottleneck, FSQ) else codes
        )

    def _from_tokens(self, tokens: Array) -> Array:
        return (
            self.bottleneck.indices_to_codes(tokens) if isinstance(self.bottleneck, FSQ) else tokens
        )

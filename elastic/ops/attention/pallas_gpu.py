"""Block-causal attention for NVIDIA GPUs: Pallas kernels of our own, lowered through Triton (FlashAttention-2, Dao 2023).

They serve what cuDNN cannot (cudnn.py): float32, segments, hidden keys, and blocks that a chunk of queries crosses.
They run on any device in interpret mode, so that tests need no GPU, and compile for sm_80 and later. Positions and
lengths may be traced. The forward pass returns the natural logsumexp, and the backward pass takes one over all keys,
as a ring needs.

Why not tokamax's Mosaic kernels, measured beside these on an H100 (scripts/bench/README.md): their forward pass is
faster and their backward pass slower; the backward pass takes 16-bit operands on sm_90 and sm_100 only; they pad keys,
which copies a cache; mixed segments need a dense mask; and without a GPU they can be neither compiled nor checked.

Letters of a shape: N rows of queries, M rows of keys, Q and K positions, D channels; t a tile of queries, s of keys.
"""

import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

from elastic.ops.attention import block_mask
from elastic.ops.attention.base import Kernel, MaskArgs, StaticArgs

_NEVER = -1e30  # the logit of a masked pair; finite, so that a fully masked row gives 0 and no nan
_LOG2_E = math.log2(math.e)
_SMALLEST_TILE = 16  # the smallest side of a matrix product in Triton

Step = Literal["forward", "dq", "dkv"]


class Tiles(NamedTuple):
    """How a kernel divides its work: queries and keys in a tile, warps that share a tile, stages of its load pipeline."""

    q_tile: int
    kv_tile: int
    num_warps: int
    num_stages: int


def check(head_dim: int, dtype: jax.typing.DTypeLike) -> None:
    """Checks that these kernels can serve a head size and a dtype.

    Raises:
      ValueError: they cannot.
    """
    if not 32 <= head_dim <= 256:
        raise ValueError(
            f"{head_dim=}: the GPU kernel takes 32 to 256 channels per head; "
            "use another number of heads, or implementation='blockwise'."
        )
    if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
        raise ValueError(
            f"dtype={jnp.dtype(dtype).name}: the GPU kernel takes float32 or bfloat16; "
            "cast q, k and v, or use implementation='blockwise'."
        )


def tiles(
    step: Step,
    head_dim: int,
    dtype: jax.typing.DTypeLike,
    lengths: tuple[int, int],
    static: StaticArgs,
) -> Tiles:
    """The tile sizes, warps and stages of one kernel.

    For 16 bits and up to 128 channels they are the fastest of five or six candidates on an H100 (at 16K tokens: forward
    414 TFLOP/s, dq 564, dk and dv 545; the slowest candidates reached 344, 502 and 149). The others were chosen from
    the compiler's report for sm_90a: 64 rows per group of 4 warps where registers allow it, as Hopper's matrix unit
    takes them; no spilled registers; and at most 160 KiB of shared memory, which sm_80 has too. float32 products run on
    the CUDA cores, whose registers allow small tiles only (96 channels still spill a few hundred bytes).

    Args:
      step: which kernel.
      head_dim: channels of a head.
      dtype: the dtype of queries, keys and values.
      lengths: lengths of the arrays of queries and of keys, in tokens.
      static: its tile sizes are upper limits, but a tile has at least 16 tokens.
    """
    width = _width(head_dim)
    if jnp.dtype(dtype).itemsize == 2 and width <= 128:
        chosen = {"forward": (128, 64, 4, 3), "dq": (128, 128, 8, 2), "dkv": (64, 128, 8, 3)}
    elif jnp.dtype(dtype).itemsize == 2:
        chosen = {"forward": (64, 64, 8, 2), "dq": (64, 32, 8, 2), "dkv": (32, 64, 8, 2)}
    elif width <= 128:
        chosen = {"forward": (32, 32, 8, 1), "dq": (32, 32, 8, 1), "dkv": (32, 32, 8, 2)}
    else:
        chosen = {"forward": (32, 16, 8, 1), "dq": (32, 16, 8, 1), "dkv": (16, 16, 8, 1)}
    q_tile, kv_tile, num_warps, num_stages = chosen[step]
    return Tiles(
        _tile_within(q_tile, static.q_tile, lengths[0]),
        _tile_within(kv_tile, static.kv_tile, lengths[1]),
        num_warps,
        num_stages,
    )


def _tile_within(tile: int, limit: int, length: int) -> int:
    """The largest power of two that is at most `tile`, `limit` and the next power of two of `length`; at least 16."""
    tile = min(tile, 1 << (limit.bit_length() - 1), pl.next_power_of_2(length))
    return max(tile, _SMALLEST_TILE)


def _width(head_dim: int) -> int:
    """Channels in a tile: a power of two, as Triton requires; the added channels are masked."""
    return max(pl.next_power_of_2(head_dim), _SMALLEST_TILE)


class _Sizes(NamedTuple):
    """What a kernel knows at compile time."""

    num_queries: int
    num_keys: int
    head_dim: int
    static: StaticArgs
    tiles: Tiles

    @property
    def q_tile(self) -> int:
        return self.tiles.q_tile

    @property
    def kv_tile(self) -> int:
        return self.tiles.kv_tile

    @property
    def logit_scale(self) -> float:
        """Scales a product of query and key to a logit in base 2, because the hardware computes exp2."""
        return self.head_dim**-0.5 * _LOG2_E


class _Scalars(NamedTuple):
    """The scalars of `MaskArgs` that a kernel reads when it runs."""

    q_start: Array
    kv_start: Array
    first_row: Array
    limit: Array  # keys at this index of the array and later do not exist


def _read_scalars(scalars_ref: Any, sizes: _Sizes) -> _Scalars:
    q_start, kv_start, kv_length, first_row = (scalars_ref[i] for i in range(4))
    return _Scalars(q_start, kv_start, first_row, jnp.minimum(kv_length - kv_start, sizes.num_keys))


def _read_tiles(tiles_ref: Any) -> block_mask.TileRanges:
    return block_mask.TileRanges(*(tiles_ref[i] for i in range(4)))


def _load(ref: Any, sizes: _Sizes, exists: Array | None, other: float | int = 0) -> Array:
    """A tile of `ref`; rows that do not exist and added channels are not read but set to `other`."""
    mask = _mask(ref.shape, sizes, exists)
    return plgpu.load(ref) if mask is None else plgpu.load(ref, mask=mask, other=other)


def _store(ref: Any, value: Array, sizes: _Sizes, exists: Array | None) -> None:
    plgpu.store(ref, value, mask=_mask(ref.shape, sizes, exists))


def _mask(shape: tuple[int, ...], sizes: _Sizes, exists: Array | None) -> Array | None:
    if len(shape) == 1:
        return exists
    mask = None if exists is None else jnp.broadcast_to(exists[:, None], shape)
    if shape[1] != sizes.head_dim:
        channels = jnp.broadcast_to((jnp.arange(shape[1]) < sizes.head_dim)[None, :], shape)
        mask = channels if mask is None else mask & channels
    return mask


def _queries_exist(first: Array, sizes: _Sizes) -> Array | None:
    """Which queries of a tile exist; None if the tiles divide the queries."""
    if sizes.num_queries % sizes.q_tile == 0:
        return None
    return first + jnp.arange(sizes.q_tile) < sizes.num_queries


def _dot(a: Array, b: Array, contract: tuple[int, int] = (1, 0)) -> Array:
    """A product summed in float32. float32 operands are not rounded (a GPU's default would round them to TF32)."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(
        a, b, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def _seen_until(query: Array, scalars: _Scalars, sizes: _Sizes) -> Array:
    """The index of the first key that a query does not see, at least 0; `query` is an index too."""
    block = lax.div(scalars.q_start + query, sizes.static.block_size)
    until = (block + 1) * sizes.static.block_size - scalars.kv_start
    return jnp.maximum(jnp.minimum(until, scalars.limit), 0)


def _seen_from(key: Array, scalars: _Scalars, sizes: _Sizes) -> Array:
    """The index of the first query that sees a key, at least 0."""
    block = lax.div(scalars.kv_start + key, sizes.static.block_size)
    return jnp.maximum(block * sizes.static.block_size - scalars.q_start, 0)


def _forward_kernel(
    scalars_ref: Any, tiles_ref: Any, q_ref: Any, k_ref: Any, v_ref: Any, ids: Any, out_ref: Any,
    lse_ref: Any, *, sizes: _Sizes, tile_of: Any,
) -> None:  # fmt: skip
    """Attention of one tile of queries to all keys that they see, with an online softmax."""
    scalars = _read_scalars(scalars_ref, sizes)
    n, first = pl.program_id(1), tile_of(pl.program_id(0)) * sizes.q_tile
    row, exists_t = scalars.first_row + n, _queries_exist(first, sizes)
    q_tD = _load(q_ref, sizes, exists_t)
    seen_tile = _seen_tile(n, first, exists_t, scalars, sizes, ids)

    def body(j: Array, carry: tuple[Array, Array, Array], masked: bool):
        top_t, total_t, out_tD = carry
        at = pl.ds(j * sizes.kv_tile, sizes.kv_tile)
        exists_s, seen_ts = seen_tile(j) if masked else (None, None)
        k_sD = _load(k_ref.at[row, at, :], sizes, exists_s)
        logits_ts = _dot(q_tD, k_sD, (1, 1)) * sizes.logit_scale
        if seen_ts is not None:
            logits_ts = jnp.where(seen_ts, logits_ts, _NEVER)
        new_top_t = jnp.maximum(top_t, jnp.max(logits_ts, axis=1))
        weights_ts = jnp.exp2(logits_ts - new_top_t[:, None])
        if seen_ts is not None:
            weights_ts = jnp.where(seen_ts, weights_ts, 0.0)
        rescale_t = jnp.exp2(top_t - new_top_t)
        total_t = total_t * rescale_t + jnp.sum(weights_ts, axis=1)
        v_sD = _load(v_ref.at[row, at, :], sizes, exists_s)
        out_tD = out_tD * rescale_t[:, None] + _dot(weights_ts.astype(v_sD.dtype), v_sD)
        return new_top_t, total_t, out_tD

    shape = q_tD.shape
    carry = (jnp.full(shape[:1], _NEVER, jnp.float32), jnp.zeros(shape[:1], jnp.float32),
             jnp.zeros(shape, jnp.float32))  # fmt: skip
    top_t, total_t, out_tD = _read_tiles(tiles_ref).fold(body, carry)
    any_t = total_t > 0
    total_t = jnp.where(any_t, total_t, 1.0)
    lse_t = jnp.where(any_t, top_t / _LOG2_E + jnp.log(total_t), -jnp.inf)
    _store(out_ref, out_tD / total_t[:, None], sizes, exists_t)
    _store(lse_ref, lse_t, sizes, exists_t)


def _seen_tile(
    n: Array, first: Array, exists_t: Array | None, scalars: _Scalars, sizes: _Sizes, ids: Any
):
    """A function of j that gives which keys of tile j exist, and which of them each query sees."""
    until_t = _seen_until(first + jnp.arange(sizes.q_tile), scalars, sizes)
    batch = lax.div(n, sizes.static.rows_per_batch)
    if ids is not None:
        q_ids, kv_ids = ids
        q_id_t = _load(q_ids.at[batch, pl.ds(first, sizes.q_tile)], sizes, exists_t)

    def seen(j: Array) -> tuple[Array, Array]:
        key_s = j * sizes.kv_tile + jnp.arange(sizes.kv_tile)
        exists_s = key_s < scalars.limit
        seen_ts = key_s[None, :] < until_t[:, None]
        if ids is not None:
            at = pl.ds(j * sizes.kv_tile, sizes.kv_tile)
            kv_id_s = _load(kv_ids.at[batch, at], sizes, exists_s)
            seen_ts &= q_id_t[:, None] == kv_id_s[None, :]
        return exists_s, seen_ts

    return seen


def _dq_kernel(
    scalars_ref: Any, tiles_ref: Any, q_ref: Any, k_ref: Any, v_ref: Any, dout_ref: Any, lse_ref: Any,
    delta_ref: Any, ids: Any, dq_ref: Any, *, sizes: _Sizes, tile_of: Any,
) -> None:  # fmt: skip
    """The gradient of one tile of queries."""
    scalars = _read_scalars(scalars_ref, sizes)
    n, first = pl.program_id(1), tile_of(pl.program_id(0)) * sizes.q_tile
    exists_t = _queries_exist(first, sizes)
    q_tD, dout_tD = _load(q_ref, sizes, exists_t), _load(dout_ref, sizes, exists_t)
    lse_t, delta_t = _load(lse_ref, sizes, exists_t), _load(delta_ref, sizes, exists_t)
    seen_tile = _seen_tile(n, first, exists_t, scalars, sizes, ids)

    def body(j: Array, dq_tD: Array, masked: bool) -> Array:
        at = pl.ds(j * sizes.kv_tile, sizes.kv_tile)
        exists_s, seen_ts = seen_tile(j) if masked else (None, None)
        k_sD = _load(k_ref.at[at, :], sizes, exists_s)
        v_sD = _load(v_ref.at[at, :], sizes, exists_s)
        logits_ts = _dot(q_tD, k_sD, (1, 1)) * sizes.logit_scale
        weights_ts = jnp.exp2(logits_ts - lse_t[:, None])
        if seen_ts is not None:
            weights_ts = jnp.where(seen_ts, weights_ts, 0.0)
        dweights_ts = _dot(dout_tD, v_sD, (1, 1))
        dlogits_ts = weights_ts * (dweights_ts - delta_t[:, None])
        return dq_tD + _dot(dlogits_ts.astype(k_sD.dtype), k_sD)

    dq_tD = _read_tiles(tiles_ref).fold(body, jnp.zeros(q_tD.shape, jnp.float32))
    _store(dq_ref, dq_tD * sizes.head_dim**-0.5, sizes, exists_t)


def _dkv_kernel(
    scalars_ref: Any, tiles_ref: Any, q_ref: Any, k_ref: Any, v_ref: Any, dout_ref: Any, lse_ref: Any,
    delta_ref: Any, ids: Any, dk_ref: Any, dv_ref: Any, *, sizes: _Sizes, tile_of: Any,
) -> None:  # fmt: skip
    """The gradients of one tile of keys and values, summed over all queries that see it."""
    scalars = _read_scalars(scalars_ref, sizes)
    n, first = pl.program_id(1), tile_of(pl.program_id(0)) * sizes.kv_tile
    key_s = first + jnp.arange(sizes.kv_tile)
    exists_s = key_s < scalars.limit
    k_sD, v_sD = _load(k_ref, sizes, exists_s), _load(v_ref, sizes, exists_s)
    from_s = _seen_from(key_s, scalars, sizes)
    batch = lax.div(n, sizes.static.rows_per_batch)
    if ids is not None:
        q_ids, kv_ids = ids
        kv_id_s = _load(kv_ids.at[batch, pl.ds(first, sizes.kv_tile)], sizes, exists_s)

    def body(i: Array, carry: tuple[Array, Array], masked: bool) -> tuple[Array, Array]:
        dk_sD, dv_sD = carry
        at = pl.ds(i * sizes.q_tile, sizes.q_tile)
        exists_t = _queries_exist(i * sizes.q_tile, sizes)
        q_tD, dout_tD = (_load(ref.at[at, :], sizes, exists_t) for ref in (q_ref, dout_ref))
        # A query that does not exist gets weights 0: exp2(logit - inf) is 0.
        lse_t = _load(lse_ref.at[at], sizes, exists_t, other=jnp.inf)
        delta_t = _load(delta_ref.at[at], sizes, exists_t)
        logits_st = _dot(k_sD, q_tD, (1, 1)) * sizes.logit_scale
        weights_st = jnp.exp2(logits_st - lse_t[None, :])
        if masked:
            query_t = i * sizes.q_tile + jnp.arange(sizes.q_tile)
            seen_st = query_t[None, :] >= from_s[:, None]
            if ids is not None:
                q_id_t = _load(q_ids.at[batch, at], sizes, exists_t)
                seen_st &= q_id_t[None, :] == kv_id_s[:, None]
            weights_st = jnp.where(seen_st, weights_st, 0.0)
        dv_sD += _dot(weights_st.astype(dout_tD.dtype), dout_tD)
        dweights_st = _dot(v_sD, dout_tD, (1, 1))
        dlogits_st = weights_st * (dweights_st - delta_t[None, :])
        dk_sD += _dot(dlogits_st.astype(q_tD.dtype), q_tD)
        return dk_sD, dv_sD

    carry = (jnp.zeros(k_sD.shape, jnp.float32), jnp.zeros(k_sD.shape, jnp.float32))
    dk_sD, dv_sD = _read_tiles(tiles_ref).fold(body, carry)
    # Keys that do not exist were read as zeros but not masked, so their gradients are set to 0 here.
    in_array = None if sizes.num_keys % sizes.kv_tile == 0 else key_s < sizes.num_keys
    _store(dk_ref, jnp.where(exists_s[:, None], dk_sD * sizes.head_dim**-0.5, 0.0), sizes, in_array)
    _store(dv_ref, jnp.where(exists_s[:, None], dv_sD, 0.0), sizes, in_array)


def _launch(
    step: Step, kernel: Any, arrays: tuple, parts: str, results: tuple, mask: MaskArgs, static: StaticArgs,
    interpret: bool,
) -> Any:  # fmt: skip
    """Runs a kernel with one program per tile and row; each program writes one tile of every result.

    A program's part of an array may extend beyond the array, in positions and in channels: loads and stores are masked.

    Args:
      step: which kernel `kernel` is.
      kernel: the body.
      arrays: its inputs, which begin with q and k.
      parts: one letter per array, the part that a program gets: t, its tile of its row; r, its row; a, everything.
      results: shapes of the outputs.
      mask: what each query may see.
      static: block size and limits of the tiles, in tokens.
      interpret: run the kernel in interpret mode.
    """
    q_NQD, k_MKD = arrays[:2]
    if not interpret:
        check(q_NQD.shape[-1], q_NQD.dtype)
    lengths = (q_NQD.shape[1], k_MKD.shape[1])
    cut = tiles(step, q_NQD.shape[-1], q_NQD.dtype, lengths, static)
    sizes = _Sizes(*lengths, q_NQD.shape[-1], static, cut)
    length, tile = (lengths[1], cut.kv_tile) if step == "dkv" else (lengths[0], cut.q_tile)
    num_tiles = pl.cdiv(length, tile)
    # Start with the tiles that take longest, so that the last programs are short. These are late queries, which see more
    # keys, and early keys, which more queries see.
    tile_of = (lambda i: i) if step == "dkv" else (lambda i: num_tiles - 1 - i)

    def spec(x: Array | jax.ShapeDtypeStruct, part: str) -> pl.BlockSpec:
        longest = max(cut.q_tile, cut.kv_tile)
        whole = pl.cdiv(x.shape[1], longest) * longest
        shape, index = {
            "t": ((None, tile), lambda i, n: (n, tile_of(i), 0)),
            "r": ((None, whole), lambda i, n: (n, 0, 0)),
            "a": ((x.shape[0], whole), lambda i, n: (0, 0, 0)),
        }[part]
        rank = len(x.shape)
        return pl.BlockSpec((*shape, _width(sizes.head_dim))[:rank], lambda *at: index(*at)[:rank])

    scalars = (mask.q_start, mask.kv_start, mask.kv_length, mask.first_row)
    mask = block_mask.valid_as_segments(mask, lengths[0])
    ids = None if mask.q_segments is None else (mask.q_segments, mask.kv_segments)
    find = block_mask.tile_ranges_of_keys if step == "dkv" else block_mask.tile_ranges_of_queries
    tile_ranges = find(mask, *lengths, static._replace(q_tile=cut.q_tile, kv_tile=cut.kv_tile))
    rows_per_range = len(q_NQD) // len(tile_ranges.end)
    return pl.pallas_call(
        functools.partial(kernel, sizes=sizes, tile_of=tile_of),
        results,
        grid=(num_tiles, len(q_NQD)),
        in_specs=(
            pl.BlockSpec((4,), lambda i, n: (0,)),
            pl.BlockSpec((None, None, 4), lambda i, n: (lax.div(n, rows_per_range), tile_of(i), 0)),
            *map(spec, arrays, parts),
            jax.tree.map(functools.partial(spec, part="a"), ids),
        ),
        out_specs=tuple(spec(x, "t") for x in results),
        compiler_params=plgpu.CompilerParams(num_warps=cut.num_warps, num_stages=cut.num_stages),
        interpret=interpret,
    )(
        jnp.stack([jnp.asarray(x, jnp.int32) for x in scalars]),
        jnp.stack(tile_ranges, axis=-1),
        *arrays,
        ids,
    )


def _like(x: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, jnp.float32)


def _forward(
    q_NQD: Array,
    k_MKD: Array,
    v_MKD: Array,
    mask: MaskArgs,
    static: StaticArgs,
    *,
    interpret: bool,
) -> tuple[Array, Array]:
    results = (_like(q_NQD), jax.ShapeDtypeStruct(q_NQD.shape[:2], jnp.float32))
    arrays = (q_NQD, k_MKD, v_MKD)
    return _launch("forward", _forward_kernel, arrays, "taa", results, mask, static, interpret)


def _backward(
    q_NQD: Array, k_NKD: Array, v_NKD: Array, dout_NQD: Array, lse_NQ: Array, delta_NQ: Array,
    mask: MaskArgs, static: StaticArgs, *, interpret: bool,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Two kernels that both recompute the logits. Programs share no sum, so results are the same to the bit in every run."""
    # In base 2. A query that sees no key gets weights 0: exp2(logit - inf) is 0.
    lse_NQ = jnp.where(jnp.isneginf(lse_NQ), jnp.inf, lse_NQ * _LOG2_E)
    arrays = (q_NQD, k_NKD, v_NKD, dout_NQD.astype(q_NQD.dtype), lse_NQ, delta_NQ)
    rest = (mask, static, interpret)
    (dq,) = _launch("dq", _dq_kernel, arrays, "trrttt", (_like(q_NQD),), *rest)
    results = (_like(k_NKD), _like(v_NKD))
    dk, dv = _launch("dkv", _dkv_kernel, arrays, "rttrrr", results, *rest)
    return dq, dk, dv


KERNEL = Kernel(
    functools.partial(_forward, interpret=False), functools.partial(_backward, interpret=False)
)
# The same kernels in interpret mode: slow, on any device, for tests.
INTERPRET_KERNEL = Kernel(
    functools.partial(_forward, interpret=True), functools.partial(_backward, interpret=True)
)

"""Block-causal attention for NVIDIA GPUs: Pallas kernels of our own, lowered through Triton (FlashAttention-2, Dao 2023).

They serve what cuDNN cannot (cudnn.py): float32, segments, hidden keys, chunks that cross blocks. They run everywhere in interpret mode
(so they are proved without a GPU), read where rows begin and end when they run, give the natural logsumexp, take the global one back
(a ring needs both), and compile for sm_80 and later. tokamax's Mosaic kernels were measured beside them on an H100 (README, "On one
H100"): faster forward, slower backward, which takes 16-bit operands on sm_90 and sm_100 only; they pad keys (a copy of a cache), mixed
segments need a dense mask, and nothing can be compiled or checked without a GPU.

Shapes: N rows of queries, M rows of keys, Q and K positions, D channels; t marks a tile of queries, s one of keys.
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

_NEVER = -1e30  # finite, so that a fully masked row gives no nan on its way to 0
_LOG2_E = math.log2(math.e)
_SMALLEST_TILE = 16  # of a matrix product in Triton

Step = Literal["forward", "dq", "dkv"]


class Tiles(NamedTuple):
    """How one kernel cuts its work: queries and keys held at once, warps that share them, loads in flight."""

    q_tile: int
    kv_tile: int
    num_warps: int
    num_stages: int


def check(head_dim: int, dtype: jax.typing.DTypeLike) -> None:
    """Raises ValueError for what these kernels cannot do."""
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
    options: StaticArgs,
) -> Tiles:
    """The tiles of one kernel, for `lengths` of queries and of keys; those of `options` are limits (not below 16).

    16 bits and up to 128 channels: the fastest of five or six on an H100 (at 16K tokens forward 414 TFLOP/s, dq 564, dk and dv 545; the
    slowest made 344, 502 and 149). The others are chosen by what the compiler makes of them for sm_90a: 64 rows for each group of 4
    warps where registers allow it, which is what Hopper's matrix unit takes, no spilled registers, and at most 160 KiB of shared
    memory, which sm_80 has too. 32 bits: true float32 products run on the plain cores, whose registers allow small tiles only
    (96 channels still spill some hundred bytes).
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
        _tile_within(q_tile, options.q_tile, lengths[0]),
        _tile_within(kv_tile, options.kv_tile, lengths[1]),
        num_warps,
        num_stages,
    )


def _tile_within(tile: int, limit: int, length: int) -> int:
    """The largest power of two up to `tile` and `limit` that does not go beyond what `length` needs."""
    tile = min(tile, 1 << (limit.bit_length() - 1), pl.next_power_of_2(length))
    return max(tile, _SMALLEST_TILE)


def _width(head_dim: int) -> int:
    """The width of a tile: Triton's arrays are powers of two, and the channels added are masked."""
    return max(pl.next_power_of_2(head_dim), _SMALLEST_TILE)


class _Sizes(NamedTuple):
    """What a kernel knows when it is compiled."""

    num_queries: int
    num_keys: int
    head_dim: int
    options: StaticArgs
    tiles: Tiles

    @property
    def q_tile(self) -> int:
        return self.tiles.q_tile

    @property
    def kv_tile(self) -> int:
        return self.tiles.kv_tile

    @property
    def logit_scale(self) -> float:
        """Of a product of query and key, to a logit in base 2: exp2 is what the hardware has."""
        return self.head_dim**-0.5 * _LOG2_E


class _Numbers(NamedTuple):
    """What a kernel reads of the scope when it runs: scalars."""

    q_start: Array
    kv_start: Array
    first_row: Array
    limit: Array  # keys at this position of the array and later are not there


def _read_numbers(numbers_ref: Any, sizes: _Sizes) -> _Numbers:
    q_start, kv_start, kv_length, first_row = (numbers_ref[i] for i in range(4))
    return _Numbers(q_start, kv_start, first_row, jnp.minimum(kv_length - kv_start, sizes.num_keys))


def _read_tiles(tiles_ref: Any) -> block_mask.TileRanges:
    return block_mask.TileRanges(*(tiles_ref[i] for i in range(4)))


def _load(ref: Any, sizes: _Sizes, there: Array | None, other: float | int = 0) -> Array:
    """A tile, with `other` for rows that are not there and for channels that are added; neither is read."""
    mask = _mask(ref.shape, sizes, there)
    return plgpu.load(ref) if mask is None else plgpu.load(ref, mask=mask, other=other)


def _store(ref: Any, value: Array, sizes: _Sizes, there: Array | None) -> None:
    plgpu.store(ref, value, mask=_mask(ref.shape, sizes, there))


def _mask(shape: tuple[int, ...], sizes: _Sizes, there: Array | None) -> Array | None:
    if len(shape) == 1:
        return there
    mask = None if there is None else jnp.broadcast_to(there[:, None], shape)
    if shape[1] != sizes.head_dim:
        channels = jnp.broadcast_to((jnp.arange(shape[1]) < sizes.head_dim)[None, :], shape)
        mask = channels if mask is None else mask & channels
    return mask


def _queries_there(first: Array, sizes: _Sizes) -> Array | None:
    """Which of a tile of queries exist; None when tiles fit."""
    if sizes.num_queries % sizes.q_tile == 0:
        return None
    return first + jnp.arange(sizes.q_tile) < sizes.num_queries


def _dot(a: Array, b: Array, contract: tuple[int, int] = (1, 0)) -> Array:
    """A product with float32 sums; float32 operands stay so (the default on a GPU would round them to TF32)."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(
        a, b, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def _seen_until(query: Array, numbers: _Numbers, sizes: _Sizes) -> Array:
    """The first key (position in the array, at least 0) that a query (likewise) does not see."""
    block = lax.div(numbers.q_start + query, sizes.options.block_size)
    until = (block + 1) * sizes.options.block_size - numbers.kv_start
    return jnp.maximum(jnp.minimum(until, numbers.limit), 0)


def _seen_from(key: Array, numbers: _Numbers, sizes: _Sizes) -> Array:
    """The first query that sees a key, at least 0."""
    block = lax.div(numbers.kv_start + key, sizes.options.block_size)
    return jnp.maximum(block * sizes.options.block_size - numbers.q_start, 0)


def _forward_kernel(
    numbers_ref: Any, tiles_ref: Any, q_ref: Any, k_ref: Any, v_ref: Any, ids: Any, out_ref: Any,
    lse_ref: Any, *, sizes: _Sizes, tile_of: Any,
) -> None:  # fmt: skip
    """One tile of queries against all keys that they see, with an online softmax."""
    numbers = _read_numbers(numbers_ref, sizes)
    n, first = pl.program_id(1), tile_of(pl.program_id(0)) * sizes.q_tile
    row, there_t = numbers.first_row + n, _queries_there(first, sizes)
    q_tD = _load(q_ref, sizes, there_t)
    seen_tile = _seen_tile(n, first, there_t, numbers, sizes, ids)

    def visit(j: Array, carry: tuple[Array, Array, Array], masked: bool):
        top_t, total_t, out_tD = carry
        at = pl.ds(j * sizes.kv_tile, sizes.kv_tile)
        there_s, seen_ts = seen_tile(j) if masked else (None, None)
        k_sD = _load(k_ref.at[row, at, :], sizes, there_s)
        logits_ts = _dot(q_tD, k_sD, (1, 1)) * sizes.logit_scale
        if seen_ts is not None:
            logits_ts = jnp.where(seen_ts, logits_ts, _NEVER)
        new_top_t = jnp.maximum(top_t, jnp.max(logits_ts, axis=1))
        weights_ts = jnp.exp2(logits_ts - new_top_t[:, None])
        if seen_ts is not None:
            weights_ts = jnp.where(seen_ts, weights_ts, 0.0)
        rescale_t = jnp.exp2(top_t - new_top_t)
        total_t = total_t * rescale_t + jnp.sum(weights_ts, axis=1)
        v_sD = _load(v_ref.at[row, at, :], sizes, there_s)
        out_tD = out_tD * rescale_t[:, None] + _dot(weights_ts.astype(v_sD.dtype), v_sD)
        return new_top_t, total_t, out_tD

    shape = q_tD.shape
    carry = (jnp.full(shape[:1], _NEVER, jnp.float32), jnp.zeros(shape[:1], jnp.float32),
             jnp.zeros(shape, jnp.float32))  # fmt: skip
    top_t, total_t, out_tD = _read_tiles(tiles_ref).fold(visit, carry)
    any_t = total_t > 0
    total_t = jnp.where(any_t, total_t, 1.0)
    lse_t = jnp.where(any_t, top_t / _LOG2_E + jnp.log(total_t), -jnp.inf)
    _store(out_ref, out_tD / total_t[:, None], sizes, there_t)
    _store(lse_ref, lse_t, sizes, there_t)


def _seen_tile(
    n: Array, first: Array, there_t: Array | None, numbers: _Numbers, sizes: _Sizes, ids: Any
):
    """A function of j: which keys of tile j are there, and which of them each query sees."""
    until_t = _seen_until(first + jnp.arange(sizes.q_tile), numbers, sizes)
    batch = lax.div(n, sizes.options.rows_per_batch)
    if ids is not None:
        q_ids, kv_ids = ids
        q_id_t = _load(q_ids.at[batch, pl.ds(first, sizes.q_tile)], sizes, there_t)

    def seen(j: Array) -> tuple[Array, Array]:
        key_s = j * sizes.kv_tile + jnp.arange(sizes.kv_tile)
        there_s = key_s < numbers.limit
        seen_ts = key_s[None, :] < until_t[:, None]
        if ids is not None:
            at = pl.ds(j * sizes.kv_tile, sizes.kv_tile)
            kv_id_s = _load(kv_ids.at[batch, at], sizes, there_s)
            seen_ts &= q_id_t[:, None] == kv_id_s[None, :]
        return there_s, seen_ts

    return seen


def _dq_kernel(
    numbers_ref: Any, tiles_ref: Any, q_ref: Any, k_ref: Any, v_ref: Any, dout_ref: Any, lse_ref: Any,
    delta_ref: Any, ids: Any, dq_ref: Any, *, sizes: _Sizes, tile_of: Any,
) -> None:  # fmt: skip
    """The gradient of one tile of queries."""
    numbers = _read_numbers(numbers_ref, sizes)
    n, first = pl.program_id(1), tile_of(pl.program_id(0)) * sizes.q_tile
    there_t = _queries_there(first, sizes)
    q_tD, dout_tD = _load(q_ref, sizes, there_t), _load(dout_ref, sizes, there_t)
    lse_t, delta_t = _load(lse_ref, sizes, there_t), _load(delta_ref, sizes, there_t)
    seen_tile = _seen_tile(n, first, there_t, numbers, sizes, ids)

    def visit(j: Array, dq_tD: Array, masked: bool) -> Array:
        at = pl.ds(j * sizes.kv_tile, sizes.kv_tile)
        there_s, seen_ts = seen_tile(j) if masked else (None, None)
        k_sD = _load(k_ref.at[at, :], sizes, there_s)
        v_sD = _load(v_ref.at[at, :], sizes, there_s)
        logits_ts = _dot(q_tD, k_sD, (1, 1)) * sizes.logit_scale
        weights_ts = jnp.exp2(logits_ts - lse_t[:, None])
        if seen_ts is not None:
            weights_ts = jnp.where(seen_ts, weights_ts, 0.0)
        dweights_ts = _dot(dout_tD, v_sD, (1, 1))
        dlogits_ts = weights_ts * (dweights_ts - delta_t[:, None])
        return dq_tD + _dot(dlogits_ts.astype(k_sD.dtype), k_sD)

    dq_tD = _read_tiles(tiles_ref).fold(visit, jnp.zeros(q_tD.shape, jnp.float32))
    _store(dq_ref, dq_tD * sizes.head_dim**-0.5, sizes, there_t)


def _dkv_kernel(
    numbers_ref: Any, tiles_ref: Any, q_ref: Any, k_ref: Any, v_ref: Any, dout_ref: Any, lse_ref: Any,
    delta_ref: Any, ids: Any, dk_ref: Any, dv_ref: Any, *, sizes: _Sizes, tile_of: Any,
) -> None:  # fmt: skip
    """The gradients of one tile of keys and values, from all queries that see it."""
    numbers = _read_numbers(numbers_ref, sizes)
    n, first = pl.program_id(1), tile_of(pl.program_id(0)) * sizes.kv_tile
    key_s = first + jnp.arange(sizes.kv_tile)
    there_s = key_s < numbers.limit
    k_sD, v_sD = _load(k_ref, sizes, there_s), _load(v_ref, sizes, there_s)
    from_s = _seen_from(key_s, numbers, sizes)
    batch = lax.div(n, sizes.options.rows_per_batch)
    if ids is not None:
        q_ids, kv_ids = ids
        kv_id_s = _load(kv_ids.at[batch, pl.ds(first, sizes.kv_tile)], sizes, there_s)

    def visit(i: Array, carry: tuple[Array, Array], masked: bool) -> tuple[Array, Array]:
        dk_sD, dv_sD = carry
        at = pl.ds(i * sizes.q_tile, sizes.q_tile)
        there_t = _queries_there(i * sizes.q_tile, sizes)
        q_tD, dout_tD = (_load(ref.at[at, :], sizes, there_t) for ref in (q_ref, dout_ref))
        # A query that is not there weighs nothing: exp2(logit - inf) is 0.
        lse_t = _load(lse_ref.at[at], sizes, there_t, other=jnp.inf)
        delta_t = _load(delta_ref.at[at], sizes, there_t)
        logits_st = _dot(k_sD, q_tD, (1, 1)) * sizes.logit_scale
        weights_st = jnp.exp2(logits_st - lse_t[None, :])
        if masked:
            query_t = i * sizes.q_tile + jnp.arange(sizes.q_tile)
            seen_st = query_t[None, :] >= from_s[:, None]
            if ids is not None:
                q_id_t = _load(q_ids.at[batch, at], sizes, there_t)
                seen_st &= q_id_t[None, :] == kv_id_s[:, None]
            weights_st = jnp.where(seen_st, weights_st, 0.0)
        dv_sD += _dot(weights_st.astype(dout_tD.dtype), dout_tD)
        dweights_st = _dot(v_sD, dout_tD, (1, 1))
        dlogits_st = weights_st * (dweights_st - delta_t[None, :])
        dk_sD += _dot(dlogits_st.astype(q_tD.dtype), q_tD)
        return dk_sD, dv_sD

    carry = (jnp.zeros(k_sD.shape, jnp.float32), jnp.zeros(k_sD.shape, jnp.float32))
    dk_sD, dv_sD = _read_tiles(tiles_ref).fold(visit, carry)
    # Keys that are not there were read as zeros and not masked: theirs is what is left out here.
    in_array = None if sizes.num_keys % sizes.kv_tile == 0 else key_s < sizes.num_keys
    _store(dk_ref, jnp.where(there_s[:, None], dk_sD * sizes.head_dim**-0.5, 0.0), sizes, in_array)
    _store(dv_ref, jnp.where(there_s[:, None], dv_sD, 0.0), sizes, in_array)


def _launch(
    step: Step, kernel: Any, arrays: tuple, places: str, results: tuple, scope: MaskArgs, options: StaticArgs,
    interpret: bool,
) -> Any:  # fmt: skip
    """Runs a kernel, one program per tile and row. `arrays` begin with q and k; a letter of `places` says which part of
    each a program is given: t, the tile of the row that it works on; r, the row; a, all of it. Results are tiles.

    Parts may reach beyond their array, in positions and in channels: loads and stores are masked.
    """
    q_NQD, k_MKD = arrays[:2]
    if not interpret:
        check(q_NQD.shape[-1], q_NQD.dtype)
    lengths = (q_NQD.shape[1], k_MKD.shape[1])
    cut = tiles(step, q_NQD.shape[-1], q_NQD.dtype, lengths, options)
    sizes = _Sizes(*lengths, q_NQD.shape[-1], options, cut)
    length, tile = (lengths[1], cut.kv_tile) if step == "dkv" else (lengths[0], cut.q_tile)
    num_tiles = pl.cdiv(length, tile)
    # Late queries see more keys, early keys are seen by more queries: long work first, so that the last to end is short.
    tile_of = (lambda i: i) if step == "dkv" else (lambda i: num_tiles - 1 - i)

    def spec(x: Array | jax.ShapeDtypeStruct, place: str) -> pl.BlockSpec:
        longest = max(cut.q_tile, cut.kv_tile)
        whole = pl.cdiv(x.shape[1], longest) * longest
        shape, index = {
            "t": ((None, tile), lambda i, n: (n, tile_of(i), 0)),
            "r": ((None, whole), lambda i, n: (n, 0, 0)),
            "a": ((x.shape[0], whole), lambda i, n: (0, 0, 0)),
        }[place]
        rank = len(x.shape)
        return pl.BlockSpec((*shape, _width(sizes.head_dim))[:rank], lambda *at: index(*at)[:rank])

    numbers = (scope.q_start, scope.kv_start, scope.kv_length, scope.first_row)
    by = block_mask.of_keys if step == "dkv" else block_mask.of_queries
    ids = block_mask.ids_of(scope, lengths[0])
    meetings = by(scope, ids, *lengths, options._replace(q_tile=cut.q_tile, kv_tile=cut.kv_tile))
    rows_alike = len(q_NQD) // len(meetings.end)
    return pl.pallas_call(
        functools.partial(kernel, sizes=sizes, tile_of=tile_of),
        results,
        grid=(num_tiles, len(q_NQD)),
        in_specs=(
            pl.BlockSpec((4,), lambda i, n: (0,)),
            pl.BlockSpec((None, None, 4), lambda i, n: (lax.div(n, rows_alike), tile_of(i), 0)),
            *map(spec, arrays, places),
            jax.tree.map(functools.partial(spec, place="a"), ids),
        ),
        out_specs=tuple(spec(x, "t") for x in results),
        compiler_params=plgpu.CompilerParams(num_warps=cut.num_warps, num_stages=cut.num_stages),
        interpret=interpret,
    )(
        jnp.stack([jnp.asarray(x, jnp.int32) for x in numbers]),
        jnp.stack(meetings, axis=-1),
        *arrays,
        ids,
    )


def _like(x: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, jnp.float32)


def _forward(
    q_NQD: Array,
    k_MKD: Array,
    v_MKD: Array,
    scope: MaskArgs,
    options: StaticArgs,
    *,
    interpret: bool,
) -> tuple[Array, Array]:
    results = (_like(q_NQD), jax.ShapeDtypeStruct(q_NQD.shape[:2], jnp.float32))
    arrays = (q_NQD, k_MKD, v_MKD)
    return _launch("forward", _forward_kernel, arrays, "taa", results, scope, options, interpret)


def _backward(
    q_NQD: Array, k_NKD: Array, v_NKD: Array, dout_NQD: Array, lse_NQ: Array, delta_NQ: Array,
    scope: MaskArgs, options: StaticArgs, *, interpret: bool,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Two kernels, each of which makes the logits again: programs share no sum, so that results repeat to the last bit."""
    # In base 2; a query that sees nothing weighs nothing: exp2(logit - inf) is 0.
    lse_NQ = jnp.where(jnp.isneginf(lse_NQ), jnp.inf, lse_NQ * _LOG2_E)
    arrays = (q_NQD, k_NKD, v_NKD, dout_NQD.astype(q_NQD.dtype), lse_NQ, delta_NQ)
    rest = (scope, options, interpret)
    (dq,) = _launch("dq", _dq_kernel, arrays, "trrttt", (_like(q_NQD),), *rest)
    results = (_like(k_NKD), _like(v_NKD))
    dk, dv = _launch("dkv", _dkv_kernel, arrays, "rttrrr", results, *rest)
    return dq, dk, dv


KERNEL = Kernel(
    functools.partial(_forward, interpret=False), functools.partial(_backward, interpret=False)
)
# The same kernels on any device, slowly: for tests.
INTERPRET_KERNEL = Kernel(
    functools.partial(_forward, interpret=True), functools.partial(_backward, interpret=True)
)

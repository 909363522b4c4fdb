"""Block-causal flash attention for TPU in Pallas: the forward kernel and the two kernels of its gradient.

They follow FlashAttention-2 (Dao 2023), with transposed tiles: a tile of logits is keys x queries. A number per query
(maximum, sum, logsumexp, delta, bound) is then a vector along the register's lanes, stored as [rows, 1, Q]; as a column
it would take 128 copies of itself. Sums over keys add registers and need no rotations within them.

The kernels know one rule: query t sees the keys with an index below `bound_t`, of its own segment where segments are
given. XLA computes the bounds (4 bytes per query) and the range of tiles to compute (block_mask.py). These ranges reach
the scalar core before the kernel starts (scalar prefetch), so all of `MaskArgs` may be traced.

Logits are in base 2 inside the kernels, which saves one multiplication each: log2(e) is part of the scale of q.

Letters of a shape: N rows of queries, M rows of keys, Q and K positions, D channels; t a tile of queries, s of keys.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Bool

from elastic.ops.attention import block_mask
from elastic.ops.attention.base import Kernel, MaskArgs, StaticArgs

_LANES, _INTERPRETED_LANES = 128, 8  # 8 lets tests have several tiles in a short array
_HEAD_DIMS = (32, 256)
_VMEM_BYTES = 15 << 20  # a kernel gets 16 MiB by default, which is all that v4 has
_LOG2_E = math.log2(math.e)
# The logit of a masked pair, and the running maximum's start. Both are finite, so that a query that sees no key gives no
# nan; and exp2(_NEVER - _LOWEST) is 0, so that masked weights need no second mask.
_NEVER, _LOWEST = -1e30, -1e29


def check(head_dim: int, dtype: DTypeLike) -> None:
    """Checks that these kernels can serve a head size and a dtype.

    Raises:
      ValueError: they cannot.
    """
    low, high = _HEAD_DIMS
    if not low <= head_dim <= high or head_dim % 8:
        raise ValueError(
            f"{head_dim=} must be a multiple of 8 from {low} to {high} for attention in Pallas on TPU;"
            " use another number of heads, or implementation='blockwise'."
        )
    if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
        raise ValueError(
            f"dtype={jnp.dtype(dtype).name!r} must be float32 or bfloat16 for attention in Pallas on TPU;"
            " cast q, k and v, or use implementation='blockwise'."
        )


def tiles(
    num_queries: int, num_keys: int, head_dim: int, dtype: DTypeLike, static: StaticArgs, *, interpret: bool = False
) -> tuple[int, int]:  # fmt: skip
    """The q_tile and kv_tile that all three kernels use.

    They are multiples of the lanes (128; 8 when interpreted), at most the padded arrays, and small enough for the VMEM
    that every TPU gives a kernel. With the default limits of 1024 and 512 only float32 gets smaller tiles: 512 x 512,
    and 256 x 512 above 128 channels.

    Args:
      num_queries: length of the array of queries, in tokens.
      num_keys: length of the array of keys, in tokens.
      head_dim: channels of a head.
      dtype: the dtype of queries, keys and values.
      static: its tile sizes are upper limits, in tokens.
      interpret: the kernels run in interpret mode.
    """
    multiple = _INTERPRETED_LANES if interpret else _LANES

    def fit(tile: int, length: int) -> int:
        return min(max(tile // multiple, 1), pl.cdiv(length, multiple)) * multiple

    def vmem_bytes(q_tile: int, kv_tile: int) -> int:
        """An estimate for the kernel that needs most (dk, dv): double-buffered inputs and outputs, sums, and tiles of logits."""
        itemsize = jnp.dtype(dtype).itemsize
        num_logits = 4 if itemsize == 2 else 9  # fitted to the compiler's reports, spills included
        windows = 4 * (q_tile + kv_tile) * itemsize + 4 * kv_tile * 4
        return (windows + 2 * kv_tile * 4) * head_dim + num_logits * q_tile * kv_tile * 4

    q_tile, kv_tile = fit(static.q_tile, num_queries), fit(static.kv_tile, num_keys)
    while vmem_bytes(q_tile, kv_tile) > _VMEM_BYTES:
        if q_tile >= kv_tile:
            q_tile = fit(q_tile // 2, num_queries)
        else:
            kv_tile = fit(kv_tile // 2, num_keys)
    return q_tile, kv_tile


class _Plan(NamedTuple):
    """What the scalar core reads, int32: the tiles to compute, per outer tile, and per batch element where they differ."""

    row_and_end: (
        Any  # [2]: the first row of the keys; how many keys exist (what follows is padding)
    )
    first: Any  # this and the next three: [b * outer], the fields of block_mask.TileRanges
    unmasked: Any
    unmasked_end: Any
    end: Any


def _plan(num_keys: int, mask: MaskArgs, tiles: block_mask.TileRanges) -> _Plan:
    end = jnp.clip(mask.kv_length - mask.kv_start, 0, num_keys)
    row_and_end = jnp.stack([mask.first_row, end]).astype(jnp.int32)
    return _Plan(row_and_end, *(x.reshape(-1) for x in tiles))


class _Step(NamedTuple):
    """What one step of the grid does."""

    outer: Array  # the tile that stays for several steps
    inner: Array  # the tile computed with it; steps without work repeat the last one, so that nothing is fetched
    starts: Array  # first step of the outer tile
    live: Array  # the step computes a tile
    unmasked: Array  # which needs no mask
    last: Array  # last step of the outer tile


# The grid is (rows, pairs of outer tiles, steps). Under a causal mask an early tile has few inner tiles and a late tile
# many. So tile p and the p-th tile from the end share their steps: a grid with one line per tile would spend up to half
# of its steps, each a third of a microsecond, on fully masked tiles. The number of steps is dynamic: the maximum over
# the pairs. Two alternatives fail: a list of all pairs of tiles would exceed scalar memory at half a million tokens on
# one device, and a loop inside the kernel would not prefetch across outer tiles.


def _num_steps(tiles: block_mask.TileRanges) -> Array:
    # A tile without work takes one step too, because it must write its zeros.
    count = jnp.maximum(tiles.end - tiles.first, 1)
    index = jnp.arange(count.shape[1])[None]
    return jnp.max(count + jnp.where(index == index[:, ::-1], 0, count[:, ::-1]))


class _Grid(NamedTuple):
    """What a kernel knows about its grid at compile time."""

    num_outer: int
    rows_per_range: int  # rows with the same tile ranges

    def step(self, n: Array, p: Array, at: Array, plan: _Plan) -> _Step:
        """Step `at` of the p-th pair of outer tiles in row n."""

        def index(tile: Array) -> Array:
            return _quotient(n, self.rows_per_range) * self.num_outer + tile

        def work_of(tile: Array) -> Array:
            return plan.end[index(tile)] - plan.first[index(tile)]

        partner = self.num_outer - 1 - p
        num_first = jnp.maximum(work_of(p), 1)
        in_first = (at < num_first) | (partner == p)
        outer = jnp.where(in_first, p, partner)
        count = jnp.where(in_first, at, at - num_first)
        num_tiles = work_of(outer)
        final = jnp.maximum(num_tiles, 1) - 1
        inner = plan.first[index(outer)] + jnp.minimum(count, final)
        begin, end = plan.unmasked[index(outer)], plan.unmasked_end[index(outer)]
        unmasked = (begin <= inner) & (inner < end)
        return _Step(outer, inner, count == 0, count < num_tiles, unmasked, count == final)


def _quotient(n: Array, divisor: int) -> Array:
    """`n // divisor`. The operator asks the default device for its kind, and compiling ahead of time has no such device."""
    return lax.div(n, jnp.int32(divisor))


def _specs(
    program: "_Program", grid: _Grid, static: StaticArgs, dim: int
) -> dict[str, pl.BlockSpec]:
    """The block of each kind of array that a step reads or writes."""
    q_tile, kv_tile = static.q_tile, static.kv_tile

    def spec(shape: tuple[int, int, int], index: Any) -> pl.BlockSpec:
        def block(n: Array, p: Array, at: Array, *refs: Any):
            plan = _Plan(*refs)
            return index(n, *program.tiles_of(grid.step(n, p, at, plan)), plan.row_and_end[0])

        return pl.BlockSpec(shape, block)

    def batch(n: Array) -> Array:
        return _quotient(n, static.rows_per_batch)

    return {
        "queries": spec((1, q_tile, dim), lambda n, i, j, first_row: (n, i, 0)),
        "numbers": spec((1, 1, q_tile), lambda n, i, j, first_row: (n, 0, i)),
        "keys": spec((1, kv_tile, dim), lambda n, i, j, first_row: (first_row + n, j, 0)),
        "bounds": spec((1, 1, q_tile), lambda n, i, j, first_row: (0, 0, i)),
        "q_ids": spec((1, 1, q_tile), lambda n, i, j, first_row: (batch(n), 0, i)),
        "kv_ids": spec((1, 1, kv_tile), lambda n, i, j, first_row: (batch(n), 0, j)),
    }


def _tiles_by_queries(step: _Step) -> tuple[Array, Array]:
    """The tiles of queries and of keys of a step whose outer tile is one of queries."""
    return step.outer, step.inner


def _tiles_by_keys(step: _Step) -> tuple[Array, Array]:
    """The tiles of queries and of keys of a step whose outer tile is one of keys."""
    return step.inner, step.outer


def _dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """A product summed in float32; float32 operands are not rounded to bfloat16."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    axes = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, axes, precision=precision, preferred_element_type=jnp.float32)


def _seen(j: Array, shape: tuple[int, ...], masks: tuple[Any, ...]) -> Bool[Array, "s t"]:
    """The mask of tile j of the keys; `masks` holds the bounds, and the segment ids if there are any."""
    bound_1t = masks[0][0] - j * shape[0]
    seen_st = lax.broadcasted_iota(jnp.int32, shape, 0) < bound_1t
    if len(masks) > 1:
        q_ids_1t, kv_ids_1s = masks[1][0], masks[2][0]
        # 8 equal rows, because only whole registers can be transposed.
        kv_ids_s1 = jnp.broadcast_to(kv_ids_1s, (8, shape[0])).T[:, :1]
        seen_st &= kv_ids_s1 == q_ids_1t
    return seen_st


def _zero_padding(x_sD: Array, j: Array, plan: _Plan) -> Array:
    """A tile of keys or values with zeros after the last key: padding may hold nan, and nan times a weight of 0 is nan."""
    position = j * x_sD.shape[0] + lax.broadcasted_iota(jnp.int32, x_sD.shape, 0)
    return jnp.where(position < plan.row_and_end[1], x_sD, jnp.zeros_like(x_sD))


def _if_live(step: _Step, body: Any) -> None:
    """Runs `body(masked)` if the step computes a tile. Most tiles are fully visible and need no mask."""
    pl.when(step.live & step.unmasked)(functools.partial(body, False))
    pl.when(step.live & ~step.unmasked)(functools.partial(body, True))


class _Refs(NamedTuple):
    """What a kernel reads and writes."""

    inputs: tuple[Any, ...]  # q, k, v; for gradients dout, logsumexp (base 2) and delta too
    masks: tuple[Any, ...]  # bounds; ids of queries and of keys if there are any
    outputs: tuple[Any, ...]
    scratch: tuple[Any, ...]


def _forward_kernel(step: _Step, plan: _Plan, refs: _Refs) -> None:
    (q, k, v), (out, lse), (top, total, sum_Dt) = refs.inputs, refs.outputs, refs.scratch
    j = step.inner

    def body(masked: bool) -> None:
        v_sD = v[0]
        logits_st = _dot(k[0], q[0], (1, 1))
        if masked:
            logits_st = jnp.where(_seen(j, logits_st.shape, refs.masks), logits_st, _NEVER)
            v_sD = _zero_padding(v_sD, j, plan)
        old_1t = top[...]
        top_1t = jnp.maximum(old_1t, jnp.max(logits_st, axis=0, keepdims=True))
        weights_st = jnp.exp2(logits_st - top_1t)
        rescale_1t = jnp.exp2(old_1t - top_1t)
        top[...] = top_1t
        total[...] = total[...] * rescale_1t + jnp.sum(weights_st, axis=0, keepdims=True)
        sum_Dt[...] = sum_Dt[...] * rescale_1t + _dot(v_sD, weights_st.astype(v_sD.dtype), (0, 0))

    _if_live(step, body)

    @pl.when(step.last)
    def _():
        total_1t = total[...]
        safe_1t = jnp.where(total_1t > 0, total_1t, 1.0)
        out[0] = (sum_Dt[...] / safe_1t).T
        log_1t = (top[...] + jnp.log2(safe_1t)) * (1 / _LOG2_E)
        lse[0] = jnp.where(total_1t > 0, log_1t, -jnp.inf)


def _recompute_tile(refs: _Refs, j: Array, plan: _Plan, masked: bool):
    """For one tile: q, k, dout, the softmax weights [s, t], and the gradient of the logits without their scale."""
    q, k, v, dout, lse, delta = refs.inputs
    q_tD, k_sD, v_sD, dout_tD = q[0], k[0], v[0], dout[0]
    if masked:
        k_sD, v_sD = (_zero_padding(x, j, plan) for x in (k_sD, v_sD))
    weights_st = jnp.exp2(_dot(k_sD, q_tD, (1, 1)) - lse[0])
    if masked:
        weights_st = jnp.where(_seen(j, weights_st.shape, refs.masks), weights_st, 0.0)
    dlogits_st = weights_st * (_dot(v_sD, dout_tD, (1, 1)) - delta[0])
    dtype = q_tD.dtype
    return q_tD, k_sD, dout_tD, weights_st.astype(dtype), dlogits_st.astype(dtype)


def _dq_kernel(step: _Step, plan: _Plan, refs: _Refs) -> None:
    (dq,), (dq_Dt,) = refs.outputs, refs.scratch

    def body(masked: bool) -> None:
        _, k_sD, _, _, dlogits_st = _recompute_tile(refs, step.inner, plan, masked)
        dq_Dt[...] += _dot(k_sD, dlogits_st, (0, 0))

    _if_live(step, body)

    @pl.when(step.last)
    def _():
        dq[0] = (dq_Dt[...] * dq_Dt.shape[0] ** -0.5).T


def _dkv_kernel(step: _Step, plan: _Plan, refs: _Refs) -> None:
    (dk, dv), (dk_sD, dv_sD) = refs.outputs, refs.scratch

    def body(masked: bool) -> None:
        q_tD, _, dout_tD, weights_st, dlogits_st = _recompute_tile(refs, step.outer, plan, masked)
        dv_sD[...] += _dot(weights_st, dout_tD, (1, 0))
        dk_sD[...] += _dot(dlogits_st, q_tD, (1, 0))

    _if_live(step, body)

    @pl.when(step.last)
    def _():
        dk[0] = dk_sD[...] * (1 / _LOG2_E)  # q is scaled for logits in base 2
        dv[0] = dv_sD[...]


class _Program(NamedTuple):
    """A kernel, its arrays and its scratch memory. Letters are sizes: t queries in a tile, s keys in a tile, D channels."""

    kernel: Any
    name: str
    tiles_of: Any
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    scratch: tuple[tuple[str, float], ...]  # shape and initial value
    products: int  # matrix products of queries x keys x channels


_BACKWARD_INPUTS = ("queries", "keys", "keys", "queries", "numbers", "numbers")
_FORWARD = _Program(
    _forward_kernel, "block_causal_attention", _tiles_by_queries,
    ("queries", "keys", "keys"), ("queries", "numbers"), (("1t", _LOWEST), ("1t", 0), ("Dt", 0)), 2,
)  # fmt: skip
_DQ = _Program(
    _dq_kernel, "block_causal_attention_dq", _tiles_by_queries,
    _BACKWARD_INPUTS, ("queries",), (("Dt", 0),), 3,
)  # fmt: skip
_DKV = _Program(
    _dkv_kernel, "block_causal_attention_dkv", _tiles_by_keys,
    _BACKWARD_INPUTS, ("keys", "keys"), (("sD", 0), ("sD", 0)), 4,
)  # fmt: skip


def _run(
    program: _Program, inputs: list[Array], mask: MaskArgs, static: StaticArgs, interpret: bool
) -> Sequence[Array]:
    """Runs a kernel on the grid (rows, pairs of outer tiles, steps); `static` holds the tile sizes in use."""
    (num_rows, num_queries, dim), num_keys = inputs[0].shape, inputs[1].shape[1]
    mask = block_mask.valid_as_segments(mask, num_queries)
    by_keys = program.tiles_of is _tiles_by_keys
    find = block_mask.tile_ranges_of_keys if by_keys else block_mask.tile_ranges_of_queries
    tile_ranges = find(mask, num_queries, num_keys, static)
    num_ranges, num_outer = tile_ranges.end.shape
    plan, grid = _plan(num_keys, mask, tile_ranges), _Grid(num_outer, num_rows // num_ranges)
    bounds = block_mask.seen_until(jnp.arange(num_queries), mask, num_keys, static)
    masks = {"bounds": bounds.astype(jnp.int32)[None, None]}
    if mask.q_segments is not None and mask.kv_segments is not None:
        masks |= {"q_ids": mask.q_segments[:, None], "kv_ids": mask.kv_segments[:, None]}

    def body(*refs: Any) -> None:
        parts, at = [], 0
        for part in (plan, inputs, masks, program.outputs, program.scratch):
            parts.append(refs[at : at + len(part)])
            at += len(part)
        numbers = _Plan(*parts[0])
        step = grid.step(pl.program_id(0), pl.program_id(1), pl.program_id(2), numbers)
        refs = _Refs(*parts[1:])

        @pl.when(step.starts)
        def _():
            for ref, (_, start) in zip(refs.scratch, program.scratch, strict=True):
                ref[...] = jnp.full(ref.shape, start, ref.dtype)

        program.kernel(step, numbers, refs)

    specs = _specs(program, grid, static, dim)
    sizes = {"1": 1, "t": static.q_tile, "s": static.kv_tile, "D": dim}
    scratch = [tuple(sizes[letter] for letter in letters) for letters, _ in program.scratch]
    queries, numbers = (num_rows, num_queries, dim), (num_rows, 1, num_queries)
    shapes = {"queries": queries, "numbers": numbers, "keys": (num_rows, num_keys, dim)}
    num_logits = num_rows * num_queries * num_keys
    return pl.pallas_call(
        body,
        out_shape=[jax.ShapeDtypeStruct(shapes[x], jnp.float32) for x in program.outputs],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(plan),
            grid=(num_rows, pl.cdiv(num_outer, 2), _num_steps(tile_ranges)),
            in_specs=[specs[x] for x in (*program.inputs, *masks)],
            out_specs=[specs[x] for x in program.outputs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        # Where a chip's two cores are one device, they divide the rows, or the pairs of outer tiles of a single row.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        # For XLA's scheduler, which must know that communication can overlap with the kernel. Assumes that all keys are seen.
        cost_estimate=pl.CostEstimate(
            flops=2 * program.products * num_logits * dim,
            transcendentals=num_logits,
            bytes_accessed=4 * num_rows * (num_queries + num_keys) * dim * inputs[0].dtype.itemsize,
        ),
        interpret=interpret,
        name=program.name,
    )(*plan, *inputs, *masks.values())


def _fitted(q_NQD: Array, k_MKD: Array, static: StaticArgs, interpret: bool) -> StaticArgs:
    (_, num_queries, dim), num_keys, dtype = q_NQD.shape, k_MKD.shape[1], q_NQD.dtype
    q_tile, kv_tile = tiles(num_queries, num_keys, dim, dtype, static, interpret=interpret)
    return static._replace(q_tile=q_tile, kv_tile=kv_tile)


def _scaled(q_NQD: Array) -> Array:
    """q scaled for logits in base 2, rounded once: a bfloat16 q times a Python number would round that number too."""
    scale = q_NQD.shape[-1] ** -0.5 * _LOG2_E
    return (q_NQD.astype(jnp.float32) * scale).astype(q_NQD.dtype)


def _forward(
    q_NQD: Array,
    k_MKD: Array,
    v_MKD: Array,
    mask: MaskArgs,
    static: StaticArgs,
    *,
    interpret: bool,
) -> tuple[Array, Array]:
    static = _fitted(q_NQD, k_MKD, static, interpret)
    inputs = [_scaled(q_NQD), k_MKD, v_MKD]
    out, lse = _run(_FORWARD, inputs, mask, static, interpret)
    return out, lse[:, 0]


def _backward(
    q_NQD: Array, k_NKD: Array, v_NKD: Array, dout_NQD: Array, lse_NQ: Array, delta_NQ: Array,
    mask: MaskArgs, static: StaticArgs, *, interpret: bool,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Two kernels that both recompute the logits.

    A single kernel would save two of seven products. But it would add dq (or dk and dv) to HBM tile by tile, in steps
    whose reads and writes overlap.
    """
    static, num_queries = _fitted(q_NQD, k_NKD, static, interpret), q_NQD.shape[1]
    # Queries are padded, unlike keys, because the gradients of keys sum over queries. Padding gets weights 0, as queries
    # that see no key do: exp2(x - inf) is 0.
    padding = -num_queries % static.q_tile

    def padded(x: Array, value: float = 0.0) -> Array:
        widths = ((0, 0), (0, padding), *((0, 0),) * (x.ndim - 2))
        return jnp.pad(x, widths, constant_values=value) if padding else x

    lse_NQ = padded(jnp.where(jnp.isneginf(lse_NQ), jnp.inf, lse_NQ) * _LOG2_E, jnp.inf)
    delta_NQ = padded(delta_NQ)
    q_NQD, dout_NQD = padded(_scaled(q_NQD)), padded(dout_NQD.astype(q_NQD.dtype))
    inputs = [q_NQD, k_NKD, v_NKD, dout_NQD, lse_NQ[:, None], delta_NQ[:, None]]
    (dq,) = _run(_DQ, inputs, mask, static, interpret)
    dk, dv = _run(_DKV, inputs, mask, static, interpret)
    return dq[:, :num_queries], dk, dv


# The second is the same source in interpret mode, for tests without a TPU.
KERNEL, INTERPRET_KERNEL = (
    Kernel(functools.partial(_forward, interpret=x), functools.partial(_backward, interpret=x))
    for x in (False, True)
)

"""Block-causal attention in XLA: tiles with an online softmax (Milakov and Gimelshein 2018; FlashAttention-2), and its own gradient.

Works row by row, a row being one head of one batch element, because XLA:CPU runs plain 2-D products fast and batched
ones slowly. Tiles that the mask rules out are never visited, and tiles that it does not touch are not masked.
Shapes below: N rows of queries, M rows of keys, Q and K positions, D channels; t marks a tile.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool

from elastic.ops import bf16_bits
from elastic.ops.attention import block_mask
from elastic.ops.attention.base import Kernel, MaskArgs, StaticArgs
from elastic.ops.dense import dot, transposed_in_memory

_NEVER = -1e30  # finite, so that a fully masked row gives no nan on its way to 0
_SHORTEST = (
    256  # numbers of queries and keys: below, products slow down by more than what is not computed
)


def tiles(num_queries: int, num_keys: int, options: StaticArgs) -> tuple[int, int]:
    """Queries and keys in a tile: no more than asked for, than there are, and than a block, beyond which nothing is seen."""
    block = max(options.block_size, _SHORTEST)
    return min(options.q_tile, num_queries, block), min(options.kv_tile, num_keys, block)


def _padded(
    q_NQD: Array, k_MKD: Array, scope: MaskArgs, options: StaticArgs
) -> tuple[Array, MaskArgs, StaticArgs]:
    """The tiles in use, and queries that fill theirs."""
    length = q_NQD.shape[1]
    q_tile, kv_tile = tiles(length, k_MKD.shape[1], options)
    options = options._replace(q_tile=q_tile, kv_tile=kv_tile)
    padding = -length % options.q_tile
    if padding:
        q_NQD = _pad_rows(q_NQD, padding)
        if scope.q_segments is not None:
            widths = ((0, 0), (0, padding))
            scope = scope._replace(q_segments=jnp.pad(scope.q_segments, widths, mode="edge"))
    return q_NQD, scope, options


def _scaled(q: Array) -> Array:
    """q / sqrt(D), rounded once: the factor itself has no exact bfloat16 for every D."""
    return (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)


def _pad_rows(x: Array, padding: int, value: float = 0.0) -> Array:
    widths = ((0, 0), (0, padding), *((0, 0),) * (x.ndim - 2))
    return jnp.pad(x, widths, constant_values=value)


def _forward(
    q_NQD: Array, k_MKD: Array, v_MKD: Array, scope: MaskArgs, options: StaticArgs
) -> tuple[Array, Array]:
    num_queries = q_NQD.shape[1]
    q_NQD, scope, options = _padded(q_NQD, k_MKD, scope, options)
    num_rows, length, dim = q_NQD.shape
    q_tile = options.q_tile
    q_NQD = _scaled(q_NQD)
    ids = block_mask.ids_of(scope, length)
    meetings = block_mask.of_queries(scope, ids, length, k_MKD.shape[1], options)

    def one_tile(n: Array, i: Array, q_tD: Array) -> tuple[Array, Array]:
        row = scope.first_row + n

        def visit(
            j: Array, carry: tuple[Array, Array, Array], masked: bool
        ) -> tuple[Array, Array, Array]:
            top_t, total_t, out_tD = carry
            start = _tile_start(j, k_MKD, options)
            k_sD, v_sD = (
                _tile(k_MKD, row, start, options.kv_tile),
                _tile(v_MKD, row, start, options.kv_tile),
            )
            logits_ts = dot(q_tD, k_sD, (1, 1))
            if masked:
                seen_ts = _seen(n, i, j, k_MKD, scope, ids, options)
                logits_ts = jnp.where(seen_ts, logits_ts, _NEVER)
            new_top_t = jnp.maximum(top_t, jnp.max(logits_ts, axis=-1))
            weights_ts = jnp.exp(logits_ts - new_top_t[:, None])
            if masked:
                weights_ts = jnp.where(seen_ts, weights_ts, 0.0)
            rescale_t = jnp.exp(top_t - new_top_t)
            total_t = total_t * rescale_t + jnp.sum(weights_ts, axis=-1)
            out_tD = out_tD * rescale_t[:, None] + dot(weights_ts.astype(v_sD.dtype), v_sD)
            return new_top_t, total_t, out_tD

        carry = (jnp.full(q_tile, _NEVER), jnp.zeros(q_tile), jnp.zeros((q_tile, dim)))
        top_t, total_t, out_tD = meetings.at(n // options.rows_per_batch, i).fold(visit, carry)
        safe_t = jnp.where(total_t > 0, total_t, 1.0)
        return out_tD / safe_t[:, None], jnp.where(total_t > 0, top_t + jnp.log(safe_t), -jnp.inf)

    num_q_tiles = length // q_tile
    tiles = q_NQD.reshape(num_rows * num_q_tiles, q_tile, dim)
    index = jnp.arange(num_rows * num_q_tiles)
    out, lse = lax.map(
        lambda item: one_tile(item[0] // num_q_tiles, item[0] % num_q_tiles, item[1]),
        (index, tiles),
    )
    out, lse = out.reshape(num_rows, length, dim), lse.reshape(num_rows, length)
    return out[:, :num_queries], lse[:, :num_queries]


def _backward(
    q_NQD: Array,
    k_NKD: Array,
    v_NKD: Array,
    dout_NQD: Array,
    lse_NQ: Array,
    delta_NQ: Array,
    scope: MaskArgs,
    options: StaticArgs,
) -> tuple[Array, Array, Array]:
    """One visit per tile: logits are made again, transposed, so that four of the five products have fast layouts."""
    num_queries, dtype = q_NQD.shape[1], q_NQD.dtype
    scale = q_NQD.shape[-1] ** -0.5
    q_NQD, scope, options = _padded(q_NQD, k_NKD, scope, options)
    padding, dim = q_NQD.shape[1] - num_queries, q_NQD.shape[-1]
    # A query that sees nothing weighs nothing: exp(logit - inf) is 0.
    lse_NQ = jnp.where(jnp.isneginf(lse_NQ), jnp.inf, lse_NQ)
    dout_NQD, delta_NQ = (_pad_rows(x, padding) for x in (dout_NQD, delta_NQ))
    lse_NQ = _pad_rows(lse_NQ, padding, jnp.inf)
    num_q_tiles = q_NQD.shape[1] // options.q_tile
    ids = block_mask.ids_of(scope, q_NQD.shape[1])
    meetings = block_mask.of_queries(scope, ids, q_NQD.shape[1], k_NKD.shape[1], options)

    def one_row(item):
        n, q_QD, k_KD, v_KD, dout_QD, lse_Q, delta_Q = item
        q_QD = _scaled(q_QD)
        dout_QD = dout_QD.astype(dtype)

        def q_step(i: Array, grads: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            at = i * options.q_tile
            q_tD, dout_tD = (
                lax.dynamic_slice_in_dim(x, at, options.q_tile) for x in (q_QD, dout_QD)
            )
            lse_t, delta_t = (
                lax.dynamic_slice_in_dim(x, at, options.q_tile) for x in (lse_Q, delta_Q)
            )

            def visit(
                j: Array, carry: tuple[Array, Array, Array], masked: bool
            ) -> tuple[Array, Array, Array]:
                dq_tD, dk_KD, dv_KD = carry
                start = _tile_start(j, k_NKD, options)
                k_sD, v_sD = (
                    lax.dynamic_slice_in_dim(x, start, options.kv_tile) for x in (k_KD, v_KD)
                )
                logits_st = dot(k_sD, q_tD, (1, 1))
                weights_st = jnp.exp(logits_st - lse_t[None, :])
                if masked:
                    seen_ts = _seen(n, i, j, k_NKD, scope, ids, options)
                    weights_st = jnp.where(seen_ts.T, weights_st, 0.0)
                dweights_st = dot(v_sD, dout_tD, (1, 1))
                dlogits_st = (weights_st * (dweights_st - delta_t[None, :])).astype(dtype)
                dq_tD = dq_tD + dot(transposed_in_memory(dlogits_st), k_sD)
                dk_KD = _add_tile(dk_KD, start, dot(dlogits_st, q_tD))
                dv_KD = _add_tile(dv_KD, start, dot(weights_st.astype(dtype), dout_tD))
                return dq_tD, dk_KD, dv_KD

            dq_QD, dk_KD, dv_KD = grads
            carry = (jnp.zeros((options.q_tile, dim)), dk_KD, dv_KD)
            dq_tD, dk_KD, dv_KD = meetings.at(n // options.rows_per_batch, i).fold(visit, carry)
            return lax.dynamic_update_slice_in_dim(dq_QD, dq_tD * scale, at, 0), dk_KD, dv_KD

        zeros = (jnp.zeros(q_QD.shape), jnp.zeros(k_KD.shape), jnp.zeros(v_KD.shape))
        return lax.fori_loop(0, num_q_tiles, q_step, zeros)

    rows = (jnp.arange(len(q_NQD)), q_NQD, k_NKD, v_NKD, dout_NQD, lse_NQ, delta_NQ)
    dq, dk, dv = lax.map(one_row, rows)
    return dq[:, :num_queries], dk, dv


KERNEL = Kernel(_forward, _backward)


def _tile_start(j: Array, keys: Array, options: StaticArgs) -> Array:
    """Where tile j of the keys begins. The last one moves back to end with the keys, and `_seen` hides what it reads twice."""
    return jnp.minimum(j * options.kv_tile, keys.shape[1] - options.kv_tile)


def _seen(
    n: Array, i: Array, j: Array, keys: Array, scope: MaskArgs, ids: block_mask.SegmentIds | None, options: StaticArgs
) -> Bool[Array, "t s"]:  # fmt: skip
    """The mask of one tile of logits."""
    at, start = i * options.q_tile, _tile_start(j, keys, options)
    kv_position = start + jnp.arange(options.kv_tile)
    until = block_mask.seen_until(at + jnp.arange(options.q_tile), scope, keys.shape[1], options)
    seen = (kv_position[None, :] < until[:, None]) & (kv_position >= j * options.kv_tile)[None, :]
    if ids is not None:
        batch = n // options.rows_per_batch
        q_ids = lax.dynamic_slice(ids.queries, (batch, at), (1, options.q_tile))[0]
        kv_ids = lax.dynamic_slice(ids.keys, (batch, start), (1, options.kv_tile))[0]
        seen &= q_ids[:, None] == kv_ids[None, :]
    return seen


def _tile(keys: Array, row: Array, start: Array, size: int) -> Array:
    at, shape = (row, start, jnp.zeros_like(start)), (1, size, keys.shape[-1])
    return bf16_bits.from_bits(lax.dynamic_slice(keys, at, shape)[0])


def _add_tile(x: Array, start: Array, tile: Array) -> Array:
    old = lax.dynamic_slice_in_dim(x, start, tile.shape[0])
    return lax.dynamic_update_slice_in_dim(x, old + tile, start, 0)

"""Block-causal attention in XLA: tiles with an online softmax (Milakov and Gimelshein 2018; FlashAttention-2, Dao 2023).

The gradient is written by hand, as algorithm 2 of FlashAttention-2. The code loops over rows (a row is one head of one
batch element), because XLA:CPU runs 2-D products fast and batched ones slowly. Tiles that are masked entirely are not
computed, and fully visible tiles are not masked.

Letters of a shape: N rows of queries, M rows of keys, Q and K positions, D channels; t a tile of queries, s of keys.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool

from elastic.ops import bf16_bits
from elastic.ops.attention import block_mask
from elastic.ops.attention.base import Kernel, MaskArgs, StaticArgs
from elastic.ops.dense import dot, transposed_in_memory

_NEVER = -1e30  # the logit of a masked pair; finite, so that a fully masked row gives 0 and no nan
# The smallest limit on a tile. Shorter tiles skip more masked pairs, but their products lose more speed than that saves.
_SHORTEST = 256


def tiles(num_queries: int, num_keys: int, static: StaticArgs) -> tuple[int, int]:
    """Queries and keys in a tile.

    A tile is at most what `static` allows, the length of the array, and a block (but at least 256): the mask changes
    at the ends of blocks only.
    """
    block = max(static.block_size, _SHORTEST)
    return min(static.q_tile, num_queries, block), min(static.kv_tile, num_keys, block)


def _padded(
    q_NQD: Array, k_MKD: Array, mask: MaskArgs, static: StaticArgs
) -> tuple[Array, MaskArgs, StaticArgs]:
    """Queries padded to whole tiles, the mask of the padded queries, and the tile sizes in use."""
    length = q_NQD.shape[1]
    q_tile, kv_tile = tiles(length, k_MKD.shape[1], static)
    static = static._replace(q_tile=q_tile, kv_tile=kv_tile)
    padding = -length % static.q_tile
    if padding:
        q_NQD = _pad_rows(q_NQD, padding)
        if mask.q_segments is not None:
            widths = ((0, 0), (0, padding))
            mask = mask._replace(q_segments=jnp.pad(mask.q_segments, widths, mode="edge"))
    return q_NQD, mask, static


def _scaled(q: Array) -> Array:
    """q / sqrt(D), rounded once: the factor itself has no exact bfloat16 for every D."""
    return (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)


def _pad_rows(x: Array, padding: int, value: float = 0.0) -> Array:
    widths = ((0, 0), (0, padding), *((0, 0),) * (x.ndim - 2))
    return jnp.pad(x, widths, constant_values=value)


def _forward(
    q_NQD: Array, k_MKD: Array, v_MKD: Array, mask: MaskArgs, static: StaticArgs
) -> tuple[Array, Array]:
    num_queries = q_NQD.shape[1]
    q_NQD, mask, static = _padded(q_NQD, k_MKD, mask, static)
    num_rows, length, dim = q_NQD.shape
    q_tile = static.q_tile
    q_NQD = _scaled(q_NQD)
    mask = block_mask.valid_as_segments(mask, length)
    tile_ranges = block_mask.tile_ranges_of_queries(mask, length, k_MKD.shape[1], static)

    def one_tile(n: Array, i: Array, q_tD: Array) -> tuple[Array, Array]:
        row = mask.first_row + n

        def body(
            j: Array, carry: tuple[Array, Array, Array], masked: bool
        ) -> tuple[Array, Array, Array]:
            top_t, total_t, out_tD = carry
            start = _tile_start(j, k_MKD, static)
            k_sD, v_sD = (
                _tile(k_MKD, row, start, static.kv_tile),
                _tile(v_MKD, row, start, static.kv_tile),
            )
            logits_ts = dot(q_tD, k_sD, (1, 1))
            if masked:
                seen_ts = _seen(n, i, j, k_MKD, mask, static)
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
        top_t, total_t, out_tD = tile_ranges.at(n // static.rows_per_batch, i).fold(body, carry)
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
    mask: MaskArgs,
    static: StaticArgs,
) -> tuple[Array, Array, Array]:
    """Computes each tile once, with its logits recomputed and transposed: four of the five products then have fast layouts."""
    num_queries, dtype = q_NQD.shape[1], q_NQD.dtype
    scale = q_NQD.shape[-1] ** -0.5
    q_NQD, mask, static = _padded(q_NQD, k_NKD, mask, static)
    padding, dim = q_NQD.shape[1] - num_queries, q_NQD.shape[-1]
    # A query that sees no key then has weights 0: exp(logit - inf) is 0.
    lse_NQ = jnp.where(jnp.isneginf(lse_NQ), jnp.inf, lse_NQ)
    dout_NQD, delta_NQ = (_pad_rows(x, padding) for x in (dout_NQD, delta_NQ))
    lse_NQ = _pad_rows(lse_NQ, padding, jnp.inf)
    num_q_tiles = q_NQD.shape[1] // static.q_tile
    mask = block_mask.valid_as_segments(mask, q_NQD.shape[1])
    tile_ranges = block_mask.tile_ranges_of_queries(mask, q_NQD.shape[1], k_NKD.shape[1], static)

    def one_row(item):
        n, q_QD, k_KD, v_KD, dout_QD, lse_Q, delta_Q = item
        q_QD = _scaled(q_QD)
        dout_QD = dout_QD.astype(dtype)

        def q_step(i: Array, grads: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            at = i * static.q_tile
            q_tD, dout_tD = (
                lax.dynamic_slice_in_dim(x, at, static.q_tile) for x in (q_QD, dout_QD)
            )
            lse_t, delta_t = (
                lax.dynamic_slice_in_dim(x, at, static.q_tile) for x in (lse_Q, delta_Q)
            )

            def body(
                j: Array, carry: tuple[Array, Array, Array], masked: bool
            ) -> tuple[Array, Array, Array]:
                dq_tD, dk_KD, dv_KD = carry
                start = _tile_start(j, k_NKD, static)
                k_sD, v_sD = (
                    lax.dynamic_slice_in_dim(x, start, static.kv_tile) for x in (k_KD, v_KD)
                )
                logits_st = dot(k_sD, q_tD, (1, 1))
                weights_st = jnp.exp(logits_st - lse_t[None, :])
                if masked:
                    seen_ts = _seen(n, i, j, k_NKD, mask, static)
                    weights_st = jnp.where(seen_ts.T, weights_st, 0.0)
                dweights_st = dot(v_sD, dout_tD, (1, 1))
                dlogits_st = (weights_st * (dweights_st - delta_t[None, :])).astype(dtype)
                dq_tD = dq_tD + dot(transposed_in_memory(dlogits_st), k_sD)
                dk_KD = _add_tile(dk_KD, start, dot(dlogits_st, q_tD))
                dv_KD = _add_tile(dv_KD, start, dot(weights_st.astype(dtype), dout_tD))
                return dq_tD, dk_KD, dv_KD

            dq_QD, dk_KD, dv_KD = grads
            carry = (jnp.zeros((static.q_tile, dim)), dk_KD, dv_KD)
            dq_tD, dk_KD, dv_KD = tile_ranges.at(n // static.rows_per_batch, i).fold(body, carry)
            return lax.dynamic_update_slice_in_dim(dq_QD, dq_tD * scale, at, 0), dk_KD, dv_KD

        zeros = (jnp.zeros(q_QD.shape), jnp.zeros(k_KD.shape), jnp.zeros(v_KD.shape))
        return lax.fori_loop(0, num_q_tiles, q_step, zeros)

    rows = (jnp.arange(len(q_NQD)), q_NQD, k_NKD, v_NKD, dout_NQD, lse_NQ, delta_NQ)
    dq, dk, dv = lax.map(one_row, rows)
    return dq[:, :num_queries], dk, dv


KERNEL = Kernel(_forward, _backward)


def _tile_start(j: Array, keys: Array, static: StaticArgs) -> Array:
    """Where tile j of the keys begins. The last tile moves back so that it ends with the keys; `_seen` hides the keys read twice."""
    return jnp.minimum(j * static.kv_tile, keys.shape[1] - static.kv_tile)


def _seen(
    n: Array, i: Array, j: Array, keys: Array, mask: MaskArgs, static: StaticArgs
) -> Bool[Array, "t s"]:  # fmt: skip
    """Which keys of tile j each query of tile i sees, in row n; `mask` comes from `valid_as_segments`."""
    at, start = i * static.q_tile, _tile_start(j, keys, static)
    kv_position = start + jnp.arange(static.kv_tile)
    until = block_mask.seen_until(at + jnp.arange(static.q_tile), mask, keys.shape[1], static)
    seen = (kv_position[None, :] < until[:, None]) & (kv_position >= j * static.kv_tile)[None, :]
    if mask.q_segments is not None and mask.kv_segments is not None:
        batch = n // static.rows_per_batch
        q_ids = lax.dynamic_slice(mask.q_segments, (batch, at), (1, static.q_tile))[0]
        kv_ids = lax.dynamic_slice(mask.kv_segments, (batch, start), (1, static.kv_tile))[0]
        seen &= q_ids[:, None] == kv_ids[None, :]
    return seen


def _tile(keys: Array, row: Array, start: Array, size: int) -> Array:
    at, shape = (row, start, jnp.zeros_like(start)), (1, size, keys.shape[-1])
    return bf16_bits.from_bits(lax.dynamic_slice(keys, at, shape)[0])


def _add_tile(x: Array, start: Array, tile: Array) -> Array:
    old = lax.dynamic_slice_in_dim(x, start, tile.shape[0])
    return lax.dynamic_update_slice_in_dim(x, old + tile, start, 0)

"""Which tiles of queries and of keys meet, so that a kernel visits no others, and which of these need no mask.

Nothing here is larger than the number of tiles squared. What is found is exact for the rule of blocks, and for segments whose ids ascend
along the sequence, as packing numbers them; else a tile may be visited in vain, and masked.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from elastic.ops.attention.base import MaskArgs, StaticArgs

HIDDEN_SEGMENT = -(2**31)  # the id of a key that nobody sees: no id of a segment in use
_LARGEST = 2**31 - 1


class SegmentIds(NamedTuple):
    """A query sees only keys of its own id. Hidden keys have one of their own, so that one comparison tells both."""

    queries: Int[Array, "b Q"]
    keys: Int[Array, "b K"]


class TileRanges(NamedTuple):
    """For each tile of one side, the tiles of the other that it meets: from `first` to before `end`.

    Those from `plain` to before `plain_end`, within these, are seen whole by all. One line for all batch elements where there are no ids.
    """

    first: Int[Array, "b tiles"]
    plain: Int[Array, "b tiles"]
    plain_end: Int[Array, "b tiles"]
    end: Int[Array, "b tiles"]

    def at(self, b: Array, tile: Array) -> "TileRanges":
        """The four numbers of one tile."""
        b = b if len(self.end) > 1 else jnp.zeros_like(b)
        return TileRanges(*(x[b, tile] for x in self))

    def fold(self, visit: Callable[..., Any], carry: Any) -> Any:
        """`carry = visit(tile, carry, masked=...)` for every tile that one tile meets, whose four numbers these are."""
        before = self.plain - self.first
        num_masked = before + self.end - self.plain_end

        def plain(tile: Array, carry: Any) -> Any:
            return visit(tile, carry, masked=False)

        def masked(t: Array, carry: Any) -> Any:
            tile = jnp.where(t < before, self.first + t, self.plain_end + t - before)
            return visit(tile, carry, masked=True)

        carry = lax.fori_loop(self.plain, self.plain_end, plain, carry)
        return lax.fori_loop(0, num_masked, masked, carry)


def ids_of(scope: MaskArgs, num_queries: int) -> SegmentIds | None:
    """None where every key may be seen, as far as segments and hidden keys go."""
    q_ids, kv_ids = scope.q_segments, scope.kv_segments
    if q_ids is None or kv_ids is None:
        if scope.valid is None:
            return None
        q_ids = jnp.zeros((len(scope.valid), num_queries), jnp.int32)
        kv_ids = jnp.zeros(scope.valid.shape, jnp.int32)
    q_ids, kv_ids = q_ids.astype(jnp.int32), kv_ids.astype(jnp.int32)
    return SegmentIds(
        q_ids, kv_ids if scope.valid is None else jnp.where(scope.valid, kv_ids, HIDDEN_SEGMENT)
    )


def of_queries(
    scope: MaskArgs, ids: SegmentIds | None, num_queries: int, num_keys: int, options: StaticArgs
) -> TileRanges:
    """The tiles of keys that each tile of queries meets; `ids` are those of the scope."""
    return _ranges(*_meetings(scope, ids, num_queries, num_keys, options))


def of_keys(
    scope: MaskArgs, ids: SegmentIds | None, num_queries: int, num_keys: int, options: StaticArgs
) -> TileRanges:
    """The tiles of queries that each tile of keys meets; `ids` are those of the scope."""
    meet, plain = _meetings(scope, ids, num_queries, num_keys, options)
    return _ranges(meet.swapaxes(1, 2), plain.swapaxes(1, 2))


def seen_until(
    query: Int[Array, "*n"], scope: MaskArgs, num_keys: int, options: StaticArgs
) -> Int[Array, "*n"]:
    """The first key that a query does not see, by the rule of blocks; both count from the start of their arrays."""
    block = options.block_size
    until = ((scope.q_start + query) // block + 1) * block
    return jnp.clip(jnp.minimum(until, scope.kv_length) - scope.kv_start, 0, num_keys)


def any_meet(q_ids: Int[Array, "b Q"], kv_ids: Int[Array, "b K"]) -> Bool[Array, ""]:
    """Whether any query may see any key, as far as ids tell: never False where one does."""
    return jnp.any(_overlap(_span(q_ids, q_ids.shape[1]), _span(kv_ids, kv_ids.shape[1])))


def _meetings(
    scope: MaskArgs, ids: SegmentIds | None, num_queries: int, num_keys: int, options: StaticArgs
) -> tuple[Bool[Array, "b i j"], Bool[Array, "b i j"]]:
    """Of tiles i of queries and j of keys: whether they meet, and whether each query sees each key."""
    q_tile, kv_tile = options.q_tile, options.kv_tile
    first = jnp.arange(0, num_queries, q_tile)
    last = jnp.minimum(first + q_tile, num_queries) - 1
    begin = jnp.arange(0, num_keys, kv_tile)[None, None, :]
    meet = begin < seen_until(last, scope, num_keys, options)[None, :, None]
    plain = begin + kv_tile <= seen_until(first, scope, num_keys, options)[None, :, None]
    if ids is None:
        return meet, plain
    queries, keys = _span(ids.queries, q_tile), _span(ids.keys, kv_tile)
    # Four equal numbers. With a hidden key among them the smallest is its id, which no query has.
    alike = _of_pairs(queries.low, keys.least) & _of_pairs(queries.high, keys.high)
    alike &= (queries.low == queries.high)[:, :, None]
    return meet & _overlap(queries, keys), plain & alike


class _Span(NamedTuple):
    """The smallest and the largest id of each tile [b, tiles], and the smallest with those of hidden keys."""

    low: Array
    high: Array
    least: Array


def _span(ids: Int[Array, "b n"], tile: int) -> _Span:
    padding = -ids.shape[1] % tile
    tiles = jnp.pad(ids, ((0, 0), (0, padding)), mode="edge").reshape(len(ids), -1, tile)
    shown = jnp.where(tiles == HIDDEN_SEGMENT, _LARGEST, tiles)
    return _Span(shown.min(axis=-1), tiles.max(axis=-1), tiles.min(axis=-1))


def _overlap(queries: _Span, keys: _Span) -> Bool[Array, "b i j"]:
    below = queries.low[:, :, None] <= keys.high[:, None, :]
    return below & (keys.low[:, None, :] <= queries.high[:, :, None])


def _of_pairs(a: Int[Array, "b i"], b: Int[Array, "b j"]) -> Bool[Array, "b i j"]:
    return a[:, :, None] == b[:, None, :]


def _ranges(meet: Bool[Array, "b i j"], plain: Bool[Array, "b i j"]) -> TileRanges:
    """Along the last axis; of several runs of plain ones the first."""
    size = meet.shape[-1]
    index = jnp.arange(size)[None, None, :]
    first, begin = (jnp.argmax(x, axis=-1) for x in (meet, plain))
    end = jnp.max(jnp.where(meet, index + 1, 0), axis=-1)
    begin = jnp.where(plain.any(axis=-1), begin, first)
    broken = ~plain & (index >= begin[..., None])
    until = jnp.min(jnp.where(broken, index, size), axis=-1)
    return TileRanges(*(x.astype(jnp.int32) for x in (first, begin, until, end)))


def visible(
    q_position: Int[Array, "q"], kv_position: Int[Array, "k"], *, block_size: int
) -> Bool[Array, "q k"]:
    """The block-causal rule for a tile of positions: a token sees its own block and earlier ones.

    Dense over its arguments: call it with a tile, or in the reference implementation.
    """
    return (kv_position // block_size)[None, :] <= (q_position // block_size)[:, None]

"""Block-sparse structure of the mask: which tiles a kernel must compute, and which of these need no masking.

Memory is at most the number of tiles squared. The result is exact for the block-causal rule, and for segment ids that
ascend along the sequence, as packing numbers them. For other ids a kernel may compute a tile that is masked entirely.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from elastic.ops.attention.base import MaskArgs, StaticArgs

HIDDEN_SEGMENT = -(2**31)  # the segment id of hidden keys; no segment in use has it
_LARGEST = 2**31 - 1


class TileRanges(NamedTuple):
    """For each tile of one side (queries or keys), the tiles of the other side that it must be computed with.

    Those are the tiles in [first, end). Tiles in [unmasked, unmasked_end), a part of this range, are fully visible and
    need no mask. Without segment ids the batch axis is 1.
    """

    first: Int[Array, "b tiles"]
    unmasked: Int[Array, "b tiles"]
    unmasked_end: Int[Array, "b tiles"]
    end: Int[Array, "b tiles"]

    def at(self, b: Array, tile: Array) -> "TileRanges":
        """The four numbers of one tile of batch element b."""
        b = b if len(self.end) > 1 else jnp.zeros_like(b)
        return TileRanges(*(x[b, tile] for x in self))

    def fold(self, body: Callable[..., Any], carry: Any) -> Any:
        """`carry = body(tile, carry, masked=...)` for every tile in the range of one tile; call it on what `at` gives."""
        before = self.unmasked - self.first
        num_masked = before + self.end - self.unmasked_end

        def unmasked(tile: Array, carry: Any) -> Any:
            return body(tile, carry, masked=False)

        def masked(t: Array, carry: Any) -> Any:
            tile = jnp.where(t < before, self.first + t, self.unmasked_end + t - before)
            return body(tile, carry, masked=True)

        carry = lax.fori_loop(self.unmasked, self.unmasked_end, unmasked, carry)
        return lax.fori_loop(0, num_masked, masked, carry)


def valid_as_segments(mask: MaskArgs, num_queries: int) -> MaskArgs:
    """The same mask with hidden keys in a segment of their own, so that comparing segment ids is enough.

    `valid` is None in the result. Segment ids are int32, or None where neither segments nor hidden keys are given.
    """
    q_ids, kv_ids, valid = mask.q_segments, mask.kv_segments, mask.valid
    if q_ids is None or kv_ids is None:
        if valid is None:
            return mask._replace(q_segments=None, kv_segments=None)
        q_ids = jnp.zeros((len(valid), num_queries), jnp.int32)
        kv_ids = jnp.zeros(valid.shape, jnp.int32)
    q_ids, kv_ids = q_ids.astype(jnp.int32), kv_ids.astype(jnp.int32)
    if valid is not None:
        kv_ids = jnp.where(valid, kv_ids, HIDDEN_SEGMENT)
    return mask._replace(q_segments=q_ids, kv_segments=kv_ids, valid=None)


def tile_ranges_of_queries(
    mask: MaskArgs, num_queries: int, num_keys: int, static: StaticArgs
) -> TileRanges:
    """For each tile of queries, the tiles of keys to compute.

    Args:
      mask: what each query may see.
      num_queries: length of the array of queries, in tokens.
      num_keys: length of the array of keys, in tokens.
      static: block size and tile sizes, in tokens.
    """
    return _ranges(*_tile_pairs(mask, num_queries, num_keys, static))


def tile_ranges_of_keys(
    mask: MaskArgs, num_queries: int, num_keys: int, static: StaticArgs
) -> TileRanges:
    """For each tile of keys, the tiles of queries to compute. Arguments as in `tile_ranges_of_queries`."""
    needed, unmasked = _tile_pairs(mask, num_queries, num_keys, static)
    return _ranges(needed.swapaxes(1, 2), unmasked.swapaxes(1, 2))


def seen_until(
    query: Int[Array, "*n"], mask: MaskArgs, num_keys: int, static: StaticArgs
) -> Int[Array, "*n"]:
    """The index of the first key that a query does not see by the block-causal rule and `kv_length`.

    Args:
      query: indices of queries, counted from the start of their array.
      mask: where queries and keys begin, and how many keys there are.
      num_keys: length of the array of keys, in tokens; indices of keys count from its start.
      static: block size, in tokens.
    """
    block = static.block_size
    until = ((mask.q_start + query) // block + 1) * block
    return jnp.clip(jnp.minimum(until, mask.kv_length) - mask.kv_start, 0, num_keys)


def any_visible(q_ids: Int[Array, "b Q"], kv_ids: Int[Array, "b K"]) -> Bool[Array, ""]:
    """Whether any query may see any key by their segment ids; may be True where none does, never False where one does."""
    return jnp.any(_overlap(_id_range(q_ids, q_ids.shape[1]), _id_range(kv_ids, kv_ids.shape[1])))


def _tile_pairs(
    mask: MaskArgs, num_queries: int, num_keys: int, static: StaticArgs
) -> tuple[Bool[Array, "b i j"], Bool[Array, "b i j"]]:
    """For tile i of the queries and j of the keys: whether some query sees some key, and whether all see all."""
    mask = valid_as_segments(mask, num_queries)
    q_tile, kv_tile = static.q_tile, static.kv_tile
    first = jnp.arange(0, num_queries, q_tile)
    last = jnp.minimum(first + q_tile, num_queries) - 1
    begin = jnp.arange(0, num_keys, kv_tile)[None, None, :]
    needed = begin < seen_until(last, mask, num_keys, static)[None, :, None]
    unmasked = begin + kv_tile <= seen_until(first, mask, num_keys, static)[None, :, None]
    if mask.q_segments is None or mask.kv_segments is None:
        return needed, unmasked
    queries, keys = _id_range(mask.q_segments, q_tile), _id_range(mask.kv_segments, kv_tile)
    # All ids are the same if the four extremes are equal. A hidden key would make `least` its id, which no query has.
    same = _equal_pairs(queries.low, keys.least) & _equal_pairs(queries.high, keys.high)
    same &= (queries.low == queries.high)[:, :, None]
    return needed & _overlap(queries, keys), unmasked & same


class _IdRange(NamedTuple):
    """Per tile [b, tiles]: the smallest and largest id of keys that are not hidden, and the smallest id of all."""

    low: Array
    high: Array
    least: Array


def _id_range(ids: Int[Array, "b n"], tile: int) -> _IdRange:
    padding = -ids.shape[1] % tile
    tiles = jnp.pad(ids, ((0, 0), (0, padding)), mode="edge").reshape(len(ids), -1, tile)
    not_hidden = jnp.where(tiles == HIDDEN_SEGMENT, _LARGEST, tiles)
    return _IdRange(not_hidden.min(axis=-1), tiles.max(axis=-1), tiles.min(axis=-1))


def _overlap(queries: _IdRange, keys: _IdRange) -> Bool[Array, "b i j"]:
    below = queries.low[:, :, None] <= keys.high[:, None, :]
    return below & (keys.low[:, None, :] <= queries.high[:, :, None])


def _equal_pairs(a: Int[Array, "b i"], b: Int[Array, "b j"]) -> Bool[Array, "b i j"]:
    return a[:, :, None] == b[:, None, :]


def _ranges(needed: Bool[Array, "b i j"], unmasked: Bool[Array, "b i j"]) -> TileRanges:
    """Ranges along the last axis. If the unmasked tiles form several runs, the first run is taken."""
    size = needed.shape[-1]
    index = jnp.arange(size)[None, None, :]
    first, begin = (jnp.argmax(x, axis=-1) for x in (needed, unmasked))
    end = jnp.max(jnp.where(needed, index + 1, 0), axis=-1)
    begin = jnp.where(unmasked.any(axis=-1), begin, first)
    broken = ~unmasked & (index >= begin[..., None])
    until = jnp.min(jnp.where(broken, index, size), axis=-1)
    return TileRanges(*(x.astype(jnp.int32) for x in (first, begin, until, end)))


def visible(
    q_position: Int[Array, "q"], kv_position: Int[Array, "k"], *, block_size: int
) -> Bool[Array, "q k"]:
    """The block-causal rule for pairs of positions: a token sees its own block and earlier ones.

    The result is dense, so only `reference` calls this on whole sequences.
    """
    return (kv_position // block_size)[None, :] <= (q_position // block_size)[:, None]

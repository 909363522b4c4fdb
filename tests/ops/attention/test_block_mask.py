"""The tiles to compute, compared with a dense mask of every pair of a query and a key."""

import jax.numpy as jnp
import numpy as np
import pytest
import released
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.ops.attention import block_mask
from elastic.ops.attention.base import MaskArgs, StaticArgs


def seen_pairs(mask: MaskArgs, num_queries: int, num_keys: int, block: int) -> np.ndarray:
    """The dense mask [b, Q, K], from the docstring of `MaskArgs`."""
    start, kv_start, kv_length = (int(x) for x in mask[:3])
    i, j = np.ogrid[start : start + num_queries, kv_start : kv_start + num_keys]
    seen = ((j // block <= i // block) & (j < kv_length))[None]
    if mask.q_segments is not None and mask.kv_segments is not None:
        q_ids, kv_ids = np.asarray(mask.q_segments), np.asarray(mask.kv_segments)
        seen = seen & (q_ids[:, :, None] == kv_ids[:, None, :])
    return seen if mask.valid is None else seen & np.asarray(mask.valid)[:, None, :]


def by_tiles(seen: np.ndarray, q_tile: int, kv_tile: int) -> tuple[np.ndarray, np.ndarray]:
    """[b, i, j]: whether any pair of two tiles is seen; whether the tile of keys is whole and all pairs are."""
    any_of, all_of = [], []
    for q_at in range(0, seen.shape[1], q_tile):
        for kv_at in range(0, seen.shape[2], kv_tile):
            part = seen[:, q_at : q_at + q_tile, kv_at : kv_at + kv_tile]
            any_of.append(part.any(axis=(1, 2)))
            all_of.append(part.all(axis=(1, 2)) & (part.shape[2] == kv_tile))
    shape = (-(-seen.shape[1] // q_tile), -(-seen.shape[2] // kv_tile), len(seen))
    return tuple(np.moveaxis(np.reshape(x, shape), -1, 0) for x in (any_of, all_of))


# Queries, keys, block, tiles of both. Few, because each is a program.
SIZES = [(24, 24, 6, 4, 3), (7, 24, 5, 8, 4), (23, 11, 12, 5, 8), (1, 16, 4, 4, 5)]


@st.composite
def cases(draw):
    """Pieces of a sequence of runs, as a ring holds them; every tile whole or not."""
    whole = lambda low, high: draw(st.integers(low, high))  # noqa: E731
    num_queries, num_keys, *sizes = draw(st.sampled_from(SIZES))
    q_start, kv_start = whole(0, 24), whole(0, 24)
    mask = MaskArgs(*map(jnp.int32, (q_start, kv_start, whole(0, 60), 0)))
    rng = np.random.default_rng(whole(0, 2**16))
    end = max(q_start + num_queries, kv_start + num_keys)
    if draw(st.booleans()):
        ids = np.cumsum(rng.random((2, end)) < 0.15, axis=1)
        ids = ids if draw(st.booleans()) else rng.permutation(9)[ids % 9]  # runs need not ascend
        mask = mask._replace(
            q_segments=jnp.asarray(ids[:, q_start : q_start + num_queries]),
            kv_segments=jnp.asarray(ids[:, kv_start : kv_start + num_keys]),
        )
    if draw(st.booleans()):
        mask = mask._replace(valid=jnp.asarray(rng.random((2, num_keys)) < rng.random()))
    return mask, num_queries, num_keys, StaticArgs(*sizes, 1)


def find_ranges(find, mask, num_queries, num_keys, static):
    return find(mask, num_queries, num_keys, static)


FOUND = released.quick_jit(find_ranges, static_argnums=(0, 2, 3, 4))


@settings(max_examples=150)
@given(cases())
def test_every_visible_pair_is_in_a_range_and_unmasked_tiles_are_fully_visible(case):
    mask, num_queries, num_keys, static = case
    seen = seen_pairs(mask, num_queries, num_keys, static.block_size)
    needed, all_seen = by_tiles(seen, static.q_tile, static.kv_tile)
    for find, turn in (
        (block_mask.tile_ranges_of_queries, False),
        (block_mask.tile_ranges_of_keys, True),
    ):
        found = FOUND(find, mask, num_queries, num_keys, static)
        ours = [np.asarray(x) for x in found]
        some, full = ((x.swapaxes(1, 2) if turn else x) for x in (needed, all_seen))
        index = np.arange(some.shape[2])
        first, begin, until, end = (x[..., None] for x in ours)
        computed, unmasked = (first <= index) & (index < end), (begin <= index) & (index < until)
        computed, unmasked = (np.broadcast_to(x, some.shape) for x in (computed, unmasked))
        assert (computed | ~some).all()  # no visible pair is missing
        assert (full | ~unmasked).all() and (computed | ~unmasked).all()
        if mask.q_segments is None and mask.valid is None:
            assert (computed == some).all() and (unmasked == full).all()


@pytest.mark.parametrize(
    "numbers", [(0, 0, 3, 5), (2, 4, 6, 9), (2, 2, 2, 6), (1, 3, 7, 7), (0, 0, 0, 0)], ids=str
)
def test_every_tile_is_computed_once_and_only_unmasked_ones_without_a_mask(numbers):
    def body(tile, counts, masked):
        return counts.at[int(masked), tile].add(1)

    first, begin, until, end = numbers
    counts = block_mask.TileRanges(*map(jnp.int32, numbers)).fold(
        body, jnp.zeros((2, 10), jnp.int32)
    )
    index = np.arange(10)
    unmasked = (begin <= index) & (index < until)
    assert (np.asarray(counts[0]) == unmasked).all()
    assert (np.asarray(counts.sum(axis=0)) == ((first <= index) & (index < end))).all()


def test_a_packed_sequence_costs_what_its_files_cost():
    """Four files of four tiles each: tiles of one file are computed with that file's tiles only, whatever its segment id."""
    ids = jnp.repeat(jnp.array([[7, 2, 9, 4]]), 16, axis=1)
    mask = MaskArgs(*map(jnp.int32, (0, 0, 64, 0)), q_segments=ids, kv_segments=ids)
    found = block_mask.tile_ranges_of_queries(mask, 64, 64, StaticArgs(4, 4, 4, 1))
    tile = np.arange(16)
    assert (np.asarray(found.first[0]) == tile // 4 * 4).all()
    assert (np.asarray(found.end[0]) == tile + 1).all()
    assert (np.asarray(found.unmasked) == np.asarray(found.first)).all()
    assert (np.asarray(found.unmasked_end) == np.asarray(found.end)).all()
    back = block_mask.tile_ranges_of_keys(mask, 64, 64, StaticArgs(4, 4, 4, 1))
    assert (np.asarray(back.first[0]) == tile).all()
    assert (np.asarray(back.end[0]) == tile // 4 * 4 + 4).all()

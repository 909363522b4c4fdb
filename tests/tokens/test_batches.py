"""Packed batches of tokens for a generator: every token once, clips apart, resumable."""

import collections
import json

import numpy as np
import pytest
from shard_cases import SIZES, make_rows

from elastic.tokens import TokenShards, write_shard
from elastic.tokens import shards as token_shards
from elastic.tokens.batches import BEGIN, CONTINUE, END, PAD, Vocabulary, token_batches


@pytest.fixture(params=SIZES)
def size(request):
    return SIZES[request.param]


def write_shards(folder, size, clips=60):
    rows = make_rows(size, clips=clips)
    for start in range(0, clips, 16):
        write_shard(folder / f"shard-{start:05d}.parquet", rows[start : start + 16])
    return TokenShards(folder), [clip for _, clip in rows]


def segments(batches):
    """Each piece of packed batches: ids, positions, blocks, loss mask, vectors, tiles and their places."""
    for batch in batches:
        for row in range(len(batch.tokens)):
            ids = batch.segment_ids[row]
            assert (batch.tokens[row][ids == 0] == PAD).all() and not batch.loss_mask[row][
                ids == 0
            ].any()
            for segment in range(1, ids.max() + 1):
                where = np.flatnonzero(ids == segment)
                assert np.array_equal(where, np.arange(where[0], where[-1] + 1))  # in one run
                yield tuple(None if part is None else part[row][where] for part in batch)


def collect(vocabulary, clips, batches):
    """{clip: its blocks from all pieces}, each piece checked."""
    found = collections.defaultdict(dict)
    for ids, _, positions, block_ids, mask, vectors, tile_ids, places in segments(batches):
        np.testing.assert_array_equal(positions, np.arange(len(ids)))
        np.testing.assert_array_equal(mask, ~np.isin(ids, [PAD, BEGIN, CONTINUE]))
        assert not tile_ids.any()
        assert not places.any()
        blocks = vocabulary.blocks(ids, vectors)
        number, first = map(int, blocks[0].values.flat[:2])
        assert ids[0] == (CONTINUE if first else BEGIN)
        last = first + len(blocks) - 1
        assert (ids[-1] == END) == (last == len(clips[number].blocks) - 1)
        starts = np.repeat(np.arange(first, last + 1), [block.num_kept + 1 for block in blocks])
        np.testing.assert_array_equal(block_ids[1 : 1 + len(starts)], starts)
        for b, block in enumerate(blocks, first):
            assert b not in found[number], "a block came twice"
            np.testing.assert_array_equal(block.values, clips[number].blocks[b].values)
            found[number][b] = block
    return found


@pytest.mark.parametrize("row", [1 << 27, 90])
def test_packed_batches_hold_every_token_once_in_order_and_clips_apart(
    tmp_path, size, row, monkeypatch
):
    monkeypatch.setattr(token_shards, "_ROW_NUMBERS", row)
    shards, clips = write_shards(tmp_path, size)
    vocabulary = Vocabulary.of(shards)
    options = dict(sequence_length=100, batch_size=3, num_epochs=1, seed=5, packing_bins=8)
    batches = list(token_batches(shards, **options))
    assert all(batch.tokens.shape[1:] == (100,) for batch in batches)
    assert max(batch.tokens.max() for batch in batches) < vocabulary.size
    found = collect(vocabulary, clips, batches)
    assert {n: len(blocks) for n, blocks in found.items()} == {
        n: len(clip.blocks) for n, clip in enumerate(clips)
    }
    assert np.mean([batch.segment_ids > 0 for batch in batches[:-1]]) > 0.8
    # The processes of a run share the pieces.
    parts = [
        collect(
            vocabulary, clips, token_batches(shards, **options, process_index=i, process_count=3)
        )
        for i in range(3)
    ]
    got = [(n, b) for part in parts for n, blocks in part.items() for b in blocks]
    assert sorted(got) == [(n, b) for n, clip in enumerate(clips) for b in range(len(clip.blocks))]


def test_batches_go_on_where_they_were_saved_and_differ_between_epochs(tmp_path):
    shards, _ = write_shards(tmp_path, 64_000)
    iterator = iter(token_batches(shards, sequence_length=64, batch_size=4))
    batches = [next(iterator) for _ in range(5)]
    place = json.dumps(iterator.get_state())
    expected = [next(iterator) for _ in range(40)]  # more than an epoch
    again = iter(token_batches(shards, sequence_length=64, batch_size=4))
    again.set_state(json.loads(place))
    for batch in expected:
        for one, other in zip(next(again), batch, strict=True):
            np.testing.assert_array_equal(one, other)
    assert not any(np.array_equal(batches[0].tokens, batch.tokens) for batch in expected)


def test_a_place_in_other_batches_is_refused_with_what_differs(tmp_path):
    shards, _ = write_shards(tmp_path, 64_000, clips=20)
    options = dict(sequence_length=64, batch_size=2, seed=1, process_count=2)
    iterator = iter(token_batches(shards, **options))
    place, expected = iterator.get_state(), next(iterator)
    for name, value in dict(sequence_length=65, seed=2, process_count=3, process_index=1).items():
        other = iter(token_batches(shards, **options | {name: value}))
        with pytest.raises(ValueError, match=rf"{name}={value} \(then "):
            other.set_state(place)
    fewer = TokenShards([tmp_path / "shard-00000.parquet"])
    with pytest.raises(ValueError, match=r"pieces=\d+ \(then \d+\), clips="):
        iter(token_batches(fewer, **options)).set_state(place)
    again = iter(token_batches(shards, **options, num_epochs=7))
    next(again)
    again.set_state(place["place"])  # as earlier versions saved it
    np.testing.assert_array_equal(next(again).tokens, expected.tokens)


def test_sequences_and_ids_that_cannot_be_are_refused(tmp_path):
    shards, clips = write_shards(tmp_path, 64_000, clips=5)
    with pytest.raises(ValueError, match=r"sequence_length=26 is too short .* use 27 or more"):
        token_batches(shards, sequence_length=26, batch_size=1)
    with pytest.raises(ValueError, match="pieces to share"):
        token_batches(shards, sequence_length=64, batch_size=1, process_index=2, process_count=2)
    vocabulary = Vocabulary.of(clips[0])
    ids = vocabulary.piece(clips[0])
    with pytest.raises(ValueError, match="no count"):
        vocabulary.blocks(ids[2:])
    with pytest.raises(ValueError, match="as its count says"):
        vocabulary.blocks(ids[:-2])

"""The plan of an epoch: every block once, in order, closely packed, whoever reads it."""

import collections
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.data.packing import PackingPlan, num_streams


def make(num_blocks, per_sequence=4, *, chunk_size=8, seed=0):
    return PackingPlan(
        np.array(num_blocks), blocks_per_sequence=per_sequence, chunk_size=chunk_size, seed=seed
    )


@settings(max_examples=60)
@given(
    num_blocks=st.lists(st.integers(1, 40), min_size=1, max_size=60),
    per_sequence=st.integers(1, 9),
    chunk_size=st.integers(1, 20),
    batch_size=st.integers(1, 40),
    epoch=st.integers(0, 2),
)
def test_every_block_of_every_file_comes_once_in_an_epoch(
    num_blocks, per_sequence, chunk_size, batch_size, epoch
):
    plan = make(num_blocks, per_sequence, chunk_size=chunk_size)
    numbers = range(epoch * plan.num_sequences, (epoch + 1) * plan.num_sequences)
    located = [plan.locate(number, batch_size) for number in numbers]
    assert {epoch_of for epoch_of, _ in located} == {epoch}
    seen = collections.Counter(
        (piece.file, piece.first_block + block)
        for _, sequence in located
        for piece in plan.pieces(sequence)
        for block in range(piece.num_blocks)
    )
    every = [(file, block) for file, count in enumerate(num_blocks) for block in range(count)]
    assert seen == collections.Counter(every)
    assert plan.num_blocks == len(every)


@settings(max_examples=40)
@given(
    num_blocks=st.lists(st.integers(1, 40), min_size=1, max_size=40),
    per_sequence=st.integers(1, 9),
)
def test_a_file_is_cut_only_where_a_sequence_cannot_hold_it(num_blocks, per_sequence):
    plan = make(num_blocks, per_sequence)
    pieces = [piece for n in range(plan.num_sequences) for piece in plan.pieces(n)]
    for sequence in range(plan.num_sequences):
        assert 1 <= sum(piece.num_blocks for piece in plan.pieces(sequence)) <= per_sequence
    for piece in pieces:
        assert piece.first_block % per_sequence == 0
        left = num_blocks[piece.file] - piece.first_block
        assert piece.num_blocks == min(per_sequence, left)


def test_a_long_file_is_spread_over_several_chunks():
    plan = make([1000, *[1] * 20], 4, chunk_size=2)
    chunks = {
        int(plan._chunks[n])
        for n in range(plan.num_sequences)
        if any(piece.file == 0 for piece in plan.pieces(n))
    }
    assert len(chunks) >= 3


@pytest.mark.parametrize("per_sequence", [1, 2, 4, 16])
def test_there_is_little_padding(per_sequence):
    rng = np.random.default_rng(0)
    kinds = {
        "images": np.ones(2000, int),
        "videos": rng.integers(8, 60, 400),
        "mixed": np.concatenate([np.ones(1500, int), rng.integers(8, 30, 263)]),
    }
    for kind, num_blocks in kinds.items():
        plan = make(num_blocks, per_sequence)
        assert plan.num_blocks / (plan.num_sequences * per_sequence) > 0.95, kind


def test_order_and_packing_follow_from_the_seed():
    sizes = list(np.random.default_rng(1).integers(1, 30, 50))
    first, again, other = make(sizes), make(sizes), make(sizes, seed=1)
    numbers = range(2 * first.num_sequences)
    stream = [first.locate(n, 3) for n in numbers]
    assert stream == [again.locate(n, 3) for n in numbers]
    assert first.digest == again.digest != other.digest
    half = first.num_sequences
    assert [s for _, s in stream[:half]] != [s for _, s in stream[half:]]  # another epoch


@pytest.mark.parametrize("batch_size", [1, 2, 5, 16, 20])
def test_a_row_walks_through_files_that_lie_together(batch_size):
    plan = make(np.full(400, 12), 2, chunk_size=4)
    lanes = num_streams(batch_size)
    assert lanes % batch_size == 0 and lanes >= 16
    changes = 0
    for lane in range(lanes):
        walk = [
            int(plan._chunks[plan.locate(n, batch_size)[1]])
            for n in range(lane, plan.num_sequences, lanes)
        ]
        changes += sum(a != b for a, b in itertools.pairwise(walk))
    num_chunks = int(plan._chunks[-1]) + 1
    assert changes < num_chunks  # each chunk is entered once, but where a lane begins within it
    order = plan.order(0).tolist()
    assert order != sorted(order)

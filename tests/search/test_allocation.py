"""A budget of tokens goes where it lowers the error most."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.search.allocation import allocate, counts_to_measure, price_of, split_equally

LOSSES = st.lists(st.floats(0.001, 1), min_size=8, max_size=8)


@settings(max_examples=100)
@given(losses=st.lists(LOSSES, min_size=1, max_size=4), share=st.floats(1, 8))
def test_no_split_is_better(losses, share):
    """On curves with cliffs and plateaus, and such that rise, too."""
    curves = [dict(enumerate(block, 1)) for block in losses]
    budget = int(share * len(curves))
    counts = allocate(curves, budget, smallest=1, largest=8)
    assert sum(counts) <= budget and all(1 <= count <= 8 for count in counts)
    splits = itertools.product(range(1, 9), repeat=len(curves))
    best = min(
        math.fsum(curve[n] for curve, n in zip(curves, split, strict=True))
        for split in splits
        if sum(split) <= budget
    )
    found = math.fsum(curve[n] for curve, n in zip(curves, counts, strict=True))
    assert found <= best * (1 + 1e-9)


@given(
    curves=st.lists(st.lists(st.floats(0, 1), min_size=8, max_size=8), min_size=1, max_size=6),
    share=st.floats(1, 8),
)
def test_on_any_curves_the_equal_split_is_never_better(curves, share):
    curves = [dict(enumerate(losses, 1)) for losses in curves]
    budget = int(share * len(curves))
    counts = allocate(curves, budget, smallest=1, largest=8)
    equal = split_equally(budget, len(curves), largest=8)
    assert sum(counts) <= budget and all(1 <= count <= 8 for count in counts)

    def error(split):
        return math.fsum(curve[n] for curve, n in zip(curves, split, strict=True))

    assert error(counts) <= error(equal) * (1 + 1e-9) + 1e-9


def test_a_block_that_counts_more_gets_more():
    curve = {n: 1 / n for n in (16, 32, 64, 128, 256)}
    alike = allocate([curve, curve], 128, smallest=16, largest=256)
    heavier = allocate([curve, curve], 128, smallest=16, largest=256, weights=[1, 4])
    assert abs(alike[0] - alike[1]) <= 6
    assert heavier[1] / heavier[0] == pytest.approx(2, rel=0.1)  # 1/n: counts go as the root


def test_tokens_that_buy_nothing_are_left():
    flat, falling = {4: 0.5, 8: 0.5, 16: 0.6}, {4: 0.5, 8: 0.1, 16: 0.05}
    assert allocate([flat, falling], 32, smallest=4, largest=16) == [4, 16]


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=40).map(lambda x: sorted(x, reverse=True)),
    st.floats(1e-4, 1),
    st.integers(1, 3),
)
def test_measuring_ends_at_the_cheapest_count_of_a_falling_curve(losses, price, most):
    """Not all of it need be measured for that."""
    curve = dict(enumerate(losses, 5))
    measured = {count: curve[count] for count in (min(curve), max(curve))}
    while counts := counts_to_measure(measured, price, most):
        assert len(counts) <= most and not set(counts) & measured.keys()
        measured |= {count: curve[count] for count in counts}

    def cost(known):
        return min(loss + price * count for count, loss in known.items())

    assert cost(measured) == pytest.approx(cost(curve))


def test_the_price_of_a_token_is_what_makes_blocks_spend_the_budget():
    rng = np.random.default_rng(0)
    counts = range(1, 33)
    curves = [
        {count: scale * count**-power for count in counts}
        for scale, power in zip(rng.uniform(0.1, 1, 20), rng.uniform(0.3, 2, 20), strict=True)
    ]

    def spent(price):
        return sum(min(curve, key=lambda n: curve[n] + price * n) for curve in curves)

    for budget in (40, 100, 400):
        price = price_of(curves, budget)
        assert spent(price) <= budget < spent(price / 1.01) + 1


def test_what_cannot_be_split_is_refused():
    with pytest.raises(ValueError, match="budget=7 must be at least 8"):
        allocate([{4: 0.5}, {4: 0.5}], 7, smallest=4, largest=16)
    with pytest.raises(ValueError, match="Block 1 has no finite loss"):
        allocate([{4: 0.5}, {4: math.nan}], 8, smallest=4, largest=16)

"""Rings over a flat grid of chips."""

import itertools
import math
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.distributed.ring_topology import closed_walk, ring_grid


def chips(columns, rows):
    return [
        types.SimpleNamespace(coords=(x, y, 0), device_kind="TPU v5 lite")
        for y in range(rows)
        for x in range(columns)
    ]


def steps(walk):
    """How far apart, in columns and rows, neighbours of a closed walk are."""
    pairs = itertools.pairwise([*walk, walk[0]])
    return [(abs(a[0] - b[0]), abs(a[1] - b[1])) for a, b in pairs]


@given(st.integers(1, 16), st.integers(1, 16))
def test_a_walk_comes_back_through_every_place(wide, high):
    walk = closed_walk(wide, high)
    if walk is None:  # a line, whose ends are apart, or an odd number of squares of two colours
        assert wide * high > 2 and (min(wide, high) == 1 or wide * high % 2)
        return
    assert sorted(walk) == sorted(itertools.product(range(wide), range(high)))
    if len(walk) > 1:
        assert all(sum(step) == 1 for step in steps(walk))


@pytest.mark.parametrize(("columns", "rows"), [(16, 16), (8, 16), (8, 8), (4, 8)])
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("sp", [2, 4, 8, 16, 32])
def test_every_ring_of_a_slice_steps_in_a_line_by_a_power_of_two(columns, rows, tp, sp):
    """That is what the chips' routing allows."""
    devices = chips(columns, rows)
    if tp * sp > len(devices):
        return
    grid = ring_grid(devices, (1, len(devices) // (tp * sp), tp, sp))
    assert grid is not None and {id(d) for d in grid.flat} == {id(d) for d in devices}
    for ring in grid.reshape(-1, sp):
        for step in steps([device.coords for device in ring]):
            assert min(step) == 0 and math.log2(max(step)).is_integer()


@pytest.mark.parametrize(
    ("devices", "shape"),
    [
        (chips(3, 3), (1, 1, 1, 9)),  # no closed walk
        (chips(6, 2), (1, 2, 3, 2)),  # three in a block
        (chips(4, 4)[:-1], (1, 5, 1, 3)),  # not a rectangle
    ],
)
def test_where_no_ring_fits_there_is_none(devices, shape):
    assert ring_grid(devices, shape) is None

"""Bjontegaard's deltas of curves whose distance is known."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.metrics.bjontegaard import bd_psnr, bd_rate

CURVE = [(0.05, 24.0), (0.1, 27.5), (0.2, 30.0), (0.5, 33.5)]


@given(factor=st.floats(0.5, 2.0), gain=st.floats(-2.0, 2.0))
def test_a_curve_that_is_moved_is_as_far_away_as_it_was_moved(factor, gain):
    assert bd_rate(CURVE, [(factor * rate, quality) for rate, quality in CURVE]) == pytest.approx(
        100 * (factor - 1), abs=1e-6
    )
    assert bd_psnr(CURVE, [(rate, quality + gain) for rate, quality in CURVE]) == pytest.approx(
        gain, abs=1e-9
    )


def test_between_two_points_the_curve_is_straight_over_the_logarithm():
    anchor, test = [(1.0, 30.0), (4.0, 34.0)], [(1.0, 31.0), (4.0, 33.0)]
    assert bd_psnr(anchor, test) == pytest.approx(0.0, abs=1e-9)
    # At 31 to 33 dB: the anchor takes 2 ** 0.5 to 2 ** 1.5 times the least rate, the other curve 1 to 4 times.
    assert bd_rate(anchor, test) == pytest.approx(0.0, abs=1e-6)
    assert bd_rate(anchor, [(2 * rate, quality) for rate, quality in test]) == pytest.approx(100.0)


def test_curves_that_share_no_range_have_no_delta_and_points_that_fall_do_not_count():
    assert bd_rate(CURVE, [(rate, quality + 20) for rate, quality in CURVE]) is None
    assert bd_psnr(CURVE, [(100 * rate, quality) for rate, quality in CURVE]) is None
    assert bd_rate(CURVE, CURVE[:1]) is None
    assert bd_rate(CURVE, [*CURVE, (0.3, 29.0)]) == pytest.approx(0.0, abs=1e-9)
    assert math.isfinite(bd_psnr(CURVE, CURVE[1:]) or math.nan)

"""Bjontegaard's deltas: how far two rate-distortion curves are apart (ITU-T VCEG-M33; HSTP-VID-WPOM for the interpolation).

A curve is interpolated by piecewise cubics (pchip, which does not overshoot) over the logarithm of the rate.
"""

from collections.abc import Sequence

import numpy as np

# Points (rate, quality in dB); rates in any unit, the same for both curves.
Curve = Sequence[tuple[float, float]]


def bd_rate(anchor: Curve, test: Curve) -> float | None:
    """How many more bits `test` takes than `anchor` for the same quality, in percent; below 0: fewer.

    None where the curves share no range of quality.
    """
    logs = ([(q, np.log(rate)) for rate, q in _best(curve)] for curve in (anchor, test))
    mean = _mean_difference(*logs)
    return None if mean is None else 100 * (float(np.exp(mean)) - 1)


def bd_psnr(anchor: Curve, test: Curve) -> float | None:
    """How much better `test` is than `anchor` for the same bits, in dB. None where the curves share no range of bits."""
    logs = ([(np.log(rate), q) for rate, q in _best(curve)] for curve in (anchor, test))
    return _mean_difference(*logs)


def _mean_difference(anchor: Curve, test: Curve) -> float | None:
    """The mean of `test - anchor` over the range of x that both have."""
    from scipy.interpolate import PchipInterpolator  # not small, and only these deltas need it

    curves = [np.array(curve, np.float64).T for curve in (anchor, test)]
    low = max(x[0] for x, _ in curves)
    high = min(x[-1] for x, _ in curves)
    if min(len(x) for x, _ in curves) < 2 or not low < high:
        return None
    first, second = (PchipInterpolator(x, y).integrate(low, high) for x, y in curves)
    return float(second - first) / (high - low)


def _best(curve: Curve) -> list[tuple[float, float]]:
    """The points in rising order, without those that another point beats with fewer bits."""
    kept: list[tuple[float, float]] = []
    for rate, quality in sorted(curve, key=lambda point: (point[0], -point[1])):
        if not kept or quality > kept[-1][1]:
            kept.append((rate, quality))
    return kept

"""How many tokens each block of a clip gets of a budget for all: where they lower the error most. Plain Python."""

import itertools
import math
from collections.abc import Mapping, Sequence

from elastic.curves import Curve, points_of

_STEPS = 64  # counts at which a measured curve is read off, geometrically spaced


def allocate(
    curves: Sequence[Mapping[int, float]],
    budget: int,
    *,
    smallest: int,
    largest: int,
    weights: Sequence[float] | None = None,
) -> list[int]:
    """The counts that give the least sum of errors for at most `budget` tokens in all.

    Each curve's convex hull is a run of steps, each so much error less for so many tokens; taking the steepest steps of all blocks first is
    optimal on the hulls. On the curves themselves the equal split may still be better, where one is far from convex: then it is taken.

    Args:
      curves: for each block, measured losses by count; between them a curve runs straight in logarithms.
      smallest, largest: the range of a count.
      weights: what an error of each block counts, such as its frames; None: all alike.

    Raises:
      ValueError: the budget is below `smallest` for each block, or a curve has no finite loss.
    """
    if budget < smallest * len(curves):
        raise ValueError(
            f"budget={budget} must be at least {smallest * len(curves)}: {smallest} tokens for each of {len(curves)} blocks."
        )
    for number, curve in enumerate(curves):
        if not points_of(curve):
            raise ValueError(f"Block {number} has no finite loss among {dict(curve)}.")
    weights = [1.0] * len(curves) if weights is None else weights
    known = [Curve(points_of(curve)) for curve in curves]
    steps = []
    for block, (curve, weight) in enumerate(zip(known, weights, strict=True)):
        hull = _hull(_read_off(curve, smallest, largest))
        for (n0, y0), (n1, y1) in itertools.pairwise(hull):
            steps.append((weight * (y0 - y1) / (n1 - n0), -block, n1 - n0))
    counts = [smallest] * len(curves)
    left = budget - sum(counts)
    for _, block, length in sorted(steps, reverse=True):
        taken = min(length, left)  # of a step that the budget cuts short, a part
        counts[-block] += taken
        left -= taken
    equal = split_equally(budget, len(curves), largest=largest)

    def error(split: list[int]) -> float:
        parts = zip(split, known, weights, strict=True)
        return math.fsum(weight * _loss(curve, count) for count, curve, weight in parts)

    return counts if error(counts) <= error(equal) else equal


def split_equally(budget: int, num_blocks: int, *, largest: int) -> list[int]:
    """The same count for every block, up to a token that the first ones have more."""
    share, more = divmod(min(budget, largest * num_blocks), num_blocks)
    return [share + (block < more) for block in range(num_blocks)]


def _loss(curve: Curve, count: int) -> float:
    return math.exp(curve.at(math.log(count)))


def _read_off(curve: Curve, smallest: int, largest: int) -> list[tuple[int, float]]:
    """The curve at counts over the whole range; at measured ones exactly."""
    ratio = largest / smallest
    counts = {round(smallest * ratio ** (i / _STEPS)) for i in range(_STEPS + 1)}
    counts |= {round(math.exp(p.x)) for p in curve.points}
    return [(n, _loss(curve, n)) for n in sorted(counts) if smallest <= n <= largest]


def _hull(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """The lower convex hull up to its lowest point: beyond, tokens buy nothing."""
    hull: list[tuple[int, float]] = []
    for n, y in points:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], (n, y)):
            hull.pop()
        hull.append((n, y))
    while len(hull) > 1 and hull[-1][1] >= hull[-2][1]:
        hull.pop()
    return hull


def _slope(a: tuple[int, float], b: tuple[int, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])

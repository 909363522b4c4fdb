"""Splits a token budget over the blocks of a clip so that the sum of their errors is least."""

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from elastic.search.rate_curve import Curve, points_of

_STEPS = 128  # counts at which a measured curve is read off, geometrically spaced
_PRICES = 1e-12, 1e3  # range of the price of a token, in error
_MOST_BINS = (
    1 << 16
)  # of the dynamic program; a larger budget is counted in units of several tokens


def allocate(
    curves: Sequence[Mapping[int, float]],
    budget: int,
    *,
    smallest: int,
    largest: int,
    weights: Sequence[float] | None = None,
) -> list[int]:
    """The token count of each block that gives the least sum of errors for at most `budget` tokens in all.

    Solves the multiple-choice knapsack problem over the curves by dynamic programming, so that curves may have cliffs and plateaus.
    The split is optimal among the tabulated counts: 128 over the range, and all measured ones. Tokens that remain go to the block
    whose error they lower most.

    Args:
      curves: for each block, measured losses by count; between them a curve is linear in logarithms.
      budget: tokens of all blocks together.
      smallest: the smallest count of a block.
      largest: the largest count of a block.
      weights: the weight of each block's error, such as its number of frames; None: all equal.

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
    options = [
        _falling([(n, weight * y) for n, y in _table(curve, smallest, largest)])
        for curve, weight in zip(known, weights, strict=True)
    ]
    counts = _knapsack(options, budget)

    def error(split: list[int]) -> float:
        parts = zip(split, known, weights, strict=True)
        return math.fsum(weight * _loss(curve, count) for count, curve, weight in parts)

    def gain(block: int, more: int) -> float:
        curve, count = known[block], counts[block]
        return weights[block] * (_loss(curve, count) - _loss(curve, count + more))

    left = budget - sum(counts)
    spare = [min(left, largest - count) for count in counts]
    best = max(range(len(counts)), key=lambda block: gain(block, spare[block]))
    if gain(best, spare[best]) > 0:
        counts[best] += spare[best]
    equal = split_equally(budget, len(curves), largest=largest)
    return counts if error(counts) <= error(equal) else equal


def price_of(curves: Sequence[Mapping[int, float]], budget: float) -> float:
    """The error that one more token saves at the best split of a budget: the multiplier of Shoham and Gersho 1988.

    At this price, the counts that minimise loss + price * count of each block sum to at most `budget`.

    Args:
      curves: for each block, losses by count, as `tabulate` gives them.
      budget: tokens of all blocks together.
    """
    tables = [(np.array([*curve]), np.array([*curve.values()])) for curve in curves]

    def spent(price: float) -> int:
        return sum(int(counts[np.argmin(losses + price * counts)]) for counts, losses in tables)

    low, high = _PRICES
    while high > low * 1.001:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if spent(middle) > budget else (low, middle)
    return high


def counts_to_measure(curve: Mapping[int, float], price: float, most: int) -> list[int]:
    """Up to `most` counts between measured ones at which loss + price * count could fall furthest below the least one measured.

    Between two measured counts the best case is the smaller of both losses, reached one token above the lower count. Losses that are
    not finite are left out. The list is empty when no count can be better than the measured ones.
    """
    points = sorted(item for item in curve.items() if math.isfinite(item[1]))
    cost = min((loss + price * count for count, loss in points), default=math.inf)
    gains = [
        (cost - (min(loss, next_loss) + price * (count + 1)), count, next_count)
        for (count, loss), (next_count, next_loss) in itertools.pairwise(points)
        if next_count - count > 1
    ]
    best = sorted((gain for gain in gains if gain[0] > 0), reverse=True)[:most]
    return [max(round(math.sqrt(low * high)), low + 1) for _, low, high in best]


def tabulate(curve: Mapping[int, float], smallest: int, largest: int) -> dict[int, float]:
    """Losses of a measured curve at counts over the whole range, exact at measured counts. Empty if no loss is finite."""
    points = points_of(curve)
    return dict(_table(Curve(points), smallest, largest)) if points else {}


def _knapsack(options: Sequence[Sequence[tuple[int, float]]], budget: int) -> list[int]:
    """One count per block so that the sum of the losses is least.

    Args:
      options: for each block, pairs of count and loss, ascending in count; the budget pays at least for all first counts.
      budget: tokens of all blocks together.
    """
    least = [choices[0][0] for choices in options]
    unit = max(1, -(-(budget - sum(least)) // _MOST_BINS))
    spare = (
        budget - sum(least)
    ) // unit  # what remains above the first counts, in units; costs are rounded up
    best = np.zeros(
        spare + 1
    )  # [units]: least loss of the blocks so far that spend at most so many
    chosen = np.zeros((len(options), spare + 1), np.int16)
    for block, choices in enumerate(options):
        extended = np.full(spare + 1, np.inf)
        for number, (count, loss) in enumerate(choices):
            cost = -(-(count - least[block]) // unit)
            if cost > spare:
                break
            candidate = best[: spare + 1 - cost] + loss
            better = candidate < extended[cost:]
            extended[cost:][better] = candidate[better]
            chosen[block, cost:][better] = number
        best = extended
    counts, left = [], spare
    for block in reversed(range(len(options))):
        count = options[block][chosen[block, left]][0]
        counts.append(count)
        left -= -(-(count - least[block]) // unit)
    return counts[::-1]


def split_equally(budget: int, num_blocks: int, *, largest: int) -> list[int]:
    """The same count for every block; the remainder of the division gives the first blocks one token more."""
    share, more = divmod(min(budget, largest * num_blocks), num_blocks)
    return [share + (block < more) for block in range(num_blocks)]


def _loss(curve: Curve, count: int) -> float:
    return math.exp(curve.at(math.log(count)))


def _table(curve: Curve, smallest: int, largest: int) -> list[tuple[int, float]]:
    """Pairs of count and loss over the whole range, exact at measured counts."""
    ratio = largest / smallest
    counts = {round(smallest * ratio ** (i / _STEPS)) for i in range(_STEPS + 1)}
    counts |= {round(math.exp(p.x)) for p in curve.points}
    return [(n, _loss(curve, n)) for n in sorted(counts) if smallest <= n <= largest]


def _falling(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """The points whose loss is below that of every smaller count."""
    kept: list[tuple[int, float]] = []
    for n, y in points:
        if not kept or y < kept[-1][1]:
            kept.append((n, y))
    return kept

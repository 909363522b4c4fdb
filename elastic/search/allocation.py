"""How many tokens each block of a clip gets of a budget for all: where they lower the error most."""

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from elastic.search.rate_curve import Curve, points_of

_STEPS = 128  # counts at which a measured curve is read off, geometrically spaced
_PRICES = 1e-12, 1e3  # of a token, in error: between them lies any that matters
_MOST_BINS = (
    1 << 16
)  # in which a budget is counted; a larger one is counted in units of several tokens


def allocate(
    curves: Sequence[Mapping[int, float]],
    budget: int,
    *,
    smallest: int,
    largest: int,
    weights: Sequence[float] | None = None,
) -> list[int]:
    """The counts that give the least sum of errors for at most `budget` tokens in all.

    The multiple-choice knapsack over the curves, by dynamic programming, so that curves may have cliffs and plateaus: optimal among
    the counts that are read off, which is `_STEPS` over the range and all measured ones; what is left goes where it buys most.

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
    room = [min(left, largest - count) for count in counts]
    best = max(range(len(counts)), key=lambda block: gain(block, room[block]))
    if gain(best, room[best]) > 0:
        counts[best] += room[best]
    equal = split_equally(budget, len(curves), largest=largest)
    return counts if error(counts) <= error(equal) else equal


def price_of(curves: Sequence[Mapping[int, float]], budget: float) -> float:
    """What one more token is worth in error where these blocks share a budget well: the multiplier of Shoham and Gersho 1988.

    At this price, each block's cheapest count, in loss + price * count, sums to at most `budget`. Curves as `read_off` gives them.
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
    """Up to `most` counts, one between two measured ones each, where the block could turn out cheaper by most.

    At best the loss is down to the lesser of both ends just above the lower count. Losses that are not finite say nothing. Empty: nothing
    can be cheaper than what is measured.
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


def read_off(curve: Mapping[int, float], smallest: int, largest: int) -> dict[int, float]:
    """A measured curve at counts over the whole range; at measured ones exactly. Empty where no loss is finite."""
    points = points_of(curve)
    return dict(_table(Curve(points), smallest, largest)) if points else {}


def _knapsack(options: Sequence[Sequence[tuple[int, float]]], budget: int) -> list[int]:
    """One count of each block, so that the sum of the losses is least; each block's options are (count, loss), the first is affordable."""
    least = [choices[0][0] for choices in options]
    unit = max(1, -(-(budget - sum(least)) // _MOST_BINS))
    room = (budget - sum(least)) // unit  # in units; costs are rounded up
    best = np.zeros(room + 1)  # least loss of the blocks so far, by what they may spend
    chosen = np.zeros((len(options), room + 1), np.int16)
    for block, choices in enumerate(options):
        longer = np.full(room + 1, np.inf)
        for number, (count, loss) in enumerate(choices):
            cost = -(-(count - least[block]) // unit)
            if cost > room:
                break
            candidate = best[: room + 1 - cost] + loss
            better = candidate < longer[cost:]
            longer[cost:][better] = candidate[better]
            chosen[block, cost:][better] = number
        best = longer
    counts, left = [], room
    for block in reversed(range(len(options))):
        count = options[block][chosen[block, left]][0]
        counts.append(count)
        left -= -(-(count - least[block]) // unit)
    return counts[::-1]


def split_equally(budget: int, num_blocks: int, *, largest: int) -> list[int]:
    """The same count for every block, up to a token that the first ones have more."""
    share, more = divmod(min(budget, largest * num_blocks), num_blocks)
    return [share + (block < more) for block in range(num_blocks)]


def _loss(curve: Curve, count: int) -> float:
    return math.exp(curve.at(math.log(count)))


def _table(curve: Curve, smallest: int, largest: int) -> list[tuple[int, float]]:
    """The curve at counts over the whole range; at measured ones exactly."""
    ratio = largest / smallest
    counts = {round(smallest * ratio ** (i / _STEPS)) for i in range(_STEPS + 1)}
    counts |= {round(math.exp(p.x)) for p in curve.points}
    return [(n, _loss(curve, n)) for n in sorted(counts) if smallest <= n <= largest]


def _falling(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """The points that no smaller count is as good as."""
    kept: list[tuple[int, float]] = []
    for n, y in points:
        if not kept or y < kept[-1][1]:
            kept.append((n, y))
    return kept

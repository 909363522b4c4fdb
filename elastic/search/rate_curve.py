"""The loss of a block as a function of its token count, and what earlier blocks tell about the next one. Plain Python.

Counts and losses are logarithms. In logarithms the curves of neighbouring blocks are nearly shifted copies of each other. A block's
curve is therefore estimated from the curve of the block before, shifted until it runs through every loss measured for this block.
Each measurement corrects the estimate near its count; elsewhere the shape of the earlier curve remains.
"""

import bisect
import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

_SLOPE = 0.7  # fall of log loss per log count where nothing was measured; fitted on recorded curves
_SAME = 0.03  # a measured point replaces remembered ones this close to it, in log counts
_MOST_POINTS = 16  # of a remembered curve
_TINY = 1e-30  # smaller losses, zero included, count as this one, as zero has no logarithm


class Point(NamedTuple):
    """One measurement: the logarithms of a count and of its loss."""

    x: float
    y: float


class Curve:
    """Log loss over log count: linear between its points, with a fixed slope beyond them."""

    def __init__(self, points: Iterable[Point]):
        self.points = sorted(points)
        if not self.points:
            raise ValueError("A curve needs at least one point.")

    def at(self, x: float) -> float:
        """The log loss at a log count."""
        first, last = self.points[0], self.points[-1]
        if x <= first.x:
            return first.y + _SLOPE * (first.x - x)
        if x >= last.x:
            return last.y - _SLOPE * (x - last.x)
        return _between(self.points, x)

    def shifted_through(self, measured: list[Point]) -> "Curve":
        """This curve shifted so that it runs through points measured for another block.

        Between two points the shift is interpolated linearly. Beyond the outermost points the shift of the nearest
        point holds.
        """
        if not measured:
            return self
        shifts = sorted(Point(p.x, p.y - self.at(p.x)) for p in measured)
        kept = [p for p in self.points if all(abs(p.x - m.x) > _SAME for m in shifts)]
        return Curve([*measured, *(Point(p.x, p.y + _between(shifts, p.x)) for p in kept)])

    def crossing(self, level: float, low: float, high: float) -> float | None:
        """The smallest log count in `low` to `high` whose log loss is at most `level`; None: there is none."""
        inner = [p for p in self.points if low < p.x < high]
        path = [Point(low, self.at(low)), *inner, Point(high, self.at(high))]
        if path[0].y <= level:
            return low
        for (x0, y0), (x1, y1) in itertools.pairwise(path):
            if y1 <= level:
                return x0 + (x1 - x0) * (y0 - level) / (y0 - y1)
        return None

    def pruned_around(self, x: float) -> "Curve":
        """This curve with the 16 points nearest to the log count `x` only."""
        return Curve(sorted(self.points, key=lambda p: abs(p.x - x))[:_MOST_POINTS])


def points_of(losses: Mapping[int, float]) -> list[Point]:
    """The points of measured losses by count; losses that are not finite are left out."""
    return [
        Point(math.log(count), log_loss(loss))
        for count, loss in losses.items()
        if math.isfinite(loss)
    ]


def log_loss(loss: float) -> float:
    """The logarithm of a loss; 0 gives that of a very small loss."""
    return math.log(max(loss, _TINY))


@dataclass
class SearchHistory:
    """What the searches of a clip's earlier blocks have shown. Every clip has a history of its own.

    The names of the fields are written to `tokens.part`; they never change.

    Attributes:
      curve: the estimated curve of the last block; None before the first block.
      tokens: tokens kept in all blocks so far.
      excess: estimated tokens that the searches could still have saved but did not, to save passes.
      spread: mean distance of first guesses from the count kept, in log counts; recent blocks weigh most.
      expected: the curve that the prior gave for the last block; None: there is no prior.
      draft_offset: the log loss of the last drafted block, minus the log loss of its draft; None: no block was drafted.
      draft_error: how far this offset was from that of the block before, in the mean; recent blocks weigh most.
    """

    curve: Curve | None = None
    tokens: int = 0
    excess: int = 0
    spread: float = 0.25
    expected: Curve | None = None
    draft_offset: float | None = None
    draft_error: float = 0.0


def history_to_json(history: SearchHistory) -> dict[str, Any]:
    """The history as lists and numbers, for a file; nothing is rounded."""
    return {
        name: value.points if isinstance(value, Curve) else value
        for name, value in vars(history).items()
    }


def history_from_json(plain: Mapping[str, Any]) -> SearchHistory:
    """The inverse of `history_to_json`. Fields that only earlier versions had are left out."""

    def value(x: Any) -> Any:
        return Curve(Point(*point) for point in x) if isinstance(x, list) else x

    names = [field.name for field in fields(SearchHistory)]
    return SearchHistory(**{name: value(plain[name]) for name in names if name in plain})


def _between(points: list[Point], x: float) -> float:
    """Linear interpolation; beyond the outermost points their values."""
    if x <= points[0].x:
        return points[0].y
    if x >= points[-1].x:
        return points[-1].y
    right = bisect.bisect_right(points, x, key=lambda p: p.x)
    (x0, y0), (x1, y1) = points[right - 1], points[right]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)

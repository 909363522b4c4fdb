"""What is known of a block's loss by its token count, and what a clip's next block will do. Plain Python.

Counts and losses are taken as logarithms, where curves of neighbouring blocks are nearly shifted copies of each other. So a block's curve
is guessed by the curve remembered of the blocks before it, moved until it runs through all that was measured of this block: each new
measurement corrects the guess near itself, and the remembered shape fills the gaps.
"""

import bisect
import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

_SLOPE = 0.7  # of log loss by log count, where nothing is known; fitted on recorded curves
_SAME = 0.03  # a remembered point this near (in log counts) to a new one gives way to it
_TILT = 0.5  # share of the slope of moves that is expected to go on
_MOST_POINTS = 16
_TINY = 1e-30  # losses below are as good as zero, which has no logarithm


class Point(NamedTuple):
    """One measurement: the logarithms of a count and of its loss."""

    x: float
    y: float


class Curve:
    """Log loss over log count: straight between its points, and beyond them with a slope of its own."""

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

    def through(self, measured: list[Point]) -> "Curve":
        """This curve moved through the points of another block; between two of them by a mix of both moves.

        Beyond them half of the difference between the last two moves goes on: on a plateau the next count down is good, too.
        """
        if not measured:
            return self
        moves = sorted(Point(p.x, p.y - self.at(p.x)) for p in measured)
        kept = [p for p in self.points if all(abs(p.x - m.x) > _SAME for m in moves)]
        return Curve([*measured, *(Point(p.x, p.y + _tilted(moves, p.x)) for p in kept)])

    def crossing(self, level: float, low: float, high: float) -> float | None:
        """The smallest log count from `low` to `high` at which the log loss is down to `level`; None: nowhere there."""
        inner = [p for p in self.points if low < p.x < high]
        path = [Point(low, self.at(low)), *inner, Point(high, self.at(high))]
        if path[0].y <= level:
            return low
        for (x0, y0), (x1, y1) in itertools.pairwise(path):
            if y1 <= level:
                return x0 + (x1 - x0) * (y0 - level) / (y0 - y1)
        return None

    def near(self, x: float) -> "Curve":
        """This curve with no more points than are worth remembering: those nearest to `x`."""
        return Curve(sorted(self.points, key=lambda p: abs(p.x - x))[:_MOST_POINTS])


def points_of(losses: Mapping[int, float]) -> list[Point]:
    """The points of measured losses by count; losses that are not finite say nothing."""
    return [
        Point(math.log(count), log_loss(loss))
        for count, loss in losses.items()
        if math.isfinite(loss)
    ]


def log_loss(loss: float) -> float:
    """The logarithm of a loss, 0 included."""
    return math.log(max(loss, _TINY))


@dataclass
class SearchHistory:
    """What the blocks of a clip so far tell about the next one. A new clip gets a new memory.

    Attributes:
      curve: as far as it is known from the last blocks; None before the first.
      tokens: kept in all blocks so far.
      blocks, passes: searched so far, and the counts that were tried for them.
      spread: how far first guesses lay from the count kept, in log counts; recent blocks weigh most.
      excess: those of them that the search knew it could perhaps have saved, and left for speed.
      expected: the curve that a prior gave for the block that `curve` is of; None: there is no prior.
    """

    curve: Curve | None = None
    tokens: int = 0
    excess: int = 0
    spread: float = 0.25
    blocks: int = 0
    passes: int = 0
    expected: Curve | None = None


def history_to_json(memory: SearchHistory) -> dict[str, Any]:
    """The memory in lists and numbers, for a file; exact."""
    return {
        name: value.points if isinstance(value, Curve) else value
        for name, value in vars(memory).items()
    }


def history_from_json(plain: Mapping[str, Any]) -> SearchHistory:
    """What `memory_to_plain` was given."""

    def value(x: Any) -> Any:
        return Curve(Point(*point) for point in x) if isinstance(x, list) else x

    return SearchHistory(**{name: value(x) for name, x in plain.items()})


def _tilted(moves: list[Point], x: float) -> float:
    """Straight interpolation; before the first and after the last point with part of the slope there."""
    if len(moves) == 1 or moves[0].x <= x <= moves[-1].x:
        return _between(moves, x)
    (near, next_one) = (moves[0], moves[1]) if x < moves[0].x else (moves[-1], moves[-2])
    slope = (next_one.y - near.y) / math.copysign(
        max(abs(next_one.x - near.x), _SAME), next_one.x - near.x
    )
    return near.y + _TILT * min(max(slope, -_SLOPE), _SLOPE) * (x - near.x)


def _between(points: list[Point], x: float) -> float:
    """Straight interpolation; before the first and after the last point as at these."""
    if x <= points[0].x:
        return points[0].y
    if x >= points[-1].x:
        return points[-1].y
    right = bisect.bisect_right(points, x, key=lambda p: p.x)
    (x0, y0), (x1, y1) = points[right - 1], points[right]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)

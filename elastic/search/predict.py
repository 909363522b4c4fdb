"""The search that predicts: which counts to try next, from the curves of the blocks before. Plain Python.

Each try is a guess by the remembered curve, moved through what was measured of this block. A count that meets the threshold is taken
when the tokens that a lower one would probably save are few enough (`tolerance`, over the clip). So the answer is always measured, and
never known to be wasteful; where guesses fail, halving the range takes over, which bounds the tries.
"""

import math
from collections.abc import Callable, Iterator, Mapping

from elastic.search.rate_curve import Curve, Point, SearchHistory, log_loss, points_of

# Fitted by replaying recorded curves of clips that no figure in the README is measured on.
_MARGIN = 0.004  # of log counts above the guess: that it meets is worth more than the token
_MOST_FIRST = 0.01  # the same for a first guess, in all that its usual error may add to it
_DOUBT = 0.06  # share of the way from the nearest measured count to the guess that may be wrong
_CREDIT = 2  # blocks ahead (this one too) of which a block may use what may be left unsaved: first ones are dear
_SNAP = 0.02  # a guess this near (in log counts) to an end of the range means the end
_MOST_EXCESS = 0.06  # share of one block's tokens that may be left unsaved
_AIM = 2.2  # passes a block; below, less is left unsaved
_CLOSER = 0.8  # this share of it
_DOUBTS = 3  # how far to each side of a guess several counts reach, in such doubts
_LEAST_STEP = 0.03  # of log counts, where steps double
GUESSES = 8  # calls before halving takes over


def predict(
    *,
    smallest: int,
    largest: int,
    threshold: float,
    width: int,
    tolerance: float,
    memory: SearchHistory,
    losses: Mapping[int, float],
    meets: Callable[[int], bool],
) -> Iterator[list[int]]:
    """Groups of counts to try, as a plan of `elastic.search` gives them; `memory` learns at the end.

    Args:
      smallest, largest: the range; its ends are tried when, and only when, they matter.
      width: most counts in a group.
      tolerance: share of the clip's tokens that may be left unsaved.
      losses, meets: what is measured by the time that the iterator is resumed.
    """
    level = log_loss(threshold)
    guess = memory.curve or Curve([Point((math.log(smallest) + math.log(largest)) / 2, level)])
    state = _Bracket(smallest, largest)
    calls = 0
    while not state.closed:
        curve = guess.through(points_of(losses))
        best = _crossing_count(curve, level, state)
        if state.found is not None and best is not None:
            excess = state.found - best
            # A clip that goes well can afford to look closer.
            cheap = memory.passes + len(losses) < _AIM * (memory.blocks + 1)
            share = tolerance * (_CLOSER if cheap else 1)
            allowed = share * (memory.tokens + _CREDIT * state.found) - memory.excess
            if excess < 1 or excess <= min(allowed, _MOST_EXCESS * state.found):
                break
        if calls < GUESSES:
            group = _guesses(curve, level, state, width=width, spread=memory.spread)
        else:
            group = state.parts(width)
        yield group
        calls += 1
        state.narrow(group, meets)
    curve, first = (
        guess.through(points_of(losses)),
        guess.crossing(level, *_Bracket(smallest, largest).ends),
    )
    kept = largest if state.found is None else state.found
    if state.found is not None and (best := _crossing_count(curve, level, state)) is not None:
        memory.excess += max(0, kept - best)
    missed = abs(math.log(kept) - (math.log(largest) if first is None else first))
    memory.spread = 0.5 * memory.spread + 0.5 * missed
    memory.curve, memory.tokens = curve.near(math.log(kept)), memory.tokens + kept
    memory.passes, memory.blocks = memory.passes + len(losses), memory.blocks + 1


class _Bracket:
    """Between which counts the answer lies: `fails` and those below it are out, `found` is the least that meets."""

    def __init__(self, smallest: int, largest: int):
        self.smallest, self.largest = smallest, largest
        self.fails, self.meets = smallest - 1, largest + 1  # just outside: nothing is known
        self.run = 0  # calls in a row after which the same side moved; negative: that of `meets`

    @property
    def found(self) -> int | None:
        return self.meets if self.meets <= self.largest else None

    @property
    def failed(self) -> bool:
        """Whether a count was seen to fail."""
        return self.fails >= self.smallest

    @property
    def closed(self) -> bool:
        return self.meets - self.fails <= 1

    @property
    def ends(self) -> tuple[float, float]:
        """The log counts between which the answer lies."""
        return math.log(max(self.fails, self.smallest)), math.log(min(self.meets, self.largest))

    def narrow(self, group: list[int], meets: Callable[[int], bool]) -> None:
        """Takes a measured group. The smallest count that meets ends the bracket even where the loss is not monotone."""
        before = self.fails, self.meets
        self.meets = next((count for count in group if meets(count)), self.meets)
        self.fails = max((count for count in group if count < self.meets), default=self.fails)
        raised, lowered = self.fails != before[0], self.meets != before[1]
        if raised and lowered:
            self.run = 0
        elif raised:
            self.run = max(self.run, 0) + 1
        else:
            self.run = min(self.run, 0) - 1

    def around(self, centre: float, spread: float, width: int) -> list[int]:
        """Up to `width` counts inside the bracket, evenly from `spread` below the log count `centre` to `spread` above."""
        low, high = self.ends
        steps = [0.0] if width == 1 else [2 * i / (width - 1) - 1 for i in range(width)]
        places = [min(max(centre + spread * step, low), high) for step in steps]
        counts = [math.ceil(math.exp(place) - 1e-9) for place in places]
        return sorted({min(max(count, self.fails + 1), self.meets - 1) for count in counts})

    def parts(self, width: int) -> list[int]:
        """Counts that split the bracket evenly; the largest first, where that was not tried."""
        if self.found is None and width == 1 and self.fails < self.largest:
            return [self.largest]
        inner = min(width, self.meets - self.fails - 1)
        span = self.meets - self.fails
        return [self.fails + span * i // (inner + 1) for i in range(1, inner + 1)]


def _crossing_count(curve: Curve, level: float, state: _Bracket) -> int | None:
    """The least count that, by the curve, meets the threshold; None: none of the bracket."""
    x = curve.crossing(level, *state.ends)
    return None if x is None else max(math.ceil(math.exp(x) - 1e-9), state.fails + 1)


def _guesses(
    curve: Curve, level: float, state: _Bracket, *, width: int, spread: float
) -> list[int]:
    """Counts to try next: one a little beyond where the curve crosses; several around it, as far as it may be wrong."""
    low, high = state.ends
    x = curve.crossing(level, low, high)
    if state.found is None and (x is None or x >= high - _SNAP):
        return [state.largest]  # all is expected to fail, and this says so for certain
    if x is None:  # a curve that contradicts what was measured
        return state.parts(width)
    if not state.failed and x <= low + _SNAP:
        return [state.smallest]
    repeats = abs(state.run) - 1  # how often in a row the guess fell on the same side
    if state.failed and state.found is not None:
        doubt = _DOUBT * min(x - low, high - x)
        lean = 1 - 0.5 ** max(repeats - 1, 0)  # to the middle, where the curve does not deliver
        centre = (1 - lean) * (x + _MARGIN + doubt) + lean * (low + high) / 2
    elif state.failed:  # and nothing met: steps double
        doubt = _DOUBT * (x - low)
        centre = x + _MARGIN + doubt + (2**repeats - 1) * max(x - low, _LEAST_STEP)
    elif state.found is not None:  # and nothing failed
        doubt = _DOUBT * (high - x)
        centre = high - (high - x) * 2**repeats + _MARGIN + doubt
    else:
        centre, doubt = x + _MARGIN + min(0.1 * spread, _MOST_FIRST), spread / _DOUBTS
    return state.around(centre, _DOUBTS * doubt, width)

"""The predicting search: it guesses which count meets the threshold from the rate curves of earlier blocks. Plain Python.

Each try is a guess from the remembered curve, shifted so that it runs through the losses measured for this block. The search stops at
a measured count that meets the threshold when a lower count would probably save only few tokens (`tolerance`, summed over the clip).
The result is therefore always measured. Where guesses keep failing, the search halves the range, which bounds the number of tries.
"""

import math
from collections.abc import Callable, Generator, Iterator, Mapping

from elastic.search.base import Draft
from elastic.search.rate_curve import Curve, Point, SearchHistory, log_loss, points_of

# The constants were fitted by replaying recorded curves of clips that no figure in the README is measured on.
# Distances are in log counts: the natural logarithm of the ratio of two counts.

# Added to a guess: meeting the threshold is worth more than one token.
_MARGIN = 0.009
# Standard error of a guess, as a share of its distance from the nearest measured count.
_UNCERTAINTY = 0.03
# Number of blocks, this one included, whose tolerance this block may spend: a clip's first blocks are expensive.
_CREDIT = 3
# A guess this close to an end of the range becomes that end.
_SNAP = 0.025
# Largest share of one block's tokens that may be more than needed.
_MOST_EXCESS = 0.055
# Several counts in one call cover the guess +- this many uncertainties.
_REACH = 3
# The first of the doubling steps.
_LEAST_STEP = 0.03
# Calls before the search halves the range instead.
GUESSES = 8
# A draft tells the crossing if it is this near to it.
_NEAR_ENOUGH = 0.015
_MOST_DRAFTS = 6
# After drafts `_MARGIN` is this, and so much more for each unit of log loss that drafts were off in earlier blocks.
_DRAFTED_MARGIN = 0.004
_MARGIN_OF_ERROR = 1
# In log loss: where drafts tell less than this, the curves of earlier blocks tell more.
_LARGEST_DRAFT_ERROR = 0.05
# What a block without drafts leaves of that error, so that they are tried again.
_FORGETTING = 0.8


def predict(
    *,
    smallest: int,
    largest: int,
    threshold: float,
    width: int,
    tolerance: float,
    history: SearchHistory,
    losses: Mapping[int, float],
    meets: Callable[[int], bool],
    drafts: Mapping[int, float] | None = None,
) -> Iterator[list[int]]:
    """Yields groups of counts to try, as every plan does (`elastic.search.base.plan`); updates `history` at the end.

    Until a count meets the threshold, and while a lower one would save more tokens than the tolerance allows, it tries the counts
    of `_guesses`. After `GUESSES` calls it splits the interval that is left evenly. Where drafts can be had, they come first: the
    curve from which it guesses then runs through their losses, moved by what the losses of the block before differed from its drafts.

    Args:
      smallest: the smallest count allowed; it is tried only if the result depends on it.
      largest: the largest count allowed; likewise.
      threshold: largest loss accepted.
      width: most counts in a group.
      tolerance: share of the clip's tokens that may be more than needed, to save passes.
      history: what the clip's earlier blocks have shown.
      losses: the loss of every count measured; it holds a group's losses when the iterator is resumed.
      meets: whether a measured count meets the threshold.
      drafts: the loss of the count of each `Draft`, as `losses`; None: no drafts can be had.
    """
    log_threshold = log_loss(threshold)
    guess = history.curve or Curve(
        [Point((math.log(smallest) + math.log(largest)) / 2, log_threshold)]
    )
    state = _Bracket(smallest, largest)
    margin, drafted = _MARGIN, None
    if drafts is not None and history.draft_error > _LARGEST_DRAFT_ERROR:
        history.draft_error *= _FORGETTING
    elif drafts is not None and smallest < largest:
        offset = history.draft_offset or 0.0
        guess = drafted = yield from _drafts(guess, log_threshold, state, drafts, offset)
        margin = min(_DRAFTED_MARGIN + _MARGIN_OF_ERROR * history.draft_error, _MARGIN)
    calls = 0
    while not state.closed:
        curve = guess.shifted_through(points_of(losses))
        best = _crossing_count(curve, log_threshold, state)
        if state.found is not None and best is not None:
            excess = state.found - best
            allowed = tolerance * (history.tokens + _CREDIT * state.found) - history.excess
            if excess < 1 or excess <= min(allowed, _MOST_EXCESS * state.found):
                break
        if calls < GUESSES:
            group = _guesses(
                curve, log_threshold, state, width=width, spread=history.spread, margin=margin
            )
        else:
            group = state.parts(width)
        yield group
        calls += 1
        state.narrow(group, meets)
    first_guess = guess.crossing(log_threshold, *_Bracket(smallest, largest).ends)
    curve = guess.shifted_through(points_of(losses))
    _remember(history, curve, log_threshold, state, first_guess=first_guess)
    kept = state.largest if state.found is None else state.found
    if drafted is not None and math.isfinite(losses[kept]):
        _remember_drafts(history, drafted, Point(math.log(kept), log_loss(losses[kept])))


def _drafts(
    guess: Curve,
    log_threshold: float,
    state: "_Bracket",
    drafts: Mapping[int, float],
    offset: float,
) -> Generator[Draft, None, Curve]:
    """Drafts the count where the curve crosses the threshold, until that is near to one that was drafted; gives the curve.

    Args:
      guess: the curve of the block as expected without drafts.
      log_threshold: the log of the threshold.
      state: has the smallest and the largest count.
      drafts: the losses of the counts drafted so far.
      offset: what is added to their logarithms.
    """
    while True:
        moved = [Point(p.x, p.y + offset) for p in points_of(drafts)]
        curve = guess.shifted_through(moved)
        count = _crossing_count(curve, log_threshold, state) or state.largest
        is_known = any(abs(math.log(count / other)) <= _NEAR_ENOUGH for other in drafts)
        if is_known or len(drafts) >= _MOST_DRAFTS:
            return curve
        yield Draft([count])


def _remember_drafts(history: SearchHistory, drafted: Curve, result: Point) -> None:
    """Adds to the history how far a block's loss was from the curve of its drafts.

    Args:
      history: changed in place.
      drafted: the curve, which the history's offset has moved.
      result: the count kept, and the loss measured with it.
    """
    missed = result.y - drafted.at(result.x)
    if history.draft_offset is not None:
        history.draft_error = 0.5 * history.draft_error + 0.5 * abs(missed)
    history.draft_offset = (history.draft_offset or 0.0) + missed


def _remember(
    history: SearchHistory,
    curve: Curve,
    log_threshold: float,
    state: "_Bracket",
    *,
    first_guess: float | None,
) -> None:
    """Adds a block whose search has ended to the history of its clip.

    Args:
      history: changed in place.
      curve: the estimated curve of the block, through all its measured losses.
      log_threshold: the log of the threshold.
      state: the result, and which counts below it may still meet the threshold.
      first_guess: the log of the count that was expected before anything was measured; None: every count was expected to fail.
    """
    kept = state.largest if state.found is None else state.found
    if state.found is not None:
        best = _crossing_count(curve, log_threshold, state)
        history.excess += 0 if best is None else max(0, kept - best)
    missed = abs(math.log(kept) - (math.log(state.largest) if first_guess is None else first_guess))
    history.spread = 0.5 * history.spread + 0.5 * missed
    history.curve = curve.pruned_around(math.log(kept))
    history.tokens += kept


class _Bracket:
    """The open interval of counts that holds the result.

    `fails` is the largest count known to fail, `meets` the smallest known to meet the threshold. Before one is known, they stand
    just outside the range.
    """

    def __init__(self, smallest: int, largest: int):
        self.smallest, self.largest = smallest, largest
        self.fails, self.meets = smallest - 1, largest + 1
        self.streak = 0  # how many calls in a row raised `fails`; negative: lowered `meets`

    @property
    def found(self) -> int | None:
        """The smallest count known to meet the threshold; None: none is known."""
        return self.meets if self.meets <= self.largest else None

    @property
    def failed(self) -> bool:
        """Whether a measured count failed."""
        return self.fails >= self.smallest

    @property
    def closed(self) -> bool:
        """Whether no count is left between `fails` and `meets`."""
        return self.meets - self.fails <= 1

    @property
    def ends(self) -> tuple[float, float]:
        """The interval in log counts, cut at the ends of the range."""
        return math.log(max(self.fails, self.smallest)), math.log(min(self.meets, self.largest))

    def narrow(self, group: list[int], meets: Callable[[int], bool]) -> None:
        """Narrows the interval by a measured group. Where the loss is not monotone, the smallest count that meets counts."""
        before = self.fails, self.meets
        self.meets = next((count for count in group if meets(count)), self.meets)
        self.fails = max((count for count in group if count < self.meets), default=self.fails)
        raised, lowered = self.fails != before[0], self.meets != before[1]
        if raised and lowered:
            self.streak = 0
        elif raised:
            self.streak = max(self.streak, 0) + 1
        else:
            self.streak = min(self.streak, 0) - 1

    def around(self, centre: float, spread: float, width: int) -> list[int]:
        """Up to `width` counts inside the interval, evenly spaced in log counts from `centre - spread` to `centre + spread`."""
        low, high = self.ends
        steps = [0.0] if width == 1 else [2 * i / (width - 1) - 1 for i in range(width)]
        places = [min(max(centre + spread * step, low), high) for step in steps]
        counts = [math.ceil(math.exp(place) - 1e-9) for place in places]
        return sorted({min(max(count, self.fails + 1), self.meets - 1) for count in counts})

    def parts(self, width: int) -> list[int]:
        """Up to `width` counts that split the interval evenly; the largest count first, if it was not tried."""
        if self.found is None and width == 1 and self.fails < self.largest:
            return [self.largest]
        inner = min(width, self.meets - self.fails - 1)
        span = self.meets - self.fails
        return [self.fails + span * i // (inner + 1) for i in range(1, inner + 1)]


def _crossing_count(curve: Curve, log_threshold: float, state: _Bracket) -> int | None:
    """The smallest count in the interval whose estimated loss meets the threshold; None: there is none."""
    x = curve.crossing(log_threshold, *state.ends)
    return None if x is None else max(math.ceil(math.exp(x) - 1e-9), state.fails + 1)


def _guesses(
    curve: Curve, log_threshold: float, state: _Bracket, *, width: int, spread: float, margin: float
) -> list[int]:
    """Counts to try next: slightly above where the curve crosses the threshold, or several around that count.

    What is known decides the step; the first line that holds counts:

    - No count met the threshold, and the curve crosses it at the upper end or nowhere: the largest count.
    - The curve crosses it nowhere, which contradicts a measurement: the interval is split evenly.
    - No count failed, and the curve crosses it at the lower end: the smallest count.
    - Counts failed and counts met it: the crossing; the more guesses in a row missed on one side, the nearer to the middle.
    - Counts failed only: above the crossing by a step from the largest failed count that doubles with every miss.
    - Counts met it only: below the smallest of them, by a step that doubles with every miss.
    - Nothing is measured: the crossing.

    Args:
      curve: the estimated curve of this block.
      log_threshold: the log of the threshold.
      state: what is known of the result.
      width: most counts to return.
      spread: usual error of a first guess, in log counts.
      margin: is added to a guess, in log counts.
    """
    low, high = state.ends
    x = curve.crossing(log_threshold, low, high)
    if state.found is None and (x is None or x >= high - _SNAP):
        # Every count is expected to fail; measuring the largest one proves it.
        return [state.largest]
    if x is None:  # the curve contradicts a measurement
        return state.parts(width)
    if not state.failed and x <= low + _SNAP:
        return [state.smallest]
    repeats = abs(state.streak) - 1  # how often in a row the guess missed on the same side
    if state.failed and state.found is not None:
        uncertainty = _UNCERTAINTY * min(x - low, high - x)
        lean = 1 - 0.5 ** max(repeats - 1, 0)  # 0: trust the curve, towards 1: halve
        centre = (1 - lean) * (x + margin + uncertainty) + lean * (low + high) / 2
    elif state.failed:  # no count met the threshold yet: double the step
        uncertainty = _UNCERTAINTY * (x - low)
        centre = x + margin + uncertainty + (2**repeats - 1) * max(x - low, _LEAST_STEP)
    elif state.found is not None:  # no count failed yet: double the step
        uncertainty = _UNCERTAINTY * (high - x)
        centre = high - (high - x) * 2**repeats + margin + uncertainty
    else:
        centre, uncertainty = x + margin, spread / _REACH
    return state.around(centre, _REACH * uncertainty, width)

"""The search of one block: options, result, the loop, and the registry of searches. Plain Python.

A search proposes token counts, and its caller measures their losses with the model. A count meets the
threshold when its loss is at most the threshold. A search returns the smallest count that was *measured*
to meet it. When none does, it returns the fallback count, measured too, with `met=False`. No count is
evaluated twice; the smallest and the largest are candidates.

This differs from the released system on purpose (difference 2 in elastic/README.md): there the binary search
returns the count that it tried last, met or not, never tries the smallest one, and does not mark a
block that misses the threshold.

A search is a plan: a generator that yields groups of counts and reads the losses of the groups before.
A new search is one function decorated with `@plan("name")`.
"""

import difflib
import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, SupportsFloat

from elastic.search.rate_curve import SearchHistory

log = logging.getLogger(__name__)


class Draft(list[int]):
    """A group of one count, whose loss a draft is to tell: about what the model would measure, for a part of the cost."""


TOLERANCE = 0.018  # share of a clip's tokens that 'predict' may keep beyond need, to save passes


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """The count chosen for one block, and what the choice cost.

    Attributes:
      num_kept: tokens kept.
      loss: the reconstruction error measured with `num_kept` tokens.
      met: whether `loss` is at most the threshold; without a threshold, whether it is finite.
      calls: calls of the model, each with one group of counts. The passes over a block are `len(tried)`: one a count.
      tried: every count evaluated and its loss, in the order tried.
      drafts: how many counts were drafted.
    """

    num_kept: int
    loss: float
    met: bool
    calls: int
    tried: dict[int, float]
    drafts: int = 0


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """What a search may try. `make_search` documents the fields.

    Raises:
      ValueError: a field is out of its range.
    """

    min_kept: int
    max_kept: int
    threshold: float | None = None
    num_tokens: int | None = None
    fallback_fraction: float = 1.0
    max_fraction: float = 1.0
    num_counts: int = 100
    width: int = 1
    full_curve: bool = False
    tolerance: float = TOLERANCE

    def __post_init__(self):
        if not 1 <= self.min_kept <= self.max_kept:
            raise ValueError(
                f"min_kept={self.min_kept} must lie between 1 and max_kept={self.max_kept}."
            )
        for name in ("fallback_fraction", "max_fraction"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0 and at most 1.")
        if self.threshold is not None and not 0 <= self.threshold < math.inf:
            raise ValueError(
                f"threshold={self.threshold} must be a finite number, 0 or above: "
                "it is a mean of squared errors."
            )
        if self.width < 1:
            raise ValueError(f"width={self.width} must be at least 1 count per call.")
        if not 0 <= self.tolerance < 1:
            raise ValueError(
                f"tolerance={self.tolerance} must be a share of the tokens, from 0 to below 1."
            )
        if self.num_counts < 2:
            raise ValueError(f"num_counts={self.num_counts} must be at least 2: both ends.")
        if self.largest < self.min_kept:
            raise ValueError(
                f"max_fraction={self.max_fraction} of max_kept={self.max_kept} allows "
                f"{self.largest} tokens, below min_kept={self.min_kept}; "
                f"use at least {self.min_kept / self.max_kept:.4g}."
            )
        if self.num_tokens is not None and not self.min_kept <= self.num_tokens <= self.largest:
            raise ValueError(
                f"num_tokens={self.num_tokens} must lie between {self.min_kept} and {self.largest}, the largest count allowed."
            )

    @property
    def largest(self) -> int:
        """The largest count that may be tried: `max_fraction` of `max_kept`, rounded up."""
        return self._share(self.max_fraction)

    @property
    def fallback(self) -> int:
        """The count taken when none meets the threshold; within `min_kept` and `largest`."""
        if self.num_tokens is not None:
            return self.num_tokens
        return min(max(self._share(self.fallback_fraction), self.min_kept), self.largest)

    def _share(self, fraction: float) -> int:
        # Rounded first: 0.07 * 100 is 7.000000000000001 in binary and would become 8.
        return math.ceil(round(fraction * self.max_kept, 6))


class Seen(Protocol):
    """What a plan can read: the losses of the counts that it has yielded so far, and the clip's history."""

    @property
    def losses(self) -> Mapping[int, float]:
        """The loss of every count tried."""
        ...

    @property
    def drafts(self) -> Mapping[int, float]:
        """The loss of every count drafted."""
        ...

    @property
    def can_draft(self) -> bool:
        """Whether a plan may yield a `Draft`."""
        ...

    @property
    def history(self) -> SearchHistory:
        """What the searches of the clip's earlier blocks have shown."""
        ...

    def meets(self, count: int) -> bool:
        """Whether a measured count meets the threshold."""
        ...


SearchPlan = Callable[[SearchOptions, Seen], Iterator[list[int]]]
_PLANS: dict[str, SearchPlan] = {}


def plan(name: str) -> Callable[[SearchPlan], SearchPlan]:
    """Registers a search: a function `(options, seen) -> iterator of groups of untried counts`.

    Each group holds at least one count, all distinct. When the iterator is resumed, `seen.losses` holds
    every count of the groups before. The loss of a `Draft` is in `seen.drafts` instead.
    """

    def register(function: SearchPlan) -> SearchPlan:
        if name in _PLANS:
            raise ValueError(f"A search named {name!r} exists already.")
        _PLANS[name] = function
        return function

    return register


def search_names() -> tuple[str, ...]:
    """The names that `make_search` accepts, in the order of `plans.py`; --search_alg accepts the same."""
    return tuple(_PLANS)


class Search:
    """The search of one block: `propose`, evaluate, `observe`, until `propose` returns None.

    `run_search` is that loop. Use `make_search` to build one.
    """

    def __init__(
        self,
        options: SearchOptions,
        groups: SearchPlan,
        history: SearchHistory | None = None,
        *,
        can_draft: bool = False,
    ):
        self._options, self.can_draft = options, can_draft
        self._drafts: dict[int, float] = {}
        self.history = SearchHistory() if history is None else history
        self._pending: list[int] | None = None
        self._finished = False
        self._calls = 0
        self._tried: dict[int, float] = {}
        self._groups = groups(options, self)

    @property
    def losses(self) -> Mapping[int, float]:
        """The loss of every count tried."""
        return self._tried

    @property
    def drafts(self) -> Mapping[int, float]:
        """The loss of every count drafted."""
        return self._drafts

    @property
    def wants_draft(self) -> bool:
        """Whether a draft is to tell the loss of the count that is proposed now."""
        self.propose()
        return isinstance(self._pending, Draft)

    @property
    def options(self) -> SearchOptions:
        """What this search may try."""
        return self._options

    def best(self) -> int | None:
        """The smallest measured count that meets the threshold; None: there is none yet."""
        return min((count for count in self._tried if self.meets(count)), default=None)

    def propose(self) -> list[int] | None:
        """The counts to try now (at least one, distinct, none tried before), or None when finished.

        Where `wants_draft`, it is a count to be drafted.

        Repeats itself until the losses of these counts are observed.
        """
        if self._pending is None and not self._finished:
            self._pending = next(self._groups, None) or self._unmeasured_fallback()
            self._finished = self._pending is None
        return None if self._pending is None else list(self._pending)

    def observe(self, counts: Sequence[int], losses: Collection[SupportsFloat]) -> None:
        """Takes the losses of the counts proposed last.

        Raises:
          ValueError: `counts` is not what was proposed, or there is not one loss for each.
        """
        counts = [int(count) for count in counts]
        if self._pending is None or counts != list(self._pending):
            raise ValueError(f"counts={counts} must be the counts proposed last, {self._pending}.")
        if len(losses) != len(counts):
            raise ValueError(f"{len(losses)} losses for {len(counts)} counts; one each is needed.")
        if isinstance(self._pending, Draft):
            self._drafts |= zip(counts, map(float, losses), strict=True)
            self._pending = None
            return
        for count, loss in zip(counts, losses, strict=True):
            self._tried[count] = loss = float(loss)
            if not math.isfinite(loss):
                log.warning(
                    "The loss with %d tokens is %s; counted as above the threshold.", count, loss
                )
        self._calls += 1
        self._pending = None

    def result(self) -> SearchResult:
        """The count chosen.

        Raises:
          ValueError: the search is not finished.
        """
        if self.propose() is not None:
            raise ValueError(
                f"The search still needs the losses of {self._pending}; "
                "observe them before asking for the result."
            )
        num_kept = self.best()
        met = num_kept is not None
        if num_kept is None:
            num_kept = self._options.fallback
        return SearchResult(
            num_kept=num_kept,
            loss=self._tried[num_kept],
            met=met,
            calls=self._calls,
            tried=dict(self._tried),
            drafts=len(self._drafts),
        )

    def _unmeasured_fallback(self) -> list[int] | None:
        """The fallback count, if it is needed and its loss unknown.

        Where the loss is not monotone it may meet the threshold after all, and is then an answer.
        """
        fallback = self._options.fallback
        if fallback in self._tried or self.best() is not None:
            return None
        return [fallback]

    def meets(self, count: int) -> bool:
        """Whether a measured count meets the threshold; without a threshold, whether its loss is finite."""
        loss, threshold = self._tried[count], self._options.threshold
        return math.isfinite(loss) if threshold is None else loss <= threshold  # False for NaN


def make_search(
    name: str,
    *,
    min_kept: int,
    max_kept: int,
    threshold: float | None = None,
    num_tokens: int | None = None,
    fallback_fraction: float = 1.0,
    max_fraction: float = 1.0,
    num_counts: int = 100,
    width: int = 1,
    full_curve: bool = False,
    tolerance: float = TOLERANCE,
    history: SearchHistory | None = None,
    can_draft: bool = False,
) -> Search:
    """The search of one block.

    Args:
      name: 'binary' (assumes that the loss falls with the count), 'predict' (also that it falls
        much as in earlier blocks), 'linear' (assumes neither) or 'fixed'.
      min_kept: smallest count allowed; it is a candidate itself.
      max_kept: tokens per block.
      threshold: largest loss accepted. Needed unless `name` is 'fixed'; there it only sets `met`.
      num_tokens: the count of 'fixed'; only there.
      fallback_fraction: share of `max_kept`, rounded up, that is kept when no count meets the
        threshold; raised to `min_kept` and lowered to `max_fraction` where it lies outside.
      max_fraction: share of `max_kept`, rounded up, that is the largest count tried.
      num_counts: how many counts 'linear' spaces over the range, before equal ones are merged.
      width: counts per call of the model.
      full_curve: 'linear' tries all its counts, also after one met the threshold.
      tolerance: share of a clip's tokens that 'predict' may keep beyond need, to save passes; 0: none.
      history: what 'predict' knows of the clip's earlier blocks; it adds this one. None: nothing is known.
      can_draft: whether 'predict' may ask for drafts (`Search.wants_draft`).

    Raises:
      ValueError: an unknown name, a value out of range, or options that do not fit the search.
    """
    if name not in _PLANS:
        hint = "".join(
            f" Did you mean {close!r}?" for close in difflib.get_close_matches(name, _PLANS, n=1)
        )
        raise ValueError(f"Unknown search {name!r}; known are {', '.join(search_names())}.{hint}")
    if name == "fixed":
        if num_tokens is None:
            raise ValueError(f"A fixed search needs num_tokens, from {min_kept} to {max_kept}.")
    else:
        if threshold is None:
            raise ValueError(
                f"A {name} search needs a threshold; give one, or use 'fixed' with num_tokens."
            )
        if num_tokens is not None:
            raise ValueError(
                f"num_tokens={num_tokens} belongs to the fixed search, not to {name!r}; "
                "drop one of the two."
            )
    options = SearchOptions(
        min_kept=min_kept,
        max_kept=max_kept,
        threshold=threshold,
        num_tokens=num_tokens,
        fallback_fraction=fallback_fraction,
        max_fraction=max_fraction,
        num_counts=num_counts,
        width=width,
        full_curve=full_curve,
        tolerance=tolerance,
    )
    return Search(options, _PLANS[name], history, can_draft=can_draft)


_Losses = Callable[[list[int]], Collection[SupportsFloat]]


def run_search(search: Search, evaluate: _Losses, draft: _Losses | None = None) -> SearchResult:
    """Runs a search to its end; `evaluate` gives one loss for each count of a group, `draft` one for each count to be drafted."""
    while (counts := search.propose()) is not None:
        losses = draft if draft and search.wants_draft else evaluate
        search.observe(counts, losses(counts))
    return search.result()

"""A budget of tokens for a whole clip, or for one stretch of it after the other: measured first, then spent where it buys most.

Each stretch is gone through twice. First every block gets the same count, and a few other counts are measured beside it: that gives the
curves from which `elastic.budget` splits the budget. Then the split is carried out. The context of a block is another one then, so the
curves are a forecast; where the error came out higher than that of equal counts, these are taken after all, which were carried out too.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from elastic.metrics import Metric
from elastic.search import geometric_counts, make_search
from elastic.search.allocation import allocate, counts_to_measure, price_of, tabulate
from elastic.tokenizer.block_codec import Codec, CodecCache
from elastic.tokenizer.result import BlockResult
from elastic.tokenizer.scheduler import BatchScheduler

_SHARING = 8  # blocks before, at most, that are taken to share a budget like the whole clip
_SPREAD = 7  # counts of a block that are measured first, over the whole range


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """What may be spent.

    Attributes:
      avg_tokens: tokens of a block in the mean, at most.
      smallest, largest: the range of a block's count.
      delay_blocks: blocks in a stretch: so many are held in memory, and so late may a block's tokens come. What a
        stretch leaves over, the next one may spend.
      num_counts: counts of a block that are measured to decide, most of them where it could end. More find the best
        split more exactly; each costs a pass.

    Raises:
      ValueError: the mean is not in the range, or a number is too small.
    """

    avg_tokens: float
    smallest: int
    largest: int
    delay_blocks: int = 64
    num_counts: int = 24

    def __post_init__(self):
        if not self.smallest <= self.avg_tokens <= self.largest:
            raise ValueError(
                f"avg_tokens={self.avg_tokens:.6g} must lie between {self.smallest} and {self.largest}, "
                "the fewest and the most tokens of a block of this model."
            )
        if self.delay_blocks < 1:
            raise ValueError(f"delay_blocks={self.delay_blocks} must be 1 or more.")
        if self.num_counts < 2:
            raise ValueError(f"num_counts={self.num_counts} must be 2 or more: both ends.")

    @property
    def equal(self) -> int:
        """The count that every block could have."""
        return math.floor(self.avg_tokens)


def spend(
    codec: Codec,
    weights: dict[str, Any],
    blocks: Iterable[UInt8[np.ndarray, "n rows columns 3"]],
    budget: Budget,
    *,
    width: int = 1,
    restart: bool = False,
    metric: Metric | None = None,
) -> Iterator[BlockResult]:
    """Tokenizes the blocks of a clip under a budget. Over each stretch the error is never above that of equal counts.

    Args:
      width: counts measured in one call.
      restart: whether the context is emptied whenever the window is full.
    """
    cache, first, left = codec.new_cache(), 0, 0.0
    source = iter(blocks)
    while stretch := list(islice(source, budget.delay_blocks)):
        walk = _Walk(codec, weights, stretch, first, width, restart, metric)
        kept = jax.tree.map(jnp.copy, cache)  # committing uses a cache up
        equal, curves, equal_cache = walk.measure(kept, budget)
        available = math.floor(budget.avg_tokens * len(stretch) + left)
        counts = allocate(
            curves,
            available,
            smallest=budget.smallest,
            largest=budget.largest,
            weights=[len(frames) for frames in stretch],
        )
        results, cache = walk.commit(cache, counts)
        if not _error(results) <= _error(equal):
            results, cache = equal, equal_cache
        left = available - sum(result.tokens.num_kept for result in results)
        first += len(stretch)
        for result, curve in zip(results, curves, strict=True):
            yield result._replace(passes=len(curve) + 1)


@dataclasses.dataclass(frozen=True)
class _Walk:
    """One stretch of a clip: its blocks, the number of the first, and how they are tokenized."""

    codec: Codec
    weights: dict[str, Any]
    stretch: list[np.ndarray]
    first: int
    width: int
    restart: bool
    metric: Metric | None

    def measure(
        self, cache: CodecCache, budget: Budget
    ) -> tuple[list[BlockResult], list[dict[int, float]], CodecCache]:
        """Every block with the equal count, and what other counts would give in its place."""
        results, curves, tables = [], [], []
        lanes = self._lanes(cache)
        for number, frames in enumerate(self.stretch, self.first):
            self._put(lanes, number, frames, budget.equal)
            curve = _sampled(functools.partial(lanes.losses_of, 0), budget, self.width, tables)
            ((_, result),) = lanes.step()
            results.append(result)
            curves.append(curve | result.tried)
            tables.append(tabulate(curves[-1], budget.smallest, budget.largest))
        return results, curves, lanes.cache

    def commit(self, cache: CodecCache, counts: list[int]) -> tuple[list[BlockResult], CodecCache]:
        """Every block with its own count."""
        results = []
        lanes = self._lanes(cache)
        for number, (frames, count) in enumerate(
            zip(self.stretch, counts, strict=True), self.first
        ):
            self._put(lanes, number, frames, count)
            ((_, result),) = lanes.step()
            results.append(result)
        return results, lanes.cache

    def _lanes(self, cache: CodecCache) -> BatchScheduler:
        return BatchScheduler(self.codec, self.weights, width=self.width, cache=cache)

    def _put(self, lanes: BatchScheduler, number: int, frames: np.ndarray, count: int) -> None:
        if self.restart and number % self.codec.window_blocks == 0:
            lanes.forget(0)
        most = self.codec.config.tokens_per_block
        search = make_search("fixed", min_kept=1, max_kept=most, num_tokens=count, width=self.width)
        lanes.put(0, frames, search, metric=self.metric)


def _sampled(
    losses_of: Callable[[list[int]], dict[int, float]],
    budget: Budget,
    width: int,
    earlier: Sequence[Mapping[int, float]],
) -> dict[int, float]:
    """A block's losses at `num_counts` counts but the equal one.

    A few are spread over the range. With the curves of the blocks before they tell what a token is worth in this clip, and so where
    this block could end: there lie the others.
    """
    spread = geometric_counts(
        budget.smallest, budget.largest, max(2, min(_SPREAD, budget.num_counts))
    )
    curve = losses_of([count for count in spread if count != budget.equal])
    tables = (*earlier[-_SHARING:], tabulate(curve, budget.smallest, budget.largest))
    sharing = [table for table in tables if table]
    price = price_of(sharing, budget.avg_tokens * len(sharing))
    while (wanted := budget.num_counts - len(curve)) > 0:
        counts = counts_to_measure(curve, price, min(width, wanted))
        # Beside the equal count, which is measured anyway.
        counts = {count + (count == budget.equal) for count in counts} - curve.keys()
        if not counts:
            break
        curve |= losses_of(sorted(counts))
    return curve


def _error(results: list[BlockResult]) -> float:
    """The sum of the losses over the frames."""
    return math.fsum(result.tokens.loss * len(result.frames) for result in results)

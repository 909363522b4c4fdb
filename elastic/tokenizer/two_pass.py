"""A budget of tokens for a clip, or for each stretch of a long one: measured first, then spent where it lowers the error most.

Where frames lie in several tiles, the tiles of all blocks of a stretch share the budget, and the error of a tile counts by its share of
the frame.

Each stretch is tokenized twice. In the first pass every block gets the same count, and a few other counts are measured: this gives the
rate curves from which `elastic.search.allocation` splits the budget. The second pass carries out the split. There a block has another
context than in the first pass, so the curves are a forecast. Where the error is higher than with equal counts, the result of the first
pass is taken.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from elastic.config import ElasticTokConfig
from elastic.metrics import Metric
from elastic.search import geometric_counts, make_search
from elastic.search.allocation import allocate, counts_to_measure, price_of, tabulate
from elastic.tiles import FrameLayout
from elastic.tokenizer.block_codec import Codec, CodecCache
from elastic.tokenizer.frame_tiles import BlockGatherer, to_tile
from elastic.tokenizer.result import BlockResult
from elastic.tokenizer.scheduler import BatchScheduler
from elastic.tokenizer.targets import EncodeOptions, tokens_of_bitrate

_SHARING = 8  # number of earlier blocks that stand for the whole clip when the price of a token is estimated
_SPREAD = 7  # counts of a block that are measured first, over the whole range


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """The tokens that a clip may spend.

    Attributes:
      avg_tokens: mean tokens of a block, at most; of a tile of a block where there are several.
      smallest, largest: the range of a block's count.
      delay_blocks: blocks in a stretch, where a tile counts as a block. They are held in memory, and a block's tokens come at most so
        many blocks late. The next stretch may spend what a stretch leaves over.
      num_counts: counts measured for each block, most of them near its likely count. More counts find a better split; each
        costs a pass.

    Raises:
      ValueError: the mean is not in the range.
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

    @classmethod
    def of(
        cls, options: EncodeOptions, config: ElasticTokConfig, *, rate: float, tiles: int = 1
    ) -> "Budget | None":
        """The budget that options ask for; None where they ask for a threshold or a fixed count.

        Args:
          options: `avg_tokens` or `bitrate`, and how it is spent.
          config: the model.
          rate: frames per second of the clip; 0 for an image.
          tiles: tiles of a frame, which share a bitrate.

        Raises:
          ValueError: the model cannot spend so much or so little, or a bitrate is given for an image.
        """
        if not options.has_budget:
            return None
        mean = options.avg_tokens
        if options.bitrate is not None:
            mean = tokens_of_bitrate(options.bitrate, rate, config) / tiles
        assert mean is not None
        limits = options.search_options(config, width=1)
        return cls(
            avg_tokens=mean,
            smallest=limits.min_kept,
            largest=limits.largest,
            delay_blocks=options.delay_blocks,
            num_counts=options.budget_counts,
        )

    @property
    def equal(self) -> int:
        """The count of every block if all have the same."""
        return math.floor(self.avg_tokens)

    @property
    def passes_per_block(self) -> int:
        """Passes over a block: its counts are measured, the equal count among them or besides, and one is carried out."""
        return self.num_counts + 2


def spend(
    codec: Codec,
    weights: dict[str, Any],
    blocks: Iterable[UInt8[np.ndarray, "n rows columns 3"]],
    budget: Budget,
    *,
    layout: FrameLayout,
    width: int = 1,
    restart: bool = False,
    metric: Metric | None = None,
    on_passes: Callable[[int], None] | None = None,
    num_blocks: int | None = None,
) -> Iterator[BlockResult]:
    """Tokenizes the blocks of a clip under a budget. Over each stretch the error is never above that of equal counts.

    Args:
      codec: the programs of the model.
      weights: the parameters as `Codec.stored` gives them.
      blocks: the whole frames of the clip, uint8; only the last block may be short.
      budget: the tokens that may be spent.
      layout: how the frames lie in tiles.
      width: counts measured in one call of the model.
      restart: whether the context is emptied whenever the window is full.
      metric: the loss of a tile of a block; None: the mean squared error.
      on_passes: called after each call of the model with its number of passes; a tile of a block takes `passes_per_block`.
      num_blocks: how many blocks there are; None: not known.
    """
    tiles, first, left = layout.num_tiles, 0, 0.0
    shares = [layout.share(tile) for tile in range(tiles)]
    caches = [codec.new_cache(num_blocks=num_blocks) for _ in shares]
    source = iter(blocks)
    while stretch := list(itertools.islice(source, max(1, budget.delay_blocks // tiles))):
        walk = _Walk(codec, weights, stretch, first, width, restart, metric, on_passes, layout)
        kept = [jax.tree.map(jnp.copy, cache) for cache in caches]  # committing donates its cache
        equal, curves, equal_caches = walk.measure(kept, budget)
        available = math.floor(budget.avg_tokens * len(curves) + left)
        counts = allocate(
            curves,
            available,
            smallest=budget.smallest,
            largest=budget.largest,
            weights=[len(frames) * share for frames in stretch for share in shares],
        )
        results, caches = walk.commit(caches, counts)
        if not _error(results, shares) <= _error(equal, shares):
            results, caches = equal, equal_caches
        left = available - sum(result.tokens.num_kept for result in results)
        first += len(stretch)
        for number, frames in enumerate(stretch):
            block = BlockGatherer(layout, frames)
            for tile, at in enumerate(range(number * tiles, (number + 1) * tiles)):
                block.add(tile, results[at]._replace(passes=len(curves[at]) + 1))
            yield block.result()


@dataclasses.dataclass(frozen=True)
class _Walk:
    """One stretch of a clip: its blocks, the number of the first, and how they are tokenized.

    `first` is a block number in the clip; the other fields are arguments of `spend`. Lists of results and counts have an entry for
    each tile of each block: a block's tiles one after the other. Caches are those of the tiles.
    """

    codec: Codec
    weights: dict[str, Any]
    stretch: list[np.ndarray]
    first: int
    width: int
    restart: bool
    metric: Metric | None
    on_passes: Callable[[int], None] | None
    layout: FrameLayout

    def measure(
        self, caches: list[CodecCache], budget: Budget
    ) -> tuple[list[BlockResult], list[dict[int, float]], list[CodecCache]]:
        """The first pass: everything with the equal count, its rate curves, and the caches after the last block."""
        results, curves, tables = [], [], []
        schedulers = [self._scheduler(cache) for cache in caches]
        for number, frames in enumerate(self.stretch, self.first):
            for tile, scheduler in enumerate(schedulers):
                self._assign(scheduler, number, frames, tile, budget.equal)
                losses_of = functools.partial(scheduler.losses_of, 0)
                curve = _sampled(losses_of, budget, self.width, tables)
                ((_, result),) = scheduler.step()
                results.append(result)
                curves.append(curve | result.tried)
                tables.append(tabulate(curves[-1], budget.smallest, budget.largest))
        return results, curves, [scheduler.cache for scheduler in schedulers]

    def commit(
        self, caches: list[CodecCache], counts: list[int]
    ) -> tuple[list[BlockResult], list[CodecCache]]:
        """The second pass: everything with its own count, and the caches after the last block."""
        results, left = [], iter(counts)
        schedulers = [self._scheduler(cache) for cache in caches]
        for number, frames in enumerate(self.stretch, self.first):
            for tile, scheduler in enumerate(schedulers):
                self._assign(scheduler, number, frames, tile, next(left))
                ((_, result),) = scheduler.step()
                results.append(result)
        return results, [scheduler.cache for scheduler in schedulers]

    def _scheduler(self, cache: CodecCache) -> BatchScheduler:
        return BatchScheduler(
            self.codec,
            self.weights,
            width=self.width,
            cache=cache,
            on_passes=self.on_passes,
            weighted=self.layout.is_weighted,
        )

    def _assign(
        self, scheduler: BatchScheduler, number: int, frames: np.ndarray, tile: int, count: int
    ) -> None:
        if self.restart and number % self.codec.window_blocks == 0:
            scheduler.forget(0)
        most = self.codec.config.tokens_per_block
        search = make_search("fixed", min_kept=1, max_kept=most, num_tokens=count, width=self.width)
        scheduler.assign(
            0,
            to_tile(self.layout, frames, tile),
            search,
            metric=self.metric,
            weights=self.layout.weights(tile),
        )


def _sampled(
    losses_of: Callable[[list[int]], dict[int, float]],
    budget: Budget,
    width: int,
    earlier: Sequence[Mapping[int, float]],
) -> dict[int, float]:
    """The losses of one block at `num_counts` counts, the equal count not among them.

    The first counts are spread over the range. Together with the curves of earlier blocks they give the price of a token in this
    clip, and so the block's likely count. The other counts lie near it.

    Args:
      losses_of: measures counts of the block.
      budget: the tokens that may be spent.
      width: counts measured in one call of the model.
      earlier: the rate curves of the blocks before, {count: loss} each.
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
        # The equal count is measured anyway: its neighbour is taken instead.
        counts = {count + (count == budget.equal) for count in counts} - curve.keys()
        if not counts:
            break
        curve |= losses_of(sorted(counts))
    return curve


def _error(results: list[BlockResult], shares: Sequence[float]) -> float:
    """The sum of the losses over the frames, each tile by its share of the frame."""
    return math.fsum(
        share * result.tokens.loss * len(result.frames)
        for share, result in zip(itertools.cycle(shares), results, strict=False)
    )

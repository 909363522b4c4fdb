"""Blocks of several clips going through the model side by side, each with a cache and a search of its own.

A lane whose search has ended commits its block and takes its clip's next one while the others still search: no run of the model waits
for the slowest.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8

from elastic.distributed.mesh import memory_limit, platform_of
from elastic.metrics import Metric
from elastic.patches import pad_block, patchify, unpatchify
from elastic.search import Search, SearchResult
from elastic.tokenizer.block_codec import Codec, CodecCache, Trial
from elastic.tokenizer.result import BlockResult
from elastic.tokens import BlockTokens

# Trials larger than this are not kept, or on an accelerator than this share of its memory: committing then costs one more pass.
_KEEP_BYTES = 2 << 30
_KEEP_SHARE = 1 / 8


@dataclasses.dataclass
class _Work:
    """One block in its lane."""

    frames: np.ndarray
    search: Search
    metric: Metric | None
    started: float
    passes: int = 0
    held: int | None = None  # the count whose candidate is held, to be committed
    again: SearchResult | None = None  # the search has ended on a candidate that was not kept

    @property
    def target(self) -> int:
        """The count that would be committed if the search ended now."""
        best = self.search.best()
        return self.search.options.fallback if best is None else best


class BatchScheduler:
    """A fixed number of clips in one compiled program.

    Args:
      batch: how many lanes.
      width: counts of a block tried in one call.
      cache: what the lanes remember; None: nothing yet. It is used up.
    """

    def __init__(
        self,
        codec: Codec,
        weights: dict[str, Any],
        *,
        batch: int = 1,
        width: int = 1,
        cache: CodecCache | None = None,
    ):
        config = codec.config
        self.codec, self.batch, self.width = codec, batch, width
        self.cache = codec.new_cache(batch) if cache is None else cache
        self._weights = weights
        self._work: list[_Work | None] = [None] * batch
        self._keep = codec.trial_bytes(batch * (width + 1)) <= _most_kept(codec)
        # The candidates to be committed: in one lane where the trial has them, in several gathered.
        self._held: tuple[Trial, np.ndarray] | None = None
        shape = (batch, config.tokens_per_block, config.patch_dim)
        self._patches = np.zeros(shape, np.uint8)
        self._num_frames = np.full(batch, config.frames_per_block, np.int32)
        self._given = False

    @property
    def free(self) -> list[int]:
        """The lanes that have no block."""
        return [lane for lane, work in enumerate(self._work) if work is None]

    def forget(self, lane: int) -> None:
        """Empties a lane's context: its next block begins a clip, or a window."""
        self.cache = self.cache.forget(np.arange(self.batch) == lane)

    def put(
        self,
        lane: int,
        frames: UInt8[np.ndarray, "n rows columns 3"],
        search: Search,
        *,
        metric: Metric | None = None,
    ) -> None:
        """Gives a free lane its next block; only a clip's last one may be short. `metric` None: squared error."""
        config = self.codec.config
        padded = pad_block(frames, config.frames_per_block)
        if self._given:  # what a call was given may still be read
            self._patches, self._num_frames = self._patches.copy(), self._num_frames.copy()
            self._given = False
        self._patches[lane] = patchify(padded, config.patch_size)
        self._num_frames[lane] = len(frames)
        self._work[lane] = _Work(frames, search, metric, time.perf_counter())

    def step(self) -> list[tuple[int, BlockResult]]:
        """One call of the model for every lane that has a block; the blocks that this finished, by lane."""
        groups: dict[int, list[int]] = {}
        for lane, work in self._busy():
            again = work.again
            groups[lane] = [again.num_kept] if again else work.search.propose() or []
        keep = self._keep or any(work.again for _, work in self._busy())
        trial, losses = self._call(groups, keep=keep)
        finished: dict[int, SearchResult] = {}
        choice, newer = np.zeros(self.batch, np.int32), np.zeros(self.batch, bool)
        for lane, work in self._busy():
            if work.again is None:
                work.search.observe(groups[lane], losses[lane])
            target = work.again.num_kept if work.again else work.target
            if keep and target in groups[lane]:
                choice[lane], newer[lane] = groups[lane].index(target), True
                work.held = target
            if work.again or work.search.propose() is None:
                result = work.again or work.search.result()
                if work.held == result.num_kept:
                    finished[lane] = result
                else:
                    work.again = result
        self._hold(trial, choice, newer)
        return self._commit(finished) if finished else []

    def losses_of(self, lane: int, counts: Sequence[int]) -> dict[int, float]:
        """The losses of other counts of a lane's block; its search does not hear of them."""
        found: dict[int, float] = {}
        for start in range(0, len(counts), self.width):
            group = list(counts[start : start + self.width])
            _, losses = self._call({lane: group}, keep=False)
            found |= zip(group, losses[lane], strict=True)
        return found

    def _busy(self) -> list[tuple[int, _Work]]:
        return [(lane, work) for lane, work in enumerate(self._work) if work is not None]

    def _call(
        self, groups: dict[int, list[int]], *, keep: bool
    ) -> tuple[Trial, dict[int, list[float]]]:
        """Runs the model once for each count of each group, in one call of one compiled shape."""
        counts = np.ones((self.batch, self.width), np.int32)
        for lane, group in groups.items():
            counts[lane] = group + group[-1:] * (self.width - len(group))
        self._given = True
        trial = self.codec.try_counts(
            self._weights,
            self.cache,
            self._patches,
            counts,
            num_frames=self._num_frames,
            keep=keep,
        )
        # Held against the threshold: the larger of both errors, so that decoded 8-bit frames keep the promise too.
        squares = np.maximum(*jax.device_get((trial.losses, trial.pixel_losses)))
        losses = {}
        for lane, group in groups.items():
            work = self._work[lane]
            assert work is not None
            work.passes += len(group)
            if work.metric is None:
                losses[lane] = squares[lane, : len(group)].tolist()
            else:
                first = lane * self.width
                losses[lane] = [
                    self._measure(work, work.metric, trial.pixels[first + k])
                    for k in range(len(group))
                ]
        return trial, losses

    def _measure(self, work: _Work, metric: Metric, pixels: Any) -> float:
        loss = float(metric(work.frames, self._frames_of(work, pixels)))
        if loss < 0:
            raise ValueError(
                f"The metric gave {loss}; a loss must be 0 or above, and less must be better."
            )
        return loss

    def _frames_of(self, work: _Work, pixels: Any) -> np.ndarray:
        """The real frames of a block's pixels [l, p]."""
        size = work.frames.shape[1:3]
        frames = np.asarray(unpatchify(np.asarray(pixels), self.codec.config.patch_size, *size))
        return frames[: len(work.frames)]

    def _hold(self, trial: Trial, choice: np.ndarray, newer: np.ndarray) -> None:
        if not newer.any():
            return
        if self.batch == 1:  # where it is: nothing is copied
            self._held = trial, choice
            return
        held = self._held[0] if self._held else None
        self._held = self.codec.hold(held, trial, choice, newer), np.zeros_like(choice)

    def _commit(self, finished: dict[int, SearchResult]) -> list[tuple[int, BlockResult]]:
        assert self._held is not None
        trial, choice = self._held
        elements = np.isin(np.arange(self.batch), list(finished))
        self.cache, committed = self.codec.commit(
            self.cache, trial, choice, None if self.batch == 1 else elements
        )
        if self.batch == 1:
            self._held = None
        results = []
        if 2 * len(finished) > self.batch:  # all come sooner than each, by a program of its own
            committed = jax.device_get(committed)
        for lane, result in finished.items():
            work = self._work[lane]
            assert work is not None
            tokens = np.asarray(committed.tokens[lane])[: result.num_kept]
            results.append((lane, self._result(work, result, tokens, committed.pixels[lane])))
            self._work[lane] = None
        return results

    def _result(
        self, work: _Work, result: SearchResult, tokens: np.ndarray, pixels: Any
    ) -> BlockResult:
        kind = "indices" if self.codec.config.bottleneck_type == "fsq" else "vectors"
        values: dict[str, Any] = {kind: tokens}
        return BlockResult(
            frames=work.frames,
            reconstruction=self._frames_of(work, pixels),
            tokens=BlockTokens(
                num_kept=result.num_kept,
                loss=result.loss,
                met_threshold=result.met,
                **values,
            ),
            passes=work.passes,
            seconds=time.perf_counter() - work.started,
            tried=result.tried,
        )


def _most_kept(codec: Codec) -> float:
    """Bytes that kept trials may take."""
    limit = None
    if codec.mesh is not None and platform_of(codec.mesh) != "cpu":
        limit = memory_limit(codec.mesh)
    return max(_KEEP_BYTES, _KEEP_SHARE * (limit or 0))

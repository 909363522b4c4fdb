"""Continuous batching: blocks of several clips, or tiles, go through the model side by side, each with its own cache and its own search.

A clip, or each tile of its frames, has a slot of the batch. A slot whose search has ended commits its block and takes the clip's next
one while other slots still search, so that no run of the model waits for the slowest search.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import UInt8

from elastic.distributed.mesh import memory_limit, platform_of
from elastic.metrics import Metric
from elastic.patches import pad_block, patchify, round_levels, unpatchify
from elastic.search import Search, SearchResult
from elastic.tokenizer.block_codec import Codec, CodecCache, EncodedBlock, Trial
from elastic.tokenizer.result import BlockResult
from elastic.tokens import BlockTokens

# A trial's keys and values are kept only if they fit in 2 GiB or, on an accelerator, in 1/8 of its memory, whichever is more.
# Otherwise committing a block costs one more pass.
_KEEP_BYTES = 2 << 30
_KEEP_SHARE = 1 / 8


@dataclasses.dataclass
class _Work:
    """One block in its slot."""

    frames: np.ndarray
    search: Search
    metric: Metric | None
    started: float
    passes: int = 0
    selected: int | None = None  # the count whose candidate is selected, to be committed
    again: SearchResult | None = None  # the search has ended on a candidate that was not kept

    @property
    def target(self) -> int:
        """The count that would be committed if the search ended now."""
        best = self.search.best()
        return self.search.options.fallback if best is None else best


def check_batch(batch: int, mesh: Mesh, *, has_budget: bool = False) -> None:
    """Refuses a number of clips that cannot go through the model at once.

    Args:
      batch: the number of clips.
      mesh: the devices, which share the clips along dp and fsdp.
      has_budget: whether the blocks of a clip share a budget of tokens.

    Raises:
      ValueError: the mesh does not divide the batch, or a budget is to be spent by more than one clip at once.
    """
    shares = mesh.shape["dp"] * mesh.shape["fsdp"]
    if batch < 1 or (batch > 1 and batch % shares):
        raise ValueError(
            f"batch={batch} must be a multiple of dp * fsdp = {shares}: the devices share the clips."
        )
    if has_budget and batch > 1:
        raise ValueError(
            f"batch={batch}: a budget is spent clip by clip; leave out --batch, or give a threshold."
        )


class BatchScheduler:
    """A fixed number of slots, one clip in each, in one compiled program.

    Args:
      codec: the programs of the model.
      weights: the parameters as `Codec.stored` gives them.
      batch: number of slots.
      width: counts of a block tried in one call of the model.
      cache: the keys and values of earlier blocks; None: an empty cache, which `reserve` lengthens. It is donated to the programs.
      on_passes: called after each call of the model with its number of passes.
      weighted: whether the pixels of a block have weights. The frames of a result are then float32 levels, to be blended.
    """

    def __init__(
        self,
        codec: Codec,
        weights: dict[str, Any],
        *,
        batch: int = 1,
        width: int = 1,
        cache: CodecCache | None = None,
        on_passes: Callable[[int], None] | None = None,
        weighted: bool = False,
    ):
        config = codec.config
        self.codec, self.batch, self.width = codec, batch, width
        self.cache = codec.new_cache(batch, num_blocks=1) if cache is None else cache
        self._weights, self._on_passes = weights, on_passes
        self._work: list[_Work | None] = [None] * batch
        self._keeps_trials = codec.trial_bytes(batch * (width + 1)) <= _most_kept(codec)
        # The candidates to be committed. One slot has them in its latest trial, several slots gather them in a trial of their own.
        self._selected: tuple[Trial, np.ndarray] | None = None
        shape = (batch, config.tokens_per_block, config.patch_dim)
        self._patches = np.zeros(shape, np.uint8)
        self._num_frames = np.full(batch, config.frames_per_block, np.int32)
        self.weighted = weighted
        self._pixel_weights: tuple[np.ndarray, np.ndarray] | None = None
        if weighted:
            side = (batch, config.resolution)
            self._pixel_weights = np.ones(side, np.float32), np.ones(side, np.float32)
        self._inputs_in_use = False  # the device may still read the arrays above
        self._encoded: EncodedBlock | None = None  # of the blocks in the slots; None: not yet

    @property
    def free_slots(self) -> list[int]:
        """The slots that have no block."""
        return [slot for slot, work in enumerate(self._work) if work is None]

    def has_block(self, slot: int) -> bool:
        """Whether a slot has a block."""
        return self._work[slot] is not None

    def drop(self, slot: int) -> None:
        """Frees a slot without finishing its block."""
        self._work[slot] = None

    def passes(self, slot: int) -> int:
        """The passes so far over the block in a slot; 0 if the slot is free."""
        work = self._work[slot]
        return 0 if work is None else work.passes

    def forget(self, slot: int) -> None:
        """Empties a slot's cache: its next block begins a clip or a window."""
        self.cache = self.cache.forget(np.arange(self.batch) == slot)

    def reserve(self, num_blocks: int | None) -> None:
        """Lengthens the cache for a clip of this many blocks; None: not known, so that it serves a whole window.

        Raises:
          ValueError: the cache is larger than the memory.
        """
        self.cache = self.codec.lengthened(self.cache, num_blocks)

    def assign(
        self,
        slot: int,
        frames: UInt8[np.ndarray, "n rows columns 3"],
        search: Search,
        *,
        metric: Metric | None = None,
        weights: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> None:
        """Gives a free slot its next block.

        Args:
          slot: a slot of `free_slots`.
          frames: the block, uint8; only the last block of a clip may be short.
          search: decides the block's token count.
          metric: the loss of the block; None: the mean squared error.
          weights: what its rows and columns weigh in the squared error, if the scheduler is weighted; None: all the same.
        """
        config = self.codec.config
        padded = pad_block(frames, config.frames_per_block)
        if self._inputs_in_use:
            self._patches, self._num_frames = self._patches.copy(), self._num_frames.copy()
            if self._pixel_weights is not None:
                rows, columns = self._pixel_weights
                self._pixel_weights = rows.copy(), columns.copy()
            self._inputs_in_use = False
        if self._pixel_weights is not None:
            for side, own in zip(self._pixel_weights, weights or (1.0, 1.0), strict=True):
                side[slot] = own
        self._patches[slot] = patchify(padded, config.patch_size, config.token_order)
        self._num_frames[slot] = len(frames)
        self._encoded = None
        self._work[slot] = _Work(frames, search, metric, time.perf_counter())

    def step(self) -> list[tuple[int, BlockResult]]:
        """Calls the model once for all slots that have a block; gives the blocks that are finished now, each with its slot."""
        with self._counted():
            return self._step()

    def _step(self) -> list[tuple[int, BlockResult]]:
        self._draft()
        groups: dict[int, list[int]] = {}
        for slot, work in self._busy():
            again = work.again
            groups[slot] = [again.num_kept] if again else work.search.propose() or []
        keep = self._keeps_trials or any(work.again for _, work in self._busy())
        trial, losses = self._call(groups, keep=keep)
        finished: dict[int, SearchResult] = {}
        choice, newer = np.zeros(self.batch, np.int32), np.zeros(self.batch, bool)
        for slot, work in self._busy():
            if work.again is None:
                work.search.observe(groups[slot], losses[slot])
            target = work.again.num_kept if work.again else work.target
            if keep and target in groups[slot]:
                choice[slot], newer[slot] = groups[slot].index(target), True
                work.selected = target
            if work.again or work.search.propose() is None:
                result = work.again or work.search.result()
                if work.selected == result.num_kept:
                    finished[slot] = result
                else:
                    work.again = result
        self._select(trial, choice, newer)
        return self._commit(finished) if finished else []

    def _draft(self) -> None:
        """Drafts what searches want drafted before the model is called."""
        while wanting := [
            (slot, work)
            for slot, work in self._busy()
            if work.again is None and work.search.wants_draft
        ]:
            counts = np.ones((self.batch, 1), np.int32)
            for slot, work in wanting:
                counts[slot] = work.search.propose() or []
            encoded = self._encode()
            assert encoded is not None, "A codec that can draft encodes once for all counts."
            found = self.codec.draft(
                self._weights,
                self._patches,
                counts,
                encoded,
                num_frames=self._num_frames,
                weights=self._pixel_weights,
            )
            losses = np.maximum(*jax.device_get(found))
            for slot, work in wanting:
                work.search.observe(counts[slot].tolist(), losses[slot])

    def _encode(self) -> EncodedBlock | None:
        """What the encoder gives for the blocks in the slots, if it serves all counts."""
        self._inputs_in_use = True
        if self._encoded is None:
            self._encoded = self.codec.encode(self._weights, self.cache, self._patches)
        return self._encoded

    def losses_of(self, slot: int, counts: Sequence[int]) -> dict[int, float]:
        """The loss of each of these counts for the block in a slot, without telling its search."""
        found: dict[int, float] = {}
        for start in range(0, len(counts), self.width):
            group = list(counts[start : start + self.width])
            with self._counted():
                _, losses = self._call({slot: group}, keep=False)
            found |= zip(group, losses[slot], strict=True)
        return found

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        """Adds the time to the codec's."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.codec.model_seconds += time.perf_counter() - started

    def _busy(self) -> list[tuple[int, _Work]]:
        return [(slot, work) for slot, work in enumerate(self._work) if work is not None]

    def _call(
        self, groups: dict[int, list[int]], *, keep: bool
    ) -> tuple[Trial, dict[int, list[float]]]:
        """Evaluates the counts of all slots in one call of one compiled shape: {slot: counts} -> {slot: losses}."""
        counts = np.ones((self.batch, self.width), np.int32)
        for slot, group in groups.items():
            counts[slot] = group + group[-1:] * (self.width - len(group))
        trial = self.codec.try_counts(
            self._weights,
            self.cache,
            self._patches,
            counts,
            num_frames=self._num_frames,
            weights=self._pixel_weights,
            encoded=self._encode(),
            keep=keep,
        )
        # The larger of both errors is compared with the threshold, so that the decoded 8-bit frames stay under it too.
        squares = np.maximum(*jax.device_get((trial.losses, trial.pixel_losses)))
        losses = {}
        for slot, group in groups.items():
            work = self._work[slot]
            assert work is not None
            work.passes += len(group)
            if work.metric is None:
                losses[slot] = squares[slot, : len(group)].tolist()
            else:
                first = slot * self.width
                losses[slot] = [
                    self._measure(work, work.metric, trial.pixels[first + k])
                    for k in range(len(group))
                ]
        if self._on_passes is not None:
            self._on_passes(sum(map(len, groups.values())))
        return trial, losses

    def _measure(self, work: _Work, metric: Metric, pixels: Any) -> float:
        frames = self._frames_of(work, pixels)
        loss = float(metric(work.frames, round_levels(frames)))
        if loss < 0:
            raise ValueError(
                f"The metric gave {loss}; a loss must be 0 or above, and less must be better."
            )
        return loss

    def _frames_of(self, work: _Work, pixels: Any) -> np.ndarray:
        """The real frames of a block's pixels [l, p]: 8-bit, or levels where they have weights."""
        rows, columns = work.frames.shape[1:3]
        config = self.codec.config
        patches = np.asarray(pixels)
        frames = np.asarray(
            unpatchify(patches, config.patch_size, rows, columns, config.token_order)
        )
        return frames[: len(work.frames)]

    def _select(self, trial: Trial, choice: np.ndarray, newer: np.ndarray) -> None:
        """Selects a candidate of the trial in the slots where `newer` is True; the others keep their earlier one."""
        if not newer.any():
            return
        if self.batch == 1:  # the trial itself is kept: nothing is copied
            self._selected = trial, choice
            return
        selected = self._selected[0] if self._selected else None
        self._selected = self.codec.select(selected, trial, choice, newer), np.zeros_like(choice)

    def _commit(self, finished: dict[int, SearchResult]) -> list[tuple[int, BlockResult]]:
        """Appends the selected candidates of the finished slots to their caches."""
        assert self._selected is not None
        trial, choice = self._selected
        elements = np.isin(np.arange(self.batch), list(finished))
        self.cache, committed = self.codec.commit(
            self.cache, trial, choice, None if self.batch == 1 else elements
        )
        if self.batch == 1:
            self._selected = None
        results = []
        if (
            2 * len(finished) > self.batch
        ):  # one transfer of all is faster than one program for each slot
            committed = jax.device_get(committed)
        for slot, result in finished.items():
            work = self._work[slot]
            assert work is not None
            tokens = np.asarray(committed.tokens[slot])[: result.num_kept]
            results.append((slot, self._result(work, result, tokens, committed.pixels[slot])))
            self._work[slot] = None
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
            drafts=result.drafts,
        )


class Slot(NamedTuple):
    """A slot of one of several schedulers."""

    scheduler: BatchScheduler
    number: int

    @property
    def is_free(self) -> bool:
        """Whether it has no block."""
        return not self.scheduler.has_block(self.number)

    @property
    def passes(self) -> int:
        """The passes so far over its block; 0 if it has none."""
        return self.scheduler.passes(self.number)


class SlotPool:
    """Slots for clips and tiles: those of one scheduler, and of as many more as a clip of many tiles takes.

    All schedulers run the same compiled program, one after the other.

    Args:
      new_scheduler: makes one.
    """

    def __init__(self, new_scheduler: Callable[[], BatchScheduler]):
        self._new_scheduler = new_scheduler
        self._schedulers = [new_scheduler()]
        self._taken: set[tuple[int, int]] = set()

    @property
    def free(self) -> list[Slot]:
        """The slots that nobody has."""
        return [
            Slot(scheduler, number)
            for scheduler in self._schedulers
            for number in range(scheduler.batch)
            if (id(scheduler), number) not in self._taken
        ]

    def take(self, count: int) -> list[Slot]:
        """This many slots with empty caches; schedulers are added where there are too few."""
        while len(found := self.free[:count]) < count:
            self._schedulers.append(self._new_scheduler())
        for scheduler, number in found:
            self._taken.add((id(scheduler), number))
            scheduler.forget(number)
        return found

    def give_back(self, slot: Slot) -> None:
        """Frees a slot, and a scheduler that was added and has none taken any more. A block in it is dropped."""
        slot.scheduler.drop(slot.number)
        self._taken.remove((id(slot.scheduler), slot.number))
        others = {scheduler for scheduler, _ in self._taken}
        if slot.scheduler is not self._schedulers[0] and id(slot.scheduler) not in others:
            self._schedulers.remove(slot.scheduler)

    def step(self) -> Iterator[tuple[Slot, BlockResult]]:
        """Calls the model once for all slots that have a block; gives the blocks that are finished now, each with its slot."""
        for scheduler in list(self._schedulers):
            if len(scheduler.free_slots) < scheduler.batch:
                for number, result in scheduler.step():
                    yield Slot(scheduler, number), result


def _most_kept(codec: Codec) -> float:
    """The most bytes of keys and values that trials may keep."""
    limit = None
    if codec.mesh is not None and platform_of(codec.mesh) != "cpu":
        limit = memory_limit(codec.mesh)
    return max(_KEEP_BYTES, _KEEP_SHARE * (limit or 0))

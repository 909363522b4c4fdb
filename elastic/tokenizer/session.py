"""Clips becoming tokens, block by block: one, or several side by side."""

import collections
import dataclasses
import functools
import itertools
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import UInt8

from elastic.checkpoints.fingerprint import fingerprint
from elastic.config import ElasticTokConfig
from elastic.io.tree import tree_digest
from elastic.media import MediaError
from elastic.metrics import make_metric
from elastic.search import CurvePrior, Search, SearchOptions, make_search
from elastic.search.rate_curve import Curve, SearchHistory, history_from_json, history_to_json
from elastic.tiles import FrameLayout
from elastic.tokenizer.block_codec import Codec, CodecCache
from elastic.tokenizer.clip_source import Clip, ahead
from elastic.tokenizer.frame_tiles import to_tile, whole_result
from elastic.tokenizer.result import BlockResult
from elastic.tokenizer.resume import ResumeError, ResumeLog, remove_resume_log
from elastic.tokenizer.scheduler import BatchScheduler
from elastic.tokenizer.targets import EncodeOptions
from elastic.tokenizer.two_pass import Budget, spend
from elastic.tokens import BlockTokens, TokenizedClip

log = logging.getLogger(__name__)

# Passes that a clip's first block is expected to take. They only move a progress bar; a search that is not here takes as 'linear'.
_FIRST_PASSES = collections.defaultdict(lambda: 30, predict=4, binary=11, fixed=1)
_AHEAD = 2  # blocks of a clip that are decoded while the model runs


def check_options(options: EncodeOptions, config: ElasticTokConfig, *, width: int) -> None:
    """Checks options against a model, without its weights. Warns if the count is below those of its training.

    Args:
      options: what is asked of a clip's tokens.
      config: the model.
      width: counts tried in one call of the model.

    Raises:
      ValueError: the model has no blocks of so many tokens, or the search does not fit the target.
    """
    search_options = options.search_options(config, width=width)
    if options.avg_tokens is not None:
        Budget.of(options, config, rate=0.0)
    if options.num_tokens is not None and options.num_tokens < config.min_toks:
        warnings.warn(
            f"num_tokens={options.num_tokens} is below {config.min_toks}, the fewest tokens of a block that this model was "
            "trained with; expect a poor picture.",
            stacklevel=1,  # attributed to this line, Python shows it once and not for every clip
        )
    if not options.has_budget:
        make_search(options.search_name, **_search_arguments(search_options))


def _search_arguments(options: SearchOptions) -> dict[str, Any]:
    """The arguments of `make_search` but its name and history; resume files hold them too."""
    arguments = dataclasses.asdict(options)
    del arguments["full_curve"], arguments["tolerance"]  # left at their defaults
    return arguments


@dataclasses.dataclass(frozen=True)
class TokenizerContext:
    """What all clips of a tokenizer share.

    Attributes:
      codec: the compiled programs of one block.
      weights: the model's parameter tree on the devices, as `Codec.stored` gives it.
      model_id: what token files call the model.
      when_full: what happens to the context when the window is full: 'carry' slides it, 'restart' empties it.
      search_width: counts of a block tried in one call of the model.
      prior: what guesses a clip's first counts for the search 'predict'; None: nothing.
    """

    codec: Codec
    weights: dict[str, Any]
    model_id: str
    when_full: Literal["carry", "restart"]
    search_width: int
    prior: CurvePrior | None = None

    @functools.cached_property
    def fingerprint(self) -> tuple[float, ...]:
        """What tells the weights from others of their shape, in whatever type they are stored."""
        return fingerprint(self.weights)

    @functools.cached_property
    def weights_digest(self) -> str:
        """SHA-256 of all parameters, by name, type and shape, to the last bit."""
        return tree_digest(self.weights)


class PendingBlock(NamedTuple):
    """A block that is to be tokenized."""

    frames: UInt8[np.ndarray, "n rows columns 3"]  # whole frames
    tile: UInt8[np.ndarray, "n tile tile 3"]  # these as the model sees them
    expected: (
        Curve | None
    )  # its rate curve as guessed from its pixels; None where the search uses no guess


class EncodeSession:
    """A clip being tokenized: iterate over it for one `BlockResult` after the other, then ask for `tokens()`.

    Frames are read, tokenized and handed out block by block; only the tokens are kept.

    Iterating does everything for one clip. `tokenize_side_by_side` calls, for each of its clips: `start` once; for every
    block `next_search`, then `record_result` with what that search gave; at last `end` after the last block, or `close`
    where the clip ends early. A run that is recorded calls `open_resume_log` before.

    Args:
      context: what all clips of the tokenizer share.
      clip: the clip.
      options: what is asked of its tokens.
      budget: the tokens that it may spend, where `options` give a mean or a bitrate; else None.

    Attributes:
      num_frames, num_blocks: of the clip; None while frames are still arriving.
      is_image, rate, source, layout: as in `TokenizedClip`.
      num_done: blocks that are tokenized.
      first_block: the first block that will be handed out. Above 0 in a resumed run: `recorded` has the earlier ones.
      recorded: the numbers `passes`, `seconds` and `squares` of each block before `first_block`.
      on_progress: None, or a function that is called after each pass of the model with the number of blocks done. The passes over
        the current block count as a part of it.
    """

    def __init__(
        self,
        context: TokenizerContext,
        clip: Clip,
        options: EncodeOptions,
        *,
        budget: Budget | None = None,
    ):
        config = context.codec.config
        self._context, self._clip, self._budget = context, clip, budget
        self._search_name = options.search_name
        self._search_options = options.search_options(config, width=context.search_width)
        self._metric_name, self.metric = make_metric(options.metric)
        self.is_image, self.rate, self.source = clip.is_image, clip.rate, clip.source
        self.layout = clip.layout
        self._frames: np.ndarray | None = None  # the whole frames of the block under way
        self.num_frames = clip.num_frames
        self.first_block = 0
        self.recorded: list[dict[str, Any]] = []
        self._resume_log: ResumeLog | None = None
        self._cache: CodecCache | None = None  # of an earlier run, until `start` hands it on
        self._history: SearchHistory | None = None
        self.num_done = 0
        self.on_progress: Callable[[float], None] | None = None
        self._passes = 0  # of the blocks that are done; with a budget, of all blocks
        self._seen_frames = 0
        self._blocks: list[BlockTokens] = []  # empty where a resume log holds them
        self._finished = False
        # Wrong options are refused before the first frame is read.
        check_options(options, config, width=context.search_width)

    @property
    def num_blocks(self) -> int | None:
        """Blocks of the clip; None while frames are still coming."""
        frames = self._context.codec.config.frames_per_block
        return None if self.num_frames is None else -(-self.num_frames // frames)

    @property
    def width(self) -> int:
        """Counts tried in one call of the model."""
        return self._search_options.width

    @property
    def has_budget(self) -> bool:
        """Whether the blocks share a budget, instead of being searched one by one."""
        return self._budget is not None

    def __iter__(self) -> Iterator[BlockResult]:
        if self._budget is None:
            for _, result in tokenize_side_by_side(self._context, [self]):
                if isinstance(result, Exception):
                    raise result
                if result is not None:
                    yield result
            return
        self._reset()
        blocks = ahead(self._clip.blocks(self._context.codec.config.frames_per_block), _AHEAD)
        held: collections.deque[np.ndarray] = collections.deque()  # of the stretch under way

        def tiles() -> Iterator[np.ndarray]:
            for frames in blocks:
                held.append(frames)
                yield to_tile(self.layout, frames)

        results = spend(
            self._context.codec,
            self._context.weights,
            tiles(),
            self._budget,
            width=self.width,
            restart=self._context.when_full == "restart",
            metric=self.metric,
            on_passes=self._note_budget_passes,
            num_blocks=self.num_blocks,
            pixel_weights=self.layout.weights(0),
        )
        for result in results:
            whole = whole_result(self.layout, held.popleft(), result)
            self._count(whole)
            yield whole
        self._end()

    @property
    def num_recorded(self) -> int:
        """Blocks that an earlier run recorded."""
        return 0 if self._resume_log is None else len(self._resume_log.blocks)

    def open_resume_log(
        self, path: str | os.PathLike, *, max_snapshot_block: float = math.inf
    ) -> None:
        """Records every block to `path` from now on; resumes from what an earlier run recorded there, which sets `first_block`.

        Args:
          path: the resume file.
          max_snapshot_block: resume from a snapshot of the cache that was made after at most this many blocks. The recorded blocks
            after the snapshot go through the model once more. 0 uses no snapshot, which is required when clips share a batch.

        Raises:
          ResumeError: the file is of another run.
          ValueError: a budget is not spent block by block.
        """
        if self._budget is not None:
            raise ValueError(
                f"record={str(path)!r} needs a threshold or num_tokens: a budget is not spent block by block."
            )
        about = self._about()
        if about["clip"] is None and os.path.exists(path):
            raise ResumeError(
                f"{path} exists already, and frames that arrive one by one cannot be read again; name another record."
            )
        self._resume_log = ResumeLog(path, about, self._header())
        found = self._resume_log.load_cache(self._context.codec) if max_snapshot_block else None
        if found is not None and 0 < found[0] <= max_snapshot_block:
            self.first_block, self._cache = found
            before = self._resume_log.blocks[: self.first_block]
            self._history = history_from_json(before[-1].about["memory"])
            self.recorded = [block.about for block in before]

    def open_or_replace_resume_log(
        self, path: str | os.PathLike, *, max_snapshot_block: float = math.inf
    ) -> None:
        """Like `open_resume_log`, but removes a file of another run, with a warning in the log."""
        try:
            self.open_resume_log(path, max_snapshot_block=max_snapshot_block)
        except ResumeError as error:
            log.warning("Starts again: %s", error)
            remove_resume_log(path)
            self.open_resume_log(path, max_snapshot_block=max_snapshot_block)

    def start(self, scheduler: BatchScheduler, slot: int) -> Iterator[PendingBlock]:
        """Makes a slot ready for the first block, and gives the blocks that are to be tokenized.

        They are read, and their rate curves guessed, in a thread while the model runs.
        """
        scheduler.forget(slot)
        self._reset()
        if self._cache is not None:
            scheduler.cache, self._cache = self._cache, None
        scheduler.reserve(self.num_blocks)
        frames_per_block = self._context.codec.config.frames_per_block
        guesses = self._search_name == "predict" and self.metric is None
        prior = self._context.prior if guesses else None

        def blocks() -> Iterator[PendingBlock]:
            for frames in self._clip.blocks(frames_per_block, self.first_block):
                tile = to_tile(self.layout, frames)
                yield PendingBlock(frames, tile, None if prior is None else prior.curve_of(tile))

        return ahead(blocks(), _AHEAD)

    def next_search(self, block: PendingBlock) -> Search:
        """The search of the next block."""
        self._frames = block.frames
        number, prior = self.num_done, self._context.prior
        if self._resume_log is not None and number < len(self._resume_log.blocks):
            count = self._resume_log.blocks[number].tokens.num_kept
            arguments: dict[str, Any] = self._search_arguments() | {"num_tokens": count}
            return make_search("fixed", **arguments)
        if block.expected is not None and prior is not None:
            self._history = prior.history(block.expected, self._history)
        elif self._history is None:  # of this clip alone: its tokens must not depend on other clips
            self._history = SearchHistory()
        return self._make_search(self._history)

    def _make_search(self, history: SearchHistory | None = None) -> Search:
        return make_search(self._search_name, history=history, **self._search_arguments())

    def _search_arguments(self) -> dict[str, Any]:
        return _search_arguments(self._search_options)

    def record_result(self, result: BlockResult, scheduler: BatchScheduler) -> BlockResult:
        """Counts and records the result of the next block, and gives it: with the tokens of the earlier run if it was recorded."""
        number, resume_log = self.num_done, self._resume_log
        assert self._frames is not None
        result = whole_result(self.layout, self._frames, result)
        if resume_log is not None and number < len(resume_log.blocks):
            result = self._repeated(result, number)
        elif resume_log is not None:
            history = history_to_json(self._history or SearchHistory())
            resume_log.append(
                result.tokens,
                len(result.frames),
                passes=result.passes,
                seconds=result.seconds,
                squares=result.squares,
                memory=history,  # the name is part of the format of resume files
            )
        self._count(result)
        if (
            resume_log is not None
            and scheduler.batch == 1
            and self.num_done > len(resume_log.blocks)
        ):
            resume_log.copy_cache(scheduler.cache)
        return result

    def note_passes(self, passes: int) -> None:
        """Tells `on_progress` that the model went over the block under way so many times.

        How many passes it will take is guessed: as many as the blocks before took in the mean.
        """
        if self.on_progress is not None and passes:
            before = self.num_done - self.first_block
            expected = self._passes / before if before else _FIRST_PASSES[self._search_name]
            self.on_progress(self.num_done + min(passes / (expected + 1), 1.0))

    def _note_budget_passes(self, passes: int) -> None:
        assert self._budget is not None
        self._passes += passes
        if self.on_progress is not None:
            self.on_progress(self._passes / self._budget.passes_per_block)

    def end(self) -> None:
        """Ends the clip: there are no more blocks."""
        if self._resume_log is not None:
            self._resume_log.finish()
        self._end()

    def close(self) -> None:
        """Closes an unfinished resume log, which a later run may resume from."""
        if self._resume_log is not None:
            self._resume_log.close()

    def tokens(self) -> TokenizedClip:
        """The token record of the whole clip.

        Raises:
          ValueError: not all blocks have been tokenized yet.
        """
        if not self._finished:
            of = "" if self.num_blocks is None else f" of {self.num_blocks}"
            raise ValueError(f"{self.num_done}{of} blocks are tokenized; iterate to the end first.")
        header: dict[str, Any] = self._header() | {"num_frames": self._seen_frames}
        blocks = self._blocks if self._resume_log is None else self._resume_log.tokens()
        return TokenizedClip(blocks=tuple(blocks), **header)

    def _reset(self) -> None:
        """Goes back to the first block that is to be tokenized."""
        before = [] if self._resume_log is None else self._resume_log.blocks[: self.first_block]
        self.num_done, self._blocks = len(before), []
        self._seen_frames = sum(block.num_frames for block in before)

    def _count(self, result: BlockResult) -> None:
        if self._resume_log is None:
            self._blocks.append(result.tokens)
        self.num_done += 1
        if self._budget is None:
            self._passes += result.passes
        self._seen_frames += len(result.frames)

    def _repeated(self, result: BlockResult, number: int) -> BlockResult:
        """The result of a block that was recorded, after it went through the model with its count."""
        assert self._resume_log is not None
        earlier = self._resume_log.blocks[number]
        same = np.array_equal(earlier.tokens.values, result.tokens.values)
        if not same or len(result.frames) != earlier.num_frames:
            raise ResumeError(
                f"{self._resume_log.path} has other tokens for block {number} than this machine computes; remove it to start again."
            )
        self._history = history_from_json(earlier.about["memory"])
        spent = {name: earlier.about[name] for name in ("passes", "seconds")}
        return result._replace(tokens=earlier.tokens, **spent)

    def _end(self) -> None:
        self.num_frames = self._seen_frames
        self._finished = True

    def _about(self) -> dict[str, Any]:
        """Everything that the result depends on."""
        context = self._context
        return {
            "clip": self._clip.identity(),
            "model": [context.codec.config.config_hash(), context.weights_digest],
            "prior": None if context.prior is None else context.prior.to_json(),
            "dtype": str(context.codec.dtype),
            "window": [context.codec.window_blocks, context.when_full],
            "metric": self._metric_name,
            "search": {"name": self._search_name} | self._search_arguments(),
        } | ({} if self.layout.fit == "crop" else {"layout": _json_of(self.layout)})

    def _header(self) -> dict[str, Any]:
        """The fields of `TokenizedClip` except its blocks."""
        context, config = self._context, self._context.codec.config
        header: dict[str, Any] = dict(
            bottleneck_type=config.bottleneck_type,
            codebook_size=config.codebook_size if config.bottleneck_type == "fsq" else None,
            tokens_per_block=config.tokens_per_block,
            frames_per_block=config.frames_per_block,
            num_frames=self.num_frames,
            is_image=self.is_image,
            resolution=config.resolution,
            source=self.source,
            pixel_aspect=self._clip.pixel_aspect,
            transfer=self._clip.transfer,
            fit=self.layout.fit,
            frame=self.layout.frame,
            tile_rows=self.layout.tops,
            tile_columns=self.layout.lefts,
            token_order=config.token_order,
            patch_size=() if config.token_order == "raster" else config.patch_size,
            rate=float(self.rate),
            model_id=context.model_id,
            config_hash=config.config_hash(),
            threshold=self._search_options.threshold,
            search=self._search_label(),
            window_blocks=context.codec.window_blocks,
            context=context.when_full,
            weights=context.fingerprint,
        )
        return header

    def _search_label(self) -> str:
        """How counts were found, as token files say it; a loss other than the squared error is named."""
        search = self._search_name if self._budget is None else "budget"
        return search if self.metric is None else f"{search}:{self._metric_name}"


def _json_of(layout: FrameLayout) -> dict[str, Any]:
    """The layout as JSON holds it."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(layout).items()
    }


Progress = tuple[EncodeSession, BlockResult | MediaError | None]


def tokenize_side_by_side(
    context: TokenizerContext, sessions: Iterable[EncodeSession], *, batch: int = 1
) -> Iterator[Progress]:
    """The blocks of several clips as they are done, each with its clip; after a clip's last block None, or the error that ended it.

    Args:
      context: what all clips of the tokenizer share.
      sessions: the clips; one is started when a slot is free.
      batch: clips that go through the model at once. The next clip takes the slot of one that ends.
    """
    waiting = iter(sessions)
    first = next(waiting, None)
    if first is None:
        return
    scheduler = BatchScheduler(
        context.codec,
        context.weights,
        batch=batch,
        width=first.width,
        weighted=first.layout.is_weighted,
    )
    waiting = itertools.chain([first], waiting)
    running: _Running = {}
    try:
        while True:
            for slot in scheduler.free_slots:
                yield from _fill_slot(context, scheduler, slot, running, waiting)
            if len(scheduler.free_slots) == batch:
                return
            results = scheduler.step()
            for slot, (session, _) in running.items():
                session.note_passes(scheduler.passes(slot))
            for slot, result in results:
                session, _ = running[slot]
                yield session, session.record_result(result, scheduler)
    finally:
        for session, blocks in running.values():
            blocks.close()  # type: ignore[attr-defined]
            session.close()


# The clip in each slot, and its blocks that are still to come.
_Running = dict[int, tuple[EncodeSession, Iterator[PendingBlock]]]


def _fill_slot(
    context: TokenizerContext,
    scheduler: BatchScheduler,
    slot: int,
    running: _Running,
    waiting: Iterator[EncodeSession],
) -> Iterator[Progress]:
    """Gives a free slot the next block of its clip, else the first block of the next clip; the slot stays free if no clip is left.

    Args:
      context: what all clips of the tokenizer share.
      scheduler: has the slots.
      slot: the free one.
      running: changed in place.
      waiting: clips that have not started.
    """
    while True:
        if slot not in running:
            session = next(waiting, None)
            if session is None:
                return
            if session.width != scheduler.width:
                raise ValueError(
                    f"Clips that try {session.width} and {scheduler.width} counts in a call cannot share one; give all the same options."
                )
            if session.layout.is_weighted != scheduler.weighted:
                raise ValueError(
                    "Clips of several fits cannot share a batch; give all the same options."
                )
            running[slot] = session, session.start(scheduler, slot)
        session, blocks = running[slot]
        try:
            block = next(blocks, None)
        except MediaError as error:
            del running[slot]
            session.close()
            yield session, error
            continue
        if block is not None:
            number, window = session.num_done, context.codec.window_blocks
            if context.when_full == "restart" and number % window == 0:
                scheduler.forget(slot)
            search = session.next_search(block)
            scheduler.assign(
                slot,
                block.tile,
                search,
                metric=session.metric,
                weights=session.layout.weights(0),
            )
            return
        del running[slot]
        session.end()
        yield session, None

"""Clips becoming tokens, block by block: one, or several side by side."""

import collections
import dataclasses
import functools
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
from elastic.search import TOLERANCE, CurvePrior, Search, SearchOptions, make_search
from elastic.search.rate_curve import Curve, SearchHistory, history_from_json, history_to_json
from elastic.tiles import FrameLayout
from elastic.tokenizer.block_codec import Codec, CodecCache
from elastic.tokenizer.clip_source import Ahead, Clip
from elastic.tokenizer.frame_tiles import BlockGatherer, to_tile
from elastic.tokenizer.result import BlockResult
from elastic.tokenizer.resume import ResumeError, ResumeLog, remove_resume_log
from elastic.tokenizer.scheduler import BatchScheduler, Slot, SlotPool
from elastic.tokenizer.targets import EncodeOptions
from elastic.tokenizer.two_pass import Budget, spend
from elastic.tokens import BlockTokens, TokenizedClip
from elastic.tokens.stream_file import Recorded

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
    del arguments["full_curve"]  # left at its default
    if arguments["tolerance"] == TOLERANCE:  # which resume files of before do not have
        del arguments["tolerance"]
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


# A tile as the model sees it, uint8 [n, tile, tile, 3]; and its rate curve as guessed from its pixels, None where the search uses none.
_Prepared = tuple[np.ndarray, Curve | None]


class PendingBlock(NamedTuple):
    """A block that is to be tokenized."""

    frames: UInt8[np.ndarray, "n rows columns 3"]  # whole frames
    prepared: dict[int, _Prepared]  # the only tile; several tiles are cut out when their turn comes


class EncodeSession:
    """A clip being tokenized: iterate over it for one `BlockResult` after the other, then ask for `tokens()`.

    Frames are read, tokenized and handed out block by block; only the tokens are kept.

    Iterating does everything for one clip. `tokenize_side_by_side` calls, for each of its clips: `start` once, and `prepare` for
    every slot; for every tile of a block `next_search`, then `tile_result` with what that search gave, and `record_result` with the
    whole block; at last `end` after the last block, or `close` where the clip ends early. A run that is recorded calls
    `open_resume_log` before.

    Args:
      context: what all clips of the tokenizer share.
      clip: the clip.
      options: what is asked of its tokens.
      budget: the tokens that it may spend, where `options` give a mean or a bitrate; else None.
      batch: tiles that go through the model at once where the clip is iterated over.

    Attributes:
      num_frames, num_blocks: of the clip; None while frames are still arriving.
      is_image, rate, source, layout: as in `TokenizedClip`.
      source_rate: frames per second of the original file; 0 for an image, and for frames that come from no file.
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
        batch: int = 1,
    ):
        config = context.codec.config
        self._context, self._clip, self._budget = context, clip, budget
        self._search_name = options.search_name
        self._search_options = options.search_options(config, width=context.search_width)
        self._metric_name, self.metric = make_metric(options.metric)
        self.is_image, self.rate, self.source = clip.is_image, clip.rate, clip.source
        self.source_rate, self.layout = clip.source_rate, clip.layout
        self._batch = batch if clip.layout.num_tiles > 1 else 1
        self.num_frames = clip.num_frames
        self.first_block = 0
        self.recorded: list[dict[str, Any]] = []
        self._resume_log: ResumeLog | None = None
        self._coming: Ahead[PendingBlock] | None = None  # what was read ahead, until `start`
        self._cache: CodecCache | None = None  # of an earlier run, until `start` hands it on
        self._histories: list[SearchHistory | None] = [None] * clip.layout.num_tiles
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
            for _, result in tokenize_side_by_side(self._context, [self], batch=self._batch):
                if isinstance(result, Exception):
                    raise result
                if result is not None:
                    yield result
            return
        self._reset()
        blocks = Ahead(self._clip.blocks(self._context.codec.config.frames_per_block), _AHEAD)
        results = spend(
            self._context.codec,
            self._context.weights,
            blocks,
            self._budget,
            layout=self.layout,
            width=self.width,
            restart=self._context.when_full == "restart",
            metric=self.metric,
            on_passes=self._note_budget_passes,
            num_blocks=self.num_blocks,
        )
        for result in results:
            self._count(result)
            yield result
        self._end()

    @property
    def num_recorded(self) -> int:
        """Blocks that an earlier run recorded."""
        log = self._resume_log
        return 0 if log is None else len(log.blocks) // self.layout.num_tiles

    @property
    def slots_needed(self) -> int:
        """Slots that the clip needs at once: one for each tile, whose cache it holds. Tiles of a single block take turns."""
        return 1 if self.num_blocks == 1 else self.layout.num_tiles

    def open_resume_log(
        self, path: str | os.PathLike, *, max_snapshot_block: float = math.inf
    ) -> None:
        """Records every block to `path` from now on; resumes from what an earlier run recorded there, which sets `first_block`.

        Args:
          path: the resume file.
          max_snapshot_block: resume from a snapshot of the cache that was made after at most this many blocks. The recorded blocks
            after the snapshot go through the model once more. 0 uses no snapshot, which is required when clips share a batch. Of
            clips of several tiles no snapshot is made.

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
        tiles = self.layout.num_tiles
        self._resume_log = ResumeLog(path, about, self._header(), tiles=tiles)
        usable = max_snapshot_block and tiles == 1
        found = self._resume_log.load_cache(self._context.codec) if usable else None
        if found is not None and 0 < found[0] <= max_snapshot_block:
            self.first_block, self._cache = found
            before = self._resume_log.blocks[: self.first_block]
            self._histories = [history_from_json(before[-1].about["memory"])]
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

    def check_beside(self, other: "EncodeSession") -> None:
        """Refuses a clip that cannot share a batch with another one.

        Raises:
          ValueError: their programs differ.
        """
        if self.width != other.width:
            raise ValueError(
                f"Clips that try {self.width} and {other.width} counts in a call cannot share one; give all the same options."
            )
        if self.layout.is_weighted != other.layout.is_weighted:
            raise ValueError(
                "Clips of several fits cannot share a batch; give all the same options."
            )

    def read_ahead(self) -> None:
        """Reads the first blocks of a file now, in a thread, so that `start` need not wait for them."""
        if self._clip.is_file and self._budget is None:
            self._coming = self._read()

    def start(self) -> Ahead[PendingBlock]:
        """The blocks that are to be tokenized. They are read in a thread while the model runs; single tiles are prepared there too."""
        self._reset()
        blocks, self._coming = self._coming or self._read(), None
        return blocks

    def _read(self) -> Ahead[PendingBlock]:
        frames_per_block = self._context.codec.config.frames_per_block
        alone = self.layout.num_tiles == 1

        def blocks() -> Iterator[PendingBlock]:
            for frames in self._clip.blocks(frames_per_block, self.first_block):
                yield PendingBlock(frames, {0: self.prepared(frames, 0)} if alone else {})

        return Ahead(blocks(), _AHEAD)

    def prepare(self, scheduler: BatchScheduler) -> None:
        """Makes a scheduler ready that has a slot for the clip: with the cache of an earlier run, and space for all blocks."""
        if self._cache is not None:
            scheduler.cache, self._cache = self._cache, None
        scheduler.reserve(self.num_blocks)

    def prepared(self, frames: UInt8[np.ndarray, "n rows columns 3"], tile: int) -> _Prepared:
        """A tile of a block as the model sees it, with its rate curve as guessed from its pixels."""
        pixels = to_tile(self.layout, frames, tile)
        guesses = self._search_name == "predict" and self.metric is None
        prior = self._context.prior if guesses else None
        return pixels, None if prior is None else prior.curve_of(pixels)

    def restarts_at(self, number: int) -> bool:
        """Whether the context is empty before a block because the window is full."""
        context = self._context
        return context.when_full == "restart" and number % context.codec.window_blocks == 0

    def next_search(self, tile: int, number: int, expected: Curve | None) -> Search:
        """The search of a tile of a block, whose rate curve is guessed to be `expected`."""
        entry, prior = self._entry(tile, number), self._context.prior
        if self._resume_log is not None and entry < len(self._resume_log.blocks):
            count = self._resume_log.blocks[entry].tokens.num_kept
            arguments: dict[str, Any] = self._search_arguments() | {"num_tokens": count}
            return make_search("fixed", **arguments)
        history = self._histories[tile]
        if expected is not None and prior is not None:
            history = prior.history(expected, history)
        elif history is None:  # of this clip alone: its tokens must not depend on other clips
            history = SearchHistory()
        self._histories[tile] = history
        return self._make_search(history)

    def tile_result(
        self, tile: int, number: int, result: BlockResult
    ) -> tuple[BlockResult, dict[str, Any]]:
        """The result of a tile of a block, with the tokens of the earlier run if it was recorded; and the history of its searches."""
        log, entry = self._resume_log, self._entry(tile, number)
        if log is not None and entry < len(log.blocks):
            result = self._repeated(result, log.blocks[entry], number)
            self._histories[tile] = history_from_json(log.blocks[entry].about["memory"])
        return result, {} if log is None else history_to_json(
            self._histories[tile] or SearchHistory()
        )

    def _entry(self, tile: int, number: int) -> int:
        """The place of a tile of a block in a token record."""
        return number * self.layout.num_tiles + tile

    def _make_search(self, history: SearchHistory | None = None) -> Search:
        return make_search(
            self._search_name,
            history=history,
            can_draft=self.metric is None and self._context.codec.can_draft,
            **self._search_arguments(),
        )

    def _search_arguments(self) -> dict[str, Any]:
        return _search_arguments(self._search_options)

    def record_result(
        self, result: BlockResult, memories: dict[int, dict[str, Any]], scheduler: BatchScheduler
    ) -> BlockResult:
        """Counts and records the result of the next block, and gives it.

        Args:
          result: with whole frames.
          memories: the history of the searches of each tile after the block.
          scheduler: has the cache of a clip that has no others beside it.
        """
        resume_log, is_new = self._resume_log, self.num_done >= self.num_recorded
        if resume_log is not None and is_new:
            parts = result.parts
            # The sum of squares is the whole block's, whose last record has it.
            squares = [0] * (len(parts) - 1) + [result.squares]
            for tile, part in enumerate(parts):
                resume_log.append(
                    part.tokens,
                    len(result.frames),
                    passes=part.passes,
                    seconds=result.seconds / len(parts),
                    squares=squares[tile],
                    memory=memories[tile],  # the name is part of the format of resume files
                )
        self._count(result)
        alone = scheduler.batch == 1 and self.layout.num_tiles == 1
        if resume_log is not None and alone and is_new:
            resume_log.copy_cache(scheduler.cache)
        return result

    def note_passes(self, passes: int) -> None:
        """Tells `on_progress` that the model went over the block under way so many times.

        How many passes it will take is guessed: as many as the blocks before took in the mean.
        """
        if self.on_progress is not None and passes:
            before = self.num_done - self.first_block
            first = _FIRST_PASSES[self._search_name] * self.layout.num_tiles
            expected = self._passes / before if before else first
            self.on_progress(self.num_done + min(passes / (expected + 1), 1.0))

    def _note_budget_passes(self, passes: int) -> None:
        assert self._budget is not None
        self._passes += passes
        if self.on_progress is not None:
            tiles = self.layout.num_tiles
            self.on_progress(self._passes / (self._budget.passes_per_block * tiles))

    def end(self) -> None:
        """Ends the clip: there are no more blocks."""
        if self._resume_log is not None:
            self._resume_log.finish()
        self._end()

    def close(self) -> None:
        """Ends reading ahead, and closes an unfinished resume log, which a later run may resume from."""
        if self._coming is not None:
            self._coming.close()
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
        # Above 0 only for clips of one tile, whose cache was kept.
        before = [] if self._resume_log is None else self._resume_log.blocks[: self.first_block]
        self.num_done, self._blocks = len(before), []
        self._seen_frames = sum(block.num_frames for block in before)

    def _count(self, result: BlockResult) -> None:
        if self._resume_log is None:
            self._blocks += [part.tokens for part in result.parts]
        self.num_done += 1
        if self._budget is None:
            self._passes += result.passes
        self._seen_frames += len(result.frames)

    def _repeated(self, result: BlockResult, earlier: Recorded, number: int) -> BlockResult:
        """The result of a tile of a block that was recorded, after it went through the model with its count."""
        assert self._resume_log is not None
        same = np.array_equal(earlier.tokens.values, result.tokens.values)
        if not same or len(result.frames) != earlier.num_frames:
            raise ResumeError(
                f"{self._resume_log.path} has other tokens for block {number} than this machine computes; remove it to start again."
            )
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
      sessions: the clips; one is started when there is room for it.
      batch: clips, or tiles of clips, that go through the model at once. The next clip takes the slots of one that ends.
    """
    waiting = iter(sessions)
    first = next(waiting, None)
    if first is None:
        return
    slots = SlotPool(
        lambda: BatchScheduler(
            context.codec,
            context.weights,
            batch=batch,
            width=first.width,
            weighted=first.layout.is_weighted,
        )
    )
    coming: EncodeSession | None = first
    running: list[_ClipRun] = []
    try:
        while True:
            yield from _advance(running)
            while slots.free:
                coming = coming or next(waiting, None)
                if coming is None or (running and len(slots.free) < coming.slots_needed):
                    break
                coming.check_beside(first)
                running.append(_ClipRun(coming, slots))
                coming = None
                yield from _advance(running)
            if not running:
                return
            results = list(slots.step())
            for run in running:
                run.note_passes()
            owners = {slot: run for run in running for slot in run.slots}
            for slot, result in results:
                run = owners[slot]
                for whole in run.add(slot, result):
                    yield run.session, whole
    finally:
        for run in running:
            run.close()


def _advance(running: list["_ClipRun"]) -> Iterator[Progress]:
    """Gives the free slots of clips their next blocks. Clips that have ended are removed."""
    for run in list(running):
        run.fill_slots()
        if not run.has_ended:
            continue
        running.remove(run)
        if run.error is None:
            run.session.end()
        run.close()
        yield run.session, run.error


class _OpenBlock(NamedTuple):
    """A block that is under way: not all of its tiles are done."""

    block: PendingBlock
    gatherer: BlockGatherer
    memories: dict[int, dict[str, Any]]  # tile -> the history of its searches after this block


class _ClipRun:
    """A clip that goes through the model: which slot each of its tiles has, and its blocks under way.

    A tile has a slot, and with it a KV cache, for the whole clip. In a clip of one block, such as a picture, tiles take turns.

    Args:
      session: the clip.
      slots: the slots that all clips share.

    Attributes:
      slots: the slots that the clip has now -> the tile in it.
      error: what ended reading the clip; None: nothing did.
    """

    def __init__(self, session: EncodeSession, slots: SlotPool):
        self.session, self._pool = session, slots
        self.slots: dict[Slot, int] = {}
        self.error: MediaError | None = None
        self._blocks = session.start()
        self._all_read = False
        self._open: dict[int, _OpenBlock] = {}
        self._next_read = self._next_done = session.first_block
        # The block that each tile's slot has, or takes next.
        self._at = [session.first_block] * session.layout.num_tiles
        self._waiting = collections.deque(range(session.layout.num_tiles))  # tiles without a slot
        if session.slots_needed > 1:
            self._take(session.slots_needed)

    @property
    def has_ended(self) -> bool:
        """Whether no block is to come and none is under way."""
        return self._all_read and not self._open

    def fill_slots(self) -> None:
        """Gives every free slot of the clip the next block of its tile, where it has come."""
        single = self.session.slots_needed == 1
        if single and self._waiting:
            self._take(min(len(self._pool.free), len(self._waiting)))
        for slot, tile in self.slots.items():
            if slot.is_free and (block := self._block(self._at[tile])) is not None:
                self._assign(slot, tile, block)
        if not self._open:  # the tiles of a picture have no slot any more: reading ends here
            self._block(self._next_read)

    def add(self, slot: Slot, result: BlockResult) -> Iterator[BlockResult]:
        """Adds what the model gave for the block in a slot; gives the blocks that are complete now."""
        tile = self.slots[slot]
        number = self._at[tile]
        opened = self._open[number]
        result, opened.memories[tile] = self.session.tile_result(tile, number, result)
        opened.gatherer.add(tile, result)
        self._at[tile] += 1
        if self.session.num_blocks == 1:
            del self.slots[slot]
            self._pool.give_back(slot)
        while (done := self._open.get(self._next_done)) is not None and done.gatherer.is_complete:
            del self._open[self._next_done]
            self._next_done += 1
            yield self.session.record_result(done.gatherer.result(), done.memories, slot.scheduler)

    def note_passes(self) -> None:
        """Tells the session how many passes the block under way has taken."""
        opened = self._open.get(self._next_done)
        if opened is not None:
            done = sum(part.passes for part in opened.gatherer.results.values())
            at = (
                slot.passes
                for slot, tile in self.slots.items()
                if self._at[tile] == self._next_done
            )
            self.session.note_passes(done + sum(at))

    def close(self) -> None:
        """Ends reading, and frees the slots."""
        self._blocks.close()
        self.session.close()
        for slot in self.slots:
            self._pool.give_back(slot)
        self.slots.clear()

    def _take(self, count: int) -> None:
        """Takes slots for tiles that have none."""
        for slot in self._pool.take(count):
            self.slots[slot] = self._waiting.popleft()
            self.session.prepare(slot.scheduler)

    def _block(self, number: int) -> PendingBlock | None:
        """A block under way, or the next one that is read; None: it has not come, or may not be read yet."""
        if number == self._next_read and not self._all_read and self._may_read:
            try:
                block = next(self._blocks, None)
            except MediaError as error:
                block, self.error = None, error
            if block is None:
                self._all_read = True
            else:
                gatherer = BlockGatherer(self.session.layout, block.frames)
                self._open[number] = _OpenBlock(block, gatherer, {})
                self._next_read += 1
        opened = self._open.get(number)
        return None if opened is None else opened.block

    @property
    def _may_read(self) -> bool:
        """Whether a block more may be under way. One is read ahead where it need not be waited for, so that no slot waits for others."""
        return len(self._open) < (1 if self.session.num_blocks is None else 2)

    def _assign(self, slot: Slot, tile: int, block: PendingBlock) -> None:
        session, number = self.session, self._at[tile]
        pixels, expected = block.prepared.get(tile) or session.prepared(block.frames, tile)
        if session.restarts_at(number):
            slot.scheduler.forget(slot.number)
        slot.scheduler.assign(
            slot.number,
            pixels,
            session.next_search(tile, number, expected),
            metric=session.metric,
            weights=session.layout.weights(tile),
        )

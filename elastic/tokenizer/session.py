"""Clips becoming tokens, block by block: one, or several side by side."""

import dataclasses
import functools
import itertools
import logging
import math
import os
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import UInt8

from elastic.checkpoints.fingerprint import fingerprint
from elastic.io.tree import tree_digest
from elastic.media import MediaError
from elastic.metrics import Metric
from elastic.search import CurvePrior, Search, make_search
from elastic.search.rate_curve import Curve, SearchHistory, history_from_json, history_to_json
from elastic.tokenizer.block_codec import Codec
from elastic.tokenizer.clip_source import Clip, ahead
from elastic.tokenizer.result import BlockResult
from elastic.tokenizer.resume import ResumeError, ResumeLog, remove_resume_log
from elastic.tokenizer.scheduler import BatchScheduler
from elastic.tokenizer.two_pass import Budget, spend
from elastic.tokens import BlockTokens, TokenizedClip

log = logging.getLogger(__name__)

_AHEAD = 2  # blocks of a clip that are decoded while the model runs


@dataclasses.dataclass(frozen=True)
class TokenizerContext:
    """What all clips of a tokenizer share; `elastic.tokenizer` documents the fields."""

    codec: Codec
    weights: dict[str, Any]
    model_id: str
    context: Literal["carry", "restart"]
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

    frames: UInt8[np.ndarray, "n rows columns 3"]
    expected: Curve | None  # what its pixels say of its curve, where the search asks


class EncodeSession:
    """A clip being tokenized: iterate over it for one `BlockResult` after the other, then ask for `tokens()`.

    Frames are read, tokenized and handed out block by block; nothing but the tokens is held.

    Attributes:
      num_frames, num_blocks: of the clip; None while frames are still coming.
      is_image, rate, source: as in `TokenizedClip`.
      num_done: blocks that are tokenized.
      first_block: the first that will be handed out. Above 0 where a recording goes on: `recorded` has those before.
      recorded: numbers of the blocks before `first_block`: `passes`, `seconds` and `squares` of each.
    """

    def __init__(
        self,
        setting: TokenizerContext,
        clip: Clip,
        search: dict[str, Any],
        *,
        budget: Budget | None = None,
        metric: tuple[str, Metric | None] = ("mse", None),
    ):
        self._setting, self._clip, self._search, self._budget = setting, clip, search, budget
        self._metric_name, self.metric = metric
        self.is_image, self.rate, self.source = clip.is_image, clip.rate, clip.source
        self.num_frames = clip.num_frames
        self.first_block = 0
        self.recorded: list[dict[str, Any]] = []
        self._recording: ResumeLog | None = None
        self._cache: Any = None
        self._history: SearchHistory | None = None
        self.num_done = 0  # blocks that are tokenized
        self._seen_frames = 0
        self._blocks: list[BlockTokens] = []  # these; with a recording they are there instead
        self._finished = False
        if budget is None:  # what cannot be searched for is refused before the first frame is read
            make_search(**search)

    @property
    def num_blocks(self) -> int | None:
        """Blocks of the clip; None while frames are still coming."""
        frames = self._setting.codec.config.frames_per_block
        return None if self.num_frames is None else -(-self.num_frames // frames)

    @property
    def width(self) -> int:
        """Counts tried in one call."""
        return self._search["width"]

    @property
    def has_budget(self) -> bool:
        """Whether the counts come from a budget instead of a search."""
        return self._budget is not None

    def __iter__(self) -> Iterator[BlockResult]:
        if self._budget is None:
            for _, result in tokenize_side_by_side(self._setting, [self]):
                if isinstance(result, Exception):
                    raise result
                if result is not None:
                    yield result
            return
        self._reset()
        results = spend(
            self._setting.codec,
            self._setting.weights,
            ahead(self._clip.blocks(self._setting.codec.config.frames_per_block), _AHEAD),
            self._budget,
            width=self.width,
            restart=self._setting.context == "restart",
            metric=self.metric,
        )
        for result in results:
            self._count(result)
            yield result
        self._end()

    @property
    def num_recorded(self) -> int:
        """Blocks that an earlier run recorded."""
        return 0 if self._recording is None else len(self._recording.blocks)

    def open_record(self, path: str | os.PathLike, *, most_copied: float = math.inf) -> None:
        """Records to `path` from now on; goes on from what an earlier run left there, so that `first_block` is known.

        Args:
          most_copied: blocks after which a copy of the cache may be used, at most; 0: none, because other clips will go through the
            model beside this one. Recorded blocks after the copy go through the model once more.

        Raises:
          RecordingError: there is a recording of another run.
          ValueError: a budget is not spent block by block.
        """
        if self._budget is not None:
            raise ValueError(
                f"record={str(path)!r} needs a threshold or num_tokens: a budget is not spent block by block."
            )
        about = self._about()
        if about["clip"] is None and os.path.exists(path):
            raise ResumeError(
                f"{path} is there already, and frames that come cannot be gone through again; give another record."
            )
        self._recording = ResumeLog(path, about, self._header())
        found = self._recording.load_cache(self._setting.codec) if most_copied else None
        if found is not None and 0 < found[0] <= most_copied:
            self.first_block, self._cache = found
            before = self._recording.blocks[: self.first_block]
            self._history = history_from_json(before[-1].about["memory"])
            self.recorded = [block.about for block in before]

    def open_fitting_record(
        self, path: str | os.PathLike, *, most_copied: float = math.inf
    ) -> None:
        """The same; a recording of another run is removed, and the log says so."""
        try:
            self.open_record(path, most_copied=most_copied)
        except ResumeError as error:
            log.warning("Begins anew: %s", error)
            remove_resume_log(path)
            self.open_record(path, most_copied=most_copied)

    def begin(self, lanes: BatchScheduler, lane: int) -> Iterator[PendingBlock]:
        """The blocks to tokenize, `lane` ready for the first. They are read, and their curves guessed, while the model works."""
        lanes.forget(lane)
        self._reset()
        if self._cache is not None:
            lanes.cache, self._cache = self._cache, None
        frames_per_block = self._setting.codec.config.frames_per_block
        guesses = self._search["name"] == "predict" and self.metric is None
        prior = self._setting.prior if guesses else None

        def blocks() -> Iterator[PendingBlock]:
            for frames in self._clip.blocks(frames_per_block, self.first_block):
                yield PendingBlock(frames, None if prior is None else prior.curve_of(frames))

        return ahead(blocks(), _AHEAD)

    def next_search(self, block: PendingBlock) -> Search:
        """The search of the next block."""
        number, prior = self.num_done, self._setting.prior
        if self._recording is not None and number < len(self._recording.blocks):
            count = self._recording.blocks[number].tokens.num_kept
            return make_search(**self._search | {"name": "fixed", "num_tokens": count})
        if block.expected is not None and prior is not None:
            self._history = prior.history(block.expected, self._history)
        elif (
            self._history is None
        ):  # of this clip alone, so that its tokens do not depend on others
            self._history = SearchHistory()
        return make_search(history=self._history, **self._search)

    def take(self, result: BlockResult, lanes: BatchScheduler) -> BlockResult:
        """Notes what the next block has become."""
        number, recording = self.num_done, self._recording
        if recording is not None and number < len(recording.blocks):
            result = self._repeated(result, number)
        elif recording is not None:
            history = history_to_json(self._history or SearchHistory())
            recording.append(
                result.tokens,
                len(result.frames),
                passes=result.passes,
                seconds=result.seconds,
                squares=result.squares,
                memory=history,
            )
        self._count(result)
        if recording is not None and lanes.batch == 1 and self.num_done > len(recording.blocks):
            recording.copy_cache(lanes.cache)
        return result

    def end(self) -> None:
        """Notes that there are no more blocks."""
        if self._recording is not None:
            self._recording.finish()
        self._end()

    def close(self) -> None:
        """Leaves an unfinished recording for a later run."""
        if self._recording is not None:
            self._recording.close()

    def tokens(self) -> TokenizedClip:
        """The token record of the whole clip.

        Raises:
          ValueError: not all blocks have been tokenized yet.
        """
        if not self._finished:
            of = "" if self.num_blocks is None else f" of {self.num_blocks}"
            raise ValueError(f"{self.num_done}{of} blocks are tokenized; iterate to the end first.")
        header: dict[str, Any] = self._header() | {"num_frames": self._seen_frames}
        blocks = self._blocks if self._recording is None else self._recording.tokens()
        return TokenizedClip(blocks=tuple(blocks), **header)

    def _reset(self) -> None:
        """Back to the first block that is to be tokenized."""
        before = [] if self._recording is None else self._recording.blocks[: self.first_block]
        self.num_done, self._blocks = len(before), []
        self._seen_frames = sum(block.num_frames for block in before)

    def _count(self, result: BlockResult) -> None:
        if self._recording is None:
            self._blocks.append(result.tokens)
        self.num_done += 1
        self._seen_frames += len(result.frames)

    def _repeated(self, result: BlockResult, number: int) -> BlockResult:
        """The result of a block that was recorded, after it went through the model with its count."""
        assert self._recording is not None
        earlier = self._recording.blocks[number]
        same = np.array_equal(earlier.tokens.values, result.tokens.values)
        if not same or len(result.frames) != earlier.num_frames:
            raise ResumeError(
                f"{self._recording.path} has other tokens for block {number} than this machine finds; remove it to begin anew."
            )
        self._history = history_from_json(earlier.about["memory"])
        spent = {name: earlier.about[name] for name in ("passes", "seconds")}
        return result._replace(tokens=earlier.tokens, **spent)

    def _end(self) -> None:
        self.num_frames = self._seen_frames
        self._finished = True

    def _about(self) -> dict[str, Any]:
        """All that the result depends on."""
        setting = self._setting
        return {
            "clip": self._clip.identity(),
            "model": [setting.codec.config.config_hash(), setting.weights_digest],
            "prior": None if setting.prior is None else setting.prior.to_json(),
            "dtype": str(setting.codec.dtype),
            "window": [setting.codec.window_blocks, setting.context],
            "metric": self._metric_name,
            "search": self._search,
        }

    def _header(self) -> dict[str, Any]:
        """The fields of `TokenizedClip` but for its blocks."""
        setting, config = self._setting, self._setting.codec.config
        header: dict[str, Any] = dict(
            bottleneck_type=config.bottleneck_type,
            codebook_size=config.codebook_size if config.bottleneck_type == "fsq" else None,
            tokens_per_block=config.tokens_per_block,
            frames_per_block=config.frames_per_block,
            num_frames=self.num_frames,
            is_image=self.is_image,
            resolution=config.resolution,
            source=self.source,
            rate=float(self.rate),
            model_id=setting.model_id,
            config_hash=config.config_hash(),
            threshold=self._search["threshold"],
            search=self._search_name(),
            window_blocks=setting.codec.window_blocks,
            context=setting.context,
            weights=setting.fingerprint,
        )
        return header

    def _search_name(self) -> str:
        """What the token file says of how counts were found; losses other than squared errors are named."""
        search = self._search["name"] if self._budget is None else "budget"
        return search if self.metric is None else f"{search}:{self._metric_name}"


Progress = tuple[EncodeSession, BlockResult | MediaError | None]


def tokenize_side_by_side(
    setting: TokenizerContext, encodings: Iterable[EncodeSession], *, batch: int = 1
) -> Iterator[Progress]:
    """The blocks of several clips as they are done, each with its clip; None says that a clip is finished, an error that it is no good.

    Args:
      batch: clips that go through the model at once. One that ends makes room for the next.
    """
    waiting = iter(encodings)
    first = next(waiting, None)
    if first is None:
        return
    lanes = BatchScheduler(setting.codec, setting.weights, batch=batch, width=first.width)
    waiting = itertools.chain([first], waiting)
    in_lane: dict[int, tuple[EncodeSession, Iterator[PendingBlock]]] = {}
    try:
        while True:
            for lane in lanes.free:
                yield from _fill(setting, lanes, lane, in_lane, waiting)
            if len(lanes.free) == batch:
                return
            for lane, result in lanes.step():
                encoding = in_lane[lane][0]
                yield encoding, encoding.take(result, lanes)
    finally:
        for encoding, blocks in in_lane.values():
            blocks.close()  # type: ignore[attr-defined]
            encoding.close()


def _fill(
    setting: TokenizerContext,
    lanes: BatchScheduler,
    lane: int,
    in_lane: dict[int, tuple[EncodeSession, Iterator[PendingBlock]]],
    waiting: Iterator[Any],
) -> Iterator[Progress]:
    """Gives a free lane its clip's next block, or the first one of another clip, if there is one."""
    while True:
        if lane not in in_lane:
            encoding = next(waiting, None)
            if encoding is None:
                return
            if encoding.width != lanes.width:
                raise ValueError(
                    f"Clips that try {encoding.width} and {lanes.width} counts in a call cannot share one; give all the same options."
                )
            in_lane[lane] = encoding, encoding.begin(lanes, lane)
        encoding, blocks = in_lane[lane]
        try:
            block = next(blocks, None)
        except MediaError as error:
            del in_lane[lane]
            encoding.close()
            yield encoding, error
            continue
        if block is not None:
            number = encoding.num_done
            window = setting.codec.window_blocks
            if setting.context == "restart" and number % window == 0:
                lanes.forget(lane)
            search = encoding.next_search(block)
            lanes.put(lane, block.frames, search, metric=encoding.metric)
            return
        del in_lane[lane]
        encoding.end()
        yield encoding, None

"""Tokenizes a data set: files -> shards, in several processes that need not know of each other, and after any restart.

How a shard comes to be: (1) its process takes the shard's lock; (2) each file becomes a token file in
`.unfinished/shard-00003/`, so that only the file under way can be lost; (3) they are packed into
`shard-00003.parquet`, which appears as a whole; (4) `shard-00003.json` says that the shard is finished;
(5) the folder goes. A process that was killed leaves at most what the next one redoes or removes.
"""

import contextlib
import dataclasses
import json
import logging
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from elastic.io.atomic import locked
from elastic.io.json_file import write_json
from elastic.media import MediaError
from elastic.media.folders import IMAGE_SUFFIXES
from elastic.pipeline.dataset_plan import (
    LOCK,
    PLAN,
    UNFINISHED,
    DatasetPlan,
    clear_unfinished,
    list_inputs,
    printable,
    sizes,
    write_or_check,
)
from elastic.pipeline.dataset_summary import BAD, PLOT, SUMMARY, Tally, write_summary
from elastic.tokenizer import ElasticTokenizer, EncodeOptions
from elastic.tokenizer.resume import remove_resume_log
from elastic.tokens import TokenFileError, TokenizedClip, write_shard

__all__ = ["Outcome", "list_inputs", "shard_name", "tokenize_dataset"]

log = logging.getLogger(__name__)

_WAIT_SECONDS, _QUIET_WAITS = 1.0, 5  # between two shards a process holds none for a moment


class Outcome(NamedTuple):
    """How a process's part in a run ended.

    Attributes:
      summary: the content of summary.json, if all shards of the run are finished.
      unfinished: shards that are not, all of them other processes'.
    """

    summary: dict[str, Any] | None
    unfinished: tuple[str, ...]


def tokenize_dataset(
    tokenizer: ElasticTokenizer,
    inputs: Mapping[str, Path],
    folder: str | Path,
    options: EncodeOptions,
    *,
    files_per_shard: int = 64,
    process_index: int = 0,
    process_count: int = 1,
    batch: int = 1,
    wait: bool = False,
    progress: bool = True,
) -> Outcome:
    """Does this process's share of a data set: shards `process_index`, `process_index + process_count`, ...

    Called again, in as many processes or others, it goes on where it was. Whoever sees that all shards are finished
    writes the summary.

    Args:
      tokenizer: the model.
      inputs: {id: file}, as `list_inputs` gives them.
      folder: where the shards go; made if need be.
      options: what is read of a clip, and how its tokens are chosen.
      files_per_shard: files that share a shard; the last one may have fewer.
      process_index, process_count: the number of this process, from 0, and how many there are.
      batch: clips that go through the model together.
      wait: return only when all shards of the run are finished, or no process works on those that are not.
      progress: show a bar with rate and estimate.

    Raises:
      ValueError: the options contradict each other, or the folder holds another run's shards.
      OSError: the folder cannot be written to.
    """
    folder = Path(folder)
    _check_options(tokenizer, inputs, options)
    plan = DatasetPlan(
        files=sizes(dict(sorted(inputs.items()))),
        files_per_shard=files_per_shard,
        model=_model(tokenizer),
        options=_written(tokenizer, options),
    )
    _check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_or_check(folder, plan)
    work = _Work(tokenizer, inputs, folder, plan, batch, options)
    mine = range(process_index, plan.num_shards, process_count)
    with _Progress(work, mine, shown=progress) as bar:
        try:
            # What another process has in hand is looked at once more at the end: it may have been killed.
            for shard in [shard for shard in mine if not work.do(shard, bar)]:
                work.do(shard, bar)
        except (KeyboardInterrupt, SystemExit):
            log.warning("Stopped; the same command goes on from here.")
            raise
    if wait:
        work.wait()
    if left := work.unfinished():
        names = tuple(shard_name(shard) for shard in left)
        log.info(
            "%d of %d shards are left to other processes: %s.",
            len(left),
            plan.num_shards,
            _few(names),
        )
        return Outcome(None, names)
    with locked(folder / LOCK, wait=True):
        for lock in folder.glob(".shard-*.lock"):
            lock.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # gone already
            (folder / UNFINISHED).rmdir()
        shards = [(shard_name(k), Tally.load(work.json(k))) for k in range(plan.num_shards)]
        return Outcome(write_summary(folder, plan, shards), ())


def shard_name(shard: int) -> str:
    """The name of a shard's files, without their ending."""
    return f"shard-{shard:05d}"


class _Work:
    """The shards of a run, as they lie in its folder."""

    def __init__(
        self,
        tokenizer: ElasticTokenizer,
        inputs: Mapping[str, Path],
        folder: Path,
        plan: DatasetPlan,
        batch: int,
        options: EncodeOptions,
    ):
        self._tokenizer, self._inputs, self._options = tokenizer, inputs, options
        self._folder, self._batch, self.plan = folder, batch, plan

    def json(self, shard: int) -> Path:
        """The file that says that a shard is finished."""
        return self._folder / f"{shard_name(shard)}.json"

    def place(self, shard: int) -> Path:
        """Where the files of an unfinished shard wait."""
        return self._folder / UNFINISHED / shard_name(shard)

    def finished(self, shard: int) -> bool:
        """Whether nothing is left to be done for a shard."""
        return self.json(shard).exists()

    def unfinished(self) -> list[int]:
        """All shards of the run that are not finished, whosever they are."""
        return [shard for shard in range(self.plan.num_shards) if not self.finished(shard)]

    def done(self, shard: int) -> int:
        """How many files of a shard are."""
        if self.finished(shard):
            return len(self.plan.names(shard))
        return sum(1 for _ in self.place(shard).glob("*.json"))

    def wait(self) -> None:
        """Returns when no other process has an unfinished shard in hand."""
        quiet = 0
        while (left := self.unfinished()) and quiet < _QUIET_WAITS:
            time.sleep(_WAIT_SECONDS)
            quiet = 0 if any(map(self._held_by_another, left)) else quiet + 1

    def _held_by_another(self, shard: int) -> bool:
        lock = self._lock(shard)
        if not lock.exists():
            return False
        with locked(lock) as held:
            return not held

    def _lock(self, shard: int) -> Path:
        return self._folder / f".{shard_name(shard)}.lock"

    def do(self, shard: int, bar: "_Progress") -> bool:
        """Finishes a shard; False: another process has it in hand."""
        if self.finished(shard) and not self.place(shard).exists():
            return True
        lock = self._lock(shard)
        with locked(lock) as held:
            if not held:
                return False
            if not self.finished(shard):  # by another process, a moment ago
                clear_unfinished(self._folder, shard_name(shard))
                self._tokenize(shard, bar)
                self._pack(shard)
            shutil.rmtree(self.place(shard), ignore_errors=True)
            # Who waits for this very file finds the shard finished.
            lock.unlink(missing_ok=True)
        return True

    def _tokenize(self, shard: int, bar: "_Progress") -> None:
        """The files of a shard that are not done -> token files."""
        place = self.place(shard)
        place.mkdir(parents=True, exist_ok=True)
        todo = [
            (number, name)
            for number, name in enumerate(self.plan.names(shard))
            if not _sound(place, number)
        ]
        files = [self._inputs[name] for _, name in todo]
        started = time.perf_counter()

        def record(which: int) -> Path:
            return place / f"{todo[which][0]:05d}.part"

        for which, found in self._tokenizer.encode_each(
            files, self._options, batch=self._batch, record=record
        ):
            number = todo[which][0]
            reason = None
            if isinstance(found, MediaError):
                reason = printable(str(found))
                log.warning("Left out: %s", found)
            else:
                found.save(place / f"{number:05d}.npz")
            seconds = time.perf_counter() - started
            # Written last: the file is done.
            write_json(place / f"{number:05d}.json", {"reason": reason, "seconds": seconds})
            remove_resume_log(record(which))
            bar.add(0 if isinstance(found, MediaError) else found.num_frames)
            started = time.perf_counter()

    def _pack(self, shard: int) -> None:
        """Token files -> the shard, then its numbers."""
        place, tally, names = self.place(shard), Tally(), self.plan.names(shard)
        good = []
        for number, name in enumerate(names):
            notes = json.loads((place / f"{number:05d}.json").read_bytes())
            tally.seconds += notes["seconds"]
            if notes["reason"] is None:
                good.append((number, name))
            else:
                tally.bad.append([name, notes["reason"]])

        def rows() -> Iterator[tuple[str, TokenizedClip]]:
            for number, name in good:
                clip = TokenizedClip.load(place / f"{number:05d}.npz")
                tally.add(clip)
                yield name, clip

        file = f"{shard_name(shard)}.parquet"
        if good:
            write_shard(self._folder / file, rows())
        tally.save(self.json(shard), file if good else None)


class _Progress:
    """One bar for this process: files, frames a second, and the time that is left."""

    def __init__(self, work: _Work, mine: Sequence[int], *, shown: bool):
        total = sum(len(work.plan.names(shard)) for shard in mine)
        done = sum(work.done(shard) for shard in mine)
        self._bar = tqdm(
            total=total, initial=done, unit="file", disable=not shown, dynamic_ncols=True
        )
        self._frames, self._started = 0, time.perf_counter()

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def add(self, num_frames: int) -> None:
        """A file is done."""
        self._frames += num_frames
        rate = self._frames / (time.perf_counter() - self._started)
        self._bar.set_postfix_str(f"{rate:.1f} frames/s", refresh=False)
        self._bar.update()


def _sound(place: Path, number: int) -> bool:
    """Whether an earlier run finished a file; what is no good is removed."""
    notes, tokens = (place / f"{number:05d}{ending}" for ending in (".json", ".npz"))
    try:
        if json.loads(notes.read_bytes())["reason"] is None:
            TokenizedClip.load(tokens)
    except FileNotFoundError:
        return False
    except (TokenFileError, ValueError, KeyError, TypeError) as error:
        log.warning("Tokenized again: %s", error)
        notes.unlink(missing_ok=True)
        return False
    return True


def _check_options(
    tokenizer: ElasticTokenizer, inputs: Mapping[str, Path], options: EncodeOptions
) -> None:
    """Refuses what no file could be tokenized with, before a plan is written."""
    images = [name for name in inputs if Path(name).suffix.lower() in IMAGE_SUFFIXES]
    if options.bitrate is not None and images:
        raise ValueError(
            f"bitrate={options.bitrate} needs videos, but {len(images)} files are images, such as {images[0]!r}; "
            "give another target, or leave the images out."
        )
    trial = options
    if options.bitrate is not None:
        # How many tokens it allows depends on the rate of each clip.
        mean = tokenizer.config.min_toks
        trial = dataclasses.replace(options, bitrate=None, avg_tokens=mean)
    size = tokenizer.config.resolution
    tokenizer.open_session(np.zeros((1, size, size, 3), np.uint8), trial)


def _check_folder(folder: Path) -> None:
    """Refuses a folder that holds files by the names of a run's results, but no run."""
    # Looked at before the plan: a process beside this one writes its plan first, and its results last.
    present = [name for name in (SUMMARY, PLOT, BAD) if (folder / name).exists()]
    if present and not (folder / PLAN).exists():
        raise ValueError(
            f"{folder} holds {', '.join(present)} but no {PLAN} of a run that wrote them; choose another output_folder, so "
            "that nothing of yours is replaced."
        )


def _model(tokenizer: ElasticTokenizer) -> dict[str, Any]:
    """What names a model, to the last bit of its weights."""
    return {
        "model_id": tokenizer.model_id,
        "config_hash": tokenizer.config.config_hash(),
        "weights": tokenizer.weights_digest,
        "tokens_per_block": tokenizer.config.tokens_per_block,
    }


def _written(tokenizer: ElasticTokenizer, options: EncodeOptions) -> dict[str, Any]:
    """The options that tokens depend on, as JSON can hold them."""
    return options.to_json() | {
        "dtype": str(np.dtype(tokenizer.codec.dtype)),
        "window_blocks": tokenizer.window_blocks,
        "context": tokenizer.context,
        "search_width": tokenizer.search_width,
    }


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")

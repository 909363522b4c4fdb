"""Tokenizes a data set into shards, in one process or several that do not communicate. An interrupted run can be restarted.

A shard is made in five steps:
1. The process takes the shard's lock.
2. It tokenizes each file into a token file in `.unfinished/shard-00003/`. A kill loses the file under way only.
3. It packs the token files into `shard-00003.parquet`, which is written atomically.
4. It writes `shard-00003.json`, which marks the shard as finished.
5. It removes the folder of step 2.
The next process redoes or removes whatever a killed process left.
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

# A process holds no lock for a moment between two shards, so that waiting ends only after several looks without a lock.
_WAIT_SECONDS, _QUIET_WAITS = 1.0, 5


class Outcome(NamedTuple):
    """The state of a run when this process is done with its own shards.

    Attributes:
      summary: the content of summary.json; None: some shards are not finished.
      unfinished: names of these shards. They belong to other processes.
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
    """Tokenizes this process's shards of a data set: `process_index`, `process_index + process_count`, ...

    A second call resumes the run; the number of processes may differ. A process that finds all shards finished writes the summary.

    Args:
      tokenizer: the model.
      inputs: {id: file}, as `list_inputs` gives them.
      folder: the folder of the shards; it is made if it does not exist.
      options: which frames are read, and how the token counts are chosen.
      files_per_shard: files in a shard; the last shard may have fewer.
      process_index, process_count: the index of this process, from 0, and the number of processes.
      batch: clips that go through the model together.
      wait: return only when all shards of the run are finished, or when no process works on the unfinished ones.
      progress: show a progress bar with the rate and the remaining time.

    Raises:
      ValueError: the options contradict each other, or the folder holds another run's shards.
      OSError: the folder cannot be written to.
    """
    folder = Path(folder)
    _check_options(tokenizer, inputs, options)
    plan = DatasetPlan(
        files=sizes(dict(sorted(inputs.items()))),
        files_per_shard=files_per_shard,
        model=_model_json(tokenizer),
        options=_options_json(tokenizer, options),
    )
    _check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_or_check(folder, plan)
    shards = _Shards(tokenizer, inputs, folder, plan, batch, options)
    mine = range(process_index, plan.num_shards, process_count)
    with _Progress(shards, mine, shown=progress) as bar:
        try:
            locked_shards = [shard for shard in mine if not shards.finish(shard, bar)]
            # The process that held the lock may have been killed since.
            for shard in locked_shards:
                shards.finish(shard, bar)
        except (KeyboardInterrupt, SystemExit):
            log.warning("Stopped; the same command goes on from here.")
            raise
    if wait:
        shards.wait()
    if left := shards.unfinished():
        names = tuple(shard_name(shard) for shard in left)
        log.info(
            "%d of %d shards belong to other processes and are not finished: %s.",
            len(left),
            plan.num_shards,
            _first_few(names),
        )
        return Outcome(None, names)
    with locked(folder / LOCK, wait=True):
        for lock in folder.glob(".shard-*.lock"):
            lock.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # removed by another process
            (folder / UNFINISHED).rmdir()
        tallies = [
            (shard_name(k), Tally.load(shards.summary_path(k))) for k in range(plan.num_shards)
        ]
        return Outcome(write_summary(folder, plan, tallies), ())


def shard_name(shard: int) -> str:
    """The name of a shard's files, without a suffix."""
    return f"shard-{shard:05d}"


class _Shards:
    """The shards of a run: which are finished, and the steps that finish one.

    Args:
      tokenizer: the model.
      inputs: {id: file} of the data set.
      folder: the folder of the shards.
      plan: the files of each shard.
      batch: clips that go through the model together.
      options: which frames are read, and how the token counts are chosen.
    """

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

    def summary_path(self, shard: int) -> Path:
        """The JSON file that marks a shard as finished."""
        return self._folder / f"{shard_name(shard)}.json"

    def work_folder(self, shard: int) -> Path:
        """The folder of the token files of an unfinished shard."""
        return self._folder / UNFINISHED / shard_name(shard)

    def finished(self, shard: int) -> bool:
        """Whether a shard is written and marked as finished."""
        return self.summary_path(shard).exists()

    def unfinished(self) -> list[int]:
        """All unfinished shards of the run, of every process."""
        return [shard for shard in range(self.plan.num_shards) if not self.finished(shard)]

    def num_done(self, shard: int) -> int:
        """The number of a shard's files that are tokenized or left out."""
        if self.finished(shard):
            return len(self.plan.names(shard))
        return sum(1 for _ in self.work_folder(shard).glob("*.json"))

    def wait(self) -> None:
        """Returns when no other process works on an unfinished shard."""
        quiet = 0
        while (left := self.unfinished()) and quiet < _QUIET_WAITS:
            time.sleep(_WAIT_SECONDS)
            quiet = 0 if any(map(self._is_locked, left)) else quiet + 1

    def _is_locked(self, shard: int) -> bool:
        """Whether another process works on a shard."""
        lock = self._lock(shard)
        if not lock.exists():
            return False
        with locked(lock) as held:
            return not held

    def _lock(self, shard: int) -> Path:
        return self._folder / f".{shard_name(shard)}.lock"

    def finish(self, shard: int, bar: "_Progress") -> bool:
        """Finishes a shard; False: another process works on it."""
        if self.finished(shard) and not self.work_folder(shard).exists():
            return True
        lock = self._lock(shard)
        with locked(lock) as held:
            if not held:
                return False
            # Another process may have finished the shard before this one got the lock.
            if not self.finished(shard):
                clear_unfinished(self._folder, shard_name(shard))
                self._tokenize(shard, bar)
                self._pack(shard)
            shutil.rmtree(self.work_folder(shard), ignore_errors=True)
            # A process that opened this lock file before still finds the shard finished.
            lock.unlink(missing_ok=True)
        return True

    def _tokenize(self, shard: int, bar: "_Progress") -> None:
        """Tokenizes the files of a shard that are not done yet into token files."""
        work_folder = self.work_folder(shard)
        work_folder.mkdir(parents=True, exist_ok=True)
        todo = [
            (number, name)
            for number, name in enumerate(self.plan.names(shard))
            if not _is_done(work_folder, number)
        ]
        files = [self._inputs[name] for _, name in todo]
        started = time.perf_counter()

        def resume_path(which: int) -> Path:
            return work_folder / f"{todo[which][0]:05d}.part"

        for which, found in self._tokenizer.encode_each(
            files, self._options, batch=self._batch, record=resume_path
        ):
            number = todo[which][0]
            reason = None
            if isinstance(found, MediaError):
                reason = printable(str(found))
                log.warning("Left out: %s", found)
            else:
                found.save(work_folder / f"{number:05d}.npz")
            seconds = time.perf_counter() - started
            # Written last, because it marks the file as done.
            write_json(work_folder / f"{number:05d}.json", {"reason": reason, "seconds": seconds})
            remove_resume_log(resume_path(which))
            bar.add(0 if isinstance(found, MediaError) else found.num_frames)
            started = time.perf_counter()

    def _pack(self, shard: int) -> None:
        """Packs token files into the shard, then writes its numbers."""
        work_folder, tally, names = self.work_folder(shard), Tally(), self.plan.names(shard)
        readable = []
        for number, name in enumerate(names):
            notes = json.loads((work_folder / f"{number:05d}.json").read_bytes())
            tally.seconds += notes["seconds"]
            if notes["reason"] is None:
                readable.append((number, name))
            else:
                tally.bad.append([name, notes["reason"]])

        def rows() -> Iterator[tuple[str, TokenizedClip]]:
            for number, name in readable:
                clip = TokenizedClip.load(work_folder / f"{number:05d}.npz")
                tally.add(clip)
                yield name, clip

        file = f"{shard_name(shard)}.parquet"
        if readable:
            write_shard(self._folder / file, rows())
        tally.save(self.summary_path(shard), file if readable else None)


class _Progress:
    """The progress bar of this process: files, frames per second, remaining time."""

    def __init__(self, shards: _Shards, mine: Sequence[int], *, shown: bool):
        total = sum(len(shards.plan.names(shard)) for shard in mine)
        done = sum(shards.num_done(shard) for shard in mine)
        self._bar = tqdm(
            total=total, initial=done, unit="file", disable=not shown, dynamic_ncols=True
        )
        self._frames, self._started = 0, time.perf_counter()

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def add(self, num_frames: int) -> None:
        """Counts one finished file and its frames."""
        self._frames += num_frames
        rate = self._frames / (time.perf_counter() - self._started)
        self._bar.set_postfix_str(f"{rate:.1f} frames/s", refresh=False)
        self._bar.update()


def _is_done(work_folder: Path, number: int) -> bool:
    """Whether an earlier run finished a file. A file whose tokens are damaged is marked as not done."""
    notes, tokens = (work_folder / f"{number:05d}{ending}" for ending in (".json", ".npz"))
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
    """Refuses options that would fail for every file, before a plan is written."""
    images = [name for name in inputs if Path(name).suffix.lower() in IMAGE_SUFFIXES]
    if options.bitrate is not None and images:
        raise ValueError(
            f"bitrate={options.bitrate} needs videos, but {len(images)} files are images, such as {images[0]!r}; "
            "give another target, or leave the images out."
        )
    trial = options
    if options.bitrate is not None:
        # A bitrate becomes a token count with the frame rate of each clip. Here any valid count will do.
        mean = tokenizer.config.min_toks
        trial = dataclasses.replace(options, bitrate=None, avg_tokens=mean)
    size = tokenizer.config.resolution
    tokenizer.open_session(np.zeros((1, size, size, 3), np.uint8), trial)


def _check_folder(folder: Path) -> None:
    """Refuses a folder that has files named like results of a run, but no plan of a run."""
    # Look for results before looking for the plan: a concurrent process writes its plan first and its results last.
    present = [name for name in (SUMMARY, PLOT, BAD) if (folder / name).exists()]
    if present and not (folder / PLAN).exists():
        raise ValueError(
            f"{folder} holds {', '.join(present)} but no {PLAN} of a run that wrote them; choose another output_folder, so "
            "that nothing of yours is replaced."
        )


def _model_json(tokenizer: ElasticTokenizer) -> dict[str, Any]:
    """What identifies a model, including a digest of its weights."""
    return {
        "model_id": tokenizer.model_id,
        "config_hash": tokenizer.config.config_hash(),
        "weights": tokenizer.weights_digest,
        "tokens_per_block": tokenizer.config.tokens_per_block,
    }


def _options_json(tokenizer: ElasticTokenizer, options: EncodeOptions) -> dict[str, Any]:
    """All options that the tokens depend on, as JSON values."""
    return options.to_json() | {
        "dtype": str(np.dtype(tokenizer.codec.dtype)),
        "window_blocks": tokenizer.window_blocks,
        "context": tokenizer.context,
        "search_width": tokenizer.search_width,
    }


def _first_few(names: Sequence[str]) -> str:
    """At most three names, as text."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")

"""Tokenizes a data set into shards, in one process or several that do not communicate. An interrupted run can be restarted.

A shard is made in five steps:
1. The process takes the shard's lock.
2. It tokenizes each file into a token file in `.unfinished/shard-00003/`. A kill loses the file under way only.
3. It packs the token files into `shard-00003.parquet`, which is written atomically.
4. It writes `shard-00003.json`, which marks the shard as finished.
5. It removes the folder of step 2.
The next process redoes or removes whatever a killed process left. Where a file of a finished shard has changed, the shard's other rows go
back to step 2, so that the next shard has the new tokens in the place of the old ones, and nobody reads those in between.
"""

import contextlib
import dataclasses
import json
import logging
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from elastic.io.atomic import locked
from elastic.io.json_file import write_json
from elastic.io.progress import hide_bar
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
    stamped,
    update_stamps,
    write_or_check,
)
from elastic.pipeline.dataset_summary import BAD, PLOT, SUMMARY, Tally, write_summary
from elastic.pipeline.file_stamp import FileStamp, content_digest, is_unchanged, stamp_of
from elastic.tokenizer import ElasticTokenizer, EncodeOptions
from elastic.tokenizer.resume import remove_resume_log
from elastic.tokens import TokenFileError, TokenizedClip, TokenShards, write_shard

__all__ = ["Outcome", "list_inputs", "shard_name", "tokenize_dataset"]

log = logging.getLogger(__name__)

# A process holds no lock for a moment between two shards, so that waiting ends only after several looks without a lock.
_WAIT_SECONDS, _QUIET_WAITS = 1.0, 5
_MOST_READS = 3  # of a file that changes while it is read


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
    append: bool = False,
    wait: bool = False,
    progress: bool = True,
) -> Outcome:
    """Tokenizes this process's shards of a data set: `process_index`, `process_index + process_count`, ...

    A second call resumes the run; the number of processes may differ. It tokenizes files anew that have changed since, and names them.
    A process that finds all shards finished writes the summary.

    Args:
      tokenizer: the model.
      inputs: {id: file}, as `list_inputs` gives them.
      folder: the folder of the shards; it is made if it does not exist.
      options: which frames are read, and how the token counts are chosen.
      files_per_shard: files in a shard; the last shard may have fewer.
      process_index, process_count: the index of this process, from 0, and the number of processes.
      batch: clips that go through the model together.
      append: tokenize files that the folder has gained since the run began, as further shards; False refuses them.
      wait: return only when all shards of the run are finished, or when no process works on the unfinished ones.
      progress: show a progress bar with the rate and the remaining time.

    Raises:
      ValueError: the options contradict each other, or the folder holds another run's shards.
      OSError: the folder cannot be written to.
    """
    folder = Path(folder)
    _check_options(tokenizer, inputs, options)
    plan = DatasetPlan(
        parts=(stamped(inputs),),
        files_per_shard=files_per_shard,
        model=_model_json(tokenizer),
        options=_options_json(tokenizer, options),
    )
    _check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards = _Shards(tokenizer, inputs, folder, plan, batch, options)
    shards.plan = plan = write_or_check(folder, plan, append=append, reopen=shards.reopen)
    _remove_stale_summary(folder, shards)
    mine = range(process_index, plan.num_shards, process_count)
    with _Progress(shards, mine, shown=progress) as bar:
        try:
            # Once more at the end: a process that held a lock may have been killed since, and another one may have
            # begun to make a finished shard anew, because a file of it has changed.
            for shard in (*mine, *mine):
                shards.finish(shard, bar)
        except (KeyboardInterrupt, SystemExit):
            log.warning("Stopped; the same command goes on from here.")
            raise
    if wait:
        shards.wait()
    shards.plan = plan = DatasetPlan.load(folder / PLAN)  # another process may have appended files
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
        for lock in folder.glob(".shard-*.lock*"):
            lock.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # removed by another process
            (folder / UNFINISHED).rmdir()
        tallies = [
            (shard_name(k), Tally.load(shards.summary_path(k))) for k in range(plan.num_shards)
        ]
        return Outcome(write_summary(folder, plan, tallies), ())


def _remove_stale_summary(folder: Path, shards: "_Shards") -> None:
    """Removes the summary of an earlier run where shards are unfinished: files are new, or have changed since."""
    with locked(folder / LOCK, wait=True):
        if shards.unfinished():
            for name in (SUMMARY, PLOT, BAD):
                (folder / name).unlink(missing_ok=True)


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
        self._reads: Counter[str] = Counter()  # reads of a file during which it has changed

    def summary_path(self, shard: int) -> Path:
        """The JSON file that marks a shard as finished."""
        return self._folder / f"{shard_name(shard)}.json"

    def _parquet_path(self, shard: int) -> Path:
        return self._folder / f"{shard_name(shard)}.parquet"

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
                self._parquet_path(shard).unlink(missing_ok=True)
                self._tokenize(shard, bar)
                while not self._pack(shard):
                    self._tokenize(shard, bar)
            shutil.rmtree(self.work_folder(shard), ignore_errors=True)
            # A process that opened this lock file before still finds the shard finished.
            lock.unlink(missing_ok=True)
        return True

    def reopen(self, plan: DatasetPlan, others: Mapping[str, FileStamp]) -> set[str]:
        """Makes finished shards unfinished where a file has changed: their other rows become token files again.

        Args:
          plan: the plan in the folder.
          others: the present stamps of the files whose stamps differ from the plan's.

        Returns:
          The files whose present stamps the plan may take: they are unchanged, or no finished shard has them any more.
        """
        self.plan, changed, taken = plan, [], set()
        for shard in range(plan.num_shards):
            names = [name for name in plan.names(shard) if name in others]
            if not names:
                continue
            with self._unless_at_work(shard) as held:
                taken.update(names)
                if not self.finished(shard):  # what its token files stand for is noted beside them
                    if held:
                        self._remove_unstamped(shard, others)
                    continue
                tally = Tally.load(self.summary_path(shard))
                gone = {
                    name
                    for name in names
                    if not is_unchanged(
                        self._inputs[name],
                        plan.files[name],
                        others[name],
                        tally.contents.get(name),
                    )
                }
                if gone:
                    self._unpack(shard, tally, gone)
                    changed += sorted(gone)
        if changed:
            log.warning(
                "Tokenized anew, because %d of %d files have changed since: %s.",
                len(changed),
                len(plan.files),
                _first_few(changed),
            )
        return taken

    def _remove_unstamped(self, shard: int, others: Mapping[str, FileStamp]) -> None:
        """Marks changed files of an unfinished shard as not done where an earlier version noted no stamp."""
        for number, name in enumerate(self.plan.names(shard)):
            notes = _Notes.load(self.work_folder(shard), number)
            if name in others and notes is not None and notes.stamp is None:
                then = self.plan.files[name]
                if not is_unchanged(self._inputs[name], then, others[name], notes.content):
                    _Notes.remove(self.work_folder(shard), number)

    @contextlib.contextmanager
    def _unless_at_work(self, shard: int) -> Iterator[bool]:
        """Holds a shard's lock; gives False if another process works on the shard and has not finished it."""
        while True:
            with locked(self._lock(shard)) as held:
                if held or not self.finished(shard):
                    yield held
                    return
            time.sleep(0.05)  # that process is about to give up the lock

    def _unpack(self, shard: int, tally: Tally, without: set[str]) -> None:
        """Writes the rows of a finished shard as token files again, except those of some files. Removes the shard."""
        work_folder, names = self.work_folder(shard), self.plan.names(shard)
        shutil.rmtree(work_folder, ignore_errors=True)
        work_folder.mkdir(parents=True)
        reasons = dict(tally.bad)
        rows = TokenShards(self._parquet_path(shard)) if len(reasons) < len(names) else None
        seconds = tally.seconds / max(1, len(names))
        for number, name in enumerate(names):
            if name in without:
                continue
            if name not in reasons:
                assert rows is not None
                rows[rows.find(name)].save(work_folder / f"{number:05d}.npz")
            notes = _Notes(
                reasons.get(name), seconds, self.plan.files[name], tally.contents.get(name)
            )
            notes.save(work_folder, number)
        # In this order a kill in between leaves a finished shard, or an unfinished one that is packed from these files.
        self.summary_path(shard).unlink()
        self._parquet_path(shard).unlink(missing_ok=True)

    def _tokenize(self, shard: int, bar: "_Progress") -> None:
        """Tokenizes the files of a shard that are not done yet into token files."""
        work_folder = self.work_folder(shard)
        work_folder.mkdir(parents=True, exist_ok=True)
        todo = [
            (number, name)
            for number, name in enumerate(self.plan.names(shard))
            if self._done(shard, number, name) is None or not self._is_sound(shard, number)
        ]
        before: list[FileStamp] = []
        started = time.perf_counter()

        def resume_path(which: int) -> Path:
            return work_folder / f"{todo[which][0]:05d}.part"

        def sources() -> Iterator[Path]:  # a file is opened right after its stamp was taken
            for _, name in todo:
                before.append(stamp_of(self._inputs[name]))
                yield self._inputs[name]

        for which, found in self._tokenizer.encode_each(
            sources(), self._options, batch=self._batch, record=resume_path
        ):
            number, name = todo[which]
            stamp, content = before[which], content_digest(self._inputs[name])
            if stamp_of(self._inputs[name]) != stamp:
                found = self._changed_while_read(shard, number, name)
                if found is None:
                    continue
                stamp = stamp._replace(ends=None)  # like no later one: a later run reads it again
            reason = None
            if isinstance(found, MediaError):
                reason = printable(str(found))
                log.warning("Left out: %s", found)
            else:
                found.save(work_folder / f"{number:05d}.npz")
            seconds = time.perf_counter() - started
            # Written last, because it marks the file as done.
            _Notes(reason, seconds, stamp, content).save(work_folder, number)
            remove_resume_log(resume_path(which))
            bar.add(0 if isinstance(found, MediaError) else found.num_frames)
            started = time.perf_counter()

    def _changed_while_read(self, shard: int, number: int, name: str) -> MediaError | None:
        """The error of a file that changes whenever it is read; None: it shall be read again."""
        remove_resume_log(self.work_folder(shard) / f"{number:05d}.part")
        self._reads[name] += 1
        if self._reads[name] < _MOST_READS:
            log.warning("%s has changed while it was read; it is tokenized again.", name)
            return None
        return MediaError(
            f"{str(self._inputs[name])!r} has changed {_MOST_READS} times while it was read; start again when it is complete."
        )

    def _done(self, shard: int, number: int, name: str) -> "_Notes | None":
        """What is noted of a file that is tokenized; None: it is not, or has changed since."""
        notes = _Notes.load(self.work_folder(shard), number)
        if notes is None:
            return None
        if self._reads[name] >= _MOST_READS:
            return notes
        now = stamp_of(self._inputs[name])
        then = notes.stamp or self.plan.files[name]  # earlier versions noted none
        if is_unchanged(self._inputs[name], then, now, notes.content):
            return notes._replace(stamp=notes.stamp and now)
        log.warning("%s has changed since it was tokenized; it is tokenized anew.", name)
        _Notes.remove(self.work_folder(shard), number)
        return None

    def _is_sound(self, shard: int, number: int) -> bool:
        """Whether the tokens of a file that is done can be read; otherwise it is marked as not done."""
        work_folder = self.work_folder(shard)
        notes = _Notes.load(work_folder, number)
        try:
            if notes is not None and notes.reason is None:
                TokenizedClip.load(work_folder / f"{number:05d}.npz")
        except (FileNotFoundError, TokenFileError) as error:
            log.warning("Tokenized again: %s", error)
            _Notes.remove(work_folder, number)
            return False
        return True

    def _pack(self, shard: int) -> bool:
        """Packs token files into the shard, then writes its numbers. False: a file is not tokenized, or has changed since."""
        work_folder, tally, names = self.work_folder(shard), Tally(), self.plan.names(shard)
        readable, stamps = [], {}
        for number, name in enumerate(names):
            notes = self._done(shard, number, name)
            if notes is None:
                return False
            tally.seconds += notes.seconds
            tally.contents[name] = notes.content
            if notes.stamp not in (None, self.plan.files[name]):
                stamps[name] = notes.stamp
            if notes.reason is None:
                readable.append((number, name))
            else:
                tally.bad.append([name, notes.reason])

        def rows() -> Iterator[tuple[str, TokenizedClip]]:
            for number, name in readable:
                clip = TokenizedClip.load(work_folder / f"{number:05d}.npz")
                tally.add(clip)
                yield name, clip

        if stamps:
            update_stamps(self._folder, stamps)
        path = self._parquet_path(shard)
        if readable:
            write_shard(path, rows())
        tally.save(self.summary_path(shard), path.name if readable else None)
        return True


class _Notes(NamedTuple):
    """What is noted of a tokenized file beside its tokens, until its shard is packed. The notes mark the file as done.

    Attributes:
      reason: why the file could not be read; None: it could.
      seconds: time spent on it.
      stamp: of the file when it was read; None: an earlier version has noted none.
      content: `content_digest` of the file.
    """

    reason: str | None
    seconds: float
    stamp: FileStamp | None
    content: str | None

    def save(self, folder: Path, number: int) -> None:
        """Writes the notes of a file of a shard."""
        write_json(folder / f"{number:05d}.json", self._asdict())

    @classmethod
    def load(cls, folder: Path, number: int) -> "_Notes | None":
        """Reads the notes of a file; None: there are none. Damaged ones are removed."""
        path = folder / f"{number:05d}.json"
        try:
            values = json.loads(path.read_bytes())
            stamp = values.get("stamp")
            return cls(
                values["reason"],
                float(values["seconds"]),
                None if stamp is None else FileStamp(*stamp),
                values.get("content"),
            )
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("Tokenized again: %s: %s", path, error)
            path.unlink()
            return None

    @staticmethod
    def remove(folder: Path, number: int) -> None:
        """Marks a file as not done."""
        (folder / f"{number:05d}.json").unlink(missing_ok=True)


class _Progress:
    """The progress bar of this process: files, frames per second, remaining time."""

    def __init__(self, shards: _Shards, mine: Sequence[int], *, shown: bool):
        total = sum(len(shards.plan.names(shard)) for shard in mine)
        done = sum(shards.num_done(shard) for shard in mine)
        self._bar = tqdm(
            total=total,
            initial=done,
            unit="file",
            disable=hide_bar(shown),
            dynamic_ncols=True,
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

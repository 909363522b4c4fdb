"""The shards of a data set run on disk: which are finished, and the steps that finish one.

A shard is made in five steps:
1. The process takes the shard's lock.
2. Each file is tokenized into a token file in `.unfinished/shard-00003/`. A kill loses the file under way only.
3. The process packs the token files into `shard-00003.parquet`, which is written atomically.
4. It writes `shard-00003.json`, which marks the shard as finished.
5. It removes the folder of step 2.
The next process redoes or removes whatever a killed process left. Where a file of a finished shard has changed, the shard's other rows go
back to step 2, so that the next shard has the new tokens in the place of the old ones, and nobody reads those in between.
"""

import contextlib
import logging
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from elastic.io.atomic import locked
from elastic.media.location import ClipLocation, Place
from elastic.pipeline.clip_files import MOST_READS, ClipResult, ClipTask, Notes, tokens_path
from elastic.pipeline.contact_sheet import Draw
from elastic.pipeline.dataset_plan import (
    LOCK,
    PLAN,
    UNFINISHED,
    DatasetPlan,
    clear_unfinished,
    stamped,
    update_stamps,
    write_or_check,
)
from elastic.pipeline.dataset_summary import BAD, PLOT, SUMMARY, Tally, write_summary
from elastic.pipeline.file_stamp import FileStamp, content_digest, is_unchanged, stamp_of
from elastic.tokens import TokenFileError, TokenizedClip, TokenShards, write_shard

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


def shard_name(shard: int) -> str:
    """The name of a shard's files, without a suffix."""
    return f"shard-{shard:05d}"


class Shards:
    """The shards of a run: which are finished, and the steps that finish one.

    Args:
      inputs: {id: file} of the data set.
      folder: the folder of the shards.
      plan: the files of each shard.
    """

    def __init__(self, inputs: Mapping[str, Place], folder: Path, plan: DatasetPlan):
        self._inputs, self._folder, self.plan = inputs, folder, plan
        self._reads: Counter[str] = Counter()  # reads of a file during which it has changed
        # If one clip has any, all shards have the columns: readers take them for one table.
        located = [place for place in inputs.values() if isinstance(place, ClipLocation)]
        tables = {(place.place, place.column): place for place in located if place.column}
        self._has_metadata = any(place.has_more for place in located) or any(
            place.has_columns for place in tables.values()
        )

    @classmethod
    def open_run(
        cls,
        inputs: Mapping[str, Place],
        folder: Path,
        *,
        files_per_shard: int,
        model: Mapping[str, Any],
        options: Mapping[str, Any],
        append: bool,
    ) -> "Shards":
        """Begins a run in a folder, or goes on with the one that is there.

        Args:
          inputs: {id: file} of the data set.
          folder: the folder of the shards; it is made if it does not exist.
          files_per_shard: files in a shard.
          model, options: what the tokens depend on, as `dataset.identity` gives it.
          append: tokenize files that are new as further shards; False refuses them.

        Raises:
          ValueError: the folder holds another run's shards, or files that no run wrote.
          OSError: the folder cannot be written to.
        """
        plan = DatasetPlan(
            parts=(stamped(inputs),), files_per_shard=files_per_shard, model=model, options=options
        )
        _check_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        shards = cls(inputs, folder, plan)
        shards.plan = write_or_check(folder, plan, append=append, reopen=shards.reopen)
        with locked(folder / LOCK, wait=True):  # files are new, or have changed since
            if shards.unfinished():
                for name in (SUMMARY, PLOT, BAD):
                    (folder / name).unlink(missing_ok=True)
        return shards

    def close_run(self, draw: Draw | None = None) -> Outcome:
        """Writes the summary if all shards are finished, of every process. `draw` gives pictures of clips for it."""
        # Another process may have appended files.
        self.plan = DatasetPlan.load(self._folder / PLAN)
        if left := self.unfinished():
            names = tuple(shard_name(shard) for shard in left)
            log.info(
                "%d of %d shards belong to other processes and are not finished: %s.",
                len(left),
                self.plan.num_shards,
                _first_few(names),
            )
            return Outcome(None, names)
        with locked(self._folder / LOCK, wait=True):
            for lock in self._folder.glob(".shard-*.lock*"):
                lock.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # removed by another process
                (self._folder / UNFINISHED).rmdir()
            tallies = [
                (shard_name(k), Tally.load(self.summary_path(k)))
                for k in range(self.plan.num_shards)
            ]
            summary = write_summary(self._folder, self.plan, tallies, draw=draw)
            return Outcome(summary, ())

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

    @contextlib.contextmanager
    def held(self, shard: int) -> Iterator[bool]:
        """Holds a shard, in order to finish it; gives False where there is nothing to do: it is finished, or another process holds it."""
        if self.finished(shard) and not self.work_folder(shard).exists():
            yield False
            return
        lock = self._lock(shard)
        with locked(lock) as held:
            if not held:
                yield False
                return
            # Another process may have finished the shard before this one got the lock.
            if self.finished(shard):
                yield False
            else:
                clear_unfinished(self._folder, shard_name(shard))
                self._parquet_path(shard).unlink(missing_ok=True)
                self.work_folder(shard).mkdir(parents=True, exist_ok=True)
                yield True
            if self.finished(shard):
                shutil.rmtree(self.work_folder(shard), ignore_errors=True)
                # A process that opened this lock file before still finds the shard finished.
                lock.unlink(missing_ok=True)

    def todo(self, shard: int) -> list[ClipTask]:
        """The files of a shard that this process holds and that are not done yet."""
        work_folder = self.work_folder(shard)
        return [
            ClipTask(work_folder, number, name, self._inputs[name], self._reads[name])
            for number, name in enumerate(self.plan.names(shard))
            if self._done(shard, number, name) is None or not self._is_sound(shard, number)
        ]

    def take(self, task: ClipTask, result: ClipResult) -> bool:
        """Notes and logs what has become of a task; False: its file shall be read again."""
        self._reads[task.name] += result.changed
        if result.changed and result.reason is None:
            log.warning("%s has changed while it was read; it is tokenized again.", task.name)
            return False
        if result.reason is not None:
            log.warning("Left out: %s", result.reason)
        return True

    def give_up(self, task: ClipTask, reason: str) -> None:
        """Notes a file as bad that cannot be tokenized for another reason than its own error."""
        content = content_digest(task.source)
        Notes(reason, 0.0, stamp_of(task.source), content).save(task.folder, task.number)
        log.warning("Left out: %s", reason)

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
            notes = Notes.load(self.work_folder(shard), number)
            if name in others and notes is not None and notes.stamp is None:
                then = self.plan.files[name]
                if not is_unchanged(self._inputs[name], then, others[name], notes.content):
                    Notes.remove(self.work_folder(shard), number)

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
                rows[rows.find(name)].save(tokens_path(work_folder, number))
            notes = Notes(
                reasons.get(name), seconds, self.plan.files[name], tally.contents.get(name)
            )
            notes.save(work_folder, number)
        # In this order a kill in between leaves a finished shard, or an unfinished one that is packed from these files.
        self.summary_path(shard).unlink()
        self._parquet_path(shard).unlink(missing_ok=True)

    def _done(self, shard: int, number: int, name: str) -> "Notes | None":
        """What is noted of a file that is tokenized; None: it is not, or has changed since."""
        notes = Notes.load(self.work_folder(shard), number)
        if notes is None:
            return None
        if self._reads[name] >= MOST_READS:
            return notes
        now = stamp_of(self._inputs[name])
        then = notes.stamp or self.plan.files[name]  # earlier versions noted none
        if is_unchanged(self._inputs[name], then, now, notes.content):
            return notes._replace(stamp=notes.stamp and now)
        log.warning("%s has changed since it was tokenized; it is tokenized anew.", name)
        Notes.remove(self.work_folder(shard), number)
        return None

    def _is_sound(self, shard: int, number: int) -> bool:
        """Whether the tokens of a file that is done can be read; otherwise it is marked as not done."""
        work_folder = self.work_folder(shard)
        notes = Notes.load(work_folder, number)
        try:
            if notes is not None and notes.reason is None:
                TokenizedClip.load(tokens_path(work_folder, number))
        except (FileNotFoundError, TokenFileError) as error:
            log.warning("Tokenized again: %s", error)
            Notes.remove(work_folder, number)
            return False
        return True

    def pack(self, shard: int) -> bool:
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
                clip = TokenizedClip.load(tokens_path(work_folder, number))
                tally.add(clip)
                yield name, clip

        if stamps:
            update_stamps(self._folder, stamps)
        path = self._parquet_path(shard)
        if readable:
            write_shard(path, rows(), metadata=self._metadata if self._has_metadata else None)
        tally.save(self.summary_path(shard), path.name if readable else None)
        return True

    def _metadata(self, name: str) -> Mapping[str, Any]:
        """What is said of a clip."""
        place = self._inputs[name]
        try:
            return place.metadata() if isinstance(place, ClipLocation) else {}
        except OSError as error:
            log.warning("%s is packed without what is said of it: %s.", name, error)
            return {}


def _check_folder(folder: Path) -> None:
    """Refuses a folder that has files named like results of a run, but no plan of a run."""
    # Look for results before looking for the plan: a concurrent process writes its plan first and its results last.
    present = [name for name in (SUMMARY, PLOT, BAD) if (folder / name).exists()]
    if present and not (folder / PLAN).exists():
        raise ValueError(
            f"{folder} holds {', '.join(present)} but no {PLAN} of a run that wrote them; choose another output_folder, so "
            "that nothing of yours is replaced."
        )


def _first_few(names: Sequence[str]) -> str:
    """At most three names, as text."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")

"""Tokenizes files of a data set into token files. Notes beside a token file mark the file as done.

Every engine uses this: one process, several, or the actors of Ray. So their token files are equal, and each may resume what
another has begun.
"""

import json
import logging
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from elastic.io.json_file import write_json
from elastic.media import MediaError
from elastic.media.location import Place
from elastic.pipeline.dataset_plan import printable
from elastic.pipeline.file_stamp import FileStamp, content_digest, stamp_of
from elastic.tokenizer import ElasticTokenizer, EncodeOptions
from elastic.tokenizer.resume import remove_resume_log

log = logging.getLogger(__name__)

MOST_READS = 3  # of a file that changes while it is read


class ClipTask(NamedTuple):
    """One file that is to be tokenized.

    Attributes:
      folder: the folder of its shard's token files, which exists.
      number: of the file in its shard.
      name: the clip's id.
      source: the file.
      reads: how often it has changed while it was read.
    """

    folder: Path
    number: int
    name: str
    source: Place
    reads: int = 0

    @property
    def tokens_path(self) -> Path:
        """The token file."""
        return tokens_path(self.folder, self.number)

    @property
    def resume_path(self) -> Path:
        """The tokens of the blocks so far, while it is under way."""
        return self.folder / f"{self.number:05d}.part"


class ClipResult(NamedTuple):
    """What has become of a task.

    Attributes:
      num_frames: of the clip; 0: it could not be read.
      reason: why it could not be read; None: it could.
      changed: whether the file has changed while it was read. Without a reason it is not done and shall be read again.
      model_seconds: how long the model has worked since the result before.
    """

    num_frames: int
    reason: str | None = None
    changed: bool = False
    model_seconds: float = 0.0


def tokens_path(folder: Path, number: int) -> Path:
    """The token file of a file of a shard."""
    return folder / f"{number:05d}.npz"


def tokenize_clips(
    tokenizer: ElasticTokenizer,
    tasks: Iterable[ClipTask],
    options: EncodeOptions,
    *,
    batch: int = 1,
) -> Iterator[tuple[ClipTask, ClipResult]]:
    """Writes the token file and the notes of each task, and gives what has become of it, in the order of ending.

    Args:
      tokenizer: the model.
      tasks: the files. The next one is taken, opened and read in a thread while the model is at those before.
      options: which frames are read, and how the token counts are chosen.
      batch: clips that go through the model together.

    Raises:
      OSError: a token file cannot be written.
    """
    under_way: dict[int, tuple[ClipTask, FileStamp]] = {}
    started, worked = time.perf_counter(), tokenizer.codec.model_seconds

    def sources() -> Iterator[Place]:  # a file is opened right after its stamp was taken
        for which, task in enumerate(tasks):
            under_way[which] = task, stamp_of(task.source)
            yield task.source

    for which, found in tokenizer.encode_each(
        sources(),
        options,
        batch=batch,
        record=lambda which: under_way[which][0].resume_path,
        early=True,
    ):
        task, stamp = under_way.pop(which)
        model_seconds = tokenizer.codec.model_seconds - worked
        worked += model_seconds
        content = content_digest(task.source)
        changed = stamp_of(task.source) != stamp
        if changed:
            remove_resume_log(task.resume_path)
            if task.reads + 1 < MOST_READS:
                yield task, ClipResult(0, changed=True, model_seconds=model_seconds)
                continue
            found = MediaError(
                f"{str(task.source)!r} has changed {MOST_READS} times while it was read; start again when it is complete."
            )
            stamp = stamp._replace(ends=None)  # like no later one: a later run reads it again
        if isinstance(found, MediaError):
            result = ClipResult(0, printable(str(found)), changed, model_seconds)
        else:
            found.save(task.tokens_path)
            result = ClipResult(found.num_frames, None, changed, model_seconds)
        seconds = time.perf_counter() - started
        # Written last, because it marks the file as done.
        Notes(result.reason, seconds, stamp, content).save(task.folder, task.number)
        remove_resume_log(task.resume_path)
        yield task, result
        started = time.perf_counter()


class Notes(NamedTuple):
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
    def load(cls, folder: Path, number: int) -> "Notes | None":
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

"""The plan of a data set run, which is written before the run starts: its files, their shards, the model, the options.

Every process of the run compares its own plan with `plan.json`, also after a restart. A process with another model or other
options is refused, so that two runs cannot mix in one folder, and so is one that misses a file. New files are appended as
further shards if the caller asks for it. A file that has changed gets its new stamp once its old tokens are gone.
"""

import dataclasses
import functools
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from elastic.io import json_file
from elastic.io.atomic import atomic_open, locked
from elastic.io.names import model_name
from elastic.io.read_options import READ_DEFAULTS
from elastic.media.inputs import find_clips, printable
from elastic.media.location import Place
from elastic.pipeline.file_stamp import FileStamp, stamps_of

__all__ = [
    "DatasetPlan",
    "FileStamp",
    "clear_unfinished",
    "list_inputs",
    "printable",
    "stamped",
    "update_stamps",
    "write_or_check",
]

log = logging.getLogger(__name__)

PLAN = "plan.json"
UNFINISHED = ".unfinished"
LOCK = ".plan.lock"  # held while plan.json or the summary is written
_FORMAT = {"format": "elastictok-dataset", "version": 2}
_EARLIER = _FORMAT | {"version": 1}  # knows no files but their sizes, and no appended ones
# Options that older plans do not have, and the values that their runs had.
_LATER_OPTIONS = READ_DEFAULTS | {"search_tolerance": 0.012}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetPlan:
    """The plan of a data set run.

    Attributes:
      parts: {name: stamp} of the files that a run began with, sorted by name, then the same of those that each later run
        appended; the name is the clip's id. A shard has files of one part.
      files_per_shard: files in a shard; the last shard of a part may have fewer.
      model: what identifies the model, including a digest of its weights.
      options: how clips are read and tokenized.
    """

    parts: tuple[Mapping[str, FileStamp], ...]
    files_per_shard: int
    model: Mapping[str, Any]
    options: Mapping[str, Any]

    def __post_init__(self):
        if self.files_per_shard < 1:
            raise ValueError(f"files_per_shard={self.files_per_shard} must be at least 1.")

    @functools.cached_property
    def files(self) -> dict[str, FileStamp]:
        """{name: stamp} of all files."""
        return {name: stamp for part in self.parts for name, stamp in part.items()}

    @functools.cached_property
    def _shards(self) -> list[list[str]]:
        step = self.files_per_shard
        return [
            list(part)[start : start + step]
            for part in self.parts
            for start in range(0, len(part), step)
        ]

    @property
    def num_shards(self) -> int:
        """The number of shards."""
        return len(self._shards)

    def names(self, shard: int) -> list[str]:
        """The names of a shard's files."""
        return self._shards[shard]

    def with_stamps(self, stamps: Mapping[str, FileStamp]) -> "DatasetPlan":
        """The plan with other stamps of some of its files."""
        parts = tuple(
            {name: stamps.get(name, stamp) for name, stamp in part.items()} for part in self.parts
        )
        return dataclasses.replace(self, parts=parts)

    def to_json(self) -> bytes:
        """The content of plan.json."""
        first, *appended = ([[name, *stamp] for name, stamp in part.items()] for part in self.parts)
        values = _FORMAT | {
            "files": first,
            "appended": appended,
            "files_per_shard": self.files_per_shard,
            "model": self.model,
            "options": self.options,
        }
        return (json.dumps(values, separators=(",", ":")) + "\n").encode()

    @classmethod
    def load(cls, path: Path) -> "DatasetPlan":
        """Reads plan.json, also one of version 1.

        Raises:
          ValueError: the file is damaged or is not a plan.
        """
        try:
            values = json_file.read_marked(path, _FORMAT, _EARLIER)
            listed = [values.pop("files"), *values.pop("appended", [])]
            parts = tuple(
                {str(name): FileStamp(int(size), *more) for name, size, *more in files}
                for files in listed
            )
            for name, usual in _LATER_OPTIONS.items():
                values["options"].setdefault(name, usual)
            if "model_id" in values["model"]:  # an absolute path in older plans
                values["model"]["model_id"] = model_name(values["model"]["model_id"])
            return cls(parts=parts, **values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is no plan of a data set run ({error}); choose another output_folder."
            ) from error


def write_or_check(
    folder: Path,
    plan: DatasetPlan,
    *,
    append: bool,
    reopen: Callable[[DatasetPlan, Mapping[str, FileStamp]], set[str]],
) -> DatasetPlan:
    """Writes the plan of a new run, or compares it with the plan in the folder, which takes up new and changed files.

    Args:
      folder: the folder of the run.
      plan: all files of this process in one part.
      append: add files that are new.
      reopen: called with the plan in the folder and with the present stamps of the files whose stamps differ from it. It removes the
        tokens of those that have changed, and returns the names of the files whose new stamps the plan may take.

    Returns:
      The plan that is in the folder now.

    Raises:
      ValueError: the folder holds another plan; the message lists the differences.
      OSError: the folder cannot be written to.
    """
    with locked(folder / LOCK, wait=True):
        clear_unfinished(folder, PLAN)
        if not (folder / PLAN).exists():
            if any(folder.glob("*.parquet")):
                raise ValueError(
                    f"{folder} holds shards but no {PLAN}; choose another output_folder."
                )
            _write(folder, plan)
            return plan
        found = DatasetPlan.load(folder / PLAN)
        now = dataclasses.replace(plan, **_through_json(plan))
        differing = _differences(found, now, append=append)
        if differing:
            raise ValueError(
                f"{folder} holds the shards of another run: {'; '.join(differing)}. Go on with what that run began with, "
                "or choose another output_folder."
            )
        new = {name: stamp for name, stamp in plan.files.items() if name not in found.files}
        others = {
            name: plan.files[name]
            for name, stamp in found.files.items()
            if plan.files[name] != stamp
        }
        taken = reopen(found, others) if others else set()
        settled = found.with_stamps({name: others[name] for name in taken})
        if new:
            settled = dataclasses.replace(settled, parts=(*settled.parts, new))
            log.info(
                "%d files are new, such as %r: shards from number %d on are theirs.",
                len(new),
                next(iter(new)),
                found.num_shards,
            )
        if settled.parts != found.parts:
            _write(folder, settled)
        return settled


def update_stamps(folder: Path, stamps: Mapping[str, FileStamp]) -> None:
    """Writes the stamps of files that changed after the plan had been made and before they were tokenized."""
    with locked(folder / LOCK, wait=True):
        found = DatasetPlan.load(folder / PLAN)
        _write(folder, found.with_stamps(stamps))


def _write(folder: Path, plan: DatasetPlan) -> None:
    with atomic_open(folder / PLAN) as file:
        file.write(plan.to_json())


def _through_json(plan: DatasetPlan) -> dict[str, Any]:
    """Model and options as reading them from JSON gives them: a tuple becomes a list."""
    return {name: json.loads(json.dumps(getattr(plan, name))) for name in ("model", "options")}


def _differences(before: DatasetPlan, now: DatasetPlan, *, append: bool) -> list[str]:
    """The differences of two plans that must not be, in words."""
    found = []
    for kind in ("model", "options"):
        old, new = getattr(before, kind), getattr(now, kind)
        found += [
            f"{name}={new.get(name)} (then {old.get(name)})"
            for name in sorted({*old, *new})
            if old.get(name) != new.get(name)
        ]
    if before.files_per_shard != now.files_per_shard:
        found.append(f"files_per_shard={now.files_per_shard} (then {before.files_per_shard})")
    new = [name for name in now.files if name not in before.files]
    if new and not append:
        found.append(
            f"{len(new)} files are new, such as {new[0]!r}, which append=True (on the command line --append=True) tokenizes as "
            "further shards"
        )
    # A file that is listed and not there may come back with its disk.
    missing = [
        name
        for name, stamp in before.files.items()
        if now.files.get(name, FileStamp(-1)).size < 0 <= stamp.size or name not in now.files
    ]
    if missing:
        found.append(f"{len(missing)} files are missing, such as {missing[0]!r}")
    return found


def list_inputs(
    input_path: str | os.PathLike, output_folder: str | os.PathLike
) -> dict[str, Place]:
    """{id: place} of the clips of an input, sorted by id, as `elastic.media.inputs.find_clips` gives them.

    What lies in the output folder is left out.

    Raises:
      MediaError: there is nothing to tokenize, or a name is listed twice.
    """
    return find_clips(input_path, without=output_folder)


def stamped(inputs: Mapping[str, Place]) -> dict[str, FileStamp]:
    """{name: stamp} of the files, sorted by name."""
    names = sorted(inputs)
    return dict(zip(names, stamps_of(inputs[name] for name in names), strict=True))


def clear_unfinished(folder: Path, stem: str) -> None:
    """Removes the temporary files that a killed process left beside a file. The caller must hold the file's lock."""
    for path in folder.glob(f".{stem}.*.tmp"):
        path.unlink(missing_ok=True)

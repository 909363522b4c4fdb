"""The plan of a data set run, which is written before the run starts: its files, their shards, the model, the options.

`plan.json` is written once. Every process of the run compares its own plan with it, also after a restart. A process with other
files, another model or other options is refused, so that two runs cannot mix in one folder.
"""

import dataclasses
import itertools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elastic import media
from elastic.io.atomic import atomic_open, locked
from elastic.io.json_file import read_marked
from elastic.io.names import model_name
from elastic.io.read_options import READ_DEFAULTS
from elastic.media import MediaError

PLAN = "plan.json"
UNFINISHED = ".unfinished"
LOCK = ".plan.lock"  # held while plan.json or the summary is written
_FORMAT = {"format": "elastictok-dataset", "version": 1}
_LIST_SUFFIX = ".txt"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetPlan:
    """The plan of a data set run.

    Attributes:
      files: (name, bytes) of each file, sorted by name; the name is the clip's id.
      files_per_shard: files in a shard; the last shard may have fewer.
      model: what identifies the model, including a digest of its weights.
      options: how clips are read and tokenized.
    """

    files: tuple[tuple[str, int], ...]
    files_per_shard: int
    model: Mapping[str, Any]
    options: Mapping[str, Any]

    def __post_init__(self):
        if self.files_per_shard < 1:
            raise ValueError(f"files_per_shard={self.files_per_shard} must be at least 1.")

    @property
    def num_shards(self) -> int:
        """The number of shards."""
        return -(-len(self.files) // self.files_per_shard)

    def names(self, shard: int) -> list[str]:
        """The names of a shard's files."""
        start = shard * self.files_per_shard
        return [name for name, _ in self.files[start : start + self.files_per_shard]]

    def to_json(self) -> bytes:
        """The content of plan.json."""
        values = _FORMAT | dataclasses.asdict(self)
        return (json.dumps(values, separators=(",", ":")) + "\n").encode()

    @classmethod
    def load(cls, path: Path) -> "DatasetPlan":
        """Reads plan.json.

        Raises:
          ValueError: the file is damaged or is not a plan.
        """
        try:
            values = read_marked(path, _FORMAT)
            values["files"] = tuple((str(name), int(size)) for name, size in values["files"])
            values["options"] = READ_DEFAULTS | values["options"]  # older plans have none
            if "model_id" in values["model"]:  # an absolute path in older plans
                values["model"]["model_id"] = model_name(values["model"]["model_id"])
            return cls(**values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is no plan of a data set run ({error}); choose another output_folder."
            ) from error


def write_or_check(folder: Path, plan: DatasetPlan) -> None:
    """Writes the plan of a new run, or checks that it equals the plan in the folder.

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
            with atomic_open(folder / PLAN) as file:
                file.write(plan.to_json())
            return
        found = DatasetPlan.load(folder / PLAN)
    differing = _differences(found, dataclasses.replace(plan, **_through_json(plan)))
    if differing:
        raise ValueError(
            f"{folder} holds the shards of another run: {'; '.join(differing)}. Go on with what that run began with, "
            "or choose another output_folder."
        )


def _through_json(plan: DatasetPlan) -> dict[str, Any]:
    """Model and options as reading them from JSON gives them: a tuple becomes a list."""
    return {name: json.loads(json.dumps(getattr(plan, name))) for name in ("model", "options")}


def _differences(before: DatasetPlan, now: DatasetPlan) -> list[str]:
    """The differences of two plans, in words."""
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
    old, new = dict(before.files), dict(now.files)
    changes = {
        "new": sorted(set(new) - set(old)),
        "missing": sorted(set(old) - set(new)),
        "of another size": sorted(name for name in set(old) & set(new) if old[name] != new[name]),
    }
    found += [
        f"{len(names)} files are {what}, such as {names[0]!r}"
        for what, names in changes.items()
        if names
    ]
    return found


def list_inputs(input_path: str | os.PathLike, output_folder: str | os.PathLike) -> dict[str, Path]:
    """{id: file} of a folder, of one file, or of a list (.txt, one name a line), sorted by id.

    In a folder, the id of a file is its path relative to the folder. In a list, the id is the name as listed, and the file is found
    relative to the list's folder. Files in the output folder are left out.

    Raises:
      MediaError: there is nothing to tokenize, or a name is listed twice.
    """
    path = Path(input_path)
    if path.is_dir():
        found = {
            printable(file.relative_to(path).as_posix()): file
            for file in media.find_media(path, without=output_folder)
        }
        if not found:
            raise MediaError(f"There is no image or video in {str(path)!r} or its folders.")
        return dict(sorted(found.items()))
    if not path.exists():
        raise MediaError(f"There is no file {str(path)!r}; check --input_path.")
    if path.suffix.lower() != _LIST_SUFFIX:
        return {printable(path.name): path}
    if not path.is_file():  # reading a pipe would block
        raise MediaError(
            f"The list {str(path)!r} is no regular file; write the files' names into one."
        )
    names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    names = sorted(name for name in names if name and not name.startswith("#"))
    twice = [name for name, following in itertools.pairwise(names) if name == following]
    if twice or not names:
        what = f"names {twice[0]!r} twice" if twice else "names no file"
        raise MediaError(
            f"The list {str(path)!r} {what}; write each file's name on a line of its own."
        )
    return {name: path.parent / name for name in names}


def printable(name: str) -> str:
    """A file's name as valid UTF-8; bytes that are not UTF-8 become \\xNN."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def sizes(inputs: Mapping[str, Path]) -> tuple[tuple[str, int], ...]:
    """(name, bytes) of each file. A missing file gets -1; tokenizing will report it."""

    def size(path: Path) -> int:
        try:
            return os.stat(path).st_size
        except OSError:
            return -1

    return tuple((name, size(path)) for name, path in inputs.items())


def clear_unfinished(folder: Path, stem: str) -> None:
    """Removes the temporary files that a killed process left beside a file. The caller must hold the file's lock."""
    for path in folder.glob(f".{stem}.*.tmp"):
        path.unlink(missing_ok=True)

"""What a data set run does, written down before it starts: its files, their shards, the model, the options.

`plan.json` is written once, and every process of the run, now or after a restart, works by it. So that two runs cannot
mix in one folder, another list of files, another model or other options are refused.
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
from elastic.media import MediaError

PLAN = "plan.json"
UNFINISHED = ".unfinished"
LOCK = ".plan.lock"  # held for what a run writes once
_FORMAT = {"format": "elastictok-dataset", "version": 1}
_LIST_SUFFIX = ".txt"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetPlan:
    """A run over a data set.

    Attributes:
      files: [name, bytes] of each, sorted by name; the name is the clip's id.
      files_per_shard: files that share a shard; the last one may have fewer.
      model: what names the model, a digest of its weights included.
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
        """How many shards there are."""
        return -(-len(self.files) // self.files_per_shard)

    def names(self, shard: int) -> list[str]:
        """The files of a shard."""
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
          ValueError: it is damaged or something else.
        """
        try:
            values = read_marked(path, _FORMAT)
            values["files"] = tuple((str(name), int(size)) for name, size in values["files"])
            return cls(**values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is no plan of a data set run ({error}); choose another output_folder."
            ) from error


def write_or_check(folder: Path, plan: DatasetPlan) -> None:
    """Writes the plan of a new run, or sees that it is the one that the folder's run began with.

    Raises:
      ValueError: it is another one; says what differs.
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
    # As JSON has it: a tuple becomes a list.
    differing = _differences(found, dataclasses.replace(plan, **_plain(plan)))
    if differing:
        raise ValueError(
            f"{folder} holds the shards of another run: {'; '.join(differing)}. Go on with what that run began with, "
            "or choose another output_folder."
        )


def _plain(plan: DatasetPlan) -> dict[str, Any]:
    return {name: json.loads(json.dumps(getattr(plan, name))) for name in ("model", "options")}


def _differences(before: DatasetPlan, now: DatasetPlan) -> list[str]:
    """What is another value now, in words."""
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
    """{id: file} of a folder, one file, or a list (.txt, a name a line), sorted by id.

    The id of a folder's file is its path in the folder; that of a list's file is the name in the list, which is
    relative to the list's folder. What lies in the output folder is no input.

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
    if not path.is_file():  # a pipe would be waited for
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
    """A file's name as UTF-8 can hold it: bytes that are none become \\xNN."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def sizes(inputs: Mapping[str, Path]) -> tuple[tuple[str, int], ...]:
    """(name, bytes) of each file; -1 where there is none, which tokenizing will report."""

    def size(path: Path) -> int:
        try:
            return os.stat(path).st_size
        except OSError:
            return -1

    return tuple((name, size(path)) for name, path in inputs.items())


def clear_unfinished(folder: Path, stem: str) -> None:
    """Removes what a process that was killed left beside a file; only who holds the file's lock may call it."""
    for path in folder.glob(f".{stem}.*.tmp"):
        path.unlink(missing_ok=True)

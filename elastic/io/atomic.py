"""Files that appear whole or not at all, and locks."""

import contextlib
import fcntl
import os
import pathlib
import secrets
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO

from elastic.io.tree import CheckpointError


@contextlib.contextmanager
def atomic_open(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Opens a file beside `path` for writing; it takes `path`'s place only when the body ends well.

    On any error the old file stays as it was and the new one is removed. Missing folders are made.
    """
    target = Path(os.path.realpath(path))  # a link stays a link
    if target.is_dir():
        raise CheckpointError(f"{path} is a folder; name a file in it.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with written_beside(target) as file:
        yield file


@contextlib.contextmanager
def replaced_together(folder: Path, names: Collection[str]) -> Iterator[Path]:
    """A folder to work in. When the body ends well its files `names` move to `folder`; it always goes.

    It lies on the same disk as `folder`, so that moving is renaming. Files of these names that the body did
    not make are an earlier run's, and are removed from `folder` then.
    """
    here = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
    work = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=here))
    try:
        yield work
        folder.mkdir(parents=True, exist_ok=True)
        take_places(work, folder, names)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def take_places(work: Path, folder: Path, names: Collection[str]) -> None:
    """Moves the files `names` from `work` to `folder`; those that are not in `work` are an earlier run's, and are removed."""
    for name in names:
        if (work / name).exists():
            os.replace(work / name, folder / name)
        else:
            (folder / name).unlink(missing_ok=True)


@contextlib.contextmanager
def written_beside(target: Path) -> Iterator[BinaryIO]:
    """Opens a file beside `target`, which takes its place, safe from a power cut, when the body ends well.

    Raises:
      OSError: the folder is missing, full or not writable; the old file stays, nothing is left behind.
    """
    beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(beside, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, target)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # else a power cut can undo the rename
        finally:
            os.close(folder)
    finally:
        beside.unlink(missing_ok=True)  # gone already when it was renamed


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Holds a lock that ends with the process, however that ends; gives whether it was to be had.

    Raises:
      OSError: the file cannot be made.
    """
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def atomic_write(path: str | os.PathLike, data: bytes) -> None:
    """Writes a file so that `path` holds all of `data`, or what it held before.

    Raises:
      OSError: the folder is missing, full or not writable; nothing is left behind.
    """
    with written_beside(pathlib.Path(path)) as file:
        file.write(data)

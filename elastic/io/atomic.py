"""Files that appear whole or not at all, and locks between processes."""

import contextlib
import errno
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO

from elastic.io.tree import CheckpointError

log = logging.getLogger(__name__)

# What NFS, Lustre and others answer when they are mounted without locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)
_PATIENCE_SECONDS = 10.0  # until the log says what is waited for
_TOLD: set[Path] = set()  # lock files that the log has named


@contextlib.contextmanager
def atomic_open(path: str | os.PathLike, *, make_folders: bool = True) -> Iterator[BinaryIO]:
    """Opens a temporary file for writing, which replaces `path` when the body ends without an error.

    After an error the old file is as it was and the temporary file is gone. A symbolic link stays
    one: the file that it points to is replaced. A power cut cannot undo a finished replacement.

    Args:
      path: the file.
      make_folders: make missing folders above it; otherwise a missing folder is an error.

    Raises:
      OSError: the folder is missing, full or not writable.
      CheckpointError: `path` is a folder.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise CheckpointError(f"{path} is a folder; name a file in it.")
    if make_folders:
        target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # otherwise a power cut can undo the rename
        finally:
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)  # there is none any more after the rename


def atomic_write(path: str | os.PathLike, data: bytes) -> None:
    """Writes a file so that `path` holds all of `data`, or what it held before.

    Raises:
      OSError: the folder is missing, full or not writable; nothing is left behind.
    """
    with atomic_open(path, make_folders=False) as file:
        file.write(data)


@contextlib.contextmanager
def replaced_together(folder: Path, names: Collection[str]) -> Iterator[Path]:
    """Gives a temporary folder, whose files `names` move to `folder` when the body ends without an error.

    The temporary folder lies on the same disk as `folder`, so that moving is renaming, and is always
    removed. Files of these names that the body did not write are left from an earlier run, and are
    removed from `folder`.
    """
    here = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
    work = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=here))
    try:
        yield work
        folder.mkdir(parents=True, exist_ok=True)
        move_files(work, folder, names)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def move_files(work: Path, folder: Path, names: Collection[str]) -> None:
    """Moves the files `names` from `work` to `folder`, and removes from `folder` those that `work` lacks."""
    for name in names:
        if (work / name).exists():
            os.replace(work / name, folder / name)
        else:
            (folder / name).unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Holds the lock file `path` during the body; gives False when another process holds it.

    The operating system frees the lock when the process ends, even if it is killed. The file stays.

    Some network file systems know no such locks. There the existence of a second file, `path` with the ending `.held`, is the lock. It
    names its process, and goes with it; after a kill, the next process of the same machine removes it. If the killed process ran on
    another machine, the file stays, and the log says that it may be removed.

    Args:
      path: the lock file, which is made if it is missing.
      wait: wait until the lock is free, and give True.

    Raises:
      OSError: the file cannot be made.
    """
    from filelock import FileLock, Timeout  # loads asyncio, and most entrances lock nothing

    # Without `fallback_to_soft`, which would take `path` itself: there it outlives the lock.
    lock = FileLock(path, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire(blocking=wait)
    except Timeout:
        yield False
        return
    except (OSError, NotImplementedError) as error:
        number = getattr(error, "errno", None) or getattr(error.__cause__, "errno", errno.ENOSYS)
        if number not in _NO_LOCKS:
            raise
        with _held(path, wait=wait) as held:
            yield held
        return
    try:
        yield True
    finally:
        lock.release()


def has_locks(folder: Path) -> bool:
    """Whether the file system of a folder knows the locks of the operating system.

    Raises:
      OSError: no file can be made there.
    """
    try:
        import fcntl
    except ImportError:  # on Windows every file system does
        return True
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno not in _NO_LOCKS
    return True


@contextlib.contextmanager
def _held(path: Path, *, wait: bool) -> Iterator[bool]:
    """As `locked`, by a file whose existence is the lock."""
    from filelock import SoftFileLock, Timeout

    file = path.with_name(f"{path.name}.held")
    lock = SoftFileLock(file, thread_local=False)
    try:
        lock.acquire(timeout=_PATIENCE_SECONDS if wait else 0)
    except Timeout:
        if file not in _TOLD:
            _TOLD.add(file)
            log.warning(
                "%s stands for a lock, because this file system has none. If no process works in %s any more, remove that file.",
                file,
                path.parent,
            )
        if not wait:
            yield False
            return
        lock.acquire()
    try:
        yield True
    finally:
        lock.release()

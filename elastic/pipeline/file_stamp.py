"""Whether a file is still the one that was tokenized: size, time of change, first and last bytes, whole content.

Size and time alone would believe a clip that was replaced by another of the same size and time. First and last bytes alone
would believe a picture without compression whose middle was painted over. So a file counts as unchanged if size, time and
both ends are the same. Where the time alone differs, as after copying a data set, all bytes are compared.
"""

import hashlib
import os
import stat
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

_END_BYTES = 64 * 1024
_THREADS = 16  # threads that wait for a network file system use no core


class FileStamp(NamedTuple):
    """What is noted of a file.

    Attributes:
      size: in bytes; -1: the file is missing.
      modified: time of the last change, in nanoseconds; None: not known, as in plans of version 1.
      ends: digest of the first and the last 64 KiB, 32 hex digits; None: not known, or no regular file.
    """

    size: int
    modified: int | None = None
    ends: str | None = None


def stamp_of(path: Path) -> FileStamp:
    """The stamp of a file as it is now. A file that cannot be read has no digest; tokenizing will report it."""
    try:
        status = os.stat(path)
    except OSError:
        return FileStamp(-1)
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for its writer
        return FileStamp(status.st_size, status.st_mtime_ns)
    digest = hashlib.blake2b(digest_size=16)
    try:
        with open(path, "rb") as file:
            digest.update(file.read(_END_BYTES))
            file.seek(max(_END_BYTES, status.st_size - _END_BYTES))
            digest.update(file.read(_END_BYTES))
    except OSError:
        return FileStamp(status.st_size, status.st_mtime_ns)
    return FileStamp(status.st_size, status.st_mtime_ns, digest.hexdigest())


def stamps_of(paths: Iterable[Path]) -> list[FileStamp]:
    """The stamps of many files."""
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="stamps") as pool:
        return list(pool.map(stamp_of, paths))


def content_digest(path: Path) -> str | None:
    """Digest of all bytes of a file, 32 hex digits; None: it cannot be read, or is no regular file."""
    try:
        if not path.is_file():
            return None
        with open(path, "rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError:
        return None


def is_unchanged(path: Path, then: FileStamp, now: FileStamp, content: str | None) -> bool:
    """Whether a file holds what it held when it was tokenized.

    Args:
      path: the file. It is read whole if nothing but its time of change differs.
      then: its stamp when it was tokenized.
      now: its stamp now.
      content: its `content_digest` when it was tokenized; None: not known.
    """
    if then.size != now.size or (then.ends != now.ends and then.modified is not None):
        return False
    if then.modified in (None, now.modified):
        return True
    covered = now.ends is not None and now.size <= 2 * _END_BYTES
    return covered or (content is not None and content == content_digest(path))

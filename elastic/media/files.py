"""Files by their place: local paths, and URLs that fsspec opens."""

import io
import os
import re
from typing import BinaryIO, NamedTuple, cast

_URL = re.compile(r"[a-zA-Z][\w+.-]*://")
# What the file systems of fsspec call the version of a file, the most exact one first.
_VERSIONS = (
    "etag",
    "ETag",
    "blob_id",  # of the Hugging Face Hub
    "mtime",
    "updated",
    "LastModified",
    "last_modified",
    "created",
)
_BUFFER = 64 * 1024


def is_url(path: object) -> bool:
    """Whether `path` names something that fsspec opens, such as 'gs://bucket/clip.mp4'."""
    return isinstance(path, str) and _URL.match(path) is not None


def open_path(path: str | os.PathLike[str]) -> BinaryIO:
    """Opens the bytes of a file for reading: a local path directly, a URL through fsspec."""
    if not is_url(path):
        return open(path, "rb")
    import fsspec  # takes a while to load, and only URLs need it

    file = cast(fsspec.core.OpenFile, fsspec.open(str(path), "rb"))
    return cast(BinaryIO, file.open())


class FileFacts(NamedTuple):
    """What tells one version of a file from another.

    Attributes:
      size: in bytes.
      changed: a local file's time of change in nanoseconds; for a URL, the tag or time that its file system gives.
    """

    size: int
    changed: int | str


def facts_of(path: str | os.PathLike[str]) -> FileFacts:
    """Size and version of a file.

    Raises:
      OSError: it is not there, or cannot be asked.
    """
    if not is_url(path):
        status = os.stat(path)
        return FileFacts(status.st_size, status.st_mtime_ns)
    import fsspec

    system, inner = fsspec.url_to_fs(str(path))
    return facts_in(system.info(inner))


def facts_in(info: dict) -> FileFacts:
    """Size and version from what a file system of fsspec says of a file."""
    changed = next((info[key] for key in _VERSIONS if info.get(key) is not None), "")
    return FileFacts(int(info.get("size") or 0), str(changed))


class FileWindow(io.RawIOBase):
    """A part of an open file as a file of its own, which nothing is copied to. Closing it closes the file.

    Args:
      file: the whole file, seekable.
      offset: where the part begins.
      size: its bytes.
    """

    def __init__(self, file: BinaryIO, offset: int, size: int):
        super().__init__()
        self._file, self._offset, self._size, self._here = file, offset, size, 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Moves to a byte of the part."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._here, os.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise OSError(f"seek to byte {base + offset} of a file")
        self._here = base + offset
        return self._here

    def tell(self) -> int:
        """The next byte."""
        return self._here

    def readinto(self, buffer) -> int:
        """Fills the buffer as far as the part goes."""
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self._size - self._here))
        if not count:
            return 0
        self._file.seek(self._offset + self._here)
        data = self._file.read(count)
        view[: len(data)] = data
        self._here += len(data)
        return len(data)

    def close(self) -> None:
        """Closes the window and the file."""
        if not self.closed:
            self._file.close()
        super().close()


def open_window(path: str | os.PathLike[str], offset: int, size: int) -> BinaryIO:
    """Opens `size` bytes of a file from `offset` on as a file of its own."""
    window = FileWindow(open_path(path), offset, size)
    return cast(BinaryIO, io.BufferedReader(window, _BUFFER))

"""Whether a file is still the one that was tokenized: size, time of change, first and last bytes, whole content.

Size and time alone would believe a clip that was replaced by another of the same size and time. First and last bytes alone
would believe a picture without compression whose middle was painted over. So a file counts as unchanged if size, time and
both ends are the same. Where the time alone differs, as after copying a data set, all bytes are compared.

Of a clip in a tar or Parquet file, the stamp is that of the whole file, with the clip's place in it. Where it differs, all bytes of the
clip are compared, so that a shard that has grown costs no clip its tokens. What is said of a clip (caption, range) counts as its bytes.
"""

import functools
import hashlib
import json
import os
import stat
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, cast

from elastic.media.files import is_url, open_path
from elastic.media.location import ClipLocation, Place, local_path, location_of, open_file

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


def stamp_of(place: Place) -> FileStamp:
    """The stamp of a clip as it is now. One that cannot be read has no digest; tokenizing will report it."""
    path = local_path(place)
    try:
        if path is None:
            return _stamp_in_file(location_of(place))
        status = path.stat()
    except OSError:
        return FileStamp(-1)
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for its writer
        return FileStamp(status.st_size, status.st_mtime_ns)
    try:
        ends = _ends(path, status.st_size)
    except OSError:
        return FileStamp(status.st_size, status.st_mtime_ns)
    if isinstance(place, ClipLocation) and place.has_more:
        ends = _digest(ends, place.identity)
    return FileStamp(status.st_size, status.st_mtime_ns, ends)


def _stamp_in_file(location: ClipLocation) -> FileStamp:
    """The stamp of a clip that is a part of a file, or that is not on this machine."""
    size, changed = location.facts
    local = location.kind in ("tar", "parquet") and not is_url(location.place)
    ends = _ends_once(location.place, size, changed) if local else str(changed)
    modified = changed if isinstance(changed, int) else 0
    return FileStamp(size, modified, _digest(ends, location.identity))


def _digest(*texts: str) -> str:
    return hashlib.blake2b("\0".join(texts).encode(), digest_size=16).hexdigest()


def _ends(path: str | os.PathLike[str], size: int) -> str:
    """Digest of the first and the last 64 KiB of a file."""
    digest = hashlib.blake2b(digest_size=16)
    with open_path(path) as file:
        digest.update(file.read(_END_BYTES))
        file.seek(max(_END_BYTES, size - _END_BYTES))
        digest.update(file.read(_END_BYTES))
    return digest.hexdigest()


@functools.lru_cache(maxsize=4096)  # a shard has many clips
def _ends_once(place: str, size: int, changed: int | str) -> str:
    del changed  # another time of change is another file
    return _ends(place, size)


def stamps_of(places: Iterable[Place]) -> list[FileStamp]:
    """The stamps of many clips."""
    places = list(places)
    parts = {place.place for place in places if isinstance(place, ClipLocation)}
    if len(parts) < len(places) / 8 and not any(map(is_url, parts)):  # shards: nothing to wait for
        return list(map(stamp_of, places))
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="stamps") as pool:
        return list(pool.map(stamp_of, places))


def content_digest(place: Place) -> str | None:
    """Digest of all bytes of a clip, 32 hex digits; None: it cannot be read, is no regular file, or would have to be fetched again."""
    path = local_path(place)
    try:
        if path is not None and not path.is_file():
            return None
        if path is None and is_url(location_of(place).place):
            return None
        with open_file(place) as file:
            digest = hashlib.file_digest(cast(Any, file), lambda: hashlib.blake2b(digest_size=16))
        if isinstance(place, ClipLocation) and (about := place.metadata()):
            digest.update(json.dumps(about, sort_keys=True).encode())
        return digest.hexdigest()
    except OSError:
        return None


def is_unchanged(place: Place, then: FileStamp, now: FileStamp, content: str | None) -> bool:
    """Whether a clip holds what it held when it was tokenized.

    Args:
      place: the clip. It is read whole if nothing but its time of change differs, or that of the file that it is a part of.
      then: its stamp when it was tokenized.
      now: its stamp now.
      content: its `content_digest` when it was tokenized; None: not known.
    """
    if local_path(place) is None:
        return then == now or (content is not None and content == content_digest(place))
    if then.size != now.size or (then.ends != now.ends and then.modified is not None):
        return False
    if then.modified in (None, now.modified):
        return True
    plain = not (isinstance(place, ClipLocation) and place.has_more)
    covered = plain and now.ends is not None and now.size <= 2 * _END_BYTES
    return covered or (content is not None and content == content_digest(place))

"""The members of a tar file as clips: each header is read once, no member is unpacked, and a damaged header costs its own member only.

tarfile of the standard library reads the headers; it knows every dialect. It has no way to go on after a damaged one, which is why the
loop stands here.
"""

import logging
import os
import posixpath
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple, cast

from elastic.media.errors import MediaError, reason
from elastic.media.files import facts_of, open_path
from elastic.media.folders import is_media
from elastic.media.kept_members import load_members, save_members
from elastic.media.location import ClipLocation

log = logging.getLogger(__name__)

METADATA = ("json", "txt")  # endings of files that say something of the clip with the same key
_MOST_HEADER = 2**20  # bytes of a long name or of extended headers
_LEAST_SECONDS = 1.0  # of reading headers, from which on the list is kept
_BLOCK, _STEP = 512, 2**20
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class _Headers:
    """The file as tarfile sees it. A header that announces more than a mebibyte is refused before it is read."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.tell, self.seek = file.tell, file.seek

    def read(self, size: int = -1) -> bytes:
        """Reads part of a header."""
        if not 0 <= size <= _MOST_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size)


class _Damage(NamedTuple):
    """A header that cannot be read: its place, and the reason."""

    offset: int
    reason: str


def members_of(place: str) -> list[ClipLocation]:
    """The images and videos in a tar file, in its order. Names that begin with a dot are left out.

    Where reading the headers takes a while, the list is kept in the user's cache until the file changes.

    A member that cannot be read (cut off, sparse, a link) has its `problem`, and so has the place of a damaged header. Names are made
    safe: they lead nowhere, and each occurs once.

    Raises:
      MediaError: the file is missing, compressed, or no tar file.
    """
    try:
        facts = facts_of(place)
    except OSError as error:
        raise MediaError(f"Cannot read {place!r}: {reason(error)}.") from error
    kept = load_members(place, facts)
    if kept is not None:
        return kept
    started = time.perf_counter()
    found = _read_members(place)
    if time.perf_counter() - started >= _LEAST_SECONDS:
        save_members(place, facts, found)
    return found


def _read_members(place: str) -> list[ClipLocation]:
    """The same, from the headers."""
    found: list[tuple[str, ClipLocation]] = []
    beside: dict[str, list[tuple[str, int, int]]] = {}
    seen: Counter[str] = Counter()
    try:
        with open_path(place) as file:
            size = file.seek(0, os.SEEK_END)
            _check_kind(place, file)
            for entry in _entries(file, size):
                if isinstance(entry, _Damage):
                    text = f"the header at byte {entry.offset} is damaged ({entry.reason}), and the member is lost"
                    name = f"damaged header at byte {entry.offset}"
                    location = ClipLocation(kind="tar", place=place, member=name, problem=text)
                    found.append(("", location))
                    continue
                name = _safe_name(place, entry.name)
                stem, ending = posixpath.splitext(name)
                if ending[1:] in METADATA and not (problem := _problem(entry, size)):
                    where = (ending[1:], entry.offset_data, entry.size)
                    beside.setdefault(stem, []).append(where)
                    continue
                hidden = posixpath.basename(name).startswith(".")
                if not is_media(name) or hidden or entry.isdir():
                    continue
                seen[name] += 1
                if seen[name] > 1:
                    unique = f"{stem}#{seen[name]}{ending}"
                    log.warning("%s has several members %r; one is %r.", place, name, unique)
                    name = unique
                at = (entry.offset_data, entry.size)
                problem = _problem(entry, size)
                location = ClipLocation(
                    kind="tar", place=place, member=name, at=at, problem=problem
                )
                found.append((stem, location))
    except (OSError, tarfile.TarError) as error:
        raise MediaError(f"Cannot read {place!r}: {reason(error)}.") from error
    if not beside:
        return [location for _, location in found]
    return [_with_metadata(location, stem, beside) for stem, location in found]


def _with_metadata(
    location: ClipLocation, stem: str, beside: dict[str, list[tuple[str, int, int]]]
) -> ClipLocation:
    """The location with the files of the same key: the name without its ending, or, as WebDataset has it, up to its first dot."""
    import dataclasses

    folder, base = posixpath.split(stem)
    key = posixpath.join(folder, base.partition(".")[0])
    files = beside.get(stem) or beside.get(key)
    return dataclasses.replace(location, beside=tuple(files)) if files else location


def _check_kind(place: str, file: BinaryIO) -> None:
    file.seek(0)
    head = file.read(8)
    for mark, kind in _COMPRESSED.items():
        if head.startswith(mark):
            raise MediaError(
                f"{place!r} is compressed ({kind}), and its members cannot be read in place; decompress it."
            )
    if not head:
        raise MediaError(f"{place!r} is empty (0 bytes); copy or download it again.")


def _entries(file: BinaryIO, size: int) -> Iterator[tarfile.TarInfo | _Damage]:
    """The members, and in their place the headers that cannot be read."""
    offset, headers = 0, _Headers(file)
    while offset < size:
        error, before = "", offset
        try:
            for info, after in _members_from(headers, offset):
                yield info
                offset = after
        except (tarfile.TarError, OSError, ValueError, OverflowError, EOFError) as failure:
            error = str(failure) or type(failure).__name__
        if offset >= size:  # the end mark is missing, or the last member is cut off
            return
        file.seek(offset)
        block = file.read(_BLOCK)
        if len(block) == _BLOCK and not any(block):
            return
        following = _next_header(file, offset + _BLOCK)
        if offset == before == 0 and following is None:
            raise tarfile.ReadError("it is no tar file, or its first header is damaged")
        yield _Damage(offset, error or _why(block))
        if following is None:
            return
        offset = following


def _members_from(headers: _Headers, offset: int) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """The members from a header on, each with the place of the next header; ends where a header cannot be read."""
    headers.seek(offset)
    source: Any = headers
    with tarfile.TarFile(fileobj=source, errors="surrogateescape") as tar:
        while True:
            info = tar.next()
            if info is None or tar.offset <= offset or info.size < 0:
                return
            offset = tar.offset
            yield info, offset
            cast(Any, tar).members.clear()  # tarfile would keep them all


def _next_header(file: BinaryIO, offset: int) -> int | None:
    """The next block that is a sound header, found by its mark and checksum; None: there is none."""
    file.seek(offset)
    while chunk := file.read(_STEP):
        for start in range(0, len(chunk) - _BLOCK + 1, _BLOCK):
            if chunk[start + 257 : start + 262] == b"ustar":
                try:
                    tarfile.TarInfo.frombuf(
                        chunk[start : start + _BLOCK], "utf-8", "surrogateescape"
                    )
                except (tarfile.TarError, ValueError):
                    continue
                return offset + start
        offset += len(chunk)
    return None


def _why(block: bytes) -> str:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError) as error:
        return str(error)
    return "it contradicts itself"


def _problem(info: tarfile.TarInfo, size: int) -> str:
    """Why a member cannot be read; '' if nothing is known against it."""
    if info.issym() or info.islnk():
        return f"it is a link to {info.linkname!r}; links in a tar file are not followed"
    if not info.isreg():
        return "it is no regular file"
    if info.issparse():
        return f"it is a sparse file of {info.size} bytes; store it whole"
    if info.offset_data + info.size > size:
        return f"it is cut off: {max(0, size - info.offset_data)} of its {info.size} bytes are there; copy or download the tar file again"
    return ""


def _safe_name(place: str, name: str) -> str:
    """The name without what would lead out of a folder."""
    safe = safe_path(name)
    if safe != name.removeprefix("./").rstrip("/"):
        log.warning("%s has a member %r; it is called %r.", place, name, safe)
    return safe


def safe_path(name: str) -> str:
    """A path below a folder: no '..', not absolute."""
    return "/".join(part for part in name.split("/") if part not in ("", ".", ".."))

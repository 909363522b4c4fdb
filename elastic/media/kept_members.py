"""The members of large tar files, kept in the user's cache, so that a later start reads no headers.

A list belongs to one version of a file: its place, its size, and its time of change or tag. It is kept only where reading the headers took
a while, so that small tar files leave nothing behind.
"""

import contextlib
import gzip
import hashlib
import json
import logging
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from elastic.io import json_file
from elastic.io.atomic import atomic_write
from elastic.io.user_cache import cache_folder
from elastic.media.files import FileFacts, is_url
from elastic.media.location import ClipLocation

log = logging.getLogger(__name__)

_FORMAT = {"format": "elastictok-tar-members", "version": 1}
_MOST_BYTES = 500_000_000  # of all lists; those unused for longest are removed


def load_members(place: str, facts: FileFacts) -> list[ClipLocation] | None:
    """The members of a tar file as an earlier start listed them; None: they are not kept, or the file has changed since.

    Args:
      place: path or URL of the tar file.
      facts: its size and version as they are now.
    """
    path = _path(place, facts)
    if path is None or not path.exists():
        return None
    try:
        values = json_file.parse_marked(gzip.decompress(path.read_bytes()), _FORMAT)
        found = [
            ClipLocation(
                kind="tar",
                place=place,
                member=member,
                at=(offset, size),
                problem=problem,
                beside=tuple((ending, start, count) for ending, start, count in beside),
            )
            for member, offset, size, problem, beside in values["members"]
        ]
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        log.debug("%s is no list of members: %s", path, error)
        return None
    with contextlib.suppress(OSError):
        os.utime(path)  # used now
    return found


def save_members(place: str, facts: FileFacts, members: Sequence[ClipLocation]) -> None:
    """Keeps the members of a tar file. Where the cache cannot be written to, nothing is kept."""
    path = _path(place, facts)
    if path is None:
        return
    listed = [[m.member, *m.at, m.problem, m.beside] for m in members]
    text = json.dumps(_FORMAT | {"members": listed}, separators=(",", ":"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, gzip.compress(text.encode("utf-8", "surrogateescape"), 1))
        _remove_oldest(path.parent)
    except OSError as error:
        log.debug("The members of %s are not kept: %s", place, error)


def _path(place: str, facts: FileFacts) -> pathlib.Path | None:
    """Where the list of this version of a tar file is kept; its name does not tell the place, which may hold a key of access."""
    folder = cache_folder()
    if folder is None or facts.changed == "":
        return None
    whole = place if is_url(place) else os.path.abspath(place)
    told: list[Any] = [whole, *facts]
    digest = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:32]
    return folder / "tar_members" / f"{digest}.json.gz"


def _remove_oldest(folder: pathlib.Path) -> None:
    """Removes the lists that were not used for longest, as far as all of them take too many bytes."""
    found = []
    for file in folder.glob("*.json.gz"):
        with contextlib.suppress(OSError):  # removed by another process
            status = file.stat()
            found.append((status.st_mtime, status.st_size, file))
    left = sum(size for _, size, _ in found)
    for _, size, file in sorted(found):
        if left <= _MOST_BYTES:
            return
        file.unlink(missing_ok=True)
        left -= size

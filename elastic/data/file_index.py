"""The files of a data folder: found, measured once, remembered; bad ones are named and left out."""

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import logging
import os
import pathlib
import posixpath
import stat
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from tqdm import tqdm

from elastic import media
from elastic.io.atomic import atomic_open
from elastic.media import MediaError
from elastic.media.files import Place, is_url

log = logging.getLogger(__name__)

_FORMAT = {"format": "elastictok-index", "version": 1}
_URL_THREADS = 16  # waiting for a bucket costs no core


class MediaFile(NamedTuple):
    """A usable file.

    Attributes:
      name: its path in the folder, with '/'.
      kind: by content, not by name.
      num_frames: how many it delivers at the index's `fps`.
      stamp: its size and time of change; a file with another one is measured again.
    """

    name: str
    kind: Literal["image", "video"]
    num_frames: int
    stamp: str


class BadFile(NamedTuple):
    """A file that cannot be used, and why."""

    reason: str
    stamp: str


@dataclasses.dataclass(frozen=True)
class FileIndex:
    """What a folder holds.

    Attributes:
      folder: a local folder, or a URL of one in a bucket.
      ext: endings that were taken, such as 'mp4' or 'jpg,png'; '' takes all that can be read.
      fps: frames per second that were counted.
      files: the usable ones, sorted by name.
      bad: the others, by name.
    """

    folder: str
    ext: str
    fps: float
    files: tuple[MediaFile, ...]
    bad: Mapping[str, BadFile]

    @classmethod
    def build(
        cls,
        folder: str,
        *,
        fps: float,
        ext: str = "",
        known: "FileIndex | None" = None,
        without: pathlib.Path | None = None,
    ) -> "FileIndex":
        """Finds and measures all files but those in `without`. Those that `known` holds unchanged are not opened again.

        Every bad file is named in the log once, with the reason.

        Raises:
          ValueError: there is no such folder, or no usable file in it.
        """
        endings = {f".{ending.strip().lstrip('.').lower()}" for ending in ext.split(",")}
        found = _find(folder, without)
        if ext:
            found = {
                name: stamp
                for name, stamp in found.items()
                if posixpath.splitext(name)[1].lower() in endings
            }
        if not found:
            kind = f"file that ends in {', '.join(sorted(endings))}" if ext else "image or video"
            raise ValueError(f"There is no {kind} in {folder!r} or its folders.")
        measured: dict[str, MediaFile | BadFile] = {}
        if known is not None and known.fps == fps:
            before: dict[str, MediaFile | BadFile] = {file.name: file for file in known.files}
            before |= known.bad
            measured = {
                name: file
                for name, file in before.items()
                if name in found and file.stamp == found[name]
            }
        new = [(name, stamp) for name, stamp in found.items() if name not in measured]
        measured |= _measure_all(folder, new, fps)
        files = [file for file in measured.values() if isinstance(file, MediaFile)]
        bad = {name: file for name, file in measured.items() if isinstance(file, BadFile)}
        for name in sorted(bad):
            log.warning("Skipping a file: %s", bad[name].reason)
        if not files:
            raise ValueError(
                f"None of the {len(found)} files in {folder!r} can be used; the log says why."
            )
        return cls(folder, ext, fps, tuple(sorted(files)), dict(sorted(bad.items())))

    @functools.cached_property
    def digest(self) -> str:
        """16 hex digits that name the usable files, their order and their lengths."""
        lines = (f"{file.name}\0{file.kind}\0{file.num_frames}\n" for file in self.files)
        text = "".join([f"{self.fps!r}\n", *lines])
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]

    def place(self, name: str) -> Place:
        """Where to open the file of this name."""
        return _place(self.folder, name)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes it as JSON, atomically."""
        values = _FORMAT | {"folder": self.folder, "ext": self.ext, "fps": self.fps}
        values["files"] = [list(file) for file in self.files]
        values["bad"] = {name: list(bad) for name, bad in self.bad.items()}
        with atomic_open(path) as file:  # a name need not be UTF-8; ASCII escapes hold any
            file.write(json.dumps(values, ensure_ascii=True).encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "FileIndex":
        """The inverse of `save`.

        Raises:
          ValueError: the file is damaged or something else.
          OSError: it cannot be read.
        """
        try:
            values: dict[str, Any] = json.loads(pathlib.Path(path).read_bytes())
            if {key: values[key] for key in _FORMAT} != _FORMAT:
                raise ValueError("its format is another one")
            files = tuple(MediaFile(*file) for file in values["files"])
            bad = {name: BadFile(*bad) for name, bad in values["bad"].items()}
            return cls(values["folder"], values["ext"], values["fps"], files, bad)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{str(path)!r} is no index of files ({error}); move it away, or delete it to have one made anew."
            ) from error


def load_or_build(
    folder: str,
    *,
    fps: float,
    ext: str = "",
    path: str | os.PathLike[str] | None = None,
    without: pathlib.Path | None = None,
) -> FileIndex:
    """The index of a folder as it is now, but for what lies in `without`; `path` keeps it, so that only what is new is measured.

    Raises:
      ValueError: as in `FileIndex.build`; or what lies at `path` is no index.
      OSError: it cannot be read or written.
    """
    known = None
    if path is not None and os.path.exists(path):
        known = FileIndex.load(path)  # what is no index is not ours to replace
        if known.folder != folder:
            known = None
    index = FileIndex.build(folder, fps=fps, ext=ext, known=known, without=without)
    if path is not None and index != known:
        index.save(path)
    return index


def _find(folder: str, without: pathlib.Path | None) -> dict[str, str]:
    """Name in the folder -> stamp, sorted by name."""
    if is_url(folder):
        return _find_in_bucket(folder)
    root = pathlib.Path(folder)
    found = {}
    for file in media.find_media(root, without=without):
        try:
            facts = os.stat(file)
            regular = stat.S_ISREG(facts.st_mode)
            stamp = f"{facts.st_size} {facts.st_mtime_ns}" if regular else "special"
        except OSError as error:  # a link to nothing, a name too long
            stamp = f"error {error.errno}"
        found[file.relative_to(root).as_posix()] = stamp
    return found


def _find_in_bucket(folder: str) -> dict[str, str]:
    import fsspec
    from fsspec.registry import known_implementations

    scheme = folder.partition("://")[0]
    try:
        system, root = fsspec.url_to_fs(folder)
    except ImportError as error:
        hint = known_implementations.get(scheme, {}).get("err") or str(error)
        raise ValueError(f"{folder!r} cannot be opened here. {hint} (with pip).") from error
    except ValueError as error:
        raise ValueError(
            f"{folder!r} starts with {scheme!r}, which fsspec does not know ({error})."
        ) from error
    found = {}
    listing: Mapping[str, Mapping[str, Any]] = system.find(root, detail=True)
    for path, facts in sorted(listing.items()):
        name = path.removeprefix(root).lstrip("/")
        hidden = any(part.startswith(".") for part in name.split("/"))
        if facts.get("type") == "file" and name and not hidden and media.is_media(name):
            keys = ("etag", "ETag", "mtime", "updated", "LastModified", "created")
            changed = next((facts[key] for key in keys if facts.get(key) is not None), "")
            found[name] = f"{facts.get('size')} {changed}"
    return found


def _place(folder: str, name: str) -> Place:
    return f"{folder.rstrip('/')}/{name}" if is_url(folder) else pathlib.Path(folder, name)


def _measure_all(
    folder: str, files: Iterable[tuple[str, str]], fps: float
) -> dict[str, MediaFile | BadFile]:
    files = list(files)
    threads = _URL_THREADS if is_url(folder) else os.cpu_count() or 1
    pool = concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="index")
    try:
        jobs = [pool.submit(_measure, folder, name, stamp, fps) for name, stamp in files]
        # Shown on a terminal, and only if there is something to wait for.
        bar = tqdm(zip(files, jobs, strict=True), "Files", len(jobs), disable=None, delay=1)
        return {name: job.result() for (name, _), job in bar}
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _measure(folder: str, name: str, stamp: str, fps: float) -> MediaFile | BadFile:
    place = _place(folder, name)
    if stamp == "special":  # opening a pipe would wait for ever
        return BadFile(f"{str(place)!r} is not a regular file.", stamp)
    try:
        with media.open_clip(place, resolution=1, rate=fps, tell_rate=False) as clip:
            return MediaFile(name, clip.info.kind, clip.num_frames, stamp)
    except MediaError as error:
        return BadFile(str(error), stamp)

"""The index of a data folder: its files are found, opened once, and remembered; bad files are left out and named."""

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
from elastic.io import json_file
from elastic.io.atomic import atomic_open
from elastic.media import MediaError
from elastic.media.files import is_url
from elastic.media.folders import results_among, tell_results
from elastic.media.location import Place

log = logging.getLogger(__name__)

_FORMAT = {"format": "elastictok-index", "version": 1}
_URL_THREADS = 16  # threads that wait for a bucket use no core


class MediaFile(NamedTuple):
    """A usable file.

    Attributes:
      name: its path in the folder, with '/'.
      kind: what the content is, whatever the name says.
      num_frames: frames that it delivers at the index's `fps`.
      stamp: its size and time of change; a file whose stamp has changed is measured again.
      transfer: 'pq' or 'hlg' for high dynamic range, which is tone-mapped; else 'sdr', also in older indexes.
    """

    name: str
    kind: Literal["image", "video"]
    num_frames: int
    stamp: str
    transfer: str = "sdr"


class BadFile(NamedTuple):
    """A file that cannot be used: the reason, and its stamp."""

    reason: str
    stamp: str


@dataclasses.dataclass(frozen=True)
class FileIndex:
    """The files of a folder.

    Attributes:
      folder: a local folder, or a URL of one in a bucket.
      ext: endings of the files that were taken, such as 'mp4' or 'jpg,png'; '' takes all images and videos.
      fps: frames per second at which frames were counted.
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
        """Finds and measures all files. Every bad file is named in the log once, with the reason.

        Args:
          folder: a local folder, or a URL of one in a bucket.
          fps: frames per second at which frames are counted.
          ext: endings to take, such as 'mp4' or 'jpg,png'; '' takes all images and videos.
          known: an earlier index; files that have not changed since are not opened again.
          without: leave out the files in this folder.

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
        if hdr := sorted(file.name for file in files if file.transfer != "sdr"):
            log.warning(
                "Files of high dynamic range, which are tone-mapped to SDR: %d of %d, such as %s.",
                len(hdr),
                len(files),
                hdr[0],
            )
        if not files:
            raise ValueError(
                f"None of the {len(found)} files in {folder!r} can be used; the log says why."
            )
        return cls(folder, ext, fps, tuple(sorted(files)), dict(sorted(bad.items())))

    @functools.cached_property
    def digest(self) -> str:
        """16 hex digits that identify the usable files, their order and their lengths."""
        lines = (f"{file.name}\0{file.kind}\0{file.num_frames}\n" for file in self.files)
        text = "".join([f"{self.fps!r}\n", *lines])
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]

    def place(self, name: str) -> Place:
        """The path or URL of the file of this name."""
        return _place(self.folder, name)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes it as JSON, atomically."""
        values = _FORMAT | {"folder": self.folder, "ext": self.ext, "fps": self.fps}
        values["files"] = [list(file) for file in self.files]
        values["bad"] = {name: list(bad) for name, bad in self.bad.items()}
        with atomic_open(path) as file:  # ASCII escapes can hold names that are not UTF-8
            file.write(json.dumps(values, ensure_ascii=True).encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "FileIndex":
        """The inverse of `save`.

        Raises:
          ValueError: the file is damaged or something else.
          OSError: it cannot be read.
        """
        try:
            values = json_file.read_marked(path, _FORMAT)
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
    """The index of a folder as it is now.

    Args:
      folder: a local folder, or a URL of one in a bucket.
      fps: frames per second at which frames are counted.
      ext: endings to take, such as 'mp4' or 'jpg,png'; '' takes all images and videos.
      path: a file that keeps the index, so that only new files are measured.
      without: leave out the files in this folder.

    Raises:
      ValueError: as in `FileIndex.build`; or the file at `path` is no index.
      OSError: it cannot be read or written.
    """
    known = None
    if path is not None and os.path.exists(path):
        known = FileIndex.load(path)  # raises, rather than replace a file that is no index
        if known.folder != folder:
            known = None
    index = FileIndex.build(folder, fps=fps, ext=ext, known=known, without=without)
    if path is not None and index != known:
        index.save(path)
    return index


def _find(folder: str, without: pathlib.Path | None) -> dict[str, str]:
    """Name in the folder -> stamp of each file, sorted by name."""
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
    folders: dict[str, list[str]] = {}
    for path in listing:
        folders.setdefault(posixpath.dirname(path), []).append(posixpath.basename(path))
    results = {
        posixpath.join(place, name)
        for place, names in folders.items()
        for name in results_among(names)
    }
    tell_results(results)
    for path, facts in sorted(listing.items()):
        name = path.removeprefix(root).lstrip("/")
        hidden = any(part.startswith(".") for part in name.split("/"))
        usable = facts.get("type") == "file" and path not in results and media.is_media(name)
        if usable and name and not hidden:
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
        # Shown on a terminal only, and only if it takes more than a second.
        bar = tqdm(zip(files, jobs, strict=True), "Files", len(jobs), disable=None, delay=1)
        return {name: job.result() for (name, _), job in bar}
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _measure(folder: str, name: str, stamp: str, fps: float) -> MediaFile | BadFile:
    """Counts the frames of a file."""
    place = _place(folder, name)
    if stamp == "special":  # opening a pipe would wait for ever
        return BadFile(f"{str(place)!r} is not a regular file.", stamp)
    try:
        with media.open_clip(place, resolution=1, rate=fps, tell_rate=False) as clip:
            info = clip.info
            return MediaFile(name, info.kind, clip.num_frames, stamp, info.transfer)
    except MediaError as error:
        return BadFile(str(error), stamp)

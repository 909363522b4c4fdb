"""The index of the training data: its clips are found, opened once, and remembered; bad ones are left out and named.

The data is a folder, or whatever else `elastic.media.inputs` lists, or several of these with weights."""

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import logging
import math
import os
import pathlib
import posixpath
import stat
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from elastic import media
from elastic.io import json_file
from elastic.io.atomic import atomic_open
from elastic.media import MediaError
from elastic.media.files import facts_in, is_url
from elastic.media.inputs import find_clips, find_in_bucket, may_exist, names_shards
from elastic.media.location import ClipLocation, Place, location_of

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
      source: which of several sources it is of.
      weight: how often it is taken compared with others of its source; 1 unless a list gives another.
    """

    name: str
    kind: Literal["image", "video"]
    num_frames: int
    stamp: str
    transfer: str = "sdr"
    source: int = 0
    weight: float = 1.0


class BadFile(NamedTuple):
    """A file that cannot be used: the reason, and its stamp."""

    reason: str
    stamp: str


@dataclasses.dataclass(frozen=True)
class FileIndex:
    """The files of a folder, or the clips of other sources.

    Attributes:
      folder: a local folder, a URL of one in a bucket, or what else `--train_dataset.vision_dataset.path` takes.
      ext: endings of the files that were taken, such as 'mp4' or 'jpg,png'; '' takes all images and videos.
      fps: frames per second at which frames were counted.
      files: the usable ones, sorted by name.
      bad: the others, by name.
      locations: where the clips are, by name, of sources that are no folder.
      shards: (size, version) of the tar and Parquet files that were listed; those that have not changed are not listed again.
    """

    folder: str
    ext: str
    fps: float
    files: tuple[MediaFile, ...]
    bad: Mapping[str, BadFile]
    locations: Mapping[str, ClipLocation] = dataclasses.field(default_factory=dict)
    shards: Mapping[str, tuple[int, int | str]] = dataclasses.field(default_factory=dict)

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
        found, locations, shards = _find_all(folder, without, known)
        if ext:  # a row of a table may have no ending
            found = {
                name: stamp
                for name, stamp in found.items()
                if (ending := posixpath.splitext(name)[1].lower()) in endings
                or (not ending and name in locations)
            }
            locations = {name: place for name, place in locations.items() if name in found}
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
        places = {name: locations.get(name) or _place(folder, name) for name, _ in new}
        measured |= _measure_all(places, new, fps)
        files = [file for file in measured.values() if isinstance(file, MediaFile)]
        numbered = len(parse_sources(folder)) > 1
        files = [
            file._replace(
                source=int(file.name.partition(":")[0]) if numbered else 0,
                weight=locations[file.name].weight if file.name in locations else 1.0,
            )
            for file in files
        ]
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
        return cls(
            folder, ext, fps, tuple(sorted(files)), dict(sorted(bad.items())), locations, shards
        )

    @functools.cached_property
    def digest(self) -> str:
        """16 hex digits that identify the usable files, their order and their lengths."""
        lines = (f"{file.name}\0{file.kind}\0{file.num_frames}\n" for file in self.files)
        text = "".join([f"{self.fps!r}\n", *lines])
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]

    def place(self, name: str) -> Place:
        """The path or URL of the file of this name."""
        return self.locations.get(name) or _place(self.folder, name)

    def copies(self, num_blocks: Int[np.ndarray, "files"], seed: int) -> Int[np.ndarray, "files"]:
        """How often each file comes in an epoch, at least once, so that sources and clips have the shares that their weights say.

        Where a share is no whole number of times, the seed draws which files come once more.

        Args:
          num_blocks: blocks of each file.
          seed: of the draw.
        """
        weights = [weight for _, weight in parse_sources(self.folder)]
        source = np.array([file.source for file in self.files])
        times = np.array([file.weight for file in self.files])
        for number, weight in enumerate(weights):
            if weight is not None:
                mine = source == number
                times[mine] *= weight / (num_blocks[mine] * times[mine]).sum()
        times /= times.min()
        draws = np.random.default_rng((seed, 4)).random(len(times))
        return (times + 1e-9 + draws * (1 - 2e-9)).astype(np.int64)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes it as JSON, atomically."""
        values = _FORMAT | {"folder": self.folder, "ext": self.ext, "fps": self.fps}
        values["files"] = [list(file) for file in self.files]
        values["bad"] = {name: list(bad) for name, bad in self.bad.items()}
        if self.locations:
            values["locations"] = {name: _packed(place) for name, place in self.locations.items()}
            values["shards"] = self.shards
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
            locations = {
                name: _unpacked(place) for name, place in values.get("locations", {}).items()
            }
            shards = {name: (size, v) for name, (size, v) in values.get("shards", {}).items()}
            return cls(
                values["folder"], values["ext"], values["fps"], files, bad, locations, shards
            )
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


def _packed(place: ClipLocation) -> dict[str, Any]:
    """The fields of a location that differ from the usual ones."""
    values = dataclasses.asdict(place)
    usual = {field.name: field.default for field in dataclasses.fields(place)}
    del values["data"]
    return {name: value for name, value in values.items() if value != usual[name]}


def _unpacked(values: Mapping[str, Any]) -> ClipLocation:
    return ClipLocation(**{**values, "at": tuple(values.get("at", (0, 0)))})


def parse_sources(path: str) -> list[tuple[str, float | None]]:
    """The sources that a path names, each with its weight; None: as much as it has.

    One path is one source. Several are separated by commas, `a,b`, or have weights, `a=0.7,b=0.3`.

    Raises:
      ValueError: some have a weight and others none, or a weight is not positive.
    """
    if os.path.exists(path):
        return [(path, None)]
    depth, parts = 0, [""]
    for letter in path:  # {a,b} is one pattern
        depth += (letter == "{") - (letter == "}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    found: list[tuple[str, float | None]] = []
    for part in (part.strip() for part in parts if part.strip()):
        name, _, text = part.rpartition("=")
        try:
            weight = None if os.path.exists(part) or not name else float(text)
        except ValueError:
            weight = None
        if weight is not None and not 0 < weight < math.inf:
            raise ValueError(f"{part!r}: the weight must be a positive number.")
        found.append((part if weight is None else name, weight))
    weights = [weight for _, weight in found]
    if None in weights and any(weight is not None for weight in weights):
        raise ValueError(f"{path!r}: give every source a weight, PATH=WEIGHT, or none of them.")
    return found


class _Found(NamedTuple):
    """What is in the sources: name -> stamp; where those are that are no files of a folder; the shards that were listed."""

    stamps: dict[str, str]
    locations: dict[str, ClipLocation]
    shards: dict[str, tuple[int, int | str]]


def _find_all(path: str, without: pathlib.Path | None, known: FileIndex | None) -> _Found:
    """The clips of all sources. Of several, names begin with the source's number."""
    sources = [name for name, _ in parse_sources(path)]
    if len(sources) == 1:
        return _find_in(sources[0], without, known)
    found = _Found({}, {}, {})
    for number, source in enumerate(sources):
        part = _find_in(source, without, known)
        for name, stamp in part.stamps.items():
            place = part.locations.get(name) or location_of(_place(source, name))
            found.stamps[f"{number}:{name}"] = stamp
            found.locations[f"{number}:{name}"] = place
        found.shards.update(part.shards)
    return found


def _find_in(source: str, without: pathlib.Path | None, known: FileIndex | None) -> _Found:
    """The clips of one source."""
    folder = os.path.isdir(source) or not may_exist(source)
    if folder or (is_url(source) and not names_shards(source)):
        stamps = _find(source, without)
        if stamps or not (is_url(source) or folder):
            return _Found(stamps, {}, {})
    listed: dict[str, list[ClipLocation]] = {}
    facts: dict[str, tuple[int, int | str]] = {}
    if known is not None:
        for place in known.locations.values():
            if place.place in known.shards:
                listed.setdefault(place.place, []).append(place)
        for name in list(listed):
            facts[name] = _facts(name, listed[name][0].kind)
            if known.shards[name] != facts[name]:
                del listed[name]
    clips = find_clips(source, without=without, flag="the path of the data", listed=listed)
    stamps, locations, shards = {}, {}, {}
    for name, place in clips.items():
        location = location_of(place)
        if location.column or location.kind == "tar":
            if location.place not in facts:
                facts[location.place] = _facts(location.place, location.kind)
            shards[location.place] = facts[location.place]
            about = shards[location.place]
        else:
            about = _facts(location.place, location.kind)
        location = dataclasses.replace(location, beside=(), given="")  # training needs none of it
        locations[name] = location
        stamps[name] = f"{about[0]} {about[1]} {dataclasses.replace(location, weight=1.0).identity}"
    return _Found(stamps, locations, shards)


def _facts(place: str, kind: Any = "file") -> tuple[int, int | str]:
    """Size and version of a file; (-1, why) if it cannot be asked."""
    try:
        size, changed = ClipLocation(kind=kind, place=place).facts
        return size, changed
    except OSError as error:
        return -1, f"error {error.errno}"


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
    """Name in the folder -> stamp of each file of a bucket."""
    found = {}
    for name, info in find_in_bucket(folder).items():
        facts = facts_in(dict(info))
        found[name] = f"{facts.size} {facts.changed}"
    return found


def _place(folder: str, name: str) -> Place:
    return f"{folder.rstrip('/')}/{name}" if is_url(folder) else pathlib.Path(folder, name)


def _measure_all(
    places: Mapping[str, Place], files: Iterable[tuple[str, str]], fps: float
) -> dict[str, MediaFile | BadFile]:
    files = list(files)
    remote = any(is_url(location_of(places[name]).place) for name, _ in files)
    threads = _URL_THREADS if remote else os.cpu_count() or 1
    pool = concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="index")
    try:
        jobs = [pool.submit(_measure, places[name], name, stamp, fps) for name, stamp in files]
        # Shown on a terminal only, and only if it takes more than a second.
        bar = tqdm(zip(files, jobs, strict=True), "Files", len(jobs), disable=None, delay=1)
        return {name: job.result() for (name, _), job in bar}
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _measure(place: Place, name: str, stamp: str, fps: float) -> MediaFile | BadFile:
    """Counts the frames of a file."""
    if stamp == "special":  # opening a pipe would wait for ever
        return BadFile(f"{str(place)!r} is not a regular file.", stamp)
    try:
        with media.open_clip(place, resolution=1, rate=fps, tell_rate=False) as clip:
            info = clip.info
            return MediaFile(name, info.kind, clip.num_frames, stamp, info.transfer)
    except MediaError as error:
        return BadFile(str(error), stamp)

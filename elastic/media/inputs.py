"""What people name as input: a file, a folder, a bucket, tar shards, Parquet files, a data set of Hugging Face, or a list."""

import glob
import itertools
import logging
import os
import pathlib
import posixpath
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from elastic.media import clip_lists
from elastic.media.errors import MediaError
from elastic.media.files import is_url
from elastic.media.folders import find_media, is_media, results_among, tell_results
from elastic.media.location import ClipLocation, Place

log = logging.getLogger(__name__)

HUB = "hf_dataset::"
HUB_STREAM = "hf_stream::"  # the same, read where its files lie
_TAR, _PARQUET = ".tar", ".parquet"
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_BRACES = re.compile(r"\{([^{}]*)\}")
_Listed = Mapping[str, list[ClipLocation]] | None
_THREADS = 16  # threads that wait for a disk or a bucket use no core


def check_input(path: str | os.PathLike[str], *, flag: str = "--input_path") -> None:
    """Refuses an input that is not there. A bucket, a data set of Hugging Face and a pattern are found out when they are listed.

    Raises:
      MediaError: there is no such file.
    """
    if not may_exist(os.fspath(path)):
        raise MediaError(f"There is no file {os.fspath(path)!r}; check {flag}.")


def may_exist(text: str) -> bool:
    """Whether an input is there, as far as can be told without asking a bucket or the Hub, or trying a pattern."""
    if text.startswith((HUB, HUB_STREAM)) or is_url(text) or os.path.exists(text):
        return True
    if _BRACES.search(text) or glob.has_magic(text):
        return True
    return os.path.exists(text.partition("::")[0])


def names_shards(text: str) -> bool:
    """Whether an input names tar or Parquet files, and not a folder."""
    return _is_shard(text.partition("::")[0]) or bool(_BRACES.search(text))


def find_clips(
    path: str | os.PathLike[str],
    *,
    without: str | os.PathLike[str] | None = None,
    flag: str = "--input_path",
    listed: Mapping[str, list[ClipLocation]] | None = None,
) -> dict[str, Place]:
    """{id: place} of the clips of an input, sorted by id.

    The id is the file's path relative to the folder, its name as listed, the member's name in its tar file, or the name beside the
    cell of a table, else the row's number. Of several tar or Parquet files, their own names stand before it.

    Args:
      path: as `elastic.io.read_options.INPUTS` says.
      without: leave out what lies in this folder.
      flag: what an error calls the input.
      listed: the clips of tar and Parquet files that are known already, by the file.

    Raises:
      MediaError: there is nothing.
      ValueError: a package is missing.
    """
    text = os.fspath(path)
    if text.startswith((HUB, HUB_STREAM)):
        from elastic.media.table_rows import rows_of_hub, rows_of_hub_files

        prefix = HUB if text.startswith(HUB) else HUB_STREAM
        name, _, column = text.removeprefix(prefix).partition("@")
        rows = rows_of_hub if prefix == HUB else rows_of_hub_files
        return _by_id({"": rows(name, column)})
    check_input(text, flag=flag)
    if is_url(text):
        return _of_urls(text, listed)
    local = pathlib.Path(text)
    if local.is_dir():
        return _of_folder(local, without, listed)
    if local.exists() and not _is_shard(text):
        if local.suffix.lower() in clip_lists.SUFFIXES:
            return clip_lists.clips_of_list(local)
        if text.lower().endswith(_COMPRESSED):
            raise MediaError(f"{text!r} is compressed; its members cannot be read in place. Decompress it.")  # fmt: skip
        return {printable(local.name): local}
    files, column = _files_of_pattern(text)
    if not files:
        raise MediaError(f"There is no file {text!r}; check {flag}.")
    return _of_files(files, column, text, listed)


def printable(name: str) -> str:
    """A file's name as valid UTF-8; bytes that are not UTF-8 become \\xNN."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _is_shard(text: str) -> bool:
    return text.lower().endswith((_TAR, _PARQUET))


def _files_of_pattern(text: str) -> tuple[list[str], str]:
    """The files of a pattern with braces and stars, sorted, and the column that is named behind '::'."""
    pattern, _, column = text.partition("::")
    found: list[str] = []
    for one in [text] if os.path.exists(text) else expand_braces(pattern):
        if os.path.exists(one) or not glob.has_magic(one):
            if not os.path.exists(one):
                raise MediaError(f"There is no file {one!r}, which {text!r} names.")
            found.append(one)
        else:
            found += glob.glob(one, recursive=True)
    return sorted(set(found)), column


def expand_braces(pattern: str) -> Iterator[str]:
    """The names that a pattern stands for, as a shell has them: {a,b} and {000..009}."""
    match = _BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    before, inner, after = pattern[: match.start()], match[1], pattern[match.end() :]
    ends = re.fullmatch(r"(\d+)\.\.(\d+)", inner)
    if ends:
        first, last = map(int, ends.groups())
        width = max(map(len, ends.groups())) if any(e.startswith("0") for e in ends.groups()) else 0
        parts = [f"{number:0{width}d}" for number in range(first, last + 1)]
    else:
        parts = inner.split(",")
    for part in parts:
        for rest in expand_braces(after):
            yield f"{before}{part}{rest}"


def _of_folder(
    folder: pathlib.Path, without: str | os.PathLike[str] | None, listed: _Listed
) -> dict[str, Place]:
    media = find_media(folder, without=without)
    if media:
        found: dict[str, Place] = {
            printable(file.relative_to(folder).as_posix()): file for file in media
        }
        shards = _shards_below(folder, without)
        if shards:
            log.warning(
                "%s has images or videos and %d tar or Parquet files, such as %s; these are not read. Name them to read them.",
                folder,
                len(shards),
                shards[0],
            )
        return dict(sorted(found.items()))
    if shards := _shards_below(folder, without):
        return _of_files([str(file) for file in shards], "", str(folder), listed)
    raise MediaError(
        f"There is no image or video in {str(folder)!r} or its folders, and no tar or Parquet file."
    )


def _shards_below(
    folder: pathlib.Path, without: str | os.PathLike[str] | None
) -> list[pathlib.Path]:
    """The tar files of a folder; if there are none, its Parquet files."""
    apart = None if without is None else pathlib.Path(without).resolve()
    for ending in (_TAR, _PARQUET):
        found = [
            file
            for file in sorted(folder.rglob(f"*{ending}"))
            if file.is_file()
            and not any(part.startswith(".") for part in file.relative_to(folder).parts)
            and (apart is None or apart not in file.resolve().parents)
        ]
        if found:
            return found
    return []


def _of_files(files: list[str], column: str, text: str, listed: _Listed) -> dict[str, Place]:
    """The clips of tar files, of Parquet files, or these files themselves."""
    kinds = {posixpath.splitext(file)[1].lower() for file in files}
    shards = kinds & {_TAR, _PARQUET}
    if shards and len(kinds) > 1:
        raise MediaError(f"{text!r} names files of several kinds ({', '.join(sorted(kinds))}); give one kind at a time.")  # fmt: skip
    root = posixpath.commonpath([posixpath.dirname(file) for file in files])
    names = [posixpath.relpath(file, root) if root else file for file in files]
    if not shards:
        places = {printable(n): _file(f) for n, f in zip(names, files, strict=True)}
        return dict(sorted(places.items()))
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="listing") as pool:
        parts = pool.map(_reader_of(next(iter(shards)), column, listed or {}), files)
        found = dict(zip(names, parts, strict=True))
    alone = len(files) == 1 and not _names_several(text)
    clips = _by_id({"": found[names[0]]} if alone else found)
    if not clips:
        raise MediaError(f"There is no image or video in {text!r}.")
    return clips


def _names_several(text: str) -> bool:
    """Whether an input may come to have several files: then ids have the file's name from the start."""
    return not _is_shard(text.partition("::")[0]) or bool(
        _BRACES.search(text) or (glob.has_magic(text) and not os.path.exists(text))
    )


def _file(place: str) -> Place:
    return place if is_url(place) else pathlib.Path(place)


def _reader_of(
    ending: str, column: str, listed: Mapping[str, list[ClipLocation]]
) -> Callable[[str], list[ClipLocation]]:
    def read(place: str) -> list[ClipLocation]:
        if place in listed:
            return listed[place]
        if ending == _TAR:
            from elastic.media.tar_members import members_of

            return members_of(place)
        from elastic.media.table_rows import rows_of_parquet

        return rows_of_parquet(place, column)

    return read


def _by_id(parts: Mapping[str, list[ClipLocation]]) -> dict[str, Place]:
    """The clips of each file, sorted by id."""
    found = {
        printable(posixpath.join(name, location.member)): location
        for name, locations in parts.items()
        for location in locations
    }
    return dict(sorted(found.items()))


def _of_urls(text: str, listed: _Listed) -> dict[str, Place]:
    """The clips of a URL: of a folder, of one file, or of a pattern of shards."""
    url, _, column = text.partition("::")
    if _BRACES.search(url) or _is_shard(url):
        files = list(expand_braces(url))
        if any(glob.has_magic(file) for file in files):
            files = list(itertools.chain.from_iterable(map(_matching, files)))
        if not files:
            raise MediaError(f"There is no file {text!r}.")
        return _of_files(sorted(files), column, text, listed)
    if posixpath.splitext(url)[1] and is_media(url):
        return {posixpath.basename(url): url}
    found = find_in_bucket(url)
    if found:
        return {printable(name): f"{url.rstrip('/')}/{name}" for name in sorted(found)}
    system, root = open_system(url)
    names = [path.removeprefix(root).lstrip("/") for path in system.find(root)]
    for ending in (_TAR, _PARQUET):
        if files := sorted(f"{url.rstrip('/')}/{n}" for n in names if n.lower().endswith(ending)):
            return _of_files(files, column, url, listed)
    raise MediaError(f"There is no image or video in {url!r}, and no tar or Parquet file.")


def _matching(pattern: str) -> list[str]:
    """The URLs that a pattern with stars stands for."""
    if not glob.has_magic(pattern):
        return [pattern]
    system, inner = open_system(pattern)
    return [system.unstrip_protocol(path) for path in system.glob(inner)]


def open_system(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it.

    Raises:
      ValueError: fsspec does not know it, or its package is not installed.
    """
    import fsspec
    from fsspec.registry import known_implementations

    scheme = url.partition("://")[0]
    try:
        return fsspec.url_to_fs(url)
    except ImportError as error:
        hint = known_implementations.get(scheme, {}).get("err") or str(error)
        raise ValueError(f"{url!r} cannot be opened here. {hint} (with pip).") from error
    except ValueError as error:
        raise ValueError(
            f"{url!r} starts with {scheme!r}, which fsspec does not know ({error})."
        ) from error


def find_in_bucket(url: str) -> dict[str, Mapping[str, Any]]:
    """{name in the folder: what the file system says of it} of the images and videos below a URL, sorted.

    Names that begin with a dot and results of earlier runs are left out, as in `find_media`.

    Raises:
      ValueError: as in `open_system`.
    """
    system, root = open_system(url)
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
    found = {}
    for path, facts in sorted(listing.items()):
        name = path.removeprefix(root).lstrip("/")
        hidden = any(part.startswith(".") for part in name.split("/"))
        usable = facts.get("type") == "file" and path not in results and is_media(name)
        if usable and name and not hidden:
            found[name] = facts
    return found

"""The rows of Parquet files and of Hugging Face data sets as clips. The bytes are read when a clip is opened, not here."""

import dataclasses
import itertools
import json
import posixpath
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from elastic.media import cells
from elastic.media.errors import MediaError, reason
from elastic.media.location import ClipLocation
from elastic.media.tar_members import members_of, safe_path

# Where several columns hold bytes, the first of these names is the clips'.
_USUAL = (
    "video videos mp4 webm image images jpg jpeg png webp clip media bytes content data".split()
)
_THREADS = 16  # threads that wait for a disk or the Hub use no core


def rows_of_parquet(place: str, column: str = "") -> list[ClipLocation]:
    """The clips of a Parquet file, one a row, in its order. Rows without a clip have one that cannot be opened.

    Args:
      place: path or URL of the file.
      column: of bytes, or of structs {bytes, path} as `datasets` writes them; '' finds it.

    Raises:
      MediaError: the file cannot be read, or it is not clear which column holds the clips.
    """
    return _locations("parquet", _read_rows(place, column))


class _Row(NamedTuple):
    """A row: its file or data set, the column of the clip, where it stands, and the path beside the bytes."""

    place: str
    column: str
    group: int
    row: int
    path: str | None


def _read_rows(place: str, column: str, schema: Any = None) -> list[_Row]:
    """The rows of a Parquet file. The schema that the data set's card tells, if any, says which column holds the clips."""
    try:
        with cells.opened(place) as file:
            own = file.schema_arrow
            column = _media_column(place, own if schema is None else schema, column)
            if column not in own.names:
                raise MediaError(f"{place!r} has no column {column!r}, which its data set has.")
            named = _has_path(own.field(column).type)
            groups = list(cells.paths_of(file, column, has_path=named))
    except OSError as error:
        raise MediaError(f"Cannot read {place!r}: {reason(error)}.") from error
    return [
        _Row(place, column, group, row, path)
        for group, paths in enumerate(groups)
        for row, path in enumerate(paths)
    ]


def rows_of_hub(place: str, column: str = "") -> list[ClipLocation]:
    """The clips of a Hugging Face data set, one a row; `place` is 'NAME' or 'NAME::SPLIT'.

    Raises:
      MediaError: it is not clear which column holds the clips.
      ValueError: the data set cannot be loaded.
    """
    rows = cells.hub_rows(place)
    kinds = rows.features.arrow_schema
    column = _media_column(f"hf_dataset::{place}", kinds, column)
    paths: list[str | None] = [None] * len(rows)
    if _has_path(kinds.field(column).type):
        table = rows.data.table if rows._indices is None else rows.select_columns(column).with_format("arrow")[:]  # fmt: skip
        paths = [value for chunk in table[column].chunks for value in chunk.field("path").to_pylist()]  # fmt: skip
    return _locations("hf", (_Row(place, column, 0, row, path) for row, path in enumerate(paths)))


def rows_of_hub_files(place: str, column: str = "") -> list[ClipLocation]:
    """The same clips, with the same names, where the data set's files lie: a cell is fetched when its clip is opened.

    The files are Parquet, or tar shards, whose clips have their members' names.

    Raises:
      MediaError: a file cannot be read, or it is not clear which column holds the clips.
      ValueError: the data set's files are not found, or are of another kind.
    """
    files, schema = cells.hub_files(place)
    endings = {posixpath.splitext(file)[1].lower() for file in files}
    if endings not in ({".parquet"}, {".tar"}):
        raise ValueError(
            f"hf_stream::{place} has {', '.join(sorted(endings)) or 'no'} files; it reads Parquet and tar files where they lie. "
            f"Use hf_dataset::{place}, which reads every data set through a cache on the disk; a folder of videos or images is read "
            "as hf://datasets/OWNER/NAME."
        )
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="listing") as pool:
        if endings == {".parquet"}:
            parts = pool.map(lambda file: _read_rows(file, column, schema), files)
            return _locations("parquet", itertools.chain.from_iterable(parts))
        members = itertools.chain.from_iterable(pool.map(members_of, files))
        seen: Counter[str] = Counter()
        return [_renamed(seen, number, member) for number, member in enumerate(members)]


def _renamed(seen: Counter[str], number: int, location: ClipLocation) -> ClipLocation:
    """The clip under its name, or, where an earlier one has it, under one with its number."""
    seen[location.member] += 1
    if seen[location.member] == 1:
        return location
    return dataclasses.replace(location, member=f"{location.member}#{number}")


def _locations(kind: Any, rows: Iterable[_Row]) -> list[ClipLocation]:
    seen: Counter[str] = Counter()
    found: list[ClipLocation] = []
    for number, (place, column, group, row, path) in enumerate(rows):
        name = safe_path(path.partition("::")[0]) if path else f"{number:08d}"
        location = ClipLocation(kind=kind, place=place, member=name, at=(group, row), column=column)
        found.append(_renamed(seen, number, location))
    return found


def _has_path(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_struct(kind) and kind.get_field_index("path") >= 0


def _media_column(place: str, schema: Any, wanted: str) -> str:
    """The column that holds the clips."""
    names = [field.name for field in schema if _may_hold_media(field.type)]
    if wanted:
        if wanted not in names:
            raise MediaError(
                f"{place!r} has no column {wanted!r} of video or image bytes; it has {', '.join(names) or 'none'}."
            )
        return wanted
    said = [name for name in _said_by_datasets(schema) if name in names]
    usual = [name for name in _USUAL if name in names]
    if len(names) == 1 or said or usual:
        return (said or usual or names)[0]
    if not names:
        raise MediaError(
            f"{place!r} has no column of video or image bytes, nor of structs {{bytes, path}}; its columns are "
            f"{', '.join(schema.names)}."
        )
    raise MediaError(
        f"{place!r} has several columns of bytes ({', '.join(names)}); name one: {place}::{names[0]}."
    )


def _may_hold_media(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        at = kind.get_field_index("bytes")
        return at >= 0 and _may_hold_media(kind.field(at).type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _said_by_datasets(schema: Any) -> list[str]:
    """The columns that `datasets` says are videos, then those that are pictures."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        kinds = {name: value.get("_type") for name, value in features.items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        return []
    return [name for kind in ("Video", "Image") for name, is_kind in kinds.items() if is_kind == kind]  # fmt: skip

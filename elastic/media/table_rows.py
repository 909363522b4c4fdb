"""The rows of Parquet files and of Hugging Face data sets as clips. The bytes are read when a clip is opened, not here."""

import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

from elastic.media import cells
from elastic.media.errors import MediaError, reason
from elastic.media.location import ClipLocation
from elastic.media.tar_members import safe_path

# Where several columns hold bytes, the first of these names is the clips'.
_USUAL = (
    "video videos mp4 webm image images jpg jpeg png webp clip media bytes content data".split()
)


def rows_of_parquet(place: str, column: str = "") -> list[ClipLocation]:
    """The clips of a Parquet file, one a row, in its order. Rows without a clip have one that cannot be opened.

    Args:
      place: path or URL of the file.
      column: of bytes, or of structs {bytes, path} as `datasets` writes them; '' finds it.

    Raises:
      MediaError: the file cannot be read, or it is not clear which column holds the clips.
    """
    try:
        with cells.opened(place) as file:
            schema = file.schema_arrow
            column = _media_column(place, schema, column)
            named = _has_path(schema.field(column).type)
            groups = list(cells.paths_of(file, column, has_path=named))
    except OSError as error:
        raise MediaError(f"Cannot read {place!r}: {reason(error)}.") from error
    rows = ((group, row, path) for group, paths in enumerate(groups) for row, path in enumerate(paths))  # fmt: skip
    return _locations("parquet", place, column, rows)


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
    return _locations("hf", place, column, ((0, row, path) for row, path in enumerate(paths)))


def _locations(
    kind: Any, place: str, column: str, rows: Iterable[tuple[int, int, str | None]]
) -> list[ClipLocation]:
    found: list[ClipLocation] = []
    seen: Counter[str] = Counter()
    for number, (group, row, path) in enumerate(rows):
        name = safe_path(path.partition("::")[0]) if path else f"{number:08d}"
        seen[name] += 1
        if seen[name] > 1:
            name = f"{name}#{number}"
        found.append(
            ClipLocation(kind=kind, place=place, member=name, at=(group, row), column=column)
        )
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

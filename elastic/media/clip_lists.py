"""Lists of clips: .txt, one name a line; .csv and .jsonl, with columns for the range, the weight and whatever else is known of a clip."""

import csv
import itertools
import json
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from elastic.media.errors import MediaError
from elastic.media.files import is_url
from elastic.media.location import ClipLocation, Place

SUFFIXES = (".txt", ".csv", ".jsonl")
_PATH = ("path", "file", "file_name", "filename", "video", "image", "url")
_MOST_FIELD = 2**20  # characters of a cell


def clips_of_list(path: pathlib.Path) -> dict[str, Place]:
    """{id: place} of a list. The id is the name as listed, with the range if there is one; a column `id` says another.

    Files are found relative to the list's folder. Columns besides path, id, start, end and weight are metadata.

    Raises:
      MediaError: a line cannot be understood, an id occurs twice, or there is none.
    """
    if not path.is_file():  # reading a pipe would block
        raise MediaError(
            f"The list {str(path)!r} is no regular file; write the files' names into one."
        )
    try:
        if path.suffix.lower() == ".txt":
            return _plain(path)
        found: dict[str, Place] = {}
        for line, values in _rows(path):
            name, place = _clip(f"line {line} of the list {str(path)!r}", path.parent, values)
            if name in found:
                raise MediaError(
                    f"The list {str(path)!r} names {name!r} twice, the second time in line {line}; give each clip an id "
                    "of its own in a column id."
                )
            found[name] = place
    except (UnicodeDecodeError, csv.Error) as error:
        raise MediaError(
            f"The list {str(path)!r} cannot be read as UTF-8 text: {error}."
        ) from error
    if not found:
        raise MediaError(f"The list {str(path)!r} names no file; write each on a line of its own.")
    return dict(sorted(found.items()))


def _plain(path: pathlib.Path) -> dict[str, Place]:
    names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    names = sorted(name for name in names if name and not name.startswith("#"))
    twice = [name for name, following in itertools.pairwise(names) if name == following]
    if twice or not names:
        what = f"names {twice[0]!r} twice" if twice else "names no file"
        raise MediaError(
            f"The list {str(path)!r} {what}; write each file's name on a line of its own."
        )
    return {name: _place(path.parent, name) for name in names}


def _place(folder: pathlib.Path, name: str) -> Place:
    return name if is_url(name) else folder / name


def _rows(path: pathlib.Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(line, values) of each line."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        if path.suffix.lower() == ".csv":
            csv.field_size_limit(_MOST_FIELD)
            reader = csv.DictReader(file, skipinitialspace=True)
            for row in reader:
                if None in row or None in row.values():
                    raise MediaError(
                        f"line {reader.line_num} of the list {str(path)!r} has another number of columns than its first line."
                    )
                yield reader.line_num, {k.strip(): v for k, v in row.items() if v != ""}
            return
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise MediaError(
                    f"line {number} of the list {str(path)!r} is no JSON: {error}."
                ) from error
            if not isinstance(values, dict):
                raise MediaError(
                    f"line {number} of the list {str(path)!r} holds a {type(values).__name__}; write an object "
                    '{"path": ...}.'
                )
            yield number, {k: v for k, v in values.items() if v is not None}


def _clip(where: str, folder: pathlib.Path, values: Mapping[str, Any]) -> tuple[str, Place]:
    left = dict(values)
    column = next((name for name in _PATH if name in left), None)
    if column is None or not isinstance(left[column], str):
        raise MediaError(f"{where} names no file; the list needs a column path.")
    path = left.pop(column)
    start = _number(where, left, "start", 0.0)
    end = _number(where, left, "end", math.inf)
    weight = _number(where, left, "weight", 1.0)
    if not 0 <= start < end or weight <= 0:
        raise MediaError(
            f"{where}: start={start:g}, end={end:g}, weight={weight:g} must be 0 <= start < end and a positive weight."
        )
    has_range = start > 0 or end < math.inf
    default = f"{path}@{start:g}-{end:g}".removesuffix("inf") if has_range else path
    name = str(left.pop("id", default))
    if not has_range and weight == 1 and not left:
        return name, _place(folder, path)
    return name, ClipLocation(
        kind="url" if is_url(path) else "file",
        place=path if is_url(path) else str(folder / path),
        start=start,
        end=end if end < math.inf else None,
        weight=weight,
        given=json.dumps(left, sort_keys=True) if left else "",
    )


def _number(where: str, values: dict[str, Any], name: str, usual: float) -> float:
    """Takes a number out of the values."""
    value = values.pop(name, usual)
    try:
        number = float(value)
        if not math.isnan(number):
            return number
    except (TypeError, ValueError):
        pass
    raise MediaError(f"{where}: {name}={value!r} is not a number.")

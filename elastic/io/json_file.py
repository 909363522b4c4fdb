"""JSON files: written atomically and without NaN; read by their format mark."""

import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from elastic.io.atomic import atomic_write


def write_json(path: str | os.PathLike, obj: Any) -> None:
    """Writes JSON, whole or not at all; numbers that are not finite become null."""
    text = json.dumps(_plain(obj), indent=1, allow_nan=False, ensure_ascii=False)
    atomic_write(path, (text + "\n").encode())


def read_marked(path: str | os.PathLike, *marks: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a JSON file that holds one of the format marks, such as {"format": "elastictok-index", "version": 1}.

    Returns:
      The object in the file without the keys of the mark.

    Raises:
      ValueError: the file holds no JSON object, or one with none of the marks.
      OSError: the file cannot be read.
    """
    return parse_marked(pathlib.Path(path).read_bytes(), *marks)


def parse_marked(data: bytes, *marks: Mapping[str, Any]) -> dict[str, Any]:
    """As `read_marked`, of the bytes of such a file.

    Raises:
      ValueError: as there.
    """
    try:
        values = json.loads(data)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(values, dict):
        raise ValueError(f"it holds a {type(values).__name__} and no object")
    for mark in marks:
        if all(values.get(key) == value for key, value in mark.items()):
            return {key: value for key, value in values.items() if key not in mark}
    raise ValueError("its format is another one")


def last_numbers(path: str | os.PathLike) -> dict[str, float]:
    """The last value of each name in a file of JSON lines such as metrics.jsonl, where that is a number.

    A line that is no JSON, such as a half-written one, counts for nothing.
    """
    last: dict[str, Any] = {}
    for line in pathlib.Path(path).read_text(encoding="utf-8").splitlines():
        try:
            last |= json.loads(line)
        except ValueError:
            continue
    return {name: value for name, value in last.items() if isinstance(value, int | float)}


def _plain(obj: Any) -> Any:
    """`obj` in JSON's own types: dicts, lists, strings, booleans, integers, finite numbers, None."""
    if isinstance(obj, Mapping):
        return {str(key): _plain(value) for key, value in obj.items()}
    if isinstance(obj, np.ndarray):
        return _plain(obj.tolist())
    if isinstance(obj, (list, tuple)):
        return [_plain(value) for value in obj]
    if isinstance(obj, np.generic):
        return _plain(obj.item())
    if isinstance(obj, float):
        return obj if math.isfinite(obj) else None
    if isinstance(obj, os.PathLike):
        return os.fspath(obj)
    return obj

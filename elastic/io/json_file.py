"""JSON files without NaN, written atomically."""

import json
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from elastic.io.atomic import atomic_write


def write_json(path: str | os.PathLike, obj: Any) -> None:
    """Writes JSON, whole or not at all; numbers that are not finite become null."""
    text = json.dumps(_plain(obj), indent=1, allow_nan=False, ensure_ascii=False)
    atomic_write(path, (text + "\n").encode())


def _plain(obj: Any) -> Any:
    """Only what JSON knows: mappings, lists, strings, integers, booleans, finite numbers, null."""
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

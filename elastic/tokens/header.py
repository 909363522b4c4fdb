"""The header of a token file: JSON fields of known names and types."""

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from elastic.tokens import npz_file
from elastic.tokens.npz_file import TokenFileError

VERSION = 1
CHOICES = {"bottleneck_type": ("fsq", "vae"), "context": ("carry", "restart")}
_MAX_BYTES = 65_536
# JSON type of every field beside the format's name and version.
_TYPES: dict[str, tuple[type, ...]] = {
    "bottleneck_type": (str,),
    "codebook_size": (int, type(None)),
    "tokens_per_block": (int,),
    "frames_per_block": (int,),
    "num_frames": (int,),
    "is_image": (bool,),
    "resolution": (int,),
    "source": (list,),
    "rate": (float,),
    "model_id": (str,),
    "config_hash": (str,),
    "threshold": (float, type(None)),
    "search": (str,),
    "window_blocks": (int,),
    "context": (str,),
}
_WEIGHTS = "weights"  # the only field that may be missing: files had none at first
_MOST_NUMBERS = 256


def pack_header(fields: Mapping[str, Any]) -> np.ndarray:
    """The header as uint8.

    Raises:
      ValueError: a name in it is too long.
    """
    header: dict[str, Any] = {"format": npz_file.FORMAT, "version": VERSION}
    header |= {name: fields[name] for name in _TYPES}
    if fields[_WEIGHTS]:
        header[_WEIGHTS] = list(fields[_WEIGHTS])
    text = json.dumps(header, allow_nan=False, indent=1).encode()
    require(
        len(text) <= _MAX_BYTES,
        f"The names of model and search take {len(text)} bytes; use shorter ones.",
    )
    return np.frombuffer(text, np.uint8)


def unpack_header(array: np.ndarray | None, file_name: str) -> dict[str, Any]:
    """The fields, complete and of the right types.

    Raises:
      TokenFileError: the file is of another version.
      ValueError: they are not.
    """
    if array is None or array.nbytes > _MAX_BYTES:
        raise ValueError("the header is missing or too long.")
    header = json.loads(array.tobytes().decode())
    require(
        isinstance(header, dict) and header.pop("format", None) == npz_file.FORMAT,
        f"the header does not say {npz_file.FORMAT!r}.",
    )
    version = header.pop("version", None)
    if version != VERSION:
        raise TokenFileError(
            f"{file_name} is a token file of version {version!r}; this package reads {VERSION}. "
            "Update the package, or tokenize the clip again."
        )
    weights = header.pop(_WEIGHTS, [])
    require(
        type(weights) is list
        and len(weights) <= _MOST_NUMBERS
        and all(type(number) is float and math.isfinite(number) for number in weights),
        f"header field {_WEIGHTS} is of no use.",
    )
    require(
        set(header) == set(_TYPES),
        f"header fields {sorted(set(header) ^ set(_TYPES))} are missing or unknown.",
    )
    for name, types in _TYPES.items():
        require(
            _has_type(header[name], types), f"header field {name}={header[name]!r} is of no use."
        )
    for name in CHOICES:
        check_choice(name, header[name])
    return header | {"source": tuple(header["source"]), _WEIGHTS: tuple(weights)}


def check_choice(name: str, value: str) -> None:
    """Refuses a value that is none of the field's."""
    require(value in CHOICES[name], f"{name}={value!r} must be one of {CHOICES[name]}.")


def require(condition: object, message: str) -> None:
    """Raises `ValueError` with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def _has_type(value: Any, types: tuple[type, ...]) -> bool:
    """Whether a JSON value has one of the types: integers of 32 bits, lists of two of them."""
    if type(value) is list:
        return list in types and len(value) == 2 and all(_has_type(v, (int,)) for v in value)
    if type(value) is int and not -(2**31) <= value < 2**31:
        return False
    return type(value) in types  # not isinstance: bool is an int in Python

"""Named arrays <-> the bytes of a token file, and its header; `clip.py` says what the arrays mean.

The file is an uncompressed .npz that NumPy alone can read. The archive's comment ends in the
SHA-256 of every byte before it, so that any damage is noticed. Equal arrays give equal bytes.

Reading is safe for files of unknown origin. It checks the digest first, then that no member is compressed or
occurs twice, and that the shape each array states fits exactly the bytes that are there, as plain numbers.
"""

import hashlib
import io
import json
import math
import os
import re
import stat
import struct
import zipfile
from collections.abc import Mapping
from typing import Any, BinaryIO, get_args

import numpy as np

from elastic.patches import TokenOrder
from elastic.tiles import FITS

FORMAT, VERSION = "elastictok-tokens", 1
_SEAL = f"{FORMAT} sha256 ".encode()  # then 64 hex digits end the file
_DIGEST_CHARS = 64
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time that a zip can state

CHOICES = {
    "bottleneck_type": ("fsq", "vae"),
    "context": ("carry", "restart"),
    "transfer": ("sdr", "pq", "hlg"),
    "fit": FITS,
    "token_order": get_args(TokenOrder),
}  # fields with few values
_MAX_HEADER_BYTES = 65_536

# What NumPy writes before the numbers of an array in C order, with one or two axes.
_ARRAY_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00(?P<size>..)"
    rb"\{'descr': '(?P<dtype>\|b1|\|u1|<[iuf][248])', 'fortran_order': False, "
    rb"'shape': \((?P<shape>[0-9]{1,12},(?: [0-9]{1,12})?)\), \} *\n",
    re.DOTALL,
)


class TokenFileError(ValueError):
    """A file that is not a valid token file; the message names the file, the fault and the way out."""


def pack(arrays: Mapping[str, np.ndarray]) -> bytes:
    """An uncompressed npz whose last bytes are the digest of all bytes before them."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, array, version=(1, 0), allow_pickle=False)
            # A fixed time: the same tokens give the same file.
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", _EPOCH), member.getvalue())
        archive.comment = _SEAL + b"0" * _DIGEST_CHARS
    body = buffer.getvalue()[:-_DIGEST_CHARS]
    return body + hashlib.sha256(body).hexdigest().encode()


def unpack(data: bytes, *, name: str) -> dict[str, np.ndarray]:
    """The arrays, read-only; errors call the file `name`.

    Raises:
      TokenFileError: the bytes are damaged, foreign, or hold anything but plain arrays of numbers.
    """
    _check_seal(data[-len(_SEAL) - _DIGEST_CHARS :], name)
    body, digest = memoryview(data)[:-_DIGEST_CHARS], data[-_DIGEST_CHARS:]
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise TokenFileError(
            f"{name} is damaged: its checksum does not match. Copy it again, "
            "or tokenize the clip again."
        )
    # From here on the bytes are as they were written, but their writer need not have been this package.
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
            arrays: dict[str, np.ndarray] = {}
            for member in members:
                key = member.filename.removesuffix(".npy")
                if key in arrays:
                    raise ValueError(f"{key} occurs twice.")
                # Stored as it is, a member cannot be larger than the file.
                if member.compress_type != zipfile.ZIP_STORED or member.file_size > len(data):
                    raise ValueError(f"{key} is compressed.")
                arrays[key] = _array(archive.read(member))
            return arrays
    except (
        zipfile.BadZipFile,
        ValueError,
        EOFError,
        NotImplementedError,  # an unknown zip version
        RuntimeError,  # an encrypted member
        OSError,
        OverflowError,
        struct.error,
    ) as error:
        raise TokenFileError(
            f"{name} is not a sound token file: {str(error).rstrip('.')}. Tokenize the clip again."
        ) from error


def read(path: str | os.PathLike) -> bytes:
    """The bytes of a file that ends like a token file.

    Raises:
      TokenFileError: it does not.
      OSError: the file cannot be read.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for ever
        raise TokenFileError(f"{path} is not a regular file. Give a token file.")
    with open(path, "rb") as file:
        # The end is read first, so that a huge foreign file is refused at once.
        _check_seal(_end(file), str(path))
        file.seek(0)
        return file.read()


def is_sealed(path: str | os.PathLike) -> bool:
    """Whether a file ends like a token file; its content is not checked.

    Raises:
      OSError: it cannot be read.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        return False
    with open(path, "rb") as file:
        return _ends_sealed(_end(file))


def _end(file: BinaryIO) -> bytes:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - len(_SEAL) - _DIGEST_CHARS))
    return file.read()


def _ends_sealed(end: bytes) -> bool:
    return end[:-_DIGEST_CHARS].endswith(_SEAL)


def _check_seal(end: bytes, name: str) -> None:
    if not _ends_sealed(end):
        raise TokenFileError(
            f"{name} is not a token file, or its end is missing. Copy it again, "
            "or tokenize the clip again."
        )


def _array(data: bytes) -> np.ndarray:
    """One .npy member; its header must account for every byte, and for plain numbers only.

    NumPy's own reader evaluates the header as Python literals and allocates what it asks for.
    """
    header = _ARRAY_HEADER.match(data)
    if header is None or int.from_bytes(header["size"], "little") != header.end() - 10:
        raise ValueError("an array is not one of plain numbers.")
    dtype = np.dtype(header["dtype"].decode())
    shape = tuple(int(length) for length in header["shape"].split(b",") if length)
    size = len(data) - header.end()
    if math.prod(shape) * dtype.itemsize != size:
        raise ValueError(f"shape {shape} of {dtype} does not fit {size} bytes.")
    return np.frombuffer(data, dtype, offset=header.end()).reshape(shape)


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


_WEIGHTS = "weights"  # may be missing: older files have none
# These are written if they differ from what most files have.
USUAL: dict[str, Any] = {"pixel_aspect": [1, 1], "transfer": "sdr", "token_order": "raster"}
# These too, and they are of any length. Where frames are cropped, the other fields say all of it.
LAYOUT: dict[str, Any] = {"fit": "crop", "frame": [], "tile_rows": [], "tile_columns": []}
_LISTS = {"frame": 2, "tile_rows": 4096, "tile_columns": 4096, "patch_size": 3}  # the most numbers
_MOST_NUMBERS = 256  # of a fingerprint of weights


def pack_header(fields: Mapping[str, Any]) -> np.ndarray:
    """The header as uint8.

    Raises:
      ValueError: a name in it is too long.
    """
    header: dict[str, Any] = {"format": FORMAT, "version": VERSION}
    header |= {name: fields[name] for name in _TYPES}
    for name, usual in USUAL.items():
        value = list(fields[name]) if isinstance(usual, list) else fields[name]
        if value != usual:
            header[name] = value
    if fields["fit"] != "crop":
        header |= {name: _as_json(fields[name]) for name in LAYOUT}
    if fields["patch_size"]:
        header["patch_size"] = list(fields["patch_size"])
    if fields[_WEIGHTS]:
        header[_WEIGHTS] = list(fields[_WEIGHTS])
    text = json.dumps(header, allow_nan=False, indent=1).encode()
    require(
        len(text) <= _MAX_HEADER_BYTES,
        f"The names of model and search take {len(text)} bytes; use shorter ones.",
    )
    return np.frombuffer(text, np.uint8)


def unpack_header(array: np.ndarray | None, file_name: str) -> dict[str, Any]:
    """The fields of the header, complete and of the right types.

    Raises:
      TokenFileError: the file is of another version.
      ValueError: a field is missing, unknown or of another type.
    """
    if array is None or array.nbytes > _MAX_HEADER_BYTES:
        raise ValueError("the header is missing or too long.")
    header = json.loads(array.tobytes().decode())
    require(
        isinstance(header, dict) and header.pop("format", None) == FORMAT,
        f"the header does not say {FORMAT!r}.",
    )
    version = header.pop("version", None)
    if version != VERSION:
        raise TokenFileError(
            f"{file_name} is a token file of version {version!r}; this package reads {VERSION}. "
            "Update the package, or tokenize the clip again."
        )
    weights = header.pop(_WEIGHTS, [])
    others = {name: header.pop(name, usual) for name, usual in USUAL.items()}
    fit = header.pop("fit", "crop")
    lists = {name: header.pop(name, []) for name in _LISTS}
    require(
        all(_is_list(value, _LISTS[name]) for name, value in lists.items()) and type(fit) is str,
        f"header fields {lists} are of no use.",
    )
    require(
        all(_has_type(value, (type(USUAL[name]),)) for name, value in others.items()),
        f"header fields {others} are of no use.",
    )
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
    header |= others | {"fit": fit}
    for name in CHOICES:
        check_choice(name, header[name])
    pairs = {name: tuple(header[name]) for name in ("source", "pixel_aspect")}
    tuples = {name: tuple(value) for name, value in lists.items()}
    return header | pairs | tuples | {_WEIGHTS: tuple(weights)}


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _is_list(value: Any, most: int) -> bool:
    """Whether a JSON value is a list of at most so many whole numbers."""
    return type(value) is list and len(value) <= most and all(_has_type(v, (int,)) for v in value)


def check_choice(name: str, value: str) -> None:
    """Raises `ValueError` for a value that the field may not have."""
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

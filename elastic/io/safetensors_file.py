"""The safetensors format, read and written one tensor at a time.

A file is `u64 header length | JSON {name: {dtype, shape, data_offsets}} | data`. The safetensors
library is not used, because it maps or copies whole files: here memory holds the result and 8 MiB,
conversion included, and a tensor is written without a copy of all. A test compares the two. The name
of a tensor is its key path joined by '.', as in the Hugging Face libraries ('/' is read too).
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

import numpy as np

from elastic.io.tensors import Tensor, as_array, dtype_of_name, stored_dtype, write_values
from elastic.io.tree import CheckpointError, check_paths, flatten, path_name

_DTYPE_NAMES = {
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
    "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64",
}  # fmt: skip
_CODES = {name: code for code, name in _DTYPE_NAMES.items()}
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        raise ValueError("a name occurs twice")
    return dict(pairs)


def index_safetensors(path: Path) -> list[Tensor]:
    """The tensors of a safetensors file, in the order of its header; no data is read.

    Raises:
      CheckpointError: the file is damaged or cut short; the message names the tensor.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if size < 8 or header_bytes > min(size - 8, _MAX_HEADER_BYTES):
            raise CheckpointError(
                f"{path}: the safetensors header is cut short; the file has {size:,} bytes."
            )
        try:
            header = json.loads(file.read(header_bytes), object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(
                f"{path}: its safetensors header is damaged ({str(error)[:100]})."
            ) from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: its safetensors header is no table of tensors.")
    header.pop("__metadata__", None)
    start = end = 8 + header_bytes
    separator = "/" if any("/" in name for name in header) else "."
    tensors = []
    for name, entry in header.items():
        tensor = _tensor(tuple(name.split(separator)), entry, start, path)
        ((offset, count),) = tensor.pieces
        if offset + count > size:
            raise CheckpointError(
                f"{path}: the file is cut short: tensor '{path_name(tensor.path)}' ends at byte "
                f"{offset + count:,}, the file at {size:,}."
            )
        tensors.append(tensor)
    for tensor in sorted(tensors, key=lambda tensor: tensor.pieces):
        ((offset, count),) = tensor.pieces
        if offset != end:
            raise CheckpointError(
                f"{path}: tensor '{path_name(tensor.path)}' begins at byte {offset:,}, where the one before it ends at {end:,}; "
                "the file is damaged."
            )
        end = offset + count
    if end != size:
        raise CheckpointError(
            f"{path}: {size - end:,} bytes follow the last tensor; the file is damaged."
        )
    check_paths((tensor.path for tensor in tensors), path)
    return tensors


def _tensor(key_path: tuple[str, ...], entry: Any, start: int, path: Path) -> Tensor:
    name = f"tensor '{path_name(key_path)}'"
    fields = entry if isinstance(entry, dict) else {}
    shape, offsets = fields.get("shape"), fields.get("data_offsets")
    if not (_are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2):
        raise CheckpointError(f"{path}: {name} lacks a proper shape and place in the file.")
    code = str(fields.get("dtype"))
    dtype = dtype_of_name(_DTYPE_NAMES.get(code, code), f"{path}: {name}")
    count = offsets[1] - offsets[0]
    tensor = Tensor(key_path, tuple(shape), dtype, ((start + offsets[0], count),))
    if count != tensor.num_bytes or math.prod(max(1, size) for size in shape) > 2**48:
        raise CheckpointError(
            f"{path}: {name} holds {count:,} bytes, but its shape {tensor.shape} of {dtype} "
            f"needs {tensor.num_bytes:,}."
        )
    return tensor


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**48 for n in value)


def write_safetensors(
    file: BinaryIO, tree: Mapping[str, Any], *, float_dtype: np.dtype | None = None
) -> None:
    """Writes nested dicts of arrays to an open file; the same tree always gives the same bytes.

    Args:
      file: the file, open for writing.
      tree: the arrays, NumPy's or JAX's.
      float_dtype: dtype in which floats are written; None keeps theirs.

    Raises:
      CheckpointError: a key holds a '.' or '/', or a leaf is no array of numbers.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "flax"}}
    arrays = {}
    for path, leaf in flatten(tree).items():
        if any("." in key or "/" in key for key in path):
            raise CheckpointError(
                f"'{path_name(path)}': a key may hold neither '.' nor '/' in a safetensors file."
            )
        arrays[".".join(path)] = as_array(leaf, path)
    dtypes = {name: stored_dtype(array, float_dtype) for name, array in arrays.items()}
    # Wide dtypes first, so that every tensor is aligned to the size of its numbers, as the library does.
    names = sorted(arrays, key=lambda name: (-dtypes[name].itemsize, name))
    end = 0
    for name in names:
        start, end = end, end + arrays[name].size * dtypes[name].itemsize
        code = _CODES[dtypes[name].name]
        header[name] = {
            "dtype": code,
            "shape": list(arrays[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in names:
        write_values(file, arrays[name], dtypes[name])


def looks_like_safetensors(head: bytes) -> bool:
    """Whether a file that starts with `head` (at least 9 bytes) is in this format."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _MAX_HEADER_BYTES

"""One tensor in a file, whatever the format: where it lies, how it is read and written.

Reading takes two steps. First the `index_*` function of a format reads the headers alone and returns
a `Tensor` for each tensor; it checks each declared size against the shape and against the size of
the file. Then `read_into` copies the bytes of one tensor to their destination, in pieces of at most
8 MiB, and converts them. So memory holds the result and a few megabytes, and a damaged file is
refused before anything is loaded. Data is little-endian.
"""

import math
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from elastic.io.tree import CheckpointError, KeyPath, path_name

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)  # 3 bits of mantissa, at most 448, no infinity
_NAMES = "float16 float32 float64 int8 int16 int32 int64 uint8 uint16 uint32 uint64 bool"
_DTYPES = {name: np.dtype(name) for name in _NAMES.split()} | {
    "bfloat16": BFLOAT16,
    "float8_e4m3fn": FLOAT8,
}

_PIECE_BYTES = 8 * 2**20  # of buffer memory, besides the tensors


class Tensor(NamedTuple):
    """Where one tensor lies in a file."""

    path: KeyPath
    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: tuple[tuple[int, int], ...]  # (offset, bytes), in C order; one piece unless above 1 GiB

    @property
    def num_bytes(self) -> int:
        """Bytes of data, by shape and dtype."""
        return math.prod(self.shape) * self.dtype.itemsize


def is_float(dtype: np.dtype) -> bool:
    """Whether `dtype` is a floating type; bfloat16 and float8 are, though NumPy does not say so."""
    return dtype.kind == "f" or dtype in (BFLOAT16, FLOAT8)


def dtype_of_name(name: str, where: str) -> np.dtype:
    """The dtype of this name; only dtypes of plain numbers are known. `where` starts the error message."""
    if name not in _DTYPES:
        raise CheckpointError(f"{where} has dtype {name[:40]!r}; known are {', '.join(_DTYPES)}.")
    return _DTYPES[name]


def _without_overflow_warning(source: np.ndarray, out: np.ndarray) -> None:
    # A value too large for a narrower float becomes inf, which `read_into` reports.
    with np.errstate(over="ignore", invalid="ignore"):
        np.copyto(out, source, casting="unsafe")


def _all_finite(values: np.ndarray) -> bool:
    if (
        values.dtype == BFLOAT16
    ):  # ml_dtypes' own test is slow; inf and NaN have all exponent bits set
        return bool(((values.view(np.uint16) & 0x7F80) != 0x7F80).all())
    if values.dtype == FLOAT8:
        return bool(((values.view(np.uint8) & 0x7F) != 0x7F).all())
    return values.dtype.kind != "f" or bool(np.isfinite(values).all())


def read_into(
    file: BinaryIO, tensor: Tensor, out: np.ndarray, *, progress: Callable[[int], Any] | None = None
) -> bool:
    """Reads one tensor into `out`, with at most 8 MiB besides; returns whether all values are finite.

    Args:
      file: the open file.
      tensor: what the format's `index_*` function found.
      out: the destination: contiguous, of the same shape, of any dtype.
      progress: is called with the number of bytes after each piece.

    Raises:
      CheckpointError: the file has become shorter since it was indexed.
    """
    if out.shape != tensor.shape or not out.flags.c_contiguous:
        raise ValueError(f"{out.shape=} must be contiguous and of shape {tensor.shape}.")
    flat = out.reshape(-1)  # a view, so the bytes land in `out`
    scratch = None
    if out.dtype != tensor.dtype:
        scratch = np.empty(min(flat.size, _PIECE_BYTES // tensor.dtype.itemsize), tensor.dtype)
    done, finite = 0, True
    for offset, size in tensor.pieces:
        file.seek(offset)
        last = done + size // tensor.dtype.itemsize
        while done < last:
            count = min(last - done, _PIECE_BYTES // tensor.dtype.itemsize)
            piece = flat[done : done + count]
            raw = piece if scratch is None else scratch[:count]
            num_bytes = raw.nbytes
            if file.readinto(raw.view(np.uint8)) != num_bytes:  # type: ignore[attr-defined]
                raise CheckpointError(
                    f"The file ended inside tensor '{path_name(tensor.path)}'; was it being written?"
                )
            if scratch is not None:
                _without_overflow_warning(raw, piece)
            finite = finite and _all_finite(piece)
            done += count
            if progress is not None:
                progress(num_bytes)
    return finite


def write_values(file: BinaryIO, values: np.ndarray, dtype: np.dtype) -> None:
    """Writes `values` in C order, converted to `dtype` at most 8 MiB at a time."""
    flat = values.reshape(-1)  # a copy only where the array is not contiguous
    step = _PIECE_BYTES // max(dtype.itemsize, values.dtype.itemsize)
    for start in range(0, flat.size, step):
        piece = np.ascontiguousarray(flat[start : start + step])
        if piece.dtype != dtype:
            converted = np.empty(piece.shape, dtype)
            _without_overflow_warning(piece, converted)
            piece = converted
        file.write(piece.view(np.uint8).data)


def as_array(leaf: Any, path: KeyPath) -> np.ndarray:
    """A leaf of a tree as a NumPy array of plain numbers; a Python number becomes int32 or float32, as in JAX."""
    if type(leaf) is float or (type(leaf) is int and -(2**31) <= leaf < 2**31):
        leaf = np.asarray(leaf, np.float32 if type(leaf) is float else np.int32)
    array = np.asarray(leaf)
    if _DTYPES.get(array.dtype.name) != array.dtype:
        raise CheckpointError(
            f"'{path_name(path)}' is {type(leaf).__name__} of dtype {array.dtype}, which no checkpoint "
            f"holds; known are {', '.join(_DTYPES)}."
        )
    return array


def stored_dtype(array: np.ndarray, float_dtype: np.dtype | None) -> np.dtype:
    """The dtype in which an array is written: `float_dtype`, if given, for floats; otherwise its own."""
    return float_dtype if float_dtype is not None and is_float(array.dtype) else array.dtype

"""What files of named tensors have in common, whatever their format.

Reading is two steps. An `index_*` function of a format walks over the headers alone and returns one
`Tensor` each, every declared size checked against the shape and against the bytes that the file
really has. Then `read_into` moves one tensor's bytes to where they belong, piece by piece,
converting on the way. So memory holds the result and a few megabytes, and a damaged file is refused
before anything is loaded. Data is little-endian, as are the machines this runs on.
"""

import contextlib
import fcntl
import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

KeyPath = tuple[str, ...]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)  # 3 bits of mantissa, up to 448, no infinity
_NAMES = "float16 float32 float64 int8 int16 int32 int64 uint8 uint16 uint32 uint64 bool"
_DTYPES = {name: np.dtype(name) for name in _NAMES.split()} | {
    "bfloat16": BFLOAT16,
    "float8_e4m3fn": FLOAT8,
}

_PIECE_BYTES = 8 * 2**20  # what reading and writing hold at once besides the tensors


class CheckpointError(ValueError):
    """A checkpoint that cannot be used as asked; the message says which file, which tensor, why."""


class Tensor(NamedTuple):
    """Where one tensor lies in a file."""

    path: KeyPath
    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: tuple[tuple[int, int], ...]  # (offset, bytes), in C order; one piece unless above 1 GiB

    @property
    def num_bytes(self) -> int:
        """What shape and dtype say the data takes."""
        return math.prod(self.shape) * self.dtype.itemsize


def is_float(dtype: np.dtype) -> bool:
    """Whether `dtype` is a floating type, those included that NumPy does not know as such."""
    return dtype.kind == "f" or dtype in (BFLOAT16, FLOAT8)


def dtype_of_name(name: str, where: str) -> np.dtype:
    """The dtype that a file names, of plain numbers only; `where` starts the message if not."""
    if name not in _DTYPES:
        raise CheckpointError(f"{where} has dtype {name[:40]!r}; known are {', '.join(_DTYPES)}.")
    return _DTYPES[name]


def show(path: KeyPath) -> str:
    """A key path for messages; what a file names is never printed raw or at any length."""
    name = "/".join(path)
    name = name if name.isprintable() else ascii(name)[1:-1]
    return name if len(name) <= 200 else f"{name[:197]}..."


# Nested dicts and flat ones


def flatten(tree: Mapping[str, Any], prefix: KeyPath = ()) -> dict[KeyPath, Any]:
    """`{'a': {'b': x}}` -> `{('a', 'b'): x}`, in the tree's order; empty branches vanish."""
    flat: dict[KeyPath, Any] = {}
    for key, value in tree.items():
        if not isinstance(key, str) or not key:
            raise CheckpointError(f"Key {key!r} under '{show(prefix)}' is not a name; use strings.")
        if isinstance(value, Mapping):
            flat |= flatten(value, (*prefix, key))
        elif value is not None:
            flat[(*prefix, key)] = value
    return flat


def unflatten(flat: Mapping[KeyPath, Any]) -> dict[str, Any]:
    """The inverse of `flatten`, in the order of `flat`."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        branch = tree
        for key in path[:-1]:
            branch = branch.setdefault(key, {})
        branch[path[-1]] = value
    return tree


def check_paths(paths: Iterable[KeyPath], file: Path) -> None:
    """Raises `CheckpointError` unless the paths are distinct and none lies under another one."""
    seen: set[KeyPath] = set()
    branches: set[KeyPath] = set()
    for path in paths:
        if not path or not all(path):
            raise CheckpointError(f"{file}: a tensor has an empty name ({list(path)}).")
        above = [path[:depth] for depth in range(1, len(path))]
        if path in seen:
            raise CheckpointError(f"{file}: tensor '{show(path)}' is in the file twice.")
        if path in branches or not seen.isdisjoint(above):
            raise CheckpointError(
                f"{file}: '{show(path)}' is both a tensor and a branch of tensors."
            )
        seen.add(path)
        branches.update(above)


# Moving data


def _without_overflow_warning(source: np.ndarray, out: np.ndarray) -> None:
    # A value too large for a narrower float becomes inf; the reader's own check reports it by name.
    with np.errstate(over="ignore", invalid="ignore"):
        np.copyto(out, source, casting="unsafe")


def _all_finite(values: np.ndarray) -> bool:
    if values.dtype == BFLOAT16:  # ml_dtypes' own test is slow; inf and NaN have a full exponent
        return bool(((values.view(np.uint16) & 0x7F80) != 0x7F80).all())
    if values.dtype == FLOAT8:
        return bool(((values.view(np.uint8) & 0x7F) != 0x7F).all())
    return values.dtype.kind != "f" or bool(np.isfinite(values).all())


def read_into(
    file: BinaryIO, tensor: Tensor, out: np.ndarray, *, progress: Callable[[int], Any] | None = None
) -> bool:
    """Reads one tensor into `out` (same shape, contiguous, any dtype); tells whether it is finite.

    Holds at most 8 MiB besides `out`. `progress` is called with the bytes read. Raises
    `CheckpointError` when the file has become shorter since it was indexed.
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
            wanted = raw.nbytes
            if file.readinto(raw.view(np.uint8)) != wanted:  # type: ignore[attr-defined]
                raise CheckpointError(
                    f"The file ended inside tensor '{show(tensor.path)}'; was it being written?"
                )
            if scratch is not None:
                _without_overflow_warning(raw, piece)
            finite = finite and _all_finite(piece)
            done += count
            if progress is not None:
                progress(wanted)
    return finite


def write_values(file: BinaryIO, values: np.ndarray, dtype: np.dtype) -> None:
    """Writes `values` as `dtype`, in C order, converting at most 8 MiB at a time."""
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
    """A tree's leaf as NumPy (Python numbers as JAX would: int32, float32); plain numbers only."""
    if type(leaf) is float or (type(leaf) is int and -(2**31) <= leaf < 2**31):
        leaf = np.asarray(leaf, np.float32 if type(leaf) is float else np.int32)
    array = np.asarray(leaf)
    if _DTYPES.get(array.dtype.name) != array.dtype:
        raise CheckpointError(
            f"'{show(path)}' is {type(leaf).__name__} of dtype {array.dtype}, which no checkpoint "
            f"holds; known are {', '.join(_DTYPES)}."
        )
    return array


def stored_dtype(array: np.ndarray, float_dtype: np.dtype | None) -> np.dtype:
    """The dtype to write an array in: floats in `float_dtype` if given, all else as it is."""
    return float_dtype if float_dtype is not None and is_float(array.dtype) else array.dtype


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Opens a file beside `path` for writing; it takes `path`'s place only when the body ends well.

    On any error the old file stays as it was and the new one is removed. Missing folders are made.
    """
    target = Path(os.path.realpath(path))  # a link stays a link
    if target.is_dir():
        raise CheckpointError(f"{path} is a folder; name a file in it.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with written_beside(target) as file:
        yield file


@contextlib.contextmanager
def replaced_together(folder: Path, names: Collection[str]) -> Iterator[Path]:
    """A folder to work in. When the body ends well its files `names` move to `folder`; it always goes.

    It lies on the same disk as `folder`, so that moving is renaming. Files of these names that the body did
    not make are an earlier run's, and are removed from `folder` then.
    """
    here = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
    work = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=here))
    try:
        yield work
        folder.mkdir(parents=True, exist_ok=True)
        take_places(work, folder, names)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def take_places(work: Path, folder: Path, names: Collection[str]) -> None:
    """Moves the files `names` from `work` to `folder`; those that are not in `work` are an earlier run's, and are removed."""
    for name in names:
        if (work / name).exists():
            os.replace(work / name, folder / name)
        else:
            (folder / name).unlink(missing_ok=True)


@contextlib.contextmanager
def written_beside(target: Path) -> Iterator[BinaryIO]:
    """Opens a file beside `target`, which takes its place, safe from a power cut, when the body ends well.

    Raises:
      OSError: the folder is missing, full or not writable; the old file stays, nothing is left behind.
    """
    beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(beside, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, target)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # else a power cut can undo the rename
        finally:
            os.close(folder)
    finally:
        beside.unlink(missing_ok=True)  # gone already when it was renamed


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Holds a lock that ends with the process, however that ends; gives whether it was to be had.

    Raises:
      OSError: the file cannot be made.
    """
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True

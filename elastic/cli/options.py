"""Records of options <-> flags: a flag for every option of a record, and a record from the values of its flags.

Type, default, choices, help text and check stand once, in the record's field (`elastic.io.options`).
"""

import contextlib
import dataclasses
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from elastic.cli.script import Flag, Values
from elastic.io.options import REQUIRED, as_typed, options_of

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class RecordFlags(Generic[_T]):
    """The flags of a record.

    Attributes:
      record: a dataclass; its fields that are made by `option` have a flag each.
      prefix: what a flag's name begins with, and a dot, where the option names no flag itself.
      zero_is_none: options that may be None, for which one types 0 then.
    """

    record: Callable[..., _T]
    prefix: str = ""
    zero_is_none: tuple[str, ...] = ()

    @property
    def names(self) -> dict[str, str]:
        """Option -> the name of its flag."""
        start = f"{self.prefix}." if self.prefix else ""
        return {name: about.flag or start + name for name, about in options_of(self.record).items()}

    def flag(self, name: str) -> Flag:
        """The flag of an option."""
        about = options_of(self.record)[name]
        kind = _kind(self._types[name])
        default: Any = self.record.__dataclass_fields__[name].default  # pyright: ignore[reportFunctionMemberAccess]
        required = default is REQUIRED
        if required or kind is tuple:
            default = as_typed(None if required else default)
        elif default is None and name in self.zero_is_none:
            default = kind(0)
        return Flag(
            name=self.names[name],
            default=default,
            help=about.help,
            kind=str if kind is tuple else kind,
            choices=about.choices,
            required=required,
            option="" if self.names[name] == name else name,
        )

    def flags(self, *names: str) -> tuple[Flag, ...]:
        """The flags of these options, or of all."""
        return tuple(self.flag(name) for name in names or self.names)

    def read(self, values: Values, **others: Any) -> _T:
        """The record that the values of the flags describe.

        Args:
          values: of all flags of the script.
          others: fields that are set otherwise.

        Raises:
          ValueError: a value is of no use; the message names the flag.
        """
        wanted = {name: flag for name, flag in self.names.items() if name not in others}
        options = {name: self._read(name, flag, values[flag]) for name, flag in wanted.items()}
        with naming_flags(self.names):
            return self.record(**options, **others)

    def _read(self, name: str, flag: str, value: Any) -> Any:
        kind = self._types[name]
        if _kind(kind) is tuple:
            return read_tuple(flag, value, kind)
        return None if name in self.zero_is_none and not value else value

    @property
    def _types(self) -> dict[str, Any]:
        return typing.get_type_hints(self.record)


@contextlib.contextmanager
def naming_flags(flag_of: Mapping[str, str]) -> Iterator[None]:
    """An error in here names the flags and not the options behind them."""
    try:
        yield
    except ValueError as error:
        raise ValueError(name_flags(str(error), flag_of)) from error


def name_flags(message: str, flag_of: Mapping[str, str]) -> str:
    """`message` with the flags of options instead of their names: keep=0 -> --checkpointer.keep=0."""
    if not flag_of:
        return message
    pattern = rf"(?<![\w.-])({'|'.join(flag_of)})="
    return re.sub(pattern, lambda found: f"--{flag_of[found[1]]}=", message)


def words(text: str) -> list[str]:
    """The parts of a list separated by commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def read_tuple(flag: str, text: str, kind: Any) -> tuple[Any, ...] | None:
    """'0.1,0.05', or as the released scripts have it '[0.1, 0.05]' or '(0.1, 0.05)' -> (0.1, 0.05).

    Args:
      flag: the name of the flag.
      text: what was typed.
      kind: `tuple[float, ...]`, `tuple[int, int]`, or such a type or None, which '' stands for.

    Raises:
      ValueError: a part is no number, or there are too many or too few.
    """
    members = _members(kind)
    (kind,) = (member for member in members if typing.get_origin(member) is tuple)
    items = [item for item in typing.get_args(kind) if item is not Ellipsis]
    parts = words(text.strip("[]() "))
    if not parts and type(None) in members:
        return None
    any_length = Ellipsis in typing.get_args(kind)
    try:
        if not any_length and len(parts) != len(items):
            raise ValueError(f"{len(parts)} parts")
        return tuple(items[0](part) for part in parts)
    except ValueError as error:
        kinds = "whole numbers" if items[0] is int else "numbers"
        example = "0.1,0.05" if items[0] is float else "256,512" if any_length else "10,15"
        wanted = kinds if any_length else f"{len(items)} {kinds}"
        raise ValueError(f"--{flag}={text} must be {wanted} such as {example}.") from error


def _members(kind: Any) -> tuple[Any, ...]:
    """The types of a union; of another type, the type alone."""
    union = typing.get_origin(kind) in (types.UnionType, typing.Union)
    return typing.get_args(kind) if union else (kind,)


def _kind(kind: Any) -> Any:
    """The type of a flag for an option: the first of its types that one can type."""
    members = [typing.get_origin(member) or member for member in _members(kind)]
    return next(member for member in members if member in (bool, int, float, str, tuple))

"""Options: dataclass fields that carry their help text, their check and the name of their flag.

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class SaveConfig:
        keep: int = option(2, "checkpoints kept, the newest", check=at_least(1), flag="checkpointer.keep")

        def __post_init__(self):
            check_options(self)

`elastic.cli` makes the flags, `--help` and the flag tables of the READMEs from these fields. Nothing heavy is imported here.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

_T = TypeVar("_T")
_KEY = "option"  # of a field's metadata

REQUIRED: Any = dataclasses.MISSING  # the default of an option that has none


class Check(NamedTuple):
    """A rule for the value of one option.

    Attributes:
      accepts: whether a value keeps the rule.
      rule: the rest of the sentence that begins with NAME=VALUE, such as "must be 1 or more".
    """

    accepts: Callable[[Any], bool]
    rule: str


class Option(NamedTuple):
    """What a field says of itself, besides its name, type and default."""

    help: str
    choices: tuple[str, ...]
    flag: str | None
    check: Check | None


def option(
    default: _T,
    help: str,
    *,
    choices: Sequence[str] = (),
    flag: str | None = None,
    check: Check | None = None,
) -> _T:
    """A dataclass field for an option.

    Args:
      default: its value where none is given; `REQUIRED` where one must be given.
      help: one sentence for `--help`, without a full stop.
      choices: the values it may have; () allows any.
      flag: the name of its flag, without dashes, where it is not the field's name.
      check: the rule that its value must keep.
    """
    about = Option(help, tuple(choices), flag, check)
    return dataclasses.field(default=default, metadata={_KEY: about})  # pyright: ignore[reportReturnType]


def options_of(record: Any) -> Mapping[str, Option]:
    """The options of a dataclass or of an instance: field name -> option, in their order."""
    return {
        field.name: field.metadata[_KEY]
        for field in dataclasses.fields(record)
        if _KEY in field.metadata
    }


def check_options(record: Any, *, open_choices: Collection[str] = ()) -> None:
    """Checks the values of all options of a dataclass instance; for its `__post_init__`. None is checked by no rule.

    Args:
      record: an instance of a dataclass.
      open_choices: options whose `choices` limit the flag alone: in Python they take other values too, such as functions.

    Raises:
      ValueError: a value is not among the choices of its option, or breaks its rule.
    """
    for name, about in options_of(record).items():
        value = getattr(record, name)
        if value is None:
            continue
        if about.choices and name not in open_choices and value not in about.choices:
            raise ValueError(f"{name}={value!r} must be one of {', '.join(about.choices)}.")
        if about.check is not None and not about.check.accepts(value):
            raise ValueError(f"{name}={as_typed(value)} {about.check.rule}.")


def as_typed(value: Any) -> str:
    """A value as one types it on the command line: (0.1, 0.05) -> '0.1,0.05', None -> ''."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "" if value is None else str(value)


# Rules. Each comparison is written so that nan breaks it.


def at_least(least: float) -> Check:
    """A number of `least` or more; inf is allowed."""
    return Check(lambda value: value >= least, f"must be {least} or more")


def at_least_below(least: float, bound: float) -> Check:
    """A number of `least` or more that is below `bound`."""
    return Check(
        lambda value: least <= value < bound, f"must be {least} or more, and below {bound}"
    )


def in_range(least: float, most: float, why: str = "") -> Check:
    """A number from `least` to `most`; `why` ends the message."""
    return Check(lambda value: least <= value <= most, f"must lie in {least} to {most}{why}")


def finite_at_least(least: float, largest: float = math.inf) -> Check:
    """A number of `least` or more that is finite, and no larger than `largest`."""
    return Check(
        lambda value: least <= value <= largest and value < math.inf,
        f"must be {least} or more, and finite",
    )


def finite_above(bound: float, largest: float = math.inf, example: str = "") -> Check:
    """A finite number above `bound`, and no larger than `largest`; `example` ends the message."""
    such = f", such as {example}" if example else ""
    return Check(
        lambda value: bound < value <= largest and value < math.inf,
        f"must be above {bound} and finite{such}",
    )

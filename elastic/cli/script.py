"""What a script is on the command line: its flags, by group, and what `--help` says of it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Flag:
    """One flag.

    Attributes:
      name: without the dashes.
      default: its value when it is not given; the type is the default's, or `kind`.
      help: one sentence for `--help`.
      kind: the type, where the default is None.
      choices: the values it may have; () for any.
      required: whether it must be given.
      option: the option of the package that it sets, where that has another name; errors name the flag instead.
      unbuilt: for a flag of the released scripts that is not served yet: the sentence that refuses
        any value but the default.
      idle: for a flag that is understood and changes nothing: why.
    """

    name: str
    default: str | int | float | bool | None
    help: str
    kind: type | None = None
    choices: tuple[str, ...] = ()
    required: bool = False
    option: str = ""
    unbuilt: str = ""
    idle: str = ""

    @property
    def type(self) -> type:
        """The type of the value."""
        return self.kind or type(self.default)


@dataclasses.dataclass(frozen=True)
class Script:
    """A script: what `--help` says, and its flags by group.

    Attributes:
      name: the file of the script, or a command such as 'elastictok info'.
      usage: what follows the name.
      description: what it does.
      groups: title -> flags.
      positional: the flag that a word without dashes gives, where the flag itself is not given; '' for none.
    """

    name: str
    usage: str
    description: str
    groups: Mapping[str, Sequence[Flag]]
    positional: str = ""

    @property
    def command(self) -> str:
        """What one types to run it."""
        return f"python3 {self.name}" if self.name.endswith(".py") else self.name

    @property
    def flags(self) -> list[Flag]:
        """All flags, in the order of `--help`."""
        return [flag for group in self.groups.values() for flag in group]

    @property
    def flag_of_option(self) -> dict[str, str]:
        """Option -> its flag, for options of another name that belong to one flag alone."""
        flags = self.flags
        known = {flag.name for flag in flags}
        options = [flag.option for flag in flags if flag.option and flag.option not in known]
        return {
            flag.option: flag.name
            for flag in flags
            if flag.option in options and options.count(flag.option) == 1
        }


class Values:
    """The values of all flags of a script; `values["output_folder"]`."""

    def __init__(self, values: dict[str, Any], given: frozenset[str]):
        self._values, self._given = values, given

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def given(self, name: str) -> bool:
        """Whether the flag stood on the command line."""
        return name in self._given

    def under(self, prefix: str) -> dict[str, Any]:
        """The flags `prefix.*` by the last part of their name."""
        prefix += "."
        return {
            name.removeprefix(prefix): value
            for name, value in self._values.items()
            if name.startswith(prefix) and "." not in name.removeprefix(prefix)
        }

"""The flag tables of scripts/README.md, made from the flags; `scripts/tools/write_flag_tables.py` writes them."""

import re
from collections.abc import Mapping

from elastic.cli.flags import DATASET, DECODE, EVALUATE, INFERENCE
from elastic.cli.flags_train import TRAIN
from elastic.cli.script import Flag, Script

SCRIPTS: Mapping[str, Script] = {
    "inference": INFERENCE,
    "decode": DECODE,
    "dataset": DATASET,
    "evaluate": EVALUATE,
    "train": TRAIN,
}
_TABLE = re.compile(r"(<!-- flags: (\w+) -->\n).*?(<!-- end flags -->)", re.DOTALL)


def flag_table(script: Script) -> str:
    """A Markdown table of all flags of a script, by group."""
    lines = ["| Flag | Default | Meaning |", "|---|---|---|"]
    for title, group in script.groups.items():
        lines.append(f"| **{title}** | | |")
        lines += [_row(flag) for flag in group]
    return "\n".join(lines) + "\n"


def names_table() -> str:
    """A Markdown table of flags whose option has another name in Python, such as `--n_codes`."""
    names = {
        flag.name: flag.option
        for script in SCRIPTS.values()
        for flag in script.flags
        if flag.option
    }
    lines = ["| Flag | Option in Python |", "|---|---|"]
    lines += [f"| `--{flag}` | `{option}` |" for flag, option in names.items() if "." not in flag]
    return "\n".join(lines) + "\n"


def update_tables(text: str) -> str:
    """`text` with a new table between each pair of marks `<!-- flags: NAME -->` and `<!-- end flags -->`.

    NAME is a script, or `names` for the table of flags and options.

    Raises:
      ValueError: a mark names no script.
    """

    def table(found: re.Match[str]) -> str:
        if found[2] == "names":
            return f"{found[1]}\n{names_table()}\n{found[3]}"
        if found[2] not in SCRIPTS:
            raise ValueError(f"flags: {found[2]} names no script; use one of {', '.join(SCRIPTS)}.")
        return f"{found[1]}\n{flag_table(SCRIPTS[found[2]])}\n{found[3]}"

    return _TABLE.sub(table, text)


def _row(flag: Flag) -> str:
    default = "required" if flag.required else _code(flag.default)
    choices = ", ".join(f"`{choice}`" for choice in flag.choices)
    meaning = flag.help + (f" ({choices})" if choices else "")
    if flag.unbuilt:
        meaning += f"; only the default is allowed: {flag.unbuilt.removesuffix('.')}"
    escaped = meaning.replace("|", "\\|").replace("<", "&lt;")
    return f"| `--{flag.name}` | {default} | {escaped} |"


def _code(default: object) -> str:
    return "" if default in (None, "") else f"`{default}`"

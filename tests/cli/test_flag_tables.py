"""The flag tables of scripts/README.md say what the flags are."""

import pathlib
import re

import pytest

from elastic.cli.flag_tables import SCRIPTS, flag_table, update_tables

README = pathlib.Path(__file__).resolve().parents[2] / "scripts" / "README.md"


def test_the_tables_of_the_readme_are_current():
    text = README.read_text(encoding="utf-8")
    assert set(re.findall(r"<!-- flags: (\w+) -->", text)) == {*SCRIPTS, "names"}
    assert update_tables(text) == text, "run python3 scripts/tools/write_flag_tables.py"


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_table_has_a_row_for_every_flag(name):
    rows = flag_table(SCRIPTS[name]).splitlines()
    for flag in SCRIPTS[name].flags:
        assert sum(row.startswith(f"| `--{flag.name}` |") for row in rows) == 1
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 4 for row in rows)


def test_a_mark_that_names_no_script_is_refused():
    with pytest.raises(ValueError, match="flags: other names no script"):
        update_tables("<!-- flags: other -->\n<!-- end flags -->")

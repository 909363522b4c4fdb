"""The program `elastictok`: its commands are the scripts, and what is no command is refused."""

import importlib
import pathlib
import re

import pytest

from elastic.cli import main as program
from elastic.cli.flag_tables import SCRIPTS

ROOT = pathlib.Path(__file__).resolve().parents[2]


def script_of(name):
    module, _, attribute = program.COMMANDS[name].flags.partition(":")
    return getattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize("name", program.COMMANDS)
def test_a_command_has_the_flags_of_its_script_under_its_own_name(name, capsys):
    assert program.main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: elastictok {name} ") and "python3" not in shown.split("\n")[0]
    listed = re.findall(r"^  --([\w.]+)=", shown, re.MULTILINE)
    assert listed == [flag.name for flag in script_of(name).flags]


@pytest.mark.parametrize("name", program.COMMANDS)
def test_a_command_calls_the_function_of_its_script(name):
    module, _, attribute = program.COMMANDS[name].body.partition(":")
    assert callable(getattr(importlib.import_module(module), attribute))


def test_every_script_with_a_table_of_flags_is_a_command():
    assert {script_of(name).name for name in program.COMMANDS} >= {s.name for s in SCRIPTS.values()}


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_every_command(arguments, capsys):
    assert program.main(arguments) == 0
    shown = capsys.readouterr().out
    assert re.findall(r"^  ([a-z-]+)  ", shown, re.MULTILINE) == list(program.COMMANDS)


def test_the_version_is_the_package_s(capsys):
    assert program.main(["--version"]) == 0
    text = (ROOT / "elastic" / "__init__.py").read_text(encoding="utf-8")
    (version,) = re.findall(r'^__version__ = "(.*)"', text, re.MULTILINE)
    assert capsys.readouterr().out == f"elastictok {version}\n"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("tokenise", "there is no command 'tokenise'. Did you mean 'tokenize'? Commands are tokenize, decode,"),
        ("xyz", "there is no command 'xyz'. Commands are"),
        ("--threshold=1", "--threshold=1 stands before the command; write elastictok COMMAND --threshold=1"),
    ],
)  # fmt: skip
def test_what_is_no_command_is_refused_in_one_line(word, message, capsys):
    assert program.main([word]) == 1
    out, err = capsys.readouterr()
    assert not out and err.startswith(f"elastictok: error: {message}") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("typed", "name"), [("tokenize_dataset", "tokenize-dataset"), ("inference", "tokenize")]
)
def test_a_script_s_name_is_understood(typed, name, capsys):
    assert program.main([typed, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: elastictok {name} ")


def test_an_error_is_one_line_that_names_the_command(capsys):
    assert program.main(["decode", "--output_path=a.mp4"]) == 1
    assert capsys.readouterr().err.startswith("elastictok decode: error: Give --input_path: ")

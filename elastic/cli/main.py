"""The command `elastictok`: one program with a command for each script.

A command has the flags and the function of its script. Its module is imported when the command is
called, so that `elastictok --help` loads none of them.
"""

import dataclasses
import importlib
import sys
from collections.abc import Sequence

import elastic
from elastic.cli import app
from elastic.io.names import did_you_mean

PROGRAM = "elastictok"


@dataclasses.dataclass(frozen=True)
class Command:
    """A command of the program.

    Attributes:
      help: one line.
      flags: module and name of its `Script`.
      body: module and name of its function.
    """

    help: str
    flags: str
    body: str


_FLAGS, _COMMANDS = "elastic.cli.flags", "elastic.cli.commands"
COMMANDS = {
    "tokenize": Command(
        "an image, a video or a folder of them -> tokens, report and pictures",
        f"{_FLAGS}:INFERENCE",
        f"{_COMMANDS}.tokenize:tokenize",
    ),
    "decode": Command(
        "a token file -> video or picture", f"{_FLAGS}:DECODE", f"{_COMMANDS}.decode:decode"
    ),
    "train": Command(
        "trains a tokenizer on a folder of images and videos",
        "elastic.cli.flags_train:TRAIN",
        f"{_COMMANDS}.train:train",
    ),
    "evaluate": Command(
        "measures models on clips, side by side",
        f"{_FLAGS}:EVALUATE",
        f"{_COMMANDS}.evaluate:evaluate",
    ),
    "tokenize-dataset": Command(
        "a folder of images and videos -> shards of tokens",
        f"{_FLAGS}:DATASET",
        f"{_COMMANDS}.tokenize_dataset:tokenize",
    ),
    "check-compile": Command(
        "says whether a run fits on hardware that is not there",
        f"{_COMMANDS}.check_compile:CHECK",
        f"{_COMMANDS}.check_compile:check_compile",
    ),
    "fit-order": Command(
        "fits the order of a block's tokens to a model",
        f"{_COMMANDS}.fit_order:FIT_ORDER",
        f"{_COMMANDS}.fit_order:fit_order",
    ),
    "fit-curves": Command(
        "fits the first guess of the search to a model",
        f"{_COMMANDS}.fit_curves:FIT_CURVES",
        f"{_COMMANDS}.fit_curves:fit_curves",
    ),
    "params-only": Command(
        "takes the parameters out of a training state",
        f"{_COMMANDS}.params_only:CONVERT",
        f"{_COMMANDS}.params_only:convert",
    ),
    "demo": Command(
        "a page for the browser: upload a clip, move a slider, compare",
        f"{_COMMANDS}.demo:DEMO",
        f"{_COMMANDS}.demo:demo",
    ),
    "info": Command(
        "says what a file, a folder or a repository is",
        f"{_COMMANDS}.info:INFO",
        f"{_COMMANDS}.info:info",
    ),
}
_OLD_NAMES = {  # what the scripts are called
    "inference": "tokenize",
    "trainstate_to_params_only": "params-only",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and gives the exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    first, *rest = arguments or ["--help"]
    if first in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if first in ("-V", "--version", "version"):
        print(f"{PROGRAM} {elastic.__version__}")
        return 0
    name = _OLD_NAMES.get(first, first).replace("_", "-")
    if name not in COMMANDS:
        print(f"{PROGRAM}: error: {_unknown(first)}", file=sys.stderr)
        return 1
    command = COMMANDS[name]
    script = dataclasses.replace(_load(command.flags), name=f"{PROGRAM} {name}")
    return app.run(script, _Body(command.body), rest)


def help_text() -> str:
    """What `elastictok --help` prints: the commands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {PROGRAM} COMMAND [--flag=value ...]",
            "",
            "Images and video as few tokens as their content needs. Paths are relative to where one stands.",
            "",
            "commands:",
            *lines,
            "",
            f"{PROGRAM} COMMAND --help lists the flags of a command; {PROGRAM} --version says the version.",
            "",
            "for example:",
            f"  {PROGRAM} tokenize --input_path=clip.mp4 --output_folder=out --load_checkpoint=small-fsq --psnr=25",
        ]
    )


class _Body:
    """The function of a command, imported when it is called."""

    def __init__(self, place: str):
        self._place = place

    def __call__(self, values: app.Values) -> int | None:
        return _load(self._place)(values)


def _load(place: str):
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def _unknown(word: str) -> str:
    if word.startswith("-"):
        return f"{word} stands before the command; write {PROGRAM} COMMAND {word}, with COMMAND one of {', '.join(COMMANDS)}."
    return (
        f"there is no command {word!r}.{did_you_mean(word, COMMANDS)} Commands are {', '.join(COMMANDS)}; "
        f"{PROGRAM} --help says what they do."
    )

"""What actors of Ray load in tests: a small tokenizer, with clips that end the process that tokenizes them."""

import os
import pathlib
import signal

from small_models import load_tokenizer

CRASHES, CRASHES_ONCE = "crashes.png", "crashes_once.png"


def load_small(golden: pathlib.Path, marks: pathlib.Path):
    """The small FSQ tokenizer. A clip named like one of the names above ends the process, always or once.

    Args:
      golden: the folder of golden files.
      marks: a folder for notes of what has happened.
    """
    tokenizer = load_tokenizer(golden, "fsq", model_id="m")
    open_session = tokenizer.open_session

    def open_or_crash(source, options, **more):
        name = pathlib.Path(source).name if isinstance(source, str | os.PathLike) else ""
        if name == CRASHES:
            with open(marks / "crashes", "a") as file:
                file.write("x")
            os.kill(os.getpid(), signal.SIGSEGV)
        if name == CRASHES_ONCE and not (marks / "once").exists():
            (marks / "once").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return open_session(source, options, **more)

    tokenizer.open_session = open_or_crash
    return tokenizer

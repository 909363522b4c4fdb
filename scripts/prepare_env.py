"""Finds or makes an environment that has what the project needs, and prints its interpreter.

    python3 -P scripts/prepare_env.py run     # what running needs
    python3 -P scripts/prepare_env.py test    # and the tests, lint and types

The interpreter that runs this script is taken as it is when it has everything; else `.venv` in the
project's folder is, made or completed by pip first where need be. Nothing is ever installed
anywhere else. The wrappers call this through scripts/setup_env.sh. Standard library only, because
it runs before anything is installed; standard output carries nothing but the path, or this help.
"""

import argparse
import contextlib
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import operator
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
REQUIREMENTS = {"run": "requirements.txt", "test": "requirements-ci.txt"}
_SIZES = {"run": "1.6 GB", "test": "2.5 GB"}  # as `du -sh .venv` shows it

_OURS = VENV / ".elastic-made"  # this script made the folder, so it may remove it again
_UNFINISHED = VENV / ".elastic-unfinished"  # pip is at work, or was stopped at it
_LACKING, _CANNOT_MAKE = 10, 11  # exit statuses; 11 tells setup_env.sh to try the next Python


def say(message: str) -> None:
    """Prints one line for the person who waits."""
    print(f"elastic: {message}", file=sys.stderr, flush=True)


def _release(version: str) -> tuple[int, ...]:
    numbers = re.match(r"\d+(?:\.\d+)*", version)
    parts = [int(part) for part in numbers[0].split(".")] if numbers else [0]
    while len(parts) > 1 and parts[-1] == 0:  # 5.0 is 5
        parts.pop()
    return tuple(parts)


_SIGNS = {">=": operator.ge, "<=": operator.le, "<": operator.lt, "==": operator.eq}


def is_met(requirement: str) -> bool:
    """Whether this interpreter has what `name[extra]>=1.2,<3` asks for (`>=`, `<=`, `<`, `==` only)."""
    parts = re.fullmatch(r"([\w.-]+)(?:\[[^\]]*\])?\s*((?:(?:>=|<=|<|==)[\d.]+,?)*)", requirement)
    if parts is None:
        raise ValueError(f"{requirement!r} is not 'name>=version,<version'.")
    try:
        found = _release(importlib.metadata.version(parts[1]))
    except importlib.metadata.PackageNotFoundError:
        return False
    bounds = re.findall(r"(>=|<=|<|==)([\d.]+)", parts[2])
    return all(_SIGNS[sign](found, _release(bound)) for sign, bound in bounds)


def _needs_of_jax() -> list[str]:
    """What the installed jax needs itself, its jaxlib above all: with another one it does not even load."""
    try:
        needs = importlib.metadata.requires("jax") or []
    except importlib.metadata.PackageNotFoundError:
        return []  # its own line says so
    plain = [need.replace(" ", "") for need in needs if ";" not in need]
    return [need for need in plain if re.fullmatch(r"[\w.-]+(?:(?:>=|<=|<|==)[\d.]+,?)*", need)]


def lacking(purpose: str) -> list[str]:
    """The requirements of `purpose` ("run", "test") that this interpreter does not meet."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = list(project["dependencies"])
    if purpose == "test":
        wanted += project["optional-dependencies"]["dev"]
    if any(re.match(r"jax\b", requirement) for requirement in wanted):
        wanted += _needs_of_jax()
    return [requirement for requirement in wanted if not is_met(requirement)]


def _with_found_version(requirement: str) -> str:
    """The requirement's name, or, where another version of it is installed, its range and that version."""
    name = re.split(r"[\[><=]", requirement)[0]
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return name
    return f"{requirement} (it has {found})"


def _pins(purpose: str) -> str:
    files = {"requirements.txt", REQUIREMENTS[purpose]}
    return hashlib.sha256(
        b"".join((ROOT / name).read_bytes() for name in sorted(files))
    ).hexdigest()


def _stamp(purpose: str) -> pathlib.Path:
    return VENV / f".elastic-{purpose}"  # holds the hash of the pins that were installed in full


def _venv_state(purpose: str) -> str:
    """ "absent", "broken" (make it anew), "incomplete" (install on top) or "ready"."""
    if not os.path.lexists(VENV):
        return "absent"
    if _UNFINISHED.exists() or not os.access(VENV_PYTHON, os.X_OK):
        return "broken"
    probe = [VENV_PYTHON, "-P", __file__, purpose, "--probe"]
    with contextlib.suppress(OSError):  # an interpreter that does not start at all: broken
        status = subprocess.run(probe, env=_environment(), capture_output=True).returncode
        if status in (0, _LACKING):
            stamps = [_stamp(name) for name in REQUIREMENTS if _stamp(name).exists()]
            # A folder that somebody made by hand bears no stamp: there the probe alone decides.
            current = not stamps or (
                _stamp(purpose) in stamps and _stamp(purpose).read_text() == _pins(purpose)
            )
            return "ready" if status == 0 and current else "incomplete"
    return "broken"


def _environment() -> dict[str, str]:
    # Settings that would lead pip, or the new interpreter, out of .venv and into the user's own.
    astray = {"PYTHONHOME", "PYTHONPATH", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_PYTHON"}
    kept = {name: value for name, value in os.environ.items() if name not in astray}
    return kept | {"PIP_USER": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


@contextlib.contextmanager
def _lock() -> Iterator[int]:
    with (ROOT / ".venv.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another run is preparing .venv; waiting for it.")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def _run(command: list[str | os.PathLike[str]], lock: int) -> bool:
    # The child holds the lock too: should this script be killed, nobody touches .venv before pip
    # has ended as well. Its output goes to the standard error: the standard output is our answer.
    done = subprocess.run(command, env=_environment(), stdout=sys.stderr, pass_fds=(lock,))
    return done.returncode == 0


def _clear_venv() -> None:
    """Removes .venv if this script made it; moves anybody else's out of the way."""
    if _OURS.exists() and not VENV.is_symlink():
        shutil.rmtree(VENV)
        return
    number = 1
    while os.path.lexists(aside := ROOT / f".venv.old{number}"):
        number += 1
    VENV.rename(aside)
    say(f"the .venv found here does not work; it is kept as {aside.name}.")


def _make(purpose: str, missing: list[str], lock: int) -> int:
    """Makes or completes .venv; returns an exit status."""
    state = _venv_state(purpose)
    if state == "ready":  # made by the run that we waited for
        return 0
    names = ", ".join(_with_found_version(requirement) for requirement in missing[:3])
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    here = f"{sys.executable} lacks {names}{more}"
    if state == "incomplete":
        say(f"{here}; adding to .venv what {REQUIREMENTS[purpose]} lists (once).")
    else:
        unable = [name for name in ("venv", "ensurepip") if importlib.util.find_spec(name) is None]
        if unable:
            say(f"{here}, and cannot make an environment: it has no module {unable[0]!r}.")
            return _CANNOT_MAKE
        say(
            f"{here}; making .venv from {REQUIREMENTS[purpose]} ({_SIZES[purpose]}, once, a few minutes)."
        )
        if state == "broken":
            _clear_venv()
        VENV.mkdir()
        _OURS.touch()
    _UNFINISHED.touch()
    if state != "incomplete":
        base = getattr(sys, "_base_executable", sys.executable)  # not an environment that may go
        if not _run([base, "-m", "venv", VENV], lock):
            say(f"{base} -m venv failed; its message is above.")
            return _CANNOT_MAKE
    install = ["-m", "pip", "install", "-qq", "--progress-bar=off"]
    if not _run([VENV_PYTHON, *install, "-r", ROOT / REQUIREMENTS[purpose]], lock):
        say(
            f"pip could not install {REQUIREMENTS[purpose]} into .venv; its message is above."
            " Check the network and the free space, then run the command again."
        )
        if state == "incomplete":
            _UNFINISHED.unlink()  # pip failed and undid its changes: the environment is as before
        return 1
    for name in (
        REQUIREMENTS if purpose == "test" else ("run",)
    ):  # the tests' pins include the run's
        _stamp(name).write_text(_pins(name))
    _UNFINISHED.unlink()
    say(".venv is ready.")
    return 0


def main(arguments: list[str]) -> int:
    """Prints the interpreter to use, or says on the standard error why there is none."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("purpose", choices=REQUIREMENTS, help="what the interpreter must have")
    parser.add_argument(
        "--probe",
        action="store_true",
        help="only tell whether this interpreter has everything: exit code 0, or "
        f"{_LACKING} if something is missing",
    )
    options = parser.parse_args(arguments)
    purpose = options.purpose
    missing = lacking(purpose)
    if options.probe:
        return _LACKING if missing else 0
    python = VENV_PYTHON
    if not missing:
        python = pathlib.Path(sys.executable)
    elif _venv_state(purpose) != "ready":
        try:
            with _lock() as lock:
                status = _make(purpose, missing, lock)
        except OSError as error:
            say(f"cannot prepare .venv: {error}")
            return 1
        except KeyboardInterrupt:
            say("interrupted; the next run starts .venv over.")
            return 130
        if status:
            return status
    print(python)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

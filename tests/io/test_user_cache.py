"""Compiled programs are kept on disk: the second start takes them from there, and what a kill left is cleared away."""

import errno
import os
import pathlib
import subprocess
import sys

import pytest

from elastic.io import user_cache

ROOT = pathlib.Path(__file__).resolve().parents[2]
START = """
from elastic.io.user_cache import keep_programs
keep_programs()
import jax
from jax._src import monitoring
seen = []
monitoring.register_event_listener(lambda event, **_: seen.append(event.rsplit("/", 1)[-1]))
jax.jit(lambda x: x * 2 + 1)(1.0)
print("cache_hits" in seen, jax.config.jax_compilation_cache_dir)
"""


def start(home, **environment):
    """Whether a new process took its program from disk, and from where."""
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XDG_CACHE_HOME": str(home),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    } | environment
    command = [sys.executable, "-c", START]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    hit, folder = done.stdout.split()
    return hit == "True", folder


def test_the_second_start_compiles_nothing_and_half_a_program_is_removed(tmp_path):
    hit, folder = start(tmp_path)
    assert not hit and pathlib.Path(folder).parent == tmp_path / "elastic" / "programs"
    assert start(tmp_path) == (True, folder)
    for program in pathlib.Path(folder).glob("*-cache"):
        os.truncate(program, 10)
        program.with_name(program.name.removesuffix("-cache") + "-atime").unlink()
    assert start(tmp_path) == (False, folder)
    assert start(tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own"))[1] == str(
        tmp_path / "own"
    )


def test_a_home_that_cannot_be_written_to_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.delitem(sys.modules, "jax")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    user_cache.keep_programs()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ


def test_without_locks_no_program_is_kept_and_one_line_says_so(tmp_path, monkeypatch, caplog):
    """jax locks its folder for every program, and complains each time where it cannot."""
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.delitem(sys.modules, "jax")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    user_cache.keep_programs()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ
    (line,) = caplog.messages
    assert str(tmp_path) in line and "JAX_COMPILATION_CACHE_DIR=FOLDER" in line
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []

"""Files appear whole or not at all; a lock keeps other processes out for as long as its process lives."""

import errno
import fcntl
import os
import subprocess
import sys

import pytest

from elastic.io.atomic import atomic_open, atomic_write, locked
from elastic.io.tree import CheckpointError

HOLD = """
import pathlib, sys, time
from elastic.io.atomic import locked
with locked(pathlib.Path(sys.argv[1])) as held:
    print(held, flush=True)
    time.sleep(600)
"""


def test_a_lock_ends_when_its_process_is_killed(tmp_path):
    lock = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-c", HOLD, lock], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"True\n"
        with locked(lock) as held:
            assert not held
        process.kill()
    with locked(lock, wait=True) as held, locked(lock) as twice:
        assert held and not twice  # nor can a process lock a file twice
    with locked(lock) as held:
        assert held
    assert lock.exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_stands_for_a_lock_where_the_file_system_has_none(
    tmp_path, monkeypatch, caplog, number
):
    """As NFS and Lustre answer where they are mounted without locks."""

    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    lock, file = tmp_path / "lock", tmp_path / "lock.held"
    with locked(lock) as held, locked(lock) as twice:
        assert held and not twice and file.exists()
    assert f"{file} stands for a lock" in caplog.text and "remove that file" in caplog.text
    assert not file.exists()
    with locked(lock, wait=True) as held:  # a file of an earlier lock is none
        assert held
    before = (
        "import errno, fcntl, os\n"
        + "def flock(*_): raise OSError(errno.ENOLCK, '')\nfcntl.flock = flock\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", before + HOLD, lock], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"True\n"
        with locked(lock) as held:
            assert not held
        process.kill()
    assert file.exists()  # the killed process left it
    with locked(lock) as held:
        assert held


def test_a_lock_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError), locked(tmp_path / "file" / "lock"):
        raise AssertionError("locked nothing")


def test_a_file_is_replaced_when_all_is_written_and_a_link_stays_one(tmp_path):
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_bytes(b"old")
    link.symlink_to(file)
    with pytest.raises(KeyError), atomic_open(link) as opened:
        opened.write(b"half")
        raise KeyError
    assert file.read_bytes() == b"old"
    with atomic_open(link) as opened:
        opened.write(b"new")
        assert file.read_bytes() == b"old"
    assert link.is_symlink() and file.read_bytes() == b"new"
    assert sorted(tmp_path.iterdir()) == [file, link]


def test_missing_folders_are_made_or_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        atomic_write(tmp_path / "missing" / "file", b"x")
    with atomic_open(tmp_path / "missing" / "file") as opened:
        opened.write(b"x")
    assert (tmp_path / "missing" / "file").read_bytes() == b"x"
    with pytest.raises(CheckpointError, match="is a folder; name a file in it"):
        atomic_write(tmp_path, b"x")

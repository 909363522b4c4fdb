"""The user's cache folder, and the programs compiled by XLA that are kept there.

A process that finds its programs there starts sooner and takes less memory. Only environment
variables are set, before jax is imported, so that a script can ask for this before it knows whether
it needs jax.
"""

import hashlib
import logging
import os
import pathlib
import platform
import sys

log = logging.getLogger(__name__)

_MAX_BYTES = 1_000_000_000  # of all programs; jax then removes those unused for longest
_MIN_SECONDS = 0.2  # programs that compile faster are not kept


def cache_folder() -> pathlib.Path | None:
    """`elastic` in the user's cache folder ($XDG_CACHE_HOME or ~/.cache on Linux), which may not exist yet.

    None where the user has no home, or where $XDG_CACHE_HOME is relative, which its standard forbids.
    """
    import platformdirs

    if not os.path.isabs(os.environ.get("XDG_CACHE_HOME") or "/"):
        return None
    try:
        folder = platformdirs.user_cache_path("elastic", appauthor=False)
    except RuntimeError:  # there is no home
        return None
    return folder if folder.is_absolute() else None


def keep_programs() -> None:
    """Has jax keep compiled programs in the folder `programs` of the user's cache.

    The user's own settings stay: JAX_COMPILATION_CACHE_DIR names another folder, and
    JAX_ENABLE_COMPILATION_CACHE=false keeps none. Does nothing where jax is imported already.
    Where the file system has no locks, which jax needs for each program, none is kept, and the log says so.
    """
    if "jax" in sys.modules or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    cache = cache_folder()
    if cache is None:
        return
    from elastic.io.atomic import has_locks  # loads numpy, which --help does without

    folder = cache / "programs" / _processor()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        locks = has_locks(folder)
    except OSError:
        return  # without a writable home everything is compiled anew in each process
    if not locks:
        log.warning(
            "Compiled programs are not kept: the file system of %s has no locks. JAX_COMPILATION_CACHE_DIR=FOLDER keeps them elsewhere.",
            folder,
        )
        return
    _remove_truncated(folder)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    # Set in any case: without a limit jax writes no `-atime` files, which `_remove_truncated` needs.
    os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(_MAX_BYTES)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", str(_MIN_SECONDS))


def _remove_truncated(folder: pathlib.Path) -> None:
    """Removes truncated programs.

    jax does not write a program atomically: a killed process can leave one without its `-atime`
    file. A program that another process is just writing is removed too, and is compiled once more.
    """
    for program in folder.glob("*-cache"):
        used = program.with_name(program.name.removesuffix("-cache") + "-atime")
        if not used.exists():
            program.unlink(missing_ok=True)


def _processor() -> str:
    """Names the kind of processor: machines may share a home, and XLA compiles for one instruction set."""
    described = [platform.machine(), platform.processor()]
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for name in ("model name", "flags", "Features"):
        described += [line for line in lines if line.startswith(name)][:1]
    return hashlib.sha256("\n".join(described).encode()).hexdigest()[:12]

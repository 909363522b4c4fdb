"""Programs that XLA has compiled, kept on disk by jax: a run that goes on starts at once, and takes less memory.

Only environment variables are set, before jax is imported, so that scripts may ask for it before they know whether they need jax.
"""

import hashlib
import os
import pathlib
import platform
import sys
from pathlib import Path

_MOST_BYTES = 1_000_000_000  # then those go that were not used for longest
_LEAST_SECONDS = 0.2  # what compiles faster is not kept


def keep_programs() -> None:
    """Has jax keep programs in `elastic/programs` of $XDG_CACHE_HOME or ~/.cache.

    What is set already is left as it is: JAX_COMPILATION_CACHE_DIR names another folder, JAX_ENABLE_COMPILATION_CACHE=false keeps none.
    """
    if "jax" in sys.modules or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    place = cache_folder()
    if place is None:
        return
    folder = place / "programs" / _processor()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # a home that cannot be written to: compiled anew each time, as without this
    if os.access(folder, os.W_OK):
        _remove_halves(folder)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
        # Not the user's, if there is one: without a limit jax does not note what was used, which `_remove_halves` goes by.
        os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(_MOST_BYTES)
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", str(_LEAST_SECONDS))


def _remove_halves(folder: pathlib.Path) -> None:
    """Removes what a kill left: jax writes a program in place, then beside it when it was used, and takes what is there for whole.

    One that another process is just writing goes too, and is compiled once more.
    """
    for program in folder.glob("*-cache"):
        used = program.with_name(program.name.removesuffix("-cache") + "-atime")
        if not used.exists():
            program.unlink(missing_ok=True)


def _processor() -> str:
    """A name for processors of this kind: machines may share a home, and XLA:CPU compiles for the instructions of one."""
    described = [platform.machine(), platform.processor()]
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for name in ("model name", "flags", "Features"):
        described += [line for line in lines if line.startswith(name)][:1]
    return hashlib.sha256("\n".join(described).encode()).hexdigest()[:12]


def cache_folder() -> Path | None:
    """`elastic` in $XDG_CACHE_HOME or ~/.cache, which need not be there yet; None where a user has no such place."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    # Without a home directory '~' stays as it is; a relative folder is no cache (XDG's own rule).
    return Path(root, "elastic") if os.path.isabs(root) else None

"""Where this package keeps what it can make again."""

import os
from pathlib import Path


def cache_folder() -> Path | None:
    """`elastic` in $XDG_CACHE_HOME or ~/.cache, which need not be there yet; None where a user has no such place."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    # Without a home directory '~' stays as it is; a relative folder is no cache (XDG's own rule).
    return Path(root, "elastic") if os.path.isabs(root) else None

"""Where media files lie: local paths and URLs."""

import os
import pathlib
import re
from typing import BinaryIO, cast

Place = pathlib.Path | str  # a string is a URL
_URL = re.compile(r"[a-zA-Z][\w+.-]*://")


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether `path` names something that fsspec opens, such as 'gs://bucket/clip.mp4'."""
    return isinstance(path, str) and _URL.match(path) is not None


def open_file(path: Place) -> BinaryIO:
    """Opens the bytes of a file for reading: a local path directly, a URL through fsspec."""
    if isinstance(path, pathlib.Path):
        return open(path, "rb")
    import fsspec  # takes a while to load, and only URLs need it

    file = cast(fsspec.core.OpenFile, fsspec.open(path, "rb"))
    return cast(BinaryIO, file.open())

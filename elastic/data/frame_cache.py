"""Decoded frames kept as files: a span is decoded once, by whichever process needs it first.

The files are plain .npy arrays, mapped into memory and not read: processes of a machine share one copy.
"""

import hashlib
import os
import pathlib

import numpy as np
from jaxtyping import UInt8

from elastic.io.atomic import atomic_open


class FrameCache:
    """Spans of frames in a folder, by what they were made of.

    Nothing is ever removed: the folder may be deleted whenever nobody trains.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self._folder = pathlib.Path(folder)

    def get(
        self, key: tuple[object, ...], shape: tuple[int, int, int, int]
    ) -> UInt8[np.ndarray, "n h w 3"] | None:
        """The frames, mapped; None where they are not there, or not whole and of this shape."""
        try:
            frames = np.load(self._path(key), mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):  # if the folder is amiss, `put` says so
            return None
        return frames if (frames.shape, frames.dtype) == (shape, np.uint8) else None

    def put(self, key: tuple[object, ...], frames: UInt8[np.ndarray, "n h w 3"]) -> None:
        """Writes them. Two processes may do so at once: the files are alike.

        Raises:
          ValueError: the folder cannot be written to, or its disk is full.
        """
        try:
            with atomic_open(self._path(key)) as file:
                np.save(file, frames, allow_pickle=False)
        except OSError as error:
            raise ValueError(
                f"cache_path={str(self._folder)!r} cannot take decoded frames: {error}. Name a folder with more room, or "
                "leave it out."
            ) from error

    def _path(self, key: tuple[object, ...]) -> pathlib.Path:
        name = hashlib.sha256(repr(key).encode("utf-8", "surrogateescape")).hexdigest()[:32]
        return self._folder / name[:2] / f"{name}.npy"

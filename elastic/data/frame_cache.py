"""Decoded frames in files: a span is decoded once, by the first process that needs it.

The files are .npy arrays and are mapped into memory, so that the processes of a machine share one copy.
"""

import hashlib
import os
import pathlib

import numpy as np
from jaxtyping import UInt8

from elastic.io.atomic import atomic_open


class FrameCache:
    """Spans of frames in a folder, found by a key: file, stamp, frame rate, size, first and last frame.

    Nothing is ever removed. The folder may be deleted while no training runs.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self._folder = pathlib.Path(folder)

    def get(
        self, key: tuple[object, ...], shape: tuple[int, int, int, int]
    ) -> UInt8[np.ndarray, "n h w 3"] | None:
        """The frames, mapped; None if there is no complete file of this shape."""
        try:
            frames = np.load(self._path(key), mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):  # `put` reports what is wrong with the folder
            return None
        return frames if (frames.shape, frames.dtype) == (shape, np.uint8) else None

    def put(self, key: tuple[object, ...], frames: UInt8[np.ndarray, "n h w 3"]) -> None:
        """Writes the frames. Two processes may do so at once, because their files are equal.

        Raises:
          ValueError: the folder cannot be written to, or its disk is full.
        """
        try:
            with atomic_open(self._path(key)) as file:
                np.save(file, frames, allow_pickle=False)
        except OSError as error:
            raise ValueError(
                f"cache_path={str(self._folder)!r} cannot take decoded frames: {error}. Name a folder on a disk "
                "with more free space, or leave it out."
            ) from error

    def _path(self, key: tuple[object, ...]) -> pathlib.Path:
        name = hashlib.sha256(repr(key).encode("utf-8", "surrogateescape")).hexdigest()[:32]
        return self._folder / name[:2] / f"{name}.npy"

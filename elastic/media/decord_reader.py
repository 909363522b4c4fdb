"""Optional: decodes video through decord instead of PyAV (`pip install decord`, last released in 2021).

Only pixels come from decord. Counts, times and display (pixel shape, rotation) are those that PyAV found, and files whose
frames decord converts differently are left to PyAV.
"""

import importlib
import importlib.util

import av
import numpy as np
from PIL import Image

from elastic.media.errors import MediaError, damaged
from elastic.media.location import Place, local_path
from elastic.media.source import Frames


def check_installed() -> None:
    """Raises `ValueError` if decord is not installed."""
    if importlib.util.find_spec("decord") is None:
        raise ValueError(
            "reader='decord' needs the package decord: pip install decord, or use 'pyav'."
        )


def decodes_alike(frame: av.VideoFrame) -> bool:
    """Whether decord gives the same pixels as PyAV for a video, by its first frame: 8 bits, 4:2:0, even size."""
    even = frame.width % 2 == 0 and frame.height % 2 == 0
    return frame.format.name == "yuv420p" and even and not frame.interlaced_frame


def decode(path: Place, positions: np.ndarray, *, num_frames: int, threads: int) -> Frames:
    """Yields the frames at `positions` (ascending) at the stored size, mode RGB.

    Args:
      path: a local file.
      positions: numbers of frames.
      num_frames: how many frames the file has by its packets.
      threads: of the decoder; 0: one per core.

    Raises:
      MediaError: decord cannot read the file, or counts its frames differently.
    """
    decord = importlib.import_module("decord")
    try:
        video = decord.VideoReader(str(local_path(path)), num_threads=threads)
        if len(video) != num_frames:
            raise MediaError(
                f"decord finds {len(video)} frames in {str(path)!r}, which has {num_frames}; use the reader 'pyav'."
            )
        for position in positions.tolist():
            yield Image.fromarray(video[position].asnumpy())
    except (decord.DECORDError, RuntimeError, OSError) as error:
        raise damaged(path, error) from error

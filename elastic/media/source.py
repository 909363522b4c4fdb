"""A media file whose facts are known: its size, its frames and their times, and how to decode them."""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from elastic.media.location import Place


@dataclass(frozen=True)
class MediaInfo:
    """What a file holds, found without decoding it.

    Attributes:
      path: the file; a string if it is a URL.
      kind: 'image' or 'video' (an animated GIF, PNG or WebP is a video), by content, not by name.
      width: columns as displayed, after rotation, in square pixels.
      height: rows as displayed.
      num_frames: how many frames it shows; exact, counted in the container.
      rate: frames per second, the mean one if it varies; 0.0 for an image.
      variable_rate: some frame is shown more than half a frame away from an even spacing.
      pixel_aspect: width and height of a pixel as stored, (32, 27) for instance; (1, 1) if it is square.
      transfer: 'pq' or 'hlg' if the file has high dynamic range, which is tone-mapped; else 'sdr'.
    """

    path: Place
    kind: Literal["image", "video"]
    width: int
    height: int
    num_frames: int
    rate: float
    variable_rate: bool
    transfer: Literal["sdr", "pq", "hlg"] = "sdr"
    pixel_aspect: tuple[int, int] = (1, 1)


Frames = Generator[Image.Image, None, None]  # mode RGB, upright


@dataclass(frozen=True)
class MediaSource:
    """A probed file: its facts, when each frame is shown, and how to get chosen frames."""

    info: MediaInfo
    times: np.ndarray | None  # seconds from the first frame, ascending; None: evenly spaced
    duration: float
    frames: Callable[[np.ndarray], Frames]  # ascending positions -> their frames

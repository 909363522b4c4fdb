"""When the frames of a video are shown, and which of them a frame rate picks."""

import functools
import logging
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
from jaxtyping import Int

from elastic.media.location import Place
from elastic.media.source import Frames, MediaInfo, MediaSource

log = logging.getLogger(__name__)


def timed_source(
    path: Place,
    width: int,
    height: int,
    times: np.ndarray,
    duration: float,
    nominal_rate: float | None,
    frames: Callable[[np.ndarray], Frames],
) -> MediaSource:
    """A video from the times of its frames.

    Args:
      path: the file.
      width: columns as displayed.
      height: rows as displayed.
      times: seconds of each frame since the first, ascending; all zero if unknown.
      duration: seconds from the first frame to the end of the last.
      nominal_rate: frames per second that the container states; None: it states none.
      frames: decodes the frames at ascending positions.
    """
    num_frames = len(times)
    variable, rate = False, nominal_rate or 25.0  # one frame, or no times at all
    if num_frames > 1 and times[-1] > 0:
        step = times[-1] / (num_frames - 1)
        variable = bool(np.abs(times - step * np.arange(num_frames)).max() > step / 2)
        if variable:
            rate = num_frames / duration
        elif nominal_rate is None or abs(nominal_rate * step - 1) > 0.01:
            rate = 1 / step  # the statement is missing or plainly wrong
    info = MediaInfo(path, "video", width, height, num_frames, float(rate), variable)
    return MediaSource(info, times if variable else None, duration, frames)


def nominal_rate(
    mean: Fraction | None, intended: Fraction | None, stamps: Sequence[int], time_base: Fraction
) -> float | None:
    """The container's mean rate, or the intended one if the mean is off because stamps were rounded.

    36 frames at 24 frames/s, copied from a file that counts milliseconds, have a mean of about 24.012.

    Args:
      mean: frames per second over the whole file; None: unknown.
      intended: ffmpeg's guess of the rate that was meant; None: unknown.
      stamps: times of the frames in ticks, ascending.
      time_base: seconds per tick.
    """
    if mean is None or intended is None or mean == intended or len(stamps) < 3:
        rate = mean or intended
        return None if rate is None else float(rate)
    since = np.array(stamps, np.int64) - stamps[0]
    clock, step = int(np.gcd.reduce(since)), float(1 / (intended * time_base))  # both in ticks
    # If the clock can state the intended step exactly, nothing was rounded, and the mean is right.
    coarse = clock < step / 8 and abs(step / clock - round(step / clock)) > 1e-3
    explained = np.abs(since - step * np.arange(len(since))).max() <= clock
    return float(intended if coarse and explained else mean)


def frame_indices(
    num_frames: int, source_rate: float | int, rate: float | int
) -> Int[np.ndarray, "picked"]:
    """The released rule for a fixed rate: which frames of an evenly spaced video to take.

    `int(num_frames * rate / source_rate)` positions spread evenly from the first frame to the
    last and rounded down; at least one. (Above the source's rate it repeats frames, but `open_clip`
    never asks for that.)
    """
    # The tiny addition keeps a whole number whole when the division falls just short of it.
    picked = max(1, int(num_frames * rate / source_rate + 1e-9))
    return np.linspace(0, num_frames - 1, picked).astype(np.int64)


@functools.lru_cache(maxsize=4096)
def log_once(level: int, message: str, *values: str | float) -> None:
    """Logs a line the first time only: an evaluation opens each clip once for each of its conditions."""
    log.log(level, message, *values)


def choose_frames(
    source: MediaSource, rate: float | int | None, *, tell_rate: bool
) -> tuple[float, np.ndarray]:
    """The rate to deliver, and the position in the source of each delivered frame.

    Args:
      source: the file.
      rate: frames per second wanted; None: every frame.
      tell_rate: whether to warn of a rate above the source's.
    """
    info = source.info
    everything = np.arange(info.num_frames)
    if info.kind == "image" or (rate is None and source.times is None):
        return info.rate, everything
    # A screen recording has pauses and bursts, so its highest rate is taken from the median step, not from the mean.
    limit = (
        info.rate
        if source.times is None
        else max(info.rate, 1 / float(np.median(np.diff(source.times))))
    )
    rate = limit if rate is None else rate
    if rate > limit:
        level = (
            logging.WARNING if tell_rate and rate > 1.01 * limit else logging.DEBUG
        )  # 23.976 for 24 is no news
        message = "%s has %.6g frames/s, fewer than the %.6g asked for; it is read at its own rate."
        log_once(level, message, str(info.path), limit, rate)
        rate = limit
    if rate < 0.99 * info.rate and source.times is None:
        level = logging.INFO if tell_rate else logging.DEBUG
        message = "%s has %.6g frames/s and is read at %.6g."
        log_once(level, message, str(info.path), info.rate, rate)
    if source.times is not None:
        level = logging.INFO if tell_rate else logging.DEBUG
        message = "%s has frames at varying times, %.6g/s in the mean; it is read at %.6g."
        log_once(level, message, str(info.path), info.rate, rate)
        steps = np.arange(max(1, int(source.duration * rate + 1e-9)))
        shown = np.searchsorted(source.times, steps / rate + 1e-6, side="right") - 1
        return float(rate), shown
    if rate == info.rate:
        return float(rate), everything
    return float(rate), frame_indices(info.num_frames, info.rate, rate)

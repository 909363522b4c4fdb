"""Arrays as people hold them -> uint8 frames: NumPy, jax and torch arrays, pictures of Pillow, floats, channels first.

The range of floats is never guessed: 0.5 is grey in [0, 1] and light in [-1, 1]. Every refusal states the shape that is expected
and the line that converts.
"""

from collections.abc import Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

RANGES = {(0.0, 1.0), (-1.0, 1.0)}
LAYOUTS = ("THWC", "TCHW", "CTHW", "HWC", "CHW", "BTHWC", "BTCHW", "BCTHW")
_EXPECTED = "uint8 [frames, height, width, 3], or a picture [height, width, 3]"
_SLACK = 0.5 / 255  # what resizing may overshoot a range by


@runtime_checkable
class ArrayInterface(Protocol):
    """What NumPy can read, such as a picture of Pillow."""

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """NumPy's description of the memory."""
        ...


@runtime_checkable
class DLPack(Protocol):
    """An array of another library, such as torch or jax."""

    def __dlpack__(self, *_: Any, **__: Any) -> Any:
        """The array as a DLPack capsule."""
        ...


ArrayLike = np.ndarray | ArrayInterface | DLPack


def is_array(source: object) -> bool:
    """Whether `source` is an array or a picture, rather than a path, a reader or an iterable of frames."""
    return isinstance(source, np.ndarray | ArrayInterface | DLPack)


def to_numpy(array: Any) -> np.ndarray:
    """A NumPy array with the values of an array of any library; without a copy where its memory can be shared.

    Raises:
      ValueError: NumPy has no such type.
    """
    if isinstance(array, np.ndarray):
        return array
    if hasattr(array, "detach"):  # torch: from the graph of gradients, and from another device
        array = array.detach().cpu()
        if "bfloat16" in str(array.dtype):
            raise ValueError(
                "A torch array of type bfloat16 is not known to NumPy; give frames.float()."
            )
        return np.from_dlpack(array)
    if hasattr(array, "getbands"):  # Pillow: a palette or an alpha channel is no colour
        return np.asarray(array.convert("RGB"))
    return np.asarray(array)


def as_frames(
    array: Any,
    *,
    value_range: tuple[float, float] | None = None,
    layout: str | None = None,
) -> UInt8[np.ndarray, "*shape 3"]:
    """uint8 frames [frames, height, width, 3], or a picture [height, width, 3].

    Args:
      array: an array of NumPy, jax, torch or another library with DLPack, or a picture of Pillow.
      value_range: of floats, (0, 1) or (-1, 1); None for uint8.
      layout: the axes, such as 'TCHW' (T frames, C channels, H rows, W columns, B clips); None: the last axis is the
        channels, or, where it is not 3 and another one must be, that one. A batch axis must have one clip.

    Raises:
      ValueError: the array is no clip; the message has the line that converts it.
    """
    array = _arranged(to_numpy(array), layout)
    if array.dtype == np.uint8:
        if value_range is not None:
            raise ValueError(
                f"value_range={value_range} is for floats, and the frames are uint8; leave it out."
            )
        return array
    return _rounded(array, value_range)


def as_live_frames(
    frames: Iterable[Any], *, value_range: tuple[float, float] | None, layout: str | None
) -> Iterator[np.ndarray]:
    """Frames that arrive one by one, each as `as_frames` gives it."""
    return (as_frames(frame, value_range=value_range, layout=layout) for frame in frames)


def _arranged(array: np.ndarray, layout: str | None) -> np.ndarray:
    """The array with its channels last, without a batch axis."""
    shape = array.shape
    if layout is None:
        layout = _layout_of(array)
    elif layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} must be one of {', '.join(LAYOUTS)}.")
    if len(layout) != array.ndim or shape[layout.index("C")] != 3:
        raise ValueError(
            f"layout={layout!r} has {len(layout)} axes with 3 channels; the array has shape {shape}."
        )
    if layout[0] == "B":
        if shape[0] != 1:
            raise ValueError(
                f"An array of shape {shape} is a batch of {shape[0]} clips; give encode_batch(frames, ...), or one clip: frames[0]."
            )
        array, layout = array[0], layout[1:]
    return np.moveaxis(array, layout.index("C"), -1)


def _layout_of(array: np.ndarray) -> str:
    shape = array.shape
    for layout in ("HWC", "THWC", "BTHWC", "CHW", "TCHW", "BTCHW", "CTHW", "BCTHW"):
        if len(layout) == len(shape) and shape[layout.index("C")] == 3:
            others = [other for other in LAYOUTS if len(other) == len(shape) and other != layout]
            if shape[-1] != 3 and any(shape[other.index("C")] == 3 for other in others):
                raise ValueError(
                    f"An array of shape {shape} has two axes of 3; say which are the channels: layout='TCHW' or layout='CTHW'."
                )
            return layout
    way = "give the axes: layout='TCHW' (T frames, C channels, H rows, W columns)"
    if len(shape) in (2, 3) and 0 not in shape and shape[-1] not in (1, 2, 4):
        way = "of grey frames make three channels: np.repeat(frames[..., None], 3, axis=-1)"
    elif shape and shape[-1] == 4:
        way = "drop the alpha channel: frames[..., :3]"
    elif shape and shape[-1] == 1:
        way = "of grey frames make three channels: np.repeat(frames, 3, axis=-1)"
    raise ValueError(f"Frames of type {array.dtype} and shape {shape} must be {_EXPECTED}; {way}.")


def _rounded(array: np.ndarray, value_range: tuple[float, float] | None) -> np.ndarray:
    """Floats of a known range as uint8."""
    is_float = array.dtype.kind == "f" or array.dtype.name == "bfloat16"
    if not is_float:
        way = "frames.astype(np.uint8)" if array.dtype.kind in "iu" else "np.uint8(255) * frames"
        raise ValueError(
            f"Frames of type {array.dtype} and shape {array.shape} must be {_EXPECTED}; levels from 0 to 255 "
            f"become it by {way}."
        )
    if value_range is None:
        raise ValueError(
            f"Frames of type {array.dtype} and shape {array.shape} must be uint8, or say what floats mean: value_range=(0, 1) or "
            "value_range=(-1, 1). As uint8: (frames * 255).round().astype(np.uint8)."
        )
    if tuple(map(float, value_range)) not in RANGES:
        raise ValueError(f"value_range={value_range} must be (0, 1) or (-1, 1).")
    low, high = map(float, value_range)
    if array.size:
        least, most = float(array.min()), float(array.max())
        slack = _SLACK * (high - low)
        if not (low - slack <= least and most <= high + slack):  # NaN is refused too
            way = "value_range=(-1, 1)" if -1 - slack <= least and most <= 1 + slack else "np.clip"
            if most > 1 + slack and least >= 0 and most <= 255:
                way = "frames.astype(np.uint8), as these look like levels from 0 to 255"
            raise ValueError(
                f"value_range=({low:g}, {high:g}), but the frames go from {least:g} to {most:g}; use {way}."
            )
    unit = (array.astype(np.float32) - low) * (255 / (high - low))
    return np.clip(np.rint(unit), 0, 255).astype(np.uint8)

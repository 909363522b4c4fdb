"""Clip <-> patches, and pixels <-> [-1, 1]: how blocks of frames lie in tokens.

The functions take NumPy's arrays and JAX's and give the same kind back. jax is not imported, because
processes that decode training data use this module.
"""

from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from einops import rearrange
from jaxtyping import Float, Real, Shaped, UInt8

if TYPE_CHECKING:
    import jax

    Array = TypeVar("Array", np.ndarray, jax.Array)
else:
    Array = Any  # jaxtyping checks shape and dtype of whatever has them

_VIDEO, _PATCHES = "... (t pt) (h ph) (w pw) c", "... (t h w) (pt ph pw c)"
_HALF_RANGE = 127.5  # of the 256 values of a pixel


def patchify(
    video: Shaped[Array, "*b frames rows columns channels"], patch_size: tuple[int, int, int]
) -> Shaped[Array, "*b tokens patch"]:
    """Cuts each clip into patches, one token each; any leading dimensions."""
    pt, ph, pw = patch_size
    return rearrange(video, f"{_VIDEO} -> {_PATCHES}", pt=pt, ph=ph, pw=pw)


def unpatchify(
    patches: Shaped[Array, "*b tokens patch"],
    patch_size: tuple[int, int, int],
    rows: int,
    columns: int,
) -> Shaped[Array, "*b frames rows columns channels"]:
    """The inverse of `patchify`.

    Args:
      patches: one patch per token, its pixels in the order of `patchify`.
      patch_size: frames, rows and columns of a patch.
      rows: rows of a frame in pixels.
      columns: columns of a frame in pixels.
    """
    pt, ph, pw = patch_size
    return rearrange(
        patches, f"{_PATCHES} -> {_VIDEO}", pt=pt, ph=ph, pw=pw, h=rows // ph, w=columns // pw
    )


def pad_block(
    frames: UInt8[np.ndarray, "n rows columns c"], frames_per_block: int
) -> UInt8[np.ndarray, "f rows columns c"]:
    """Repeats the last frame until the block is full: still content costs the fewest tokens.

    Raises:
      ValueError: there is no frame, or more than a block of them.
    """
    if not 0 < len(frames) <= frames_per_block:
        raise ValueError(f"A block takes 1 to {frames_per_block} frames, not {len(frames)}.")
    return np.concatenate([frames, np.repeat(frames[-1:], frames_per_block - len(frames), axis=0)])


def to_unit_range(pixels: Real[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Pixels, 0 to 255 -> float32 in [-1, 1], as the released models were trained."""
    return pixels.astype(np.float32) / _HALF_RANGE - 1


def to_levels(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """[-1, 1] -> the nearest pixel values, whole numbers of 0 to 255 that are still floats.

    They are rounded; the released code truncates, which darkens by half a level.
    """
    return ((x + 1) * _HALF_RANGE).round()


def to_uint8(x: Float[Array, "*shape"]) -> UInt8[Array, "*shape"]:
    """[-1, 1] -> pixels, the inverse of `to_unit_range`; what is outside is clipped."""
    return to_levels(x.clip(-1, 1)).astype(np.uint8)

"""Clip <-> patches, and pixels <-> [-1, 1]: how blocks of frames lie in tokens.

The functions take NumPy's arrays and JAX's and give the same kind back. jax is not imported, because
processes that decode training data use this module.
"""

import functools
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
from einops import rearrange
from jaxtyping import Float, Int, Real, Shaped, UInt8

if TYPE_CHECKING:
    import jax

    Array = TypeVar("Array", np.ndarray, jax.Array)
else:
    Array = Any  # jaxtyping checks shape and dtype of whatever has them

TokenOrder = Literal["raster", "coarse_to_fine", "adaptive"]

_VIDEO, _PATCHES = "... (t pt) (h ph) (w pw) c", "... (t h w) (pt ph pw c)"
_HALF_RANGE = 127.5  # of the 256 values of a pixel


def patchify(
    video: Shaped[Array, "*b frames rows columns channels"],
    patch_size: tuple[int, int, int],
    order: TokenOrder = "raster",
) -> Shaped[Array, "*b tokens patch"]:
    """Cuts each clip into patches, one token each; any leading dimensions.

    Args:
      video: frames [..., frames, rows, columns, channels] of any dtype.
      patch_size: frames, rows and columns of a patch.
      order: of the tokens of a slice, as `token_places` gives it.
    """
    pt, ph, pw = patch_size
    patches = rearrange(video, f"{_VIDEO} -> {_PATCHES}", pt=pt, ph=ph, pw=pw)
    rows, columns = video.shape[-3] // ph, video.shape[-2] // pw
    return reorder(patches, token_places(rows, columns, order))


def unpatchify(
    patches: Shaped[Array, "*b tokens patch"],
    patch_size: tuple[int, int, int],
    rows: int,
    columns: int,
    order: TokenOrder = "raster",
) -> Shaped[Array, "*b frames rows columns channels"]:
    """The inverse of `patchify`.

    Args:
      patches: one patch per token, its pixels in the order of `patchify`.
      patch_size: frames, rows and columns of a patch.
      rows: rows of a frame in pixels.
      columns: columns of a frame in pixels.
      order: of the tokens of a slice.
    """
    pt, ph, pw = patch_size
    patches = reorder(patches, token_numbers(rows // ph, columns // pw, order))
    return rearrange(
        patches, f"{_PATCHES} -> {_VIDEO}", pt=pt, ph=ph, pw=pw, h=rows // ph, w=columns // pw
    )


@functools.cache
def token_places(rows: int, columns: int, order: TokenOrder) -> Int[np.ndarray, "s"] | None:
    """The place of each token of a slice: its number in raster order. None: tokens stand in raster order.

    'coarse_to_fine' is the order of a Bayer matrix (Bayer 1973, for dithering): each prefix is spread evenly over the
    slice. Sizes that are no power of two take the matrix of the next one and leave out what lies outside. With 'adaptive'
    it is the network's order too; `elastic.model.adaptive_order` has the one in which tokens are sent.

    Args:
      rows: rows of patches.
      columns: columns of patches.
      order: the config's `token_order`.
    """
    if order == "raster":
        return None
    row, column = (place.reshape(-1) for place in np.mgrid[:rows, :columns])
    row_bits, column_bits = ((size - 1).bit_length() for size in (rows, columns))
    rank, shift = np.zeros(rows * columns, np.int64), 0
    # Frames are square, so the highest bits of row and of column are steps of the same size in pixels. The largest steps
    # change first: they are the lowest bits of the rank. Of two steps of a size the diagonal one comes first.
    for level in range(1, max(row_bits, column_bits) + 1):
        down = row >> (row_bits - level) & 1 if level <= row_bits else None
        right = column >> (column_bits - level) & 1 if level <= column_bits else None
        digits = [down, right] if down is None or right is None else [down, down ^ right]
        for digit in digits:
            if digit is not None:
                rank |= digit << shift
                shift += 1
    return np.argsort(rank, kind="stable").astype(np.int32)


@functools.cache
def token_numbers(rows: int, columns: int, order: TokenOrder) -> Int[np.ndarray, "s"] | None:
    """The inverse of `token_places`: at each place of a slice, in raster order, the number of its token."""
    places = token_places(rows, columns, order)
    return None if places is None else np.argsort(places).astype(np.int32)


def reorder(
    x: Shaped[Array, "*b tokens c"], index: Int[np.ndarray, "s"] | None
) -> Shaped[Array, "*b tokens c"]:
    """Within each slice of `len(index)` tokens, item i becomes the one that was item `index[i]`; None changes nothing."""
    if index is None:
        return x
    return x.reshape(*x.shape[:-2], -1, len(index), x.shape[-1])[..., index, :].reshape(x.shape)


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
    return to_unrounded_levels(x).round()


def to_unrounded_levels(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """[-1, 1] -> levels from 0 to 255 that are not rounded, for what is computed from several of them."""
    return (x + 1) * _HALF_RANGE


def round_levels(levels: Real[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """Levels from 0 to 255 as 8 bits; what has 8 bits already stays."""
    return levels if levels.dtype == np.uint8 else np.rint(levels).astype(np.uint8)


def to_uint8(x: Float[Array, "*shape"]) -> UInt8[Array, "*shape"]:
    """[-1, 1] -> pixels, the inverse of `to_unit_range`; what is outside is clipped."""
    return to_levels(x.clip(-1, 1)).astype(np.uint8)

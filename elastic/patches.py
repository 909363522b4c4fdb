"""Clip <-> patches: the layout of pixels in tokens, the block grid, padding and trimming the tail."""

import jax
import numpy as np
from einops import rearrange
from jaxtyping import Float, Shaped, UInt8

_VIDEO, _PATCHES = "... (t pt) (h ph) (w pw) c", "... (t h w) (pt ph pw c)"


def patchify(
    video: Shaped[np.ndarray | jax.Array, "*b frames rows columns channels"],
    patch_size: tuple[int, int, int],
) -> Shaped[np.ndarray | jax.Array, "*b tokens patch"]:
    """Cuts each clip into patches, one token each; any leading dimensions."""
    pt, ph, pw = patch_size
    return rearrange(video, f"{_VIDEO} -> {_PATCHES}", pt=pt, ph=ph, pw=pw)


def unpatchify(
    patches: Shaped[np.ndarray | jax.Array, "*b tokens patch"],
    patch_size: tuple[int, int, int],
    rows: int,
    columns: int,
) -> Shaped[np.ndarray | jax.Array, "*b frames rows columns channels"]:
    """The inverse of `patchify` for frames of `rows` x `columns` pixels."""
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


def to_unit_range(patches: UInt8[np.ndarray | jax.Array, "*shape"]) -> Float[jax.Array, "*shape"]:
    """uint8 pixels -> float32 in [-1, 1], as the released models were trained."""
    return jax.numpy.asarray(patches).astype(jax.numpy.float32) / 127.5 - 1


def to_uint8(x: Float[np.ndarray | jax.Array, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """[-1, 1] -> uint8, rounded (the released code truncates, which darkens by half a level)."""
    return np.clip(np.rint((np.asarray(x, np.float32) + 1) * 127.5), 0, 255).astype(np.uint8)

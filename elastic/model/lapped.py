"""Lapped patches: every token sees, or paints, a window of twice its patch, which overlaps those of its neighbours.

Lapped output: windows are weighted by a raised cosine and added, as in lapped transforms (Malvar and Staelin 1989):
shifted by a patch, its values sum to one. At the edge of the frame, where no neighbour is, the part of a window beyond
the edge is folded back, as a mirror shows it; so the weights sum to one there too.

Lapped input: a token's window has the pixels of its neighbours around its own; beyond the edge of the frame it has the
mirror's. A linear start sees the window through the filter of `lapped_filter.py`.
"""

from typing import Literal

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from elastic.config import ElasticTokConfig
from elastic.patches import reorder, token_numbers, token_places

WINDOW = 4  # numbers of a window per number of a patch


def windows(x: Float[Array, "b l p"], config: ElasticTokConfig) -> Float[Array, "b l w"]:
    """Patches of whole blocks -> windows, in the orders of `overlap_add`, which gives the patches back.

    Args:
      x: pixels of each token's patch [batch, tokens, frames * rows * columns * 3]; with `patch_group` of each group's.
      config: the model; gives the patch size and the order of tokens.
    """
    frames, rows, columns = config.group_size
    down, right = config.grid_shape
    x = reorder(x, token_numbers(down, right, config.token_order))
    x = rearrange(
        x,
        "b (s h w) (pt ph pw c) -> b s h w pt ph pw c",
        h=down,
        w=right,
        pt=frames,
        ph=rows,
        pw=columns,
    )
    x = _surround(x, place_axis=2, patch_axis=5)
    x = _surround(x, place_axis=3, patch_axis=6)
    x = rearrange(x, "b s h w pt wh ww c -> b (s h w) (pt wh ww c)")
    return reorder(x, token_places(down, right, config.token_order))


def overlap_add(x: Float[Array, "b l w"], config: ElasticTokConfig) -> Float[Array, "b l p"]:
    """Windows of whole blocks -> patches, linear in the windows.

    Args:
      x: a window of each token, float32 [batch, tokens, frames * 2 rows * 2 columns * 3] of a patch, in that order; with
        `patch_group` of each group of patches.
      config: the model; gives the patch size and the order of tokens.
    """
    frames, rows, columns = config.group_size
    down, right = config.grid_shape
    x = reorder(x, token_numbers(down, right, config.token_order))
    x = rearrange(
        x,
        "b (s h w) (pt wh ww c) -> b s h w pt wh ww c",
        h=down,
        w=right,
        pt=frames,
        wh=2 * rows,
        ww=2 * columns,
    )
    x = _blend(x, place_axis=2, window_axis=5)
    x = _blend(x, place_axis=3, window_axis=6)
    x = rearrange(x, "b s h w pt ph pw c -> b (s h w) (pt ph pw c)")
    return reorder(x, token_places(down, right, config.token_order))


def repeat_border(
    kernel: Float[np.ndarray, "c p"], patch_size: tuple[int, int, int]
) -> Float[np.ndarray, "c w"]:
    """A projection to patches as one to windows: the margin repeats the pixels at the patch's border."""
    return _padded(kernel, patch_size, mode="edge")


def ignore_border(
    kernel: Float[np.ndarray, "p c"], patch_size: tuple[int, int, int]
) -> Float[np.ndarray, "w c"]:
    """A projection from patches as one from windows: the margin counts nothing."""
    return _padded(kernel.T, patch_size, mode="constant").T


def _padded(
    kernel: Float[np.ndarray, "c p"],
    patch_size: tuple[int, int, int],
    *,
    mode: Literal["edge", "constant"],
) -> Float[np.ndarray, "c w"]:
    frames, rows, columns = patch_size
    patches = kernel.reshape(-1, frames, rows, columns, 3)
    margin = ((0, 0), (0, 0), (rows // 2, rows // 2), (columns // 2, columns // 2), (0, 0))
    return np.pad(patches, margin, mode=mode).reshape(len(kernel), -1)


def _surround(x: Array, *, place_axis: int, patch_axis: int) -> Array:
    """Adds half a patch of both neighbours along one direction; at the edge of the frame the mirror's."""
    x = jnp.moveaxis(x, (place_axis, patch_axis), (-2, -1))
    first, second = jnp.split(x, 2, axis=-1)
    before = jnp.concatenate([first[..., :1, ::-1], second[..., :-1, :]], axis=-2)
    after = jnp.concatenate([first[..., 1:, :], second[..., -1:, ::-1]], axis=-2)
    x = jnp.concatenate([before, first, second, after], axis=-1)
    return jnp.moveaxis(x, (-2, -1), (place_axis, patch_axis))


def raised_cosine(size: int) -> Float[np.ndarray, "w"]:
    """The window of a patch of `size` pixels: 2 * size weights; those `size` apart sum to one."""
    return np.sin(np.pi * (np.arange(2 * size) + 0.5) / (2 * size)) ** 2


def _blend(x: Array, *, place_axis: int, window_axis: int) -> Array:
    """Adds the windows along one direction; the window's axis shrinks to the patch."""
    x = jnp.moveaxis(x, (place_axis, window_axis), (-2, -1))
    size = x.shape[-1] // 2
    ones = (1,) * (x.ndim - 2)
    weight = raised_cosine(size).astype(np.float32)
    # Quarters of a window: the neighbour before, both halves of the patch itself, the neighbour after.
    before, first, second, after = jnp.split(x * weight.reshape(*ones, 1, -1), 4, axis=-1)
    # At the edge of the frame the neighbour is the window's own part beyond the edge, mirrored.
    first = first + jnp.concatenate([before[..., :1, ::-1], after[..., :-1, :]], axis=-2)
    second = second + jnp.concatenate([before[..., 1:, :], after[..., -1:, ::-1]], axis=-2)
    return jnp.moveaxis(
        jnp.concatenate([first, second], axis=-1), (-2, -1), (place_axis, window_axis)
    )

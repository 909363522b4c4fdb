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
    x = _as_grid(x, config, patches=1)
    x = _surround(x, place_axis=2, patch_axis=5)
    x = _surround(x, place_axis=3, patch_axis=6)
    return _as_tokens(x, config)


def overlap_add(x: Float[Array, "b l w"], config: ElasticTokConfig) -> Float[Array, "b l p"]:
    """Windows of whole blocks -> patches, linear in the windows.

    Args:
      x: a window of each token, float32 [batch, tokens, frames * 2 rows * 2 columns * 3] of a patch, in that order; with
        `patch_group` of each group of patches.
      config: the model; gives the patch size and the order of tokens.
    """
    x = _as_grid(x, config, patches=2)
    x = _blend(x, place_axis=2, window_axis=5)
    x = _blend(x, place_axis=3, window_axis=6)
    return _as_tokens(x, config)


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


def _as_grid(
    x: Float[Array, "b l n"], config: ElasticTokConfig, *, patches: int
) -> Float[Array, "b s h w t r q c"]:
    """Patches, or windows that are `patches` patches wide and high, at their places in the slices of whole blocks."""
    frames, rows, columns = config.group_size
    down, right = config.grid_shape
    return rearrange(
        reorder(x, token_numbers(down, right, config.token_order)),
        "b (s h w) (t r q c) -> b s h w t r q c",
        h=down, w=right, t=frames, r=patches * rows, q=patches * columns,
    )  # fmt: skip


def _as_tokens(
    x: Float[Array, "b s h w t r q c"], config: ElasticTokConfig
) -> Float[Array, "b l n"]:
    """The inverse of `_as_grid`."""
    x = rearrange(x, "b s h w t r q c -> b (s h w) (t r q c)")
    return reorder(x, token_places(*config.grid_shape, config.token_order))


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

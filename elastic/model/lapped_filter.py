"""The filter of a linear start with lapped input: windows of pixels -> numbers from which the pixels can be had back.

It stands apart from `lapped.py`, because scipy takes a while to import and a trained model does not need it.
"""

import numpy as np
import scipy.fft
import scipy.linalg
from jaxtyping import Float


def prefilter(size: int) -> Float[np.ndarray, "p w"]:
    """The matrix from a window of 2 * `size` pixels to `size` numbers, from which the pixels can be had back.

    It is the filter of a lapped transform (Tran, Liang and Tu 2003): across the border between two patches the sum of
    mirrored pixels stays, and their difference is rotated and amplified. A transform of the numbers then is one of
    overlapping windows: more energy lies in few components, and steps at borders of patches cannot arise. What mirrors
    itself at a border stays as it is, so nothing is filtered at the edge of the frame.
    """
    border = _border_filter(size // 2)
    return np.asarray(scipy.linalg.block_diag(border, border))[size // 2 : -(size // 2)]


def postfilter(size: int) -> Float[np.ndarray, "w p"]:
    """The inverse: from a patch's numbers to what they add to a window of 2 * `size` pixels."""
    border = np.linalg.inv(_border_filter(size // 2))
    return np.asarray(scipy.linalg.block_diag(border, border))[:, size // 2 : -(size // 2)]


def see_prefiltered(
    kernel: Float[np.ndarray, "p c"], patch_size: tuple[int, int, int]
) -> Float[np.ndarray, "w c"]:
    """A projection from the filtered pixels of a patch as one from its window."""
    frames, rows, columns = patch_size
    down, right = prefilter(rows), prefilter(columns)
    kernel = kernel.reshape(frames, rows, columns, 3, -1)
    seen = np.einsum("rR,cC,trcxk->tRCxk", down, right, kernel, optimize=True)
    return seen.reshape(-1, kernel.shape[-1]).astype(np.float32)


def _border_filter(half: int) -> Float[np.ndarray, "n n"]:
    """The filter of the `half` pixels before a border between patches and the `half` pixels behind it."""
    one, mirror = np.eye(half), np.eye(half)[::-1]
    butterfly = np.block([[one, mirror], [mirror, -one]]) / np.sqrt(2)
    # The diagonal is close to the one with the highest coding gain for neighbours that correlate by 0.95.
    second, fourth = (
        np.asarray(scipy.fft.dct(one, type=kind, norm="ortho", axis=0)) for kind in (2, 4)
    )
    rotation = mirror @ second.T @ np.diag(1 + 0.6 * 3.0 ** -np.arange(half)) @ fourth @ mirror
    return butterfly @ scipy.linalg.block_diag(one, rotation) @ butterfly

"""DISTS, a distance of structure and texture in the features of VGG16 (Ding, Ma, Wang and Simoncelli 2020, equations 5 to 8).

It tolerates that one texture stands for another of the same kind, where LPIPS compares place by place. VGG16's weights
are those of LPIPS. The weights of the channels come with the package `DISTS_pytorch`, which is never imported.
"""

import functools
import hashlib
import importlib.metadata
import os
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt8

from elastic.metrics.lpips import of_frames, vgg16
from elastic.metrics.lpips_weights import STAGES, Weights
from elastic.patches import to_unit_range

_DISTRIBUTION, _FILE = "DISTS_pytorch", "DISTS_pytorch/weights.pt"
_FILE_SHA256 = "f5e65c96230b7f6ca995691647d482237e4cab8a50c5c4a5784f219ef0748218"
_CHANNELS = (3, *(widths[-1] for widths in STAGES))  # of the image and of each stage
_C1 = _C2 = 1e-6


class DistsWeights(NamedTuple):
    """The weights of the channels of the image and of VGG16's five stages; all of them together sum to one."""

    texture: Float[np.ndarray, "1475"]  # alpha of the paper: compares means
    structure: Float[np.ndarray, "1475"]  # beta: compares covariances


def load_dists_weights(path: str | os.PathLike | None = None) -> DistsWeights:
    """The weights of the channels.

    Args:
      path: the file `weights.pt` of the package `DISTS_pytorch` 0.1; None: that of the installed package.

    Raises:
      ValueError: there is no such file, or it is another one.
    """
    way_out = f"`pip install --no-deps {_DISTRIBUTION}==0.1`, or give the path of its weights.pt (--dists_weights)"
    if path is None:
        try:
            path = Path(str(importlib.metadata.distribution(_DISTRIBUTION).locate_file(_FILE)))
        except importlib.metadata.PackageNotFoundError:
            raise ValueError(
                f"DISTS needs the weights that the package {_DISTRIBUTION} carries, which is not installed: {way_out}."
            ) from None
    data = Path(path).read_bytes()
    # The file is a pickle followed by two runs of float32, each behind its length. The digest says that it is this file,
    # so the runs are read from their places and the pickle is not.
    if hashlib.sha256(data).hexdigest() != _FILE_SHA256:
        raise ValueError(f"{path} is not the weights.pt of {_DISTRIBUTION} 0.1: {way_out}.")
    count = sum(_CHANNELS)
    runs = np.frombuffer(data[-2 * (8 + 4 * count) :], np.uint8).reshape(2, -1)[:, 8:]
    texture, structure = runs.copy().view("<f4").astype(np.float32)
    total = texture.sum() + structure.sum()
    return DistsWeights(texture / total, structure / total)


def _l2_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b p q c"]:
    """Every second pixel of the root of the blurred squares, which aliases less than a maximum (section III-A)."""
    side = np.hanning(5)[1:-1]
    window = np.outer(side, side)
    kernel = jnp.asarray(window / window.sum(), jnp.float32).reshape(3, 3, 1, 1)
    channels = x.shape[-1]
    squares = lax.conv_general_dilated(
        jnp.square(x),
        jnp.broadcast_to(kernel, (3, 3, 1, channels)),
        (2, 2),
        ((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=channels,
    )
    return jnp.sqrt(squares + 1e-12)


def dists(
    vgg: Weights,
    weights: DistsWeights,
    a: Float[Array, "b h w 3"],
    b: Float[Array, "b h w 3"],
) -> Float[Array, "b"]:
    """The DISTS distance of each pair of images: 0 if they are equal, at most about 1.

    Args:
      vgg: of `load_lpips_weights`.
      weights: of `load_dists_weights`.
      a: float [b, h, w, 3] in [-1, 1].
      b: likewise; the distance is symmetric.

    Raises:
      ValueError: the images are smaller than 16 x 16.
    """
    pairs = zip(
        *(((x + 1) / 2, *vgg16(vgg, x, pool=_l2_pool)) for x in (a, b)),
        strict=True,
    )
    similarity, first = jnp.zeros(a.shape[0], jnp.float32), 0
    for channels, (x, y) in zip(_CHANNELS, pairs, strict=True):
        places = slice(first, first + channels)
        first += channels
        texture, structure = (jnp.asarray(w[places]).reshape(1, -1) for w in weights)
        mean_x, mean_y = jnp.mean(x, axis=(1, 2)), jnp.mean(y, axis=(1, 2))
        # Products of differences: the difference of two products loses most of its digits.
        x, y = x - mean_x[:, None, None], y - mean_y[:, None, None]
        variance_x, variance_y, covariance = (
            jnp.mean(product, axis=(1, 2)) for product in (x * x, y * y, x * y)
        )
        means = (2 * mean_x * mean_y + _C1) / (jnp.square(mean_x) + jnp.square(mean_y) + _C1)
        shapes = (2 * covariance + _C2) / (variance_x + variance_y + _C2)
        similarity += jnp.sum(texture * means + structure * shapes, axis=1)
    return 1 - similarity


@jax.jit
def _of_uint8(weights: tuple[Weights, DistsWeights], a: Array, b: Array) -> Array:
    return dists(*weights, to_unit_range(a), to_unit_range(b))


def dists_of_frames(
    vgg: Weights,
    weights: DistsWeights,
    a: UInt8[np.ndarray, "n rows columns 3"],
    b: UInt8[np.ndarray, "n rows columns 3"],
    *,
    batch_size: int = 8,
) -> Float[np.ndarray, "n"]:
    """The DISTS distance of each pair of frames at their own size (the paper's program resizes to 256 rows first).

    Args:
      vgg: of `load_lpips_weights`; put them on the device by `jax.device_put` if this is called often.
      weights: of `load_dists_weights`.
      a: uint8 [n, rows, columns, 3].
      b: likewise.
      batch_size: pairs computed at a time.
    """
    return of_frames(functools.partial(_of_uint8, jax.device_put((vgg, weights))), a, b, batch_size)

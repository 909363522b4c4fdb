"""LPIPS, the distance of two images in the features of VGG16 (Zhang et al. 2018).

The weights are constants (`lpips_weights.py`). Gradients flow into the first image only. The second image, the
original, therefore needs a forward pass only and stores nothing for a backward pass.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from elastic.metrics.lpips_weights import STAGES, Weights
from elastic.patches import to_unit_range

# Mean and deviation of ImageNet's channels, for pixels in [-1, 1].
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_EPS = 1e-10
_LEAST_SIZE = 16  # four poolings


class Features(NamedTuple):
    """VGG16's features after the last ReLU of each stage; each stage halves rows and columns."""

    relu1_2: Float[Array, "b h1 w1 64"]
    relu2_2: Float[Array, "b h2 w2 128"]
    relu3_3: Float[Array, "b h3 w3 256"]
    relu4_3: Float[Array, "b h4 w4 512"]
    relu5_3: Float[Array, "b h5 w5 512"]


def _products(x: Array, kernel: Array, dtype: jnp.dtype) -> Array:
    return lax.conv_general_dilated(
        x.astype(dtype),
        kernel.astype(dtype),
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        preferred_element_type=jnp.float32,
    )


# JAX cannot transpose a convolution whose result has a wider type than its operands, so the gradient is written out.
_convolution = jax.custom_vjp(_products, nondiff_argnums=(2,))


def _convolution_fwd(x: Array, kernel: Array, dtype: jnp.dtype) -> tuple[Array, Array]:
    return _convolution(x, kernel, dtype), kernel


def _convolution_bwd(dtype: jnp.dtype, kernel: Array, gradient: Array) -> tuple[Array, None]:
    mirrored = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
    return _products(gradient, mirrored, dtype), None  # the kernel is a constant


_convolution.defvjp(_convolution_fwd, _convolution_bwd)


def _pool(x: Float[Array, "b h w c"]) -> Float[Array, "b p q c"]:
    """Max pooling over 2 x 2 pixels; an odd last row or column is left out."""
    b, h, w, c = x.shape
    x = x[:, : h // 2 * 2, : w // 2 * 2]
    # A reshape, because the gradient of reduce_window is slow on CPUs (LPIPS as a whole: 0.55 instead of 0.66 s a pair).
    return jnp.max(x.reshape(b, h // 2, 2, w // 2, 2, c), axis=(2, 4))


def vgg16(
    weights: Weights,
    images: Float[Array, "b h w 3"],
    *,
    dtype: DTypeLike = jnp.float32,
    pool: Callable[[Array], Array] = _pool,
) -> Features:
    """The features of images in [-1, 1].

    Args:
      weights: of `load_lpips_weights`.
      images: float [b, h, w, 3].
      dtype: type of the operands of products; sums and results are float32.
      pool: halves rows and columns between two stages.

    Raises:
      ValueError: the images are smaller than 16 x 16.
    """
    if min(images.shape[1:3]) < _LEAST_SIZE:
        raise ValueError(
            f"LPIPS needs images of {_LEAST_SIZE} x {_LEAST_SIZE} pixels or more, not {images.shape[1:3]}; use `resize`."
        )
    shift, scale = (jnp.asarray(row, jnp.float32).reshape(1, 1, 1, 3) for row in (_SHIFT, _SCALE))
    x = (images.astype(jnp.float32) - shift) / scale
    stages, layer = [], 0
    for widths in STAGES:
        x = pool(x) if stages else x
        for _ in widths:
            conv = weights["VGG16_0"][f"Conv_{layer}"]
            bias = jnp.asarray(conv["bias"], jnp.float32).reshape(1, 1, 1, -1)
            x = jax.nn.relu(_convolution(x, jnp.asarray(conv["kernel"]), jnp.dtype(dtype)) + bias)
            layer += 1
        stages.append(x)
    return Features(*stages)


def _unit(features: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Every pixel's features, scaled to length 1; zero features stay zero and have a finite gradient."""
    squares = jnp.sum(jnp.square(features), axis=-1, keepdims=True)
    # The root's slope at 0 is infinite, and infinity times the 0 of one `where` is NaN, so there are two.
    length = jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)
    return features / (length + _EPS)


def lpips(
    weights: Weights,
    images: Float[Array, "b h w 3"],
    originals: Float[Array, "b h w 3"],
    *,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "b"]:
    """The LPIPS distance of each pair of images; 0 up to rounding if they are equal.

    Args:
      weights: of `load_lpips_weights`.
      images: float [b, h, w, 3] in [-1, 1]; gradients flow into these.
      originals: likewise; no gradient flows into these. The value is symmetric in both.
      dtype: type of the operands of products; sums are float32.
    """
    # Two calls: one batch of both takes 1.6 times as long and as much memory, because its backward pass covers
    # the originals too.
    ours = vgg16(weights, images, dtype=dtype)
    theirs = vgg16(weights, lax.stop_gradient(originals), dtype=dtype)
    distance = jnp.zeros(images.shape[0], jnp.float32)
    for stage, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        weight = jnp.asarray(weights[f"NetLinLayer_{stage}"]["Conv_0"]["kernel"], jnp.float32)
        squares = jnp.square(_unit(a) - _unit(b)) * weight.reshape(1, 1, 1, -1)
        distance += jnp.mean(jnp.sum(squares, axis=-1), axis=(1, 2))
    return distance


def resize(images: Float[Array, "b h w c"], size: int = 224) -> Float[Array, "b s s c"]:
    """Images resized to `size` x `size` pixels as the released training step does it: bilinear with antialiasing."""
    b, _, _, c = images.shape
    return jax.image.resize(images, (b, size, size, c), "bilinear")


@functools.partial(jax.jit, static_argnames="dtype")
def _of_uint8(weights: Weights, a: Array, b: Array, *, dtype: Any) -> Array:
    return lpips(weights, to_unit_range(a), to_unit_range(b), dtype=dtype)


def lpips_of_frames(
    weights: Weights,
    a: UInt8[np.ndarray, "n rows columns 3"],
    b: UInt8[np.ndarray, "n rows columns 3"],
    *,
    batch_size: int = 8,
    dtype: DTypeLike = jnp.float32,
) -> Float[np.ndarray, "n"]:
    """The LPIPS distance of each pair of frames at their own size (training compares at 224 x 224).

    Args:
      weights: of `load_lpips_weights`; put them on the device by `jax.device_put` if this is called often.
      a: uint8 [n, rows, columns, 3].
      b: likewise.
      batch_size: pairs computed at a time.
      dtype: type of the operands of products.
    """
    # Putting the weights on the device does nothing if they are there already.
    measure = functools.partial(_of_uint8, jax.device_put(weights), dtype=jnp.dtype(dtype))
    return of_frames(measure, a, b, batch_size)


def of_frames(
    measure: Callable[[Array, Array], Array],
    a: UInt8[np.ndarray, "n rows columns 3"],
    b: UInt8[np.ndarray, "n rows columns 3"],
    batch_size: int,
) -> Float[np.ndarray, "n"]:
    """A measure of each pair of frames, `batch_size` pairs at a time."""
    found = [np.zeros(0, np.float32)]
    for start in range(0, len(a), batch_size):
        pair = [x[start : start + batch_size] for x in (a, b)]
        num = len(pair[0])
        if start:  # a smaller last batch is filled up, so that one compiled program serves all
            pair = [np.concatenate([x, np.repeat(x[-1:], batch_size - num, axis=0)]) for x in pair]
        found.append(np.asarray(measure(*pair))[:num])
    return np.concatenate(found)

"""PSNR and SSIM of a reconstruction."""

import math

import numpy as np
from jaxtyping import Float, UInt8

# SSIM (Wang et al. 2004): an 11 x 11 Gaussian window of deviation 1.5, and constants that avoid 0 / 0 in flat windows.
_RADIUS, _DEVIATION = 5, 1.5
_AT_ONCE = (
    1 << 22
)  # numbers whose squares are summed at once: a picture of 48 megapixels must not need the memory of four
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def psnr_of_mse(mse: float) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error with pixels in [-1, 1] (peak to peak 2); inf for 0."""
    return math.inf if mse == 0 else 10 * math.log10(4 / mse)


def mse_of_psnr(psnr: float) -> float:
    """The inverse of `psnr_of_mse`."""
    return 4 / 10 ** (psnr / 10)


def squared_error(a: UInt8[np.ndarray, "*shape"], b: UInt8[np.ndarray, "*shape"]) -> int:
    """Sum of the squared differences of two uint8 arrays, exact. It takes little memory besides them, whatever their size."""
    total, flat = 0, (a.reshape(-1), b.reshape(-1))
    for first in range(0, a.size, _AT_ONCE):
        x, y = (side[first : first + _AT_ONCE].astype(np.int32) for side in flat)
        total += int(np.sum(np.square(x - y), dtype=np.int64))
    return total


def psnr(a: UInt8[np.ndarray, "*shape"], b: UInt8[np.ndarray, "*shape"]) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 arrays (peak 255); inf where they are equal."""
    mse = squared_error(a, b) / a.size
    return math.inf if mse == 0 else 10 * math.log10(255**2 / mse)


def ssim(
    a: UInt8[np.ndarray, "*b rows columns c"], b: UInt8[np.ndarray, "*b rows columns c"]
) -> Float[np.ndarray, "*b"]:
    """Structural similarity of each pair of images: 1 where they are equal.

    The mean over the channels and over the windows that lie inside of the image, as scikit-image and torchmetrics
    compute it with a Gaussian window (the paper speaks of grey images only).

    Raises:
      ValueError: the images are smaller than the window.
    """
    *leading, rows, columns, _ = a.shape
    side = 2 * _RADIUS + 1
    if min(rows, columns) < side:
        raise ValueError(
            f"SSIM needs images of {side} x {side} pixels or more, not {rows} x {columns}."
        )
    pairs = zip(a.reshape(-1, *a.shape[-3:]), b.reshape(-1, *b.shape[-3:]), strict=True)
    # An image at a time: five float64 arrays of a whole video would take 40 times its memory.
    values = np.array([_ssim_of_images(*pair) for pair in pairs], np.float64)
    return values.reshape(leading)


def _ssim_of_images(
    a: UInt8[np.ndarray, "rows columns c"], b: UInt8[np.ndarray, "rows columns c"]
) -> float:
    from scipy.ndimage import gaussian_filter  # takes half a second, and only SSIM needs it

    x, y = a.astype(np.float64), b.astype(np.float64)

    def mean(z: Float[np.ndarray, "rows columns c"]) -> Float[np.ndarray, "r k c"]:
        blurred = gaussian_filter(z, _DEVIATION, radius=_RADIUS, axes=(0, 1))
        return blurred[_RADIUS:-_RADIUS, _RADIUS:-_RADIUS]

    mean_x, mean_y = mean(x), mean(y)
    variances = mean(x * x) - mean_x**2 + mean(y * y) - mean_y**2
    covariance = mean(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
    return float(np.mean(luminance * (2 * covariance + _C2) / (variances + _C2)))

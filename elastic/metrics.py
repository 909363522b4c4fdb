"""How close a reconstruction is."""

import math

import numpy as np
from jaxtyping import UInt8


def psnr_of_mse(mse: float) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error with pixels in [-1, 1] (peak to peak 2); inf for 0."""
    return math.inf if mse == 0 else 10 * math.log10(4 / mse)


def psnr(a: UInt8[np.ndarray, "*shape"], b: UInt8[np.ndarray, "*shape"]) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 arrays (peak 255); inf where they are equal."""
    mse = float(np.mean(np.square(a.astype(np.float64) - b.astype(np.float64))))
    return math.inf if mse == 0 else 10 * math.log10(255**2 / mse)

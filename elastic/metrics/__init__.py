"""Measures how different two pictures or clips are."""

from elastic.metrics.distortion import Metric, make_metric
from elastic.metrics.image import mse_of_psnr, psnr, psnr_of_mse, squared_error, ssim
from elastic.metrics.lpips import lpips
from elastic.metrics.lpips_weights import load_lpips_weights

__all__ = [
    "Metric",
    "load_lpips_weights",
    "lpips",
    "make_metric",
    "mse_of_psnr",
    "psnr",
    "psnr_of_mse",
    "squared_error",
    "ssim",
]

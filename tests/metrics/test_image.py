"""SSIM and PSNR against their formulas."""

import itertools
import math

import numpy as np
import pytest

from elastic.metrics import psnr, psnr_of_mse, ssim


def pictures(*shape, seed=0):
    """Smooth pictures with a little noise: what SSIM is made for."""
    rng = np.random.default_rng(seed)
    rows, columns = np.arange(shape[-3])[:, None, None], np.arange(shape[-2])[None, :, None]
    waves = rng.uniform(0.05, 0.4, (2, *shape[:-3], 1, 1, shape[-1]))
    smooth = 128 + 80 * np.sin(rows * waves[0]) * np.cos(columns * waves[1])
    return np.clip(smooth + rng.normal(0, 8, shape), 0, 255).astype(np.uint8)


def slow_ssim(a, b):
    """Window by window, from the definition (Wang et al. 2004, eq. 13 to 16)."""
    at = np.arange(11) - 5
    window = np.exp(-(at[:, None] ** 2 + at[None, :] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    rows, columns, channels = a.shape
    found = []
    for i, j, c in itertools.product(range(rows - 10), range(columns - 10), range(channels)):
        x, y = (z[i : i + 11, j : j + 11, c].astype(np.float64) for z in (a, b))
        mx, my = (window * x).sum(), (window * y).sum()
        vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
        cov = (window * (x - mx) * (y - my)).sum()
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        value = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
        found.append(value)
    return np.mean(found)


@pytest.mark.parametrize("size", [(11, 11), (24, 17)], ids=str)
def test_ssim_is_the_mean_over_windows_of_the_papers_formula(size):
    a, b = pictures(2, *size, 3), pictures(2, *size, 3, seed=1)
    mixed = (0.7 * a + 0.3 * b).astype(np.uint8)
    found = ssim(a, mixed)
    assert found == pytest.approx([slow_ssim(*pair) for pair in zip(a, mixed, strict=True)])
    assert (found > 0.1).all() and (found < 0.99).all()


def test_ssim_gives_one_value_an_image_and_1_for_equal_ones():
    video = pictures(2, 3, 16, 20, 3)
    assert ssim(video, video) == pytest.approx(np.ones((2, 3)))
    assert ssim(video[0, 0], video[0, 0]).shape == ()
    other = 255 - video
    assert ssim(video, other) == pytest.approx(ssim(other, video))
    assert (ssim(video, other) < 0).all()  # a negative is the opposite
    black = np.zeros((16, 16, 3), np.uint8)
    assert ssim(black, black) == 1 and ssim(black, black + 255) == pytest.approx(0, abs=1e-3)


def test_an_image_smaller_than_the_window_is_refused():
    small = np.zeros((4, 10, 64, 3), np.uint8)
    with pytest.raises(ValueError, match="11 x 11 pixels or more, not 10 x 64"):
        ssim(small, small)


def test_psnr_of_pixels_and_of_a_mean_squared_error_agree():
    a, b = pictures(16, 16, 3), pictures(16, 16, 3, seed=1)
    mse = np.mean(np.square((a.astype(float) - b) / 127.5))
    assert psnr(a, b) == pytest.approx(psnr_of_mse(float(mse)))
    assert psnr(a, a) == psnr_of_mse(0.0) == math.inf

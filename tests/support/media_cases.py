"""Clips, pictures and comparisons that the tests of media share."""

import subprocess

import imageio_ffmpeg
import numpy as np
from PIL import Image

from elastic.media import open_clip

CLIP = "media/clip_160x120_30fps_97f.mp4"
PATCH = {"fsq": (1, 8, 8), "vae": (2, 8, 8)}


def ffmpeg(*arguments) -> bytes:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True).stdout


def gray_frames(num_frames, rows=48, columns=64):
    """Frame i is flat gray of level 4 i + 10, so that a decoded frame tells which one it is."""
    return [np.full((rows, columns, 3), 4 * i + 10, np.uint8) for i in range(num_frames)]


def numbers(frames):
    return np.rint((frames.mean(axis=(1, 2, 3)) - 10) / 4).astype(int).tolist()


def texture(rows, columns, seed=0):
    small = np.random.default_rng(seed).integers(0, 256, (rows // 8 + 2, columns // 8 + 2, 3))
    image = Image.fromarray(small.astype(np.uint8)).resize(
        (columns, rows), Image.Resampling.BICUBIC
    )
    return np.asarray(image)


def read_one(path, resolution=32):
    with open_clip(path, resolution=resolution) as clip:
        frames = clip.read()
    assert frames.shape == (1, resolution, resolution, 3)
    assert frames.dtype == np.uint8
    return frames[0]


def psnr(a, b):
    return 10 * np.log10(255**2 / max(np.mean((a.astype(float) - b) ** 2), 1e-9))

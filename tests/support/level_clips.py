"""Clips whose frames are flat and of a level that tells which file and which place they are of."""

import numpy as np

from elastic import media


def write_clip(path, colour, num_frames):
    """Frame i is flat, of level `colour` + 2 i, so that a frame tells its file and its place."""
    frames = [np.full((40, 40, 3), colour + 2 * i, np.uint8) for i in range(num_frames)]
    media.write_video(path, frames, 24)


def make_folder(folder):
    """Clips of 1 to 9 blocks and images, in nested folders; the level tells which file it is."""
    (folder / "deep" / "er").mkdir(parents=True)
    for k, num_frames in enumerate((2, 5, 9, 18)):
        write_clip(folder / ("deep" if k % 2 else ".") / f"clip{k}.mp4", 20 + 50 * k, num_frames)
    for k in range(3):
        picture = np.full((64, 48, 3), 40 + 50 * k, np.uint8)
        media.write_image(folder / "deep" / "er" / f"image{k}.png", picture)
    (folder / "notes.txt").write_text("not media")
    return folder


def damaged_clip(path):
    """Measured as whole, as its packets are all there, but its second half cannot be decoded."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 40, 3)).astype(np.uint8)
    media.write_video(path, list(noise), 24)
    data = bytearray(path.read_bytes())
    data[-len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    path.write_bytes(data)

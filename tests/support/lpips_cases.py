"""Where the weights of LPIPS lie in a cache folder."""

import pathlib


def cached_file(folder: pathlib.Path) -> pathlib.Path:
    """The file of weights in a folder that stands for ~/.cache."""
    return folder / "elastic" / "lpips_vgg16.safetensors"

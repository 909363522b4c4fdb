"""FVD and FID: how far apart the features of reconstructions and originals are distributed, by Fréchet's distance.

FVD (Unterthiner et al. 2018) looks at windows of 16 frames through I3D, FID (Heusel et al. 2017) at single frames through
Inception. Numbers of other papers were made with two files of TorchScript, `i3d_torchscript.pt` and
`inception-2015-12-05.pt`. They are run here as they are, by PyTorch: a conversion would give other numbers.
"""

import importlib
import os
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from elastic.patches import to_unit_range

WINDOW = 16  # frames that FVD looks at together

# The networks, and the names of the files that others use.
NETWORKS = {
    "fvd": "I3D, i3d_torchscript.pt of StyleGAN-V",
    "fid": "Inception, inception-2015-12-05.pt of StyleGAN2-ADA",
}

# Takes windows or frames, uint8 [n, 16, rows, columns, 3] for FVD and [n, rows, columns, 3] for FID; returns float [n, d].
Network = Callable[[np.ndarray], np.ndarray]


def load_network(name: Literal["fvd", "fid"], path: str | os.PathLike) -> Network:
    """The network that a Fréchet distance looks through, out of the file of TorchScript that everyone uses.

    Args:
      name: 'fvd' for I3D, 'fid' for Inception.
      path: `i3d_torchscript.pt` of StyleGAN-V, or `inception-2015-12-05.pt` of StyleGAN2-ADA. TorchScript holds a
        program of its own small language: take it from where you trust.

    Returns:
      A function of uint8 frames, at their own size: the files resize them as they were trained.

    Raises:
      ValueError: PyTorch is not installed, there is no such file, or it is no TorchScript of this network.
    """
    flag, what = f"--{name}_weights", f"the TorchScript file of {NETWORKS[name]}"
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        raise ValueError(
            f"{name.upper()} runs {what} by PyTorch, which is not installed: `pip install torch`, or leave out {flag}."
        ) from None
    if not os.path.isfile(path):
        raise ValueError(f"{flag}={os.fspath(path)!r} is no file; name {what}.")
    try:
        # No unpickling: PyTorch reads TorchScript with an interpreter of its own, which runs no Python.
        network: Any = torch.jit.load(os.fspath(path), map_location="cpu").eval()
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{flag}={os.fspath(path)!r} is not {what}: {reason}") from error

    def features(frames: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            if name == "fvd":
                inputs = torch.from_numpy(np.moveaxis(to_unit_range(frames), -1, 1).copy())
                found = network(inputs, rescale=False, resize=True, return_features=True)
            else:
                inputs = torch.from_numpy(np.moveaxis(frames, -1, 1).copy())
                found = network(inputs, return_features=True)
        return found.float().reshape(len(frames), -1).numpy()

    black = np.zeros((1, *(WINDOW,) * (name == "fvd"), 64, 64, 3), np.uint8)
    try:
        features(black)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"{flag}={os.fspath(path)!r} is not {what}: {reason}") from error
    return features


def frechet_distance(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]) -> float | None:
    """Fréchet's distance of two sets of features, each taken as a normal distribution; None: a set has fewer than two.

    |mean a - mean b|^2 + tr(A + B - 2 (A B)^(1/2)) for covariances A and B. With A = F'F and B = G'G the eigenvalues of
    (A B)^(1/2) are the singular values of F G', which are real whatever the rounding.
    """
    if min(len(a), len(b)) < 2:
        return None
    (mean_a, root_a), (mean_b, root_b) = _moments(a), _moments(b)
    shared = np.linalg.norm(root_a @ root_b.T, "nuc")
    spread = np.sum(root_a**2) + np.sum(root_b**2) - 2 * shared
    return float(np.sum((mean_a - mean_b) ** 2) + spread)


def _moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean [d], and a matrix F [min(n, d), d] with F'F the covariance."""
    features = np.asarray(features, np.float64)
    mean = features.mean(axis=0)
    centred = (features - mean) / np.sqrt(len(features) - 1)
    return mean, np.asarray(np.linalg.qr(centred, mode="r"))

"""Implementations of attention by name: which exist, what each can serve, and which is best for a device.

A new implementation is a file with `KERNEL` (a `base.Kernel`) and `check(head_dim, dtype)`; register it here.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from elastic.distributed.mesh import platform_of
from elastic.ops.attention import blockwise
from elastic.ops.attention.base import Kernel

log = logging.getLogger(__name__)

# 'reference' is the definition, which makes an array of queries x keys. The '_interpret' names run the source of the
# Pallas kernels on any device, slowly, for tests and debugging. 'gpu' is cuDNN where it can serve and 'pallas_gpu'
# elsewhere (see cudnn.py).
IMPLEMENTATIONS = (
    "reference",
    "blockwise",
    "pallas_tpu",
    "gpu",
    "pallas_gpu",
    "pallas_tpu_interpret",
    "pallas_gpu_interpret",
)
_PLATFORM = {"pallas_tpu": "tpu", "gpu": "gpu", "pallas_gpu": "gpu"}  # the others run anywhere
_BEST = {"tpu": ("pallas_tpu",), "gpu": ("gpu", "pallas_gpu")}  # the first that can serve


def choose_implementation(
    name: str | None = None,
    *,
    head_dim: int = 128,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
) -> str:
    """The implementation called `name`; None or '' picks the best for the device and logs the choice.

    Args:
      name: a name out of `IMPLEMENTATIONS`, None or ''.
      head_dim: channels of a head.
      dtype: the dtype of queries, keys and values.
      mesh: the devices that it must run on; None: the default device.

    Raises:
      ValueError: no implementation has that name, or it cannot serve this device, head_dim or dtype. An implementation
        that was asked for by name is never replaced by another.
    """
    platform = platform_of(mesh)
    dtype = jnp.dtype(dtype)
    if not name:
        return _best(platform, head_dim, dtype)
    if name not in IMPLEMENTATIONS:
        raise ValueError(
            f"attention implementation {name!r} must be one of {', '.join(IMPLEMENTATIONS)}."
        )
    needs = _PLATFORM.get(name, platform)
    if needs != platform:
        raise ValueError(
            f"attention implementation {name!r} runs on {needs}, and the device is {platform}; leave it empty for "
            f"{_BEST.get(platform, ('blockwise',))[0]!r}, or take 'pallas_{needs}_interpret' to run the same source slowly anywhere."
        )
    _kernel(name)[1](head_dim, dtype)
    return name


def kernel_of(name: str) -> Kernel:
    """The kernel of an implementation other than 'reference'."""
    return _kernel(name)[0]


@functools.cache
def _best(platform: str, head_dim: int, dtype: jnp.dtype) -> str:
    for name in (*_BEST.get(platform, ()), "blockwise"):
        try:
            _kernel(name)[1](head_dim, dtype)
        except ValueError as error:
            log.warning("Attention does not run as %r on %s: %s", name, platform, error)
            continue
        log.debug("Attention runs as %r on %s.", name, platform)
        return name
    raise AssertionError("'blockwise' serves everything")


@functools.cache
def _kernel(name: str) -> tuple[Kernel, Callable[[int, Any], None]]:
    """A kernel, and its check, which raises ValueError for a head_dim or dtype that the kernel cannot serve."""
    if name.startswith("pallas_tpu"):
        from elastic.ops.attention import pallas_tpu as module
    elif name == "gpu":
        from elastic.ops.attention import cudnn as module
    elif name.startswith("pallas_gpu"):
        from elastic.ops.attention import pallas_gpu as module
    else:
        return blockwise.KERNEL, lambda head_dim, dtype: None
    interpreted = name.endswith("_interpret")
    return getattr(module, "INTERPRET_KERNEL" if interpreted else "KERNEL"), module.check

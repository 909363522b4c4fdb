"""Virtual CPU devices, and freed memory returned to the operating system."""

import contextlib
import ctypes
import functools
import os
from typing import Any

import jax
import jax.monitoring

_COMPILED = "/jax/core/compile/backend_compile_duration"


@functools.cache
def return_after_compiling() -> None:
    """Makes this process return freed memory to the operating system after every XLA compilation.

    glibc keeps freed memory for later use. After compiling the training step of the debug model that is 300 MB, a third
    of the memory of the whole run (measured). With another C library this does nothing.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        return

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        del duration_secs
        if event == _COMPILED:
            trim(0)

    jax.monitoring.register_event_duration_secs_listener(listen)


def set_up_cpu() -> None:
    """Sets up one CPU device per core, up to 8, and `return_after_compiling`. Call it before jax starts its backends.

    A number of devices that the user has set is kept. XLA runs elementwise operations inside loops on one core per
    device: attention with its heads on two devices takes about 60 % of the time of one device (measured on two cores).
    """
    return_after_compiling()
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" in flags or "JAX_NUM_CPU_DEVICES" in os.environ:
        return
    with contextlib.suppress(RuntimeError):  # the backends have started: keep their devices
        jax.config.update("jax_num_cpu_devices", num_cpu_devices())


def num_cpu_devices() -> int:
    """The CPU devices that `set_up_cpu` gives a process: one per core, a power of 2, at most 8."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return min(8, 1 << (cores.bit_length() - 1))

"""Memory of this process that the C library keeps after it was freed."""

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
    """From now on, whenever XLA has compiled a program, what that took goes back to the operating system.

    glibc keeps freed memory for later use: after the training step of the debug model was compiled these are 300 MB, a third of what the
    whole run takes (measured). Another C library is left alone.
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
    """One CPU device per core, up to 8, unless the user decided otherwise, and small memory. Call before jax starts its backends.

    Elementwise work inside loops runs on one core per device, so that attention over heads on two devices takes about 60 %
    of the time of one (measured on two cores).
    """
    return_after_compiling()
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" in flags or "JAX_NUM_CPU_DEVICES" in os.environ:
        return
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    with contextlib.suppress(RuntimeError):  # the backends run already: keep what they have
        jax.config.update("jax_num_cpu_devices", min(8, 1 << (cores.bit_length() - 1)))

"""Memory freed after a compilation returns to the operating system."""

import ctypes
import types

import jax
import jax.numpy as jnp

from elastic.distributed import cpu_devices


def test_memory_goes_back_once_for_every_program_that_is_compiled(monkeypatch):
    trims: list[int] = []
    library = types.SimpleNamespace(malloc_trim=trims.append)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    cpu_devices.return_after_compiling.__wrapped__()  # whatever was set up before
    program = jax.jit(lambda x: jnp.sin(x) * 3)
    x = jax.device_put(jnp.ones(17))
    before = len(trims)
    program(x)
    assert len(trims) == before + 1
    program(x)
    assert len(trims) == before + 1


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: types.SimpleNamespace())
    cpu_devices.return_after_compiling.__wrapped__()

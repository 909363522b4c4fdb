"""Settings of the whole suite: 8 virtual CPU devices, and the released system's numbers as fixtures."""

import pathlib

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)  # meshes without hardware
jax.config.update("jax_numpy_rank_promotion", "raise")

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden() -> pathlib.Path:
    """The folder of files that the released system computed (see tests/golden/README.md)."""
    return GOLDEN

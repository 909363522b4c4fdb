"""Settings of the whole suite: 8 virtual CPU devices, and the released system's numbers as fixtures."""

import pathlib
import signal

import hypothesis
import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

jax.config.update("jax_num_cpu_devices", 8)  # meshes without hardware
jax.config.update("jax_numpy_rank_promotion", "raise")

# No test asserts a time, also not by a library's default.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

# Started in the background, pytest may find Ctrl-C ignored, and so would the programs that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def programs_kept(tmp_path_factory):
    """What several runs or tokenizers of a module compile is compiled once: the second takes it from a folder."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("programs")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def one_device():
    """What is proved of training does not depend on the mesh, and one device compiles fastest."""
    from elastic.distributed.mesh import make_mesh
    from elastic.training import loop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_mesh", lambda dim: make_mesh(dim, jax.devices()[:1]))
        yield


@pytest.fixture(scope="session", autouse=True)
def programs_of_scripts(tmp_path_factory):
    """What scripts compile that tests start is not kept in the user's cache. This process has read its variables before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(
            "JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "of_scripts")
        )
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
        yield


@pytest.fixture(scope="session")
def golden() -> pathlib.Path:
    """The folder of files that the released system computed (see tests/golden/README.md)."""
    return GOLDEN

"""Settings of the whole suite: 8 virtual CPU devices, quick compilation, and the released system's numbers as fixtures."""

import contextlib
import gc
import importlib.metadata
import os
import pathlib
import signal

# Most of the suite's time is XLA's, and most programs run once: do not optimize them. Programs that tests start inherit this.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # XLA's newer code generator for fusions takes a third of the time of compiling a training step. Later versions of jaxlib
    # have no other, and stop at the name of the flag.
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"
    )

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


def pytest_collection_finish():
    """The modules stay: the garbage collector need not look through them again and again while jax traces."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@contextlib.contextmanager
def optimized_programs():
    """What is compiled meanwhile is optimized as users have it."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="module")
def optimized():
    """Optimized programs, for modules whose tests run them for longer than it takes to compile them."""
    with optimized_programs():
        yield


@pytest.fixture
def optimized_test():
    """Optimized programs, for a test whose tolerance is that of such programs."""
    with optimized_programs():
        yield


@pytest.fixture(scope="module")
def one_device():
    """What is proved of training does not depend on the mesh, and one device compiles fastest."""
    from elastic.distributed.mesh import make_mesh
    from elastic.training import loop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_mesh", lambda dim: make_mesh(dim, jax.devices()[:1]))
        yield


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory):
    """Every program is compiled once for all tests, by this process, its neighbours or those that tests start.

    The others take it from a folder. It has a limit of size because jax locks its files only then.
    """
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "programs"
    options = dict(
        jax_compilation_cache_dir=str(folder),
        jax_compilation_cache_max_size=10_000_000_000,
        jax_persistent_cache_min_compile_time_secs=0.1,
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in options.items():
            jax.config.update(name, value)
            patch.setenv(name.upper(), str(value))
        compilation_cache.reset_cache()
        # From here on a command line that a test calls cannot set another number.
        assert len(jax.devices()) == 8
        yield


@pytest.fixture(scope="session")
def golden() -> pathlib.Path:
    """The folder of files that the released system computed (see tests/golden/README.md)."""
    return GOLDEN

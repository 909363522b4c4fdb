"""The weights of LPIPS, cached once for all tests of metrics."""

import jax
import pytest
from lpips_cases import cached_file

from elastic.metrics import load_lpips_weights


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A cache folder that the first load has filled."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        load_lpips_weights()
    return folder


@pytest.fixture(scope="session")
def weights(cache):
    return jax.device_put(load_lpips_weights(cached_file(cache)))

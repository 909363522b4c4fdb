"""DISTS against the paper's formula in NumPy, and the file of its weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastic.io.tree import unflatten
from elastic.metrics import dists as module
from elastic.metrics.dists import DistsWeights, dists, dists_of_frames, load_dists_weights
from elastic.metrics.lpips import vgg16
from elastic.metrics.lpips_weights import SHAPES

DRAW = np.random.default_rng(0)
VGG = unflatten({path: DRAW.normal(0, 0.05, shape).astype(np.float32) for path, shape in SHAPES.items()})  # fmt: skip
RAW = DRAW.random((2, 1475)).astype(np.float32)
WEIGHTS = DistsWeights(*(RAW / RAW.sum()))
FRAMES = DRAW.integers(0, 256, (2, 3, 18, 16, 3), dtype=np.uint8)


def test_it_is_the_formula_of_the_paper():
    def features(frames):
        x = jnp.asarray(frames / 127.5 - 1, jnp.float32)
        maps = [(x + 1) / 2, *jax.jit(lambda x: vgg16(VGG, x, pool=module._l2_pool))(x)]
        return [np.asarray(m, np.float64).reshape(len(frames), -1, m.shape[-1]) for m in maps]

    scores = 1.0
    means, covariances = [], []
    for x, y in zip(*map(features, FRAMES), strict=True):
        mean_x, mean_y = x.mean(1), y.mean(1)
        means.append((2 * mean_x * mean_y + 1e-6) / (mean_x**2 + mean_y**2 + 1e-6))
        covariance = ((x - mean_x[:, None]) * (y - mean_y[:, None])).mean(1)
        covariances.append((2 * covariance + 1e-6) / (x.var(1) + y.var(1) + 1e-6))
    scores = 1 - np.concatenate(means, 1) @ WEIGHTS.texture - np.concatenate(covariances, 1) @ WEIGHTS.structure  # fmt: skip
    found = dists_of_frames(VGG, WEIGHTS, *FRAMES, batch_size=2)
    np.testing.assert_allclose(found, scores, atol=1e-4)
    assert (found > 0.01).all()


def test_equal_frames_have_no_distance_and_both_sides_are_alike():
    a, b = FRAMES
    assert np.abs(dists_of_frames(VGG, WEIGHTS, a, a, batch_size=2)).max() < 1e-5
    one, other = (dists_of_frames(VGG, WEIGHTS, *pair, batch_size=2) for pair in ((a, b), (b, a)))
    np.testing.assert_allclose(one, other, atol=1e-6)
    with pytest.raises(ValueError, match=r"16 x 16 pixels or more"):
        dists(VGG, WEIGHTS, *jnp.zeros((2, 1, 8, 8, 3)))


def test_only_the_known_file_gives_weights(tmp_path, monkeypatch):
    (tmp_path / "weights.pt").write_bytes(b"\x80\x02something else")
    with pytest.raises(ValueError, match=r"is not the weights\.pt of DISTS_pytorch 0.1"):
        load_dists_weights(tmp_path / "weights.pt")
    monkeypatch.setattr(module, "_DISTRIBUTION", "no-such-package")
    with pytest.raises(
        ValueError, match=r"not installed: `pip install --no-deps .*--dists_weights"
    ):
        load_dists_weights()


def test_the_runs_behind_the_pickle_are_the_weights(tmp_path, monkeypatch):
    runs = b"".join((1475).to_bytes(8, "little") + run.astype("<f4").tobytes() for run in RAW)
    (tmp_path / "weights.pt").write_bytes(b"\x80\x02 a pickle that is not read" + runs)
    digest = module.hashlib.sha256((tmp_path / "weights.pt").read_bytes()).hexdigest()
    monkeypatch.setattr(module, "_FILE_SHA256", digest)
    for found, expected in zip(load_dists_weights(tmp_path / "weights.pt"), WEIGHTS, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5)

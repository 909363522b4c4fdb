"""Checkpoint files: the released format to the byte, both layouts, and refusal by name."""

import json
import math
import os
import tracemalloc
import warnings

import flax.serialization
import jax
import ml_dtypes
import msgpack
import numpy as np
import optax
import pytest
from checkpoint_cases import FSQ, FSQ_NUMBERED, assert_same, file_tree, golden_config
from flax.training.train_state import TrainState
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.checkpoints import (
    load_params,
    load_train_state,
    save_params,
    save_pretrained,
    save_train_state,
)
from elastic.checkpoints.params import CheckpointError, convert_layout, restore_into
from elastic.config import ElasticTokConfig
from elastic.io import msgpack_stream
from elastic.io import tensors as tensor_file
from elastic.io.tensors import BFLOAT16
from elastic.io.tree import flatten, unflatten
from elastic.model import param_shapes

PARAM_FILES = [f"params_{a}_{b}" for a in ("scan", "unscan") for b in ("fp32", "bf16")]
STATE_FILES = ["trainstate_scan_fp32", "trainstate_scan_bf16", "trainstate_unscan_bf16"]


def reference_stream(tree) -> bytes:
    """What the released system writes: msgpack pairs of key path and flax bytes."""
    records = flatten(tree).items()
    return b"".join(msgpack.packb((path, flax.serialization.to_bytes(x))) for path, x in records)


# The released files


@pytest.mark.parametrize("case", ["fsq", "vae"])
@pytest.mark.parametrize("name", PARAM_FILES + STATE_FILES)
def test_released_files_are_read_and_written_again_byte_for_byte(golden, tmp_path, case, name):
    config = golden_config(case, scan_layers="unscan" not in name)
    file = golden / case / "ckpt" / name
    if name in STATE_FILES:
        file = file / "streaming_train_state"
        save_train_state(tmp_path / "again", load_train_state(file, config))
    else:
        save_params(tmp_path / "again", load_params(f"params::{file}", config))
    assert (tmp_path / "again").read_bytes() == file.read_bytes()


@pytest.mark.parametrize("case", ["fsq", "vae"])
@pytest.mark.parametrize("layout", ["scan", "unscan"])
def test_parameter_names_and_shapes_of_the_200m_models_are_the_released_ones(golden, case, layout):
    vae = dict(patch_size=(2, 8, 8), max_toks=2048, min_toks=128) if case == "vae" else {}
    config = ElasticTokConfig(bottleneck_type=case, scan_layers=layout == "scan", **vae)
    released = json.loads((golden / f"release_200m/param_list_{case}_{layout}.json").read_text())
    found = {"/".join(path): leaf for path, leaf in flatten(param_shapes(config)).items()}
    assert {name: [list(leaf.shape), leaf.dtype.name] for name, leaf in found.items()} == {
        entry["path"]: [entry["shape"], entry["dtype"]] for entry in released
    }
    total = json.loads((golden / "release_200m/totals.json").read_text())[f"{case}_{layout}"]
    assert sum(math.prod(leaf.shape) for leaf in found.values()) == total["n_params"]


@pytest.mark.parametrize("case", ["fsq", "vae"])
@pytest.mark.parametrize("layout", ["scan", "unscan"])
@pytest.mark.parametrize("kind", ["param", "trainstate"])
def test_files_hold_the_listed_tensors(golden, case, layout, kind):
    listed = json.loads((golden / case / f"{kind}_list_{layout}.json").read_text())
    file = golden / case / "ckpt" / f"{kind}s_{layout}_bf16".replace("states", "state")
    file = file / "streaming_train_state" if kind == "trainstate" else file
    found = {"/".join(tensor.path): tensor.shape for tensor in msgpack_stream.index_stream(file)}
    assert found == {entry["path"]: tuple(entry["shape"]) for entry in listed}


@pytest.mark.parametrize("case", ["fsq", "vae"])
@pytest.mark.parametrize("float_type", ["fp32", "bf16"])
def test_either_layout_of_a_file_loads_into_either_layout(golden, case, float_type):
    folder = golden / case / "ckpt"
    for scan_layers in (True, False):
        config = golden_config(case, scan_layers=scan_layers)
        trees = [load_params(f"params::{folder}/params_{a}_{float_type}", config) for a in ("scan", "unscan")]  # fmt: skip
        assert_same(*trees)
        assert_same(trees[0], load_params(f"{folder}/params_scan_{float_type}", config))


@pytest.mark.parametrize("scan_layers", [True, False])
def test_either_layout_of_a_train_state_loads_into_either_layout_moments_too(golden, scan_layers):
    config = golden_config("fsq", scan_layers=scan_layers)
    for stored in (True, False):
        folder = golden / "fsq/ckpt" / f"trainstate_{'scan' if stored else 'unscan'}_bf16"
        state = load_train_state(folder, config)
        as_stored = load_train_state(folder, golden_config("fsq", scan_layers=stored))
        assert_same(state, convert_layout(as_stored, scan_layers=scan_layers))
        assert state["step"] == 2 and set(state["opt_state"]["1"]["0"]) == {"count", "mu", "nu"}
        for prefix in ("trainstate", "trainstate_params"):
            found = load_params(f"{prefix}::{folder}/streaming_train_state", config)
            assert_same(found, state["params"]["params"])


def test_a_train_state_resumes_in_flax_and_optax_and_is_written_the_same(golden, tmp_path):
    file = golden / "fsq/ckpt/trainstate_scan_fp32/streaming_train_state"
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), param_shapes(FSQ))
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(optax.constant_schedule(1e-4))
    )
    state = TrainState.create(apply_fn=None, params={"params": zeros}, tx=optimizer)
    loaded = load_train_state(file, FSQ)
    state = restore_into(state, loaded)
    assert int(state.step) == 2
    save_train_state(tmp_path / "again", jax.tree.map(np.asarray, state))
    assert (tmp_path / "again").read_bytes() == file.read_bytes()
    other = {"step": loaded["step"], "params": loaded["params"], "opt_state": {"0": {"mu": 1}}}
    with pytest.raises(CheckpointError, match="opt_state/1/0/count is missing"):
        restore_into(state, other)
    other = loaded | {"momentum": np.zeros(3)}
    with pytest.raises(CheckpointError, match="momentum is not in this optimizer's"):
        restore_into(state, other)
    loaded["opt_state"]["1"]["2"]["count"] = np.zeros(3)
    with pytest.raises(CheckpointError, match=r"opt_state/1/2/count: expected shape \(\), found"):
        restore_into(state, loaded)


def test_loading_says_nothing_when_all_is_well(golden, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_params(f"params::{golden}/fsq/ckpt/params_scan_fp32", FSQ)
        load_train_state(golden / "fsq/ckpt/trainstate_scan_bf16", FSQ)
    assert capfd.readouterr() == ("", "")


# The format


def random_array(dtype: str, shape: list[int], seed: int) -> np.ndarray:
    values = np.random.default_rng(seed).integers(0, 2 if dtype == "bool" else 100, shape)
    return np.asarray(values).astype(getattr(ml_dtypes, dtype, dtype))


arrays = st.builds(
    random_array,
    st.sampled_from(
        "float32 float16 bfloat16 float8_e4m3fn int32 uint8 int64 bool float64".split()
    ),
    st.lists(st.integers(0, 9), max_size=3),
    st.integers(0, 99),
)
names = st.sampled_from(["a", "b", "w.1", "with/slash", "é", "x" * 40])
trees = st.dictionaries(names, arrays | st.dictionaries(names, arrays, min_size=1), min_size=1)


@settings(max_examples=40)
@given(tree=trees, chunk_bytes=st.sampled_from([2**30, 16, 50]))
def test_any_tree_is_written_as_flax_writes_it_and_comes_back(tmp_path_factory, tree, chunk_bytes):
    file, blob = (tmp_path_factory.getbasetemp() / name for name in ("stream", "blob"))
    file.unlink(missing_ok=True)
    with pytest.MonkeyPatch.context() as patch:  # large arrays are cut: at 16 bytes, not at 2**30
        patch.setattr(msgpack_stream, "_CHUNK_BYTES", chunk_bytes)
        patch.setattr(flax.serialization, "MAX_CHUNK_SIZE", chunk_bytes)
        patch.setattr(
            os, "fsync", lambda descriptor: None
        )  # fifty waits for the disk prove nothing
        msgpack_stream.write_stream(file, tree)
        assert file.read_bytes() == reference_stream(tree)
        blob.write_bytes(flax.serialization.to_bytes(tree))
    for path, index in ((file, msgpack_stream.index_stream), (blob, msgpack_stream.index_blob)):
        found = {}
        with open(path, "rb") as data:
            for tensor in index(path):
                found[tensor.path] = np.empty(tensor.shape, tensor.dtype)
                tensor_file.read_into(data, tensor, found[tensor.path])
        assert_same(unflatten(found), tree)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "float32", np.float64, ml_dtypes.bfloat16])
def test_floats_are_converted_as_numpy_converts_them(golden, dtype):
    found = flatten(load_params(f"params::{golden}/fsq/ckpt/params_unscan_fp32", FSQ, dtype=dtype))
    for path, leaf in flatten(file_tree()).items():
        np.testing.assert_array_equal(found[path], leaf.astype(found[path].dtype))
        assert found[path].dtype.name in str(dtype).replace("bf16", "bfloat16").replace("fp16", "float16")  # fmt: skip


def test_saving_with_another_float_type_leaves_integers_alone(golden, tmp_path):
    state = load_train_state(golden / "fsq/ckpt/trainstate_scan_fp32", FSQ)
    save_train_state(tmp_path / "file", state, float_dtype="bf16")
    expected = (golden / "fsq/ckpt/trainstate_scan_bf16/streaming_train_state").read_bytes()
    assert (tmp_path / "file").read_bytes() == expected


def test_loading_takes_little_more_memory_than_the_parameters(tmp_path):
    config = golden_config("fsq").replace(hidden_size=512, intermediate_size=1024)
    shapes = flatten(param_shapes(config))
    tree = unflatten({path: np.ones(leaf.shape, BFLOAT16) for path, leaf in shapes.items()})
    numbered, stacked = tmp_path / "numbered", tmp_path / "stacked"
    save_params(stacked, tree)
    save_params(numbered, convert_layout(tree, scan_layers=False))
    for file in (numbered, stacked):
        for dtype, width in ((None, 2), ("fp32", 4)):
            load_params(f"params::{file}", config)  # warm: tracing the model is not loading
            tracemalloc.start()
            load_params(f"params::{file}", config, dtype=dtype)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 1.3 * width * sum(math.prod(leaf.shape) for leaf in shapes.values())


def test_converting_the_layout_there_and_back_is_the_identity(golden):
    for name in PARAM_FILES[::2]:
        config = golden_config("fsq", scan_layers="unscan" not in name)
        tree = load_params(f"params::{golden}/fsq/ckpt/{name}", config)
        assert_same(convert_layout(tree, scan_layers=config.scan_layers), tree)
        other = convert_layout(tree, scan_layers=not config.scan_layers)
        assert len(flatten(other)) != len(flatten(tree))
        assert_same(convert_layout(other, scan_layers=config.scan_layers), tree)


def test_twelve_layers_keep_their_order(tmp_path):
    tree = {"encoder": {"encoder_blocks": {"scan_decoder": {"w": np.arange(24.0).reshape(12, 2)}}}}
    numbered = convert_layout(tree, scan_layers=False)
    layers = numbered["encoder"]["encoder_blocks"]
    assert list(layers) == [str(layer) for layer in range(12)] and layers["11"]["w"][1] == 23
    # JAX sorts keys as text: '10' comes before '2'.
    resorted = {"encoder": {"encoder_blocks": {key: layers[key] for key in sorted(layers)}}}
    assert_same(convert_layout(resorted, scan_layers=True), tree)
    del layers["5"]
    with pytest.raises(CheckpointError, match=r"layer 5 of .*scan_decoder/w' is missing"):
        convert_layout(numbered, scan_layers=True)


# Files that do not fit or are damaged


def test_a_file_of_another_model_is_refused_by_tensor_and_shape(golden):
    vae = golden / "vae/ckpt/params_scan_fp32"
    with pytest.raises(CheckpointError) as error:
        load_params(f"params::{vae}", FSQ)
    assert "decoder/out_proj/kernel: expected shape (64, 192), found (64, 384)" in str(error.value)
    assert "bottleneck_type='vae' with 8 channels, not 'fsq' with 6 channels" in str(error.value)
    file = golden / "fsq/ckpt/params_unscan_fp32"
    for layers, word in ((3, "missing"), (1, "not in the model")):
        message = f"encoder/encoder_blocks/./.* {word}.* has num_encoder_layers=2, not {layers}"
        with pytest.raises(CheckpointError, match=message):
            load_params(f"params::{file}", FSQ.replace(num_encoder_layers=layers))


def test_missing_foreign_and_integer_tensors_are_named(tmp_path):
    file = tmp_path / "params"
    flat = flatten(file_tree())
    path = ("encoder", "ln_f", "kernel")
    save_params(file, unflatten({name: leaf for name, leaf in flat.items() if name != path}))
    with pytest.raises(CheckpointError, match=r"encoder/ln_f/kernel, shape \(64,\), is missing\. Was the file cut"):  # fmt: skip
        load_params(file, FSQ)
    save_params(file, file_tree() | {"head": {"w": np.zeros(3)}})
    with pytest.raises(CheckpointError, match=r"head/w, shape \(3,\), is not in the model"):
        load_params(file, FSQ)
    save_params(file, unflatten(flat | {path: np.zeros(64, np.int8)}))
    with pytest.raises(CheckpointError, match="encoder/ln_f/kernel is of int8; parameters are"):
        load_params(file, FSQ)


def test_a_file_cut_short_anywhere_is_refused(golden, tmp_path):
    whole = (golden / "fsq/ckpt/params_unscan_bf16").read_bytes()
    tensors = msgpack_stream.index_stream(golden / "fsq/ckpt/params_unscan_bf16")
    ends = [offset + size for tensor in tensors for offset, size in tensor.pieces]
    assert ends[-1] == len(whole)
    cut = tmp_path / "cut"
    for end in {*ends[:-1], *(end - 1 for end in ends), *(end + 9 for end in ends[:-1]), 1, 2, 9}:
        cut.write_bytes(whole[:end])
        with pytest.raises(CheckpointError, match=r"cut short|is missing"):
            load_params(cut, FSQ)


def damaged_record(path=("w",), *, code=1, shape=(2,), dtype="float32", data=b"12345678", tail=b""):
    inner = msgpack.packb((shape, dtype, data)) + tail
    return msgpack.packb((path, msgpack.packb(msgpack.ExtType(code, inner))))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (damaged_record(code=5), "'w' is of extension type 5, not an array; it is not read"),
        (damaged_record(code=2), "extension type 2"),
        (damaged_record(dtype="object"), "'w' has dtype 'object'; known are float16"),
        (damaged_record(dtype="O"), "has dtype 'O'"),
        (damaged_record(dtype=3), "the dtype of tensor 'w': expected msgpack str, found int"),
        (damaged_record(shape=(3,)), r"holds 8 bytes, but its shape \(3,\) of float32 needs 12"),
        (damaged_record(shape=(-2,)), "the shape of tensor 'w': expected msgpack int"),
        (damaged_record(shape=(2**62, 4)), "impossible shape"),
        (damaged_record(shape=(0, 2**62), data=b""), "impossible shape"),
        (damaged_record(shape=(1,) * 33 + (2,)), "34 dimensions"),
        (damaged_record(tail=b"x"), "do not add up"),
        (damaged_record(("w",) * 40), "40 parts"),
        (damaged_record(("",)), "empty name"),
        (damaged_record() + damaged_record(), "'w' is in the file twice"),
        (damaged_record() + damaged_record(("w", "x")), "both a tensor and a branch"),
        (damaged_record(("w", "x")) + damaged_record(), "both a tensor and a branch"),
        (damaged_record(("\x1b[2J" + "w" * 300,), code=5), r"'\\x1b\[2Jw+\.\.\.' is of"),
        (damaged_record()[:-4] + b"\xc0", "cut short: tensor 'w' needs 8 more bytes, 5 are left"),
        (b"\x92\x91\xa1w\xc6\xff\xff\xff\xff\xc9\xff\xff\xff\xf0\x01", "cut short"),
        (b"\x92\xdd\xff\xff\xff\xff", "4,294,967,295 parts"),
        (b"\x92\x91\xdb\xff\xff\xff\xff", "4,294,967,295 bytes long"),
        (b"\x92\x91\xa1w\xc4\x01\x05", "expected an array, found msgpack int"),
        (b"\x92\x91\xa1w\xc4\x03\x81\xa1x", "cut short"),
        (b"\x81\xa1w" * 40, "expected an array, found msgpack map"),
        (b"\x81\xa1w\xc1", "found msgpack byte 0xc1"),
    ],
)
def test_a_damaged_or_hostile_file_is_refused_before_memory_is_taken(tmp_path, content, message):
    file = tmp_path / "file"
    file.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=message):
        load_params(file, FSQ)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**24  # some of these declare 4 GiB and more


@settings(max_examples=200)
@given(at=st.integers(0, 900), byte=st.integers(0, 255))
def test_a_changed_byte_gives_an_error_or_other_numbers_never_a_crash(tmp_path_factory, at, byte):
    tree = {"a": {"b": np.ones((3, 5), np.float32)}, "c": np.ones((100, 2), BFLOAT16)}
    file = tmp_path_factory.getbasetemp() / "fuzz"
    content = bytearray(reference_stream(tree))
    content[at % len(content)] = byte
    file.write_bytes(content)
    try:
        tensors = msgpack_stream.index_stream(file)
    except CheckpointError:
        return
    assert sum(tensor.num_bytes for tensor in tensors) <= len(content)


def test_values_that_are_not_finite_are_named_in_a_warning(tmp_path):
    flat = {path: np.array(leaf) for path, leaf in flatten(file_tree()).items()}
    flat["decoder", "out_proj", "kernel"][3, 4] = np.nan
    save_params(tmp_path / "params", unflatten(flat))
    for dtype in (None, "bf16"):
        with pytest.warns(UserWarning, match=r"1 tensors hold NaN .* the first is decoder/out_proj/kernel"):  # fmt: skip
            load_params(tmp_path / "params", FSQ, dtype=dtype)
    flat["decoder", "out_proj", "kernel"][3, 4] = 1e30
    save_params(tmp_path / "params", unflatten(flat))
    with pytest.warns(UserWarning, match="infinite values as float16"):
        load_params(tmp_path / "params", FSQ, dtype="fp16")
    with pytest.raises(CheckpointError, match="dtype 'int8' is not a float type"):
        load_params(tmp_path / "params", FSQ, dtype="int8")


# Saving


def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    save_pretrained(tmp_path, FSQ, file_tree())
    save_params(tmp_path / "params", file_tree())
    before = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()}
    bad = file_tree() | {"z": np.array([object()])}
    with pytest.raises(CheckpointError, match="'z' is ndarray of dtype object"):
        save_params(tmp_path / "params", bad)
    with pytest.raises(CheckpointError, match="'z' is ndarray of dtype object"):
        save_pretrained(tmp_path, FSQ_NUMBERED, bad)
    with pytest.raises(CheckpointError, match="no tensors"):
        save_params(tmp_path / "params", {"a": {}})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_params(tmp_path / "params", {"a": np.ones(3)})
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(tmp_path, FSQ_NUMBERED, {"a": np.ones(3)})
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == before


def test_a_train_state_without_its_parts_is_not_written(tmp_path):
    with pytest.raises(CheckpointError, match=r"needs 'step', 'params' as \{'params'"):
        save_train_state(tmp_path / "file", {"step": 1, "params": file_tree()})
    assert not list(tmp_path.iterdir())

"""Train states that are not whole: refused by what is missing, wherever the file was cut."""

import re

import jax
import jax.numpy as jnp
import pytest
from checkpoint_cases import FSQ, file_tree

from elastic.checkpoints import load_params, load_train_state, save_train_state
from elastic.checkpoints.params import CheckpointError
from elastic.io import msgpack_stream
from elastic.io.tree import flatten, unflatten
from elastic.training.config import OptimizerConfig
from elastic.training.optimizer import make_optimizer
from elastic.training.state import state_tree
from elastic.training.step import new_state


@pytest.fixture(scope="module")
def states(golden, tmp_path_factory):
    """Train states by name: a released one, and one of a run of ours whose steps make half an update each."""
    optimizer = make_optimizer(OptimizerConfig(accumulate_gradient_steps=2))
    state = new_state(jax.tree.map(jnp.asarray, file_tree()), optimizer, ema=False)
    ours = tmp_path_factory.mktemp("states") / "ours"
    save_train_state(ours, state_tree(jax.device_get(state)))
    return {
        "released": golden / "fsq/ckpt/trainstate_scan_bf16/streaming_train_state",
        "ours": ours,
    }


@pytest.mark.parametrize("name", ["released", "ours"])
def test_a_train_state_cut_short_anywhere_is_refused(states, tmp_path, name):
    whole, tensors = states[name].read_bytes(), msgpack_stream.index_stream(states[name])
    assert int(load_train_state(states[name], FSQ)["step"]) == (2 if name == "released" else 0)
    load_params(f"trainstate_params::{states[name]}", FSQ)
    ends = [tensor.pieces[0][0] + tensor.num_bytes for tensor in tensors]
    assert ends[-1] == len(whole)
    cut = tmp_path / "cut"
    for end in {*ends[:-1], *(end - 3 for end in ends[::9])}:
        cut.write_bytes(whole[:end])
        for load in (load_train_state, load_params):
            with pytest.raises(CheckpointError, match=r"cut short"):
                load(cut, FSQ)


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("step", "'step' is missing. Was"),
        ("opt_state", "'opt_state/1/0/count' is missing, and 53 more. Was"),
        ("opt_state/1/0/count", "'opt_state/1/0/count' is missing. Was"),
        ("opt_state/1/0/mu", "mu/params/decoder/decoder_blocks/scan_decoder/attention/wk/kernel' is missing, and 25"),
        ("opt_state/1/0/nu", "nu/params/decoder/decoder_blocks/scan_decoder/attention/wk/kernel' is missing, and 25"),
        ("opt_state/1/0/nu/params/encoder/ln_f", "'opt_state/1/0/nu/params/encoder/ln_f/kernel' is missing. Was"),
        ("opt_state/1/2", "'opt_state/1/2/count' is missing. Was the file cut short? Copy it again"),
    ],
)  # fmt: skip
def test_a_train_state_that_lacks_a_part_is_neither_read_nor_written(
    states, tmp_path, lost, message
):
    state = flatten(load_train_state(states["released"], FSQ))
    kept = {path: leaf for path, leaf in state.items() if not "/".join(path).startswith(lost)}
    assert len(kept) < len(state)
    msgpack_stream.write_stream(tmp_path / "file", unflatten(kept))
    for load in (load_train_state, load_params):
        with pytest.raises(CheckpointError, match=re.escape(message)):
            load(tmp_path / "file", FSQ)
    with pytest.raises(CheckpointError, match=re.escape(message.partition(" is missing")[0])):
        save_train_state(tmp_path / "again", unflatten(kept))
    assert not (tmp_path / "again").exists()

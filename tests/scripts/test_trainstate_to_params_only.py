"""The script that takes parameters out of training states: what it replaces, and which parameters it takes."""

import jax
import numpy as np
import pytest
from tiny_run import MODELS

from elastic import checkpoints
from elastic.cli import app
from elastic.model import init_params
from elastic.training.checkpoints import Checkpoints
from elastic.training.config import SaveConfig
from elastic.training.state import write_config
from elastic.training.step import TrainState
from scripts import trainstate_to_params_only as script

MODEL = MODELS["vae"]


def params_of(value):
    shapes = jax.eval_shape(lambda: init_params(MODEL, jax.random.key(0)))
    return jax.tree.map(lambda leaf: np.full(leaf.shape, value, np.float32), shapes)


def checkpoint_of(folder, ema):
    """A run's checkpoint: the parameters are 1 everywhere, their mean is 2."""
    none = np.zeros((), np.int32)
    mean = params_of(2) if ema else None
    state = TrainState(none, params_of(1), (), mean, none, none)
    notes = {"model": MODEL.to_json_dict(), "training": {"ema_decay": 0.9 if ema else 0.0}}
    checkpoints = Checkpoints(folder, SaveConfig())
    checkpoints.save(0, state, notes)
    checkpoints.close()
    return str(folder / "checkpoints" / "00000000")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A training state in the released format, beside the model's config.json."""
    folder = tmp_path_factory.mktemp("source")
    tree = {
        "step": np.asarray(0),
        "params": {"params": params_of(1)},
        "opt_state": {
            "count": np.asarray(0),
            "mu": {"params": params_of(0)},
            "nu": {"params": params_of(0)},
        },
    }
    checkpoints.save_train_state(folder / "streaming_train_state", tree)
    write_config(folder, MODEL)
    return f"trainstate::{folder}/streaming_train_state"


def convert(source, path, *flags):
    command = [f"--load_checkpoint={source}", f"--output_path={path}", *flags]
    return app.run(script.CONVERT, script.convert, command)


def value_in(path):
    found = checkpoints.load_params(f"params::{path}", MODEL)
    (value,) = {float(x) for leaf in jax.tree.leaves(found) for x in np.unique(leaf)}
    return value


def test_the_last_line_says_which_parameters_were_written(source, tmp_path, capsys):
    for name, spec, value, message in [
        ("mean", checkpoint_of(tmp_path / "a", ema=True), 2, "the running mean of the parameters"),
        ("last", checkpoint_of(tmp_path / "b", ema=False), 1, "this run kept no running mean"),
        ("state", source, 1, "a running mean (--ema_decay), if the run kept one, is in its checkp"),
    ]:
        assert convert(spec, tmp_path / name) == 0
        assert value_in(tmp_path / name) == value and message in capsys.readouterr().out
    assert convert(f"params::{tmp_path}/last", tmp_path / "again") == 0
    assert "which is no training state" in capsys.readouterr().out


def test_only_a_file_of_parameters_is_replaced(source, tmp_path, capsys):
    assert convert(source, tmp_path / "params") == 0
    assert convert(source, tmp_path / "params") == 0
    state = source.removeprefix("trainstate::")
    (tmp_path / "diary.txt").write_text("dear diary")
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "diary.txt", tmp_path / "empty", tmp_path / "folder", state):
        assert convert(source, path) == 1
        assert f"{path} exists and is no file of parameters" in capsys.readouterr().err
    assert (tmp_path / "diary.txt").read_text() == "dear diary"
    assert checkpoints.load_train_state(state, MODEL)["step"] == 0
    assert (
        convert(source, tmp_path / "new" / "config.json") == 1 and not (tmp_path / "new").exists()
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(theta=2e4), "of another model (theta=20000.0, here 10000.0)"),
        (dict(min_toks=4), "of another model (min_toks=4, here 2)"),
        (None, "beside it is no model's"),
    ],
)
def test_parameters_are_not_put_beside_another_models_config(
    source, tmp_path, capsys, change, message
):
    if change is None:
        (tmp_path / "config.json").write_text("[]")
    else:
        write_config(tmp_path, MODEL.replace(**change))
    before = (tmp_path / "config.json").read_bytes()
    assert convert(source, tmp_path / "params") == 1
    assert message in capsys.readouterr().err and not (tmp_path / "params").exists()
    assert (tmp_path / "config.json").read_bytes() == before


def test_what_does_not_change_the_model_may_differ(source, tmp_path):
    write_config(tmp_path, MODEL.replace(remat_block="nothing_saveable"))
    assert convert(source, tmp_path / "params") == 0

"""The trainer: the loss falls, a run that was stopped goes on bit for bit, and nothing is lost."""

import contextlib
import ctypes
import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

import jax
import ml_dtypes
import numpy as np
import pytest
from tiny_run import MODELS, make_clips, numbers, records, settings

from elastic import checkpoints
from elastic.checkpoints import float8
from elastic.cli import app
from elastic.config import load_config
from elastic.data.dataset import DataPosition
from elastic.distributed.mesh import make_mesh
from elastic.io.tree import flatten
from elastic.model import init_params
from elastic.model.flops import peak_flops
from elastic.tokenizer import ElasticTokenizer
from elastic.training import loop as training
from elastic.training import run, signals
from elastic.training import state as train_state
from elastic.training.checkpoints import Checkpoints
from elastic.training.config import EvalConfig, OptimizerConfig
from elastic.training.evaluator import Evaluator
from elastic.training.feed import DeviceBatches
from elastic.training.loop import train
from elastic.training.optimizer import make_optimizer
from elastic.training.run import Run
from elastic.training.throughput import CLOCK, StepRecorder
from elastic.training.writers import progress_line
from scripts import train as train_script
from scripts import trainstate_to_params_only

pytestmark = pytest.mark.usefixtures("one_device", "one_trace")

WRITTEN = ["checkpoints", "config.json", "data_index.json", "metrics.jsonl", "params", "pretrained", "streaming_train_state"]  # fmt: skip


@pytest.fixture(scope="module")
def one_trace():
    """Runs with the same step share its program: to trace it takes longer than to run it."""
    make, programs = run.step_program, {}

    def shared(config, model, optimizer, shardings):
        other = dict(output_dir="", total_steps=0, load_checkpoint="", load_dataset_state="")
        other |= dict(data=None, log=None, evaluation=None, init="", autoresume=True)
        same = dataclasses.replace(config.save, freq=0, milestone_freq=0, keep=1)
        key = str((dataclasses.asdict(config) | other, same, model, jax.tree.leaves(shardings)))
        if key not in programs:
            programs[key] = make(config, model, optimizer, shardings)
        return programs[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "step_program", shared)
        yield


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return make_clips(tmp_path_factory.mktemp("clips"))


def names(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


@pytest.mark.parametrize("kind", ["fsq", pytest.param("vae", marks=pytest.mark.slow)])
def test_the_loss_falls_and_the_model_is_ready_for_inference(clips, tmp_path, kind):
    config = settings(clips, tmp_path, total_steps=30, save=dict(freq=0))
    state = train(config, MODELS[kind]).state
    losses = [record["loss"] for record in records(tmp_path)]
    assert all(record["model_flops_utilization"] is None for record in records(tmp_path))
    assert len(losses) == 30 and np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
    assert names(tmp_path) == WRITTEN
    assert names(tmp_path / "checkpoints") == ["00000030"]

    for spec in ("pretrained", "params", "streaming_train_state"):
        params = checkpoints.load_params(tmp_path / spec, MODELS[kind])
        jax.tree.map(np.testing.assert_array_equal, params, jax.device_get(state.params))
    tokenizer = ElasticTokenizer.from_pretrained(tmp_path / "pretrained")
    assert tokenizer.config == load_config(str(tmp_path)) == MODELS[kind]
    tokens = tokenizer.encode(clips / "dot.mp4", num_tokens=16)
    assert np.mean([block.loss for block in tokens.blocks]) < losses[0]


@pytest.fixture(scope="module")
def straight(clips, tmp_path_factory):
    """Six steps without a stop: the state and the numbers of each step."""
    folder = tmp_path_factory.mktemp("straight")
    return train(settings(clips, folder), MODELS["vae"]).state, numbers(folder)


@pytest.mark.slow
def test_a_run_that_starts_linear_begins_where_noise_does_not(
    clips, tmp_path, straight, monkeypatch
):
    monkeypatch.setattr(train_state, "_START_PATCHES", 2000)  # of clips as small as these
    config = settings(clips, tmp_path, init="linear", total_steps=1, mask_full_fraction=1.0)
    train(config, MODELS["vae"])
    assert records(tmp_path)[0]["loss"] < straight[1][0]["loss"] / 3


def assert_equal_states(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def test_a_record_says_how_fast_how_full_and_how_long_data_was_waited_for(straight):
    (record, *_) = straight[1]
    assert {"loss", "recon_loss", "aux_loss", "psnr", "gradient_norm", "param_norm", "learning_rate", "kept_tokens",
            "skipped_steps", "epoch", "bad_files", "step"} <= record.keys()  # fmt: skip
    assert record["learning_rate"] == 0  # the rate that the step used: the warm-up begins at 0
    assert 2 < record["kept_tokens"] <= 16 and record["skipped_steps"] == 0
    assert 1 <= record["visible_blocks"] <= 1.5  # of sequences of two blocks


@pytest.mark.parametrize(
    ("share", "shown"),
    [(None, "2.5 GFLOP/s  "), (0.4, "2.5 GFLOP/s (40% of the data sheet's peak)  ")],
)
def test_a_share_of_the_peak_is_logged_where_a_data_sheet_states_one(straight, share, shown):
    """This device has none: a measured product would be no bound, and shares above 100 % no news."""
    assert peak_flops(jax.local_devices()[0].device_kind) is None
    clock = dict.fromkeys(CLOCK, 1.0) | {"model_flops_per_second": 2.5e9}
    record = straight[1][0] | clock | {"model_flops_utilization": share}
    assert shown in progress_line(record, 6)


def test_an_exception_between_two_checkpoints_loses_no_number(
    clips, tmp_path, straight, monkeypatch
):
    original = DeviceBatches.placed
    calls = []

    def killed(self, local):
        calls.append(1)
        if (
            len(calls) == 5
        ):  # after the checkpoint of step 3, and after records that will be repeated
            raise KeyboardInterrupt
        return original(self, local)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(DeviceBatches, "placed", killed)
        train(settings(clips, tmp_path), MODELS["vae"])
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3, 4]
    assert not (tmp_path / "pretrained").exists()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')  # cut off by the kill

    state = train(settings(clips, tmp_path), MODELS["vae"]).state
    assert_equal_states(state, straight[0])
    assert numbers(tmp_path) == straight[1]


WORKER = """
import sys
sys.path[:0] = {paths!r}
import jax
jax.config.update("jax_num_cpu_devices", 1)
import pathlib
from tiny_run import MODELS, settings
from elastic.training.loop import train
from elastic.training.run import Run
{before}
train(settings(pathlib.Path({clips!r}), pathlib.Path({folder!r}), {options}), MODELS["vae"])
"""


@contextlib.contextmanager
def started(clips, folder, options, before=""):
    """A run in a process of its own; `said` is then what it wrote on standard error."""
    tests = pathlib.Path(__file__).parents[1]
    code = WORKER.format(
        paths=[str(tests / "support"), str(tests.parent)],
        clips=str(clips),
        folder=str(folder),
        options=options,
        before=before,
    )
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        yield process
        process.said = process.communicate(timeout=900)[1]


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_like_an_unbroken_one(clips, tmp_path):
    """SIGKILL, with a checkpoint every step: saving is under way at most of these moments."""
    options = "total_steps=16, save=dict(freq=1), data=dict(workers=1)"

    def finish(folder):
        with started(clips, folder, options) as process:
            pass
        assert process.returncode == 0, process.said[-3000:]

    finish(tmp_path / "whole")
    log = tmp_path / "killed" / "metrics.jsonl"
    for at_step in (1, 5):
        with started(clips, tmp_path / "killed", options) as process:
            until = time.time() + 200
            while time.time() < until and process.poll() is None:
                if log.exists() and len(log.read_bytes().splitlines()) > at_step:
                    break
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
    finish(tmp_path / "killed")
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")
    for file in ("params", "streaming_train_state", "pretrained/model.safetensors"):
        assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_leaves_and_the_same_command_goes_on(
    clips, tmp_path, straight, monkeypatch, number
):
    before = signal.getsignal(number)
    record = StepRecorder.__call__

    def signalled(self, step, terms):
        if step == 2:
            os.kill(os.getpid(), number)
        return record(self, step, terms)

    with monkeypatch.context() as patch:
        patch.setattr(StepRecorder, "__call__", signalled)
        finished = train(settings(clips, tmp_path, save=dict(freq=0)), MODELS["vae"])
    assert int(finished.state.step) == 2 and finished.signal == number
    assert signal.getsignal(number) == before
    assert not (tmp_path / "pretrained").exists()
    assert_equal_states(train(settings(clips, tmp_path), MODELS["vae"]).state, straight[0])
    assert numbers(tmp_path) == straight[1]


def stop_in(patch, owner, name, call, *, seconds=300):
    """Sends SIGTERM to this process in a call of `owner.name`, which then lasts as long as an evaluation may."""
    original, calls = getattr(owner, name), []

    def stopped(*arguments, **named):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(seconds)
        return original(*arguments, **named)

    patch.setattr(owner, name, stopped)


class Compiling:
    """A step that the signal finds while it is compiled."""

    def lower(self, *arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(300)


MOMENTS = {  # the step that is saved, and what the signal finds
    "compiling": (0, lambda patch: patch.setattr(Run, "train_step", lambda self: Compiling())),
    "waiting for data": (2, lambda patch: stop_in(patch, DeviceBatches, "placed", 3)),
    "a step before an evaluation": (
        2,
        lambda patch: stop_in(patch, StepRecorder, "__call__", 2, seconds=0),
    ),
    "an evaluation": (2, lambda patch: stop_in(patch, Evaluator, "__call__", 1)),
    "a milestone": (3, lambda patch: stop_in(patch, run, "export", 1)),
    "the export": (6, lambda patch: stop_in(patch, training, "export", 1)),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_that_is_stopped_saves_first_and_leaves_nothing_half_done(
    clips, tmp_path, monkeypatch, straight, moment
):
    step, prepare = MOMENTS[moment]
    evaluated = []
    monkeypatch.setattr(Evaluator, "__call__", lambda self, step, *_: evaluated.append(step))
    save = dict(freq=3, milestone_freq=3) if moment == "a milestone" else dict(freq=0)
    config = settings(
        clips, tmp_path, save=save, evaluation=EvalConfig(freq=2, path=str(clips), num_tokens=(4,))
    )
    with monkeypatch.context() as patch:
        prepare(patch)
        finished = train(config, MODELS["vae"])
    assert finished.signal == signal.SIGTERM and int(finished.state.step) == step
    assert names(tmp_path / "checkpoints") == [f"{step:08d}"]
    assert evaluated == {"the export": [2, 4, 6], "a milestone": [2], "waiting for data": [2]}.get(
        moment, []
    )
    assert not (tmp_path / "pretrained").exists()
    assert not list(tmp_path.glob("**/.*.tmp"))
    assert_equal_states(train(config, MODELS["vae"]).state, straight[0])
    assert (tmp_path / "pretrained").exists()
    if moment == "a milestone":
        assert names(tmp_path / "milestones") == ["00000003", "00000006"]


def test_a_run_is_saved_while_no_handler_can_run(clips, tmp_path, monkeypatch):
    """A mutex stands for XLA, which may compute for minutes: a thread saves, and ends the process."""
    monkeypatch.setattr(signals, "_GRACE_SECONDS", 0.05)
    libc, mutex, left = ctypes.CDLL(None), ctypes.create_string_buffer(64), []
    libc.pthread_mutex_lock(mutex)

    def evaluate(*_):
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        libc.pthread_mutex_lock(mutex)

    def leave(code):
        left.append((code, names(tmp_path / "checkpoints")))
        libc.pthread_mutex_unlock(mutex)

    monkeypatch.setattr(Evaluator, "__call__", evaluate)
    evaluation = EvalConfig(freq=2, path=str(clips), num_tokens=(4,))
    config = settings(clips, tmp_path, save=dict(freq=0), evaluation=evaluation)
    finished = train(config, MODELS["vae"], leave=leave)
    assert left == [(143, ["00000002"])] and finished.signal == signal.SIGTERM
    assert names(tmp_path / "checkpoints") == ["00000002"]


def test_a_run_that_is_done_changes_nothing_when_started_again(clips, tmp_path, straight):
    train(settings(clips, tmp_path), MODELS["vae"])
    before = (tmp_path / "streaming_train_state").read_bytes()
    assert_equal_states(train(settings(clips, tmp_path), MODELS["vae"]).state, straight[0])
    assert (tmp_path / "streaming_train_state").read_bytes() == before
    assert numbers(tmp_path) == straight[1]
    with pytest.raises(ValueError, match="holds a run up to step 6"):
        train(settings(clips, tmp_path, autoresume=False), MODELS["vae"])


def test_milestones_stay_in_both_formats_and_other_checkpoints_go(clips, tmp_path, straight):
    save = dict(freq=1, milestone_freq=2, keep=1)
    train(settings(clips, tmp_path, save=save, total_steps=5), MODELS["vae"])
    assert names(tmp_path / "checkpoints") == ["00000002", "00000004", "00000005"]
    assert names(tmp_path / "milestones") == ["00000002", "00000004"]
    milestone = tmp_path / "milestones" / "00000004"
    state = checkpoints.load_train_state(milestone, MODELS["vae"])
    assert int(state["step"]) == 4
    position = DataPosition.load(milestone / "data_position.json")
    assert position.batches == 4

    # A whole state, with its moments and its place in the data, goes on as the run itself did.
    config = settings(
        clips, tmp_path / "on", load_checkpoint=f"trainstate::{milestone}/streaming_train_state",
        load_dataset_state=str(milestone / "data_position.json"),
    )  # fmt: skip
    on = train(config, MODELS["vae"]).state
    assert_equal_states(on.params, straight[0].params)
    assert numbers(tmp_path / "on") == straight[1][4:]


def test_the_script_takes_parameters_out_of_states_and_checkpoints(clips, tmp_path, capsys):
    train(settings(clips, tmp_path, total_steps=2), MODELS["vae"])
    script = trainstate_to_params_only
    bf16 = jax.tree.map(
        lambda x: x.astype("bfloat16"), checkpoints.load_params(tmp_path / "params", MODELS["vae"])
    )
    for number, source in enumerate(
        (f"trainstate::{tmp_path}/streaming_train_state", f"{tmp_path}/checkpoints/00000002")
    ):
        path = tmp_path / f"out{number}" / "params"
        command = [f"--load_checkpoint={source}", f"--output_path={path}"]
        assert app.run(script.CONVERT, script.convert, command) == 0
        found = checkpoints.load_params(f"params::{path}", checkpoints.load_config(path))
        jax.tree.map(np.testing.assert_array_equal, found, bf16)
    cut = tmp_path / "cut"
    cut.write_bytes((tmp_path / "streaming_train_state").read_bytes()[:-2000])
    command = [f"--load_checkpoint=trainstate::{cut}", f"--output_path={tmp_path}/never"]
    assert app.run(script.CONVERT, script.convert, command) == 1
    assert not (tmp_path / "never").exists() and "cut" in capsys.readouterr().err


def test_parameters_alone_start_a_new_run(clips, tmp_path, straight):
    train(settings(clips, tmp_path / "a"), MODELS["vae"])
    spec = f"trainstate_params::{tmp_path}/a/streaming_train_state"
    config = settings(clips, tmp_path / "b", load_checkpoint=spec, total_steps=1)
    state = train(config, MODELS["vae"]).state
    assert int(state.step) == 1
    # Step 0 has the learning rate 0: the parameters are still those that were loaded.
    assert_equal_states(state.params, straight[0].params)

    # So do they for a model with more options: what these add begins as zeros.
    more = MODELS["vae"].replace(condition_decoder=True, token_order="coarse_to_fine")
    optimizer = make_optimizer(config.optimizer)
    layout = train_state.state_layout(
        config, more, optimizer, make_mesh("1,1,1,1", jax.devices()[:1])
    )
    params = dict(
        train_state.first_state(config, more, optimizer, layout, lambda count: None).params
    )
    params["decoder"] = dict(params["decoder"])
    for name in ("is_kept_embed", "is_masked_embed"):
        assert not np.any(params["decoder"].pop(name))
    assert_equal_states(params, straight[0].params)


def test_the_folder_of_another_model_is_left_alone(clips, tmp_path):
    train(settings(clips, tmp_path, total_steps=1), MODELS["vae"])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="holds the run of another model"):
        train(settings(clips, tmp_path, total_steps=2), MODELS["fsq"])
    with pytest.raises(ValueError, match=r"ema_decay \(was False, is True\)"):
        train(settings(clips, tmp_path, total_steps=2, ema_decay=0.9), MODELS["vae"])
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_older_checkpoints_stay(clips, tmp_path, straight):
    """A limit on the size of files stands for a full disk: writing fails in the middle of a checkpoint."""
    folder = tmp_path / "run"
    full = """
import resource, signal
from elastic.cli import app
from elastic.cli.flags_train import TRAIN
jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)  # leaves no cut program to others
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
begin = train
def train(*arguments):
    flags = ["--train_dataset.vision_dataset.path=x", "--logger.output_dir=x"]
    sys.exit(app.run(TRAIN, lambda _: begin(*arguments) and 0, flags))
"""
    train(settings(clips, folder, total_steps=3), MODELS["vae"])
    with started(clips, folder, "", before=full) as process:
        pass
    assert process.returncode == 1
    *before, last = process.said.splitlines()
    assert re.fullmatch(r"scripts/train\.py: error: .*not saved in .*too large\.", last), (
        process.said
    )
    assert not any("Traceback" in line or "rror" in line for line in before), process.said
    assert names(folder / "checkpoints")[0] == "00000003"
    assert_equal_states(train(settings(clips, folder), MODELS["vae"]).state, straight[0])


def test_a_second_run_in_the_same_folder_is_refused(clips, tmp_path):
    with training._alone_in(tmp_path), pytest.raises(ValueError, match="Another process trains in"):
        train(settings(clips, tmp_path), MODELS["vae"])
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_an_error_at_once(clips, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        train(settings(clips, tmp_path / "file" / "run"), MODELS["vae"])


def test_a_step_without_a_finite_loss_changes_nothing_and_many_stop_the_run(clips, tmp_path):
    optimizer = OptimizerConfig(init_lr=1e30, lr=1e30, end_lr=0.0, lr_warmup_steps=0, lr_decay_steps=99)  # fmt: skip
    config = settings(clips, tmp_path, optimizer=optimizer, max_skipped_steps=3, total_steps=40)
    with pytest.raises(ValueError, match="has not been finite for 3 steps in a row"):
        train(config, MODELS["vae"])
    skipped = [record["skipped_steps"] for record in records(tmp_path)]
    norms = [record["param_norm"] for record in records(tmp_path)]
    assert skipped[0] == 0 and skipped[-1] == 2 and norms[-1] == norms[-2]


@pytest.mark.slow
def test_a_run_with_muon_goes_on_bit_for_bit_under_a_mesh_too(clips, tmp_path):
    muon = OptimizerConfig(type="muon", lr=3e-3, end_lr=1e-3, lr_warmup_steps=2, lr_decay_steps=30)
    config = settings(clips, tmp_path / "whole", optimizer=muon)
    whole = train(config, MODELS["vae"]).state
    train(settings(clips, tmp_path / "parts", optimizer=muon, total_steps=3), MODELS["vae"])
    assert_equal_states(train(settings(clips, tmp_path / "parts", optimizer=muon), MODELS["vae"]).state, whole)  # fmt: skip
    with pytest.raises(ValueError, match=r"other type \(was muon, is adamw\)"):
        train(settings(clips, tmp_path / "parts", total_steps=7), MODELS["vae"])
    tree = train_state.state_tree(jax.device_get(whole))
    rest = tree["opt_state"]["1"]["inner_states"]["rest"]["inner_state"]["0"]
    del rest["nu"]["params"]["decoder"]["out_proj"]["kernel"]
    with pytest.raises(
        checkpoints.CheckpointError, match="nu/params/decoder/out_proj/kernel' is missing"
    ):
        checkpoints.save_train_state(tmp_path / "state", tree)
    like, shardings = train_state.state_layout(
        config, MODELS["vae"], make_optimizer(muon), make_mesh("1,2,2,2", jax.devices())
    )
    jax.tree.map(lambda x, place: place.shard_shape(x.shape), like, shardings)
    moments = [place.spec for place in jax.tree.leaves(shardings.opt_state)]
    assert any("tp" in (axis or ()) for spec in moments for axis in spec)


@pytest.mark.slow
def test_a_running_mean_of_the_parameters_is_what_comes_out(clips, tmp_path):
    state = train(settings(clips, tmp_path, ema_decay=0.5, total_steps=3), MODELS["vae"]).state
    params = checkpoints.load_params(tmp_path / "pretrained", MODELS["vae"])
    assert_equal_states(params, state.ema)
    again = train(settings(clips, tmp_path, ema_decay=0.5), MODELS["vae"]).state
    whole = train(settings(clips, tmp_path / "whole", ema_decay=0.5), MODELS["vae"]).state
    assert_equal_states(again, whole)
    differs = jax.tree.map(lambda a, b: bool((a != b).any()), state.ema, state.params)
    assert any(jax.tree.leaves(differs))


@pytest.mark.slow
def test_a_run_for_float8_trains_with_the_weights_that_it_stores(clips, tmp_path):
    """Its loss and gradient are those of the rounded parameters, and these are what comes out."""
    model = MODELS["fsq"]
    start = jax.device_get(init_params(model, jax.random.key(1)))
    checkpoints.save_params(tmp_path / "start", start)
    rounded = jax.device_get(float8.rounded(start))
    for path, x in flatten(start).items():
        assert float8.is_matrix(path) == bool((flatten(rounded)[path] != x).any())
    checkpoints.save_params(tmp_path / "rounded_start", rounded)
    terms = {}
    for name, float_dtype in {"rounded": "fp32", "fp8": "fp8"}.items():
        begin = tmp_path / ("start" if float_dtype == "fp8" else "rounded_start")
        save = dict(float_dtype=float_dtype)
        run = settings(clips, tmp_path / name, total_steps=1, load_checkpoint=str(begin), save=save)
        state = train(run, model).state
        terms[name] = [records(tmp_path / name)[0][term] for term in ("loss", "gradient_norm")]
    assert terms["fp8"] == terms["rounded"]
    used = flatten(jax.device_get(float8.rounded(state.params)))
    for stored in ("params", "pretrained"):
        found = flatten(checkpoints.load_params(tmp_path / "fp8" / stored, model, dtype="fp32"))
        for path, x in used.items():
            expected = x if float8.is_matrix(path) else x.astype(ml_dtypes.bfloat16)
            np.testing.assert_array_equal(found[path], expected, str(path))


def test_evaluations_log_numbers_and_pictures(clips, tmp_path):
    evaluation = EvalConfig(freq=2, path=str(clips), thresholds=(0.5,), num_tokens=(4, 16))
    log = dict(tensorboard=True)
    train(settings(clips, tmp_path, evaluation=evaluation, log=log, total_steps=2), MODELS["fsq"])
    *_, found = records(tmp_path)
    assert found["step"] == 2 and found["eval/mean_tokens@0.5"] >= 2 and found["eval/psnr@16"] > 0
    assert [path.suffix for path in (tmp_path / "eval" / "00000002").iterdir()] == [".png"]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    with pytest.raises(ValueError, match=r"eval_freq=2 needs --eval_dataset\.path"):
        EvalConfig(freq=2)


def test_options_out_of_range_are_refused(clips, tmp_path):
    for option in (
        dict(total_steps=0),
        dict(log=dict(freq=0)),
        dict(save=dict(keep=0)),
        dict(mask_full_fraction=2.0),
        dict(init="zeros"),
        dict(dtype="int8"),
        dict(ema_decay=1.0),
        dict(log=dict(profile_steps=(3, 2))),
    ):
        inner = next(iter(option.values()))
        name = next(iter(inner)) if isinstance(inner, dict) else next(iter(option))
        with pytest.raises(ValueError, match=name):
            settings(clips, tmp_path / "a", **option)
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
def test_the_script_trains_with_the_released_flags_on_several_devices(
    clips, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(training, "make_mesh", lambda dim: make_mesh(dim, jax.devices()[:2]))
    sizes = {
        name: getattr(MODELS["fsq"], name)
        for name in ("hidden_size", "intermediate_size", "frames_per_block")
    }
    sizes |= dict(
        num_encoder_layers=1, num_decoder_layers=1, patch_size=(2, 8, 8), min_toks=2, max_toks=16
    )
    sizes |= dict(max_sequence_length=32, lpips_loss_ratio=0.0)
    command = [
        "--mesh_dim=!1,1,-1,1", "--dtype=fp32", "--total_steps=2", "--log_freq=1", "--save_model_freq=2",
        "--save_milestone_freq=2", "--eval_thresholds=[0.1,0.05]", "--profile_steps=2,2",
        "--load_elastic_config=debug", f"--update_elastic_config={sizes}", "--optimizer.type=adamw",
        "--optimizer.accumulate_gradient_steps=1", "--optimizer.adamw_optimizer.lr=1e-3",
        "--optimizer.adamw_optimizer.lr_warmup_steps=1", "--train_dataset.type=vision",
        f"--train_dataset.vision_dataset.path={clips}", "--train_dataset.vision_dataset.ext=mp4",
        "--train_dataset.vision_dataset.resolution=32", "--train_dataset.vision_dataset.chunk_size=8",
        "--train_dataset.vision_dataset.workers=1",
        "--checkpointer.save_optimizer_state=False", "--logger.online=False", f"--logger.output_dir={tmp_path}",
        "--logger.experiment_id=one", "--jax_distributed.initialize_jax_distributed=False",
    ]  # fmt: skip
    assert app.run(train_script.TRAIN, train_script.train, command) == 0
    assert [record["step"] for record in records(tmp_path / "one")] == [1, 2]
    assert (tmp_path / "one" / "pretrained" / "model.safetensors").exists()
    assert (tmp_path / "one" / "profile").is_dir()
    assert names(tmp_path / "one" / "milestones" / "00000002") == [
        "config.json",
        "data_position.json",
        "params",
    ]
    assert "step 2/2" in capsys.readouterr().err
    wrong = "--train_dataset.vision_dataset.resolution=64"
    assert app.run(train_script.TRAIN, train_script.train, [*command, wrong]) == 1
    assert "resolution=64" in capsys.readouterr().err


def test_a_run_is_described_in_its_checkpoint(clips, tmp_path):
    config = settings(clips, tmp_path, total_steps=1)
    train(config, MODELS["vae"])
    found = Checkpoints(tmp_path, config.save)
    notes = found.notes(1)
    found.close()
    assert notes["model"] == MODELS["vae"].to_json_dict()
    assert notes["training"] == json.loads(json.dumps(dataclasses.asdict(config)))
    assert notes["position"]["batches"] == 1

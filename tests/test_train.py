"""The trainer: the loss falls, a run that was stopped goes on bit for bit, and nothing is lost."""

import json
import os
import signal

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from elastic import checkpoint, cli, media
from elastic import train as training
from elastic.config import ElasticTokConfig, load_config
from elastic.data import ClipSampler, DataConfig
from elastic.mesh import make_mesh
from elastic.optim import OptimizerConfig
from elastic.tokenizer import ElasticTokenizer
from elastic.train import TrainConfig, train
from scripts import train as train_script

MODELS = {
    kind: ElasticTokConfig(
        hidden_size=32, intermediate_size=32, num_encoder_layers=1, num_decoder_layers=1, num_attention_heads=2,
        frames_per_block=2, patch_size=(2, 8, 8), min_toks=2, max_toks=16, max_sequence_length=32, theta=1e4,
        bottleneck_type=kind, lpips_loss_ratio=0.0,
    )
    for kind in ("fsq", "vae")
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def programs_kept(tmp_path_factory):
    """Every run compiles the same step: the second one takes it from a folder."""
    folder = str(tmp_path_factory.mktemp("programs"))
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """What is proved here does not depend on the mesh, and one device compiles fastest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "make_mesh", lambda dim: make_mesh(dim, jax.devices()[:1]))
        yield


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Two made clips of 32 x 32 pixels: a ramp that moves, and a dot."""
    folder = tmp_path_factory.mktemp("clips")
    ramp = np.linspace(0, 255, 40).astype(np.uint8)
    pan = [np.broadcast_to(np.roll(ramp, k)[:, None], (40, 40, 3)).copy() for k in range(8)]
    media.write_video(folder / "pan.mp4", pan, 24)
    dot = np.full((8, 40, 40, 3), 30, np.uint8)
    for k, frame in enumerate(dot):
        frame[10:20, 3 * k : 3 * k + 10] = (250, 180, 20)
    media.write_video(folder / "dot.mp4", list(dot), 24)
    return folder


def settings(clips, folder, **options):
    fixed = dict(
        data=DataConfig(path=str(clips), batch_size=2),
        optimizer=OptimizerConfig(lr=3e-3, end_lr=1e-3, lr_warmup_steps=2, lr_decay_steps=30),
        output_dir=str(folder),
        mesh_dim="1,1,-1,1",
        total_steps=6,
        log_freq=1,
        save_model_freq=3,
    )
    return TrainConfig(**(fixed | options))


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def numbers(folder):
    """The records without the clock."""
    return [
        {name: v for name, v in record.items() if name != "seconds_per_step"}
        for record in records(folder)
    ]


@pytest.mark.parametrize("kind", ["fsq", "vae"])
def test_the_loss_falls_and_the_model_is_ready_for_inference(clips, tmp_path, kind):
    config = settings(clips, tmp_path, total_steps=30, save_model_freq=0, float_dtype="fp32")
    state = train(config, MODELS[kind])
    losses = [record["loss"] for record in records(tmp_path)]
    assert len(losses) == 30 and np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
    written = ["config.json", "metrics.jsonl", "pretrained", "streaming_train_state"]
    assert sorted(path.name for path in tmp_path.iterdir()) == written

    params = checkpoint.load_params(tmp_path / "pretrained", MODELS[kind])
    jax.tree.map(np.testing.assert_array_equal, params, jax.device_get(state.params))
    tokenizer = ElasticTokenizer.from_pretrained(tmp_path / "pretrained")
    assert tokenizer.config == load_config(str(tmp_path)) == MODELS[kind]
    tokens = tokenizer.encode(clips / "dot.mp4", num_tokens=16)
    assert np.mean([block.loss for block in tokens.blocks]) < losses[0]


def test_a_run_that_starts_linear_begins_where_noise_does_not(clips, tmp_path):
    losses = {}
    for init in ("random", "linear"):
        config = settings(clips, tmp_path / init, init=init, total_steps=1, mask_full_fraction=1.0)
        train(config, MODELS["vae"])
        losses[init] = records(tmp_path / init)[0]["loss"]
    assert losses["linear"] < losses["random"] / 3


@pytest.fixture(scope="module")
def straight(clips, tmp_path_factory):
    """Six steps without a stop: the state and the numbers of each step."""
    folder = tmp_path_factory.mktemp("straight")
    return train(settings(clips, folder), MODELS["vae"]), numbers(folder)


def assert_equal_states(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def test_a_killed_run_repeats_the_same_losses_to_the_last_bit(
    clips, tmp_path, straight, monkeypatch
):
    original = ClipSampler.batch

    def killed(self, step):
        if step == 5:  # after the checkpoint of step 3, and after records that will be repeated
            raise KeyboardInterrupt
        return original(self, step)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ClipSampler, "batch", killed)
        train(settings(clips, tmp_path), MODELS["vae"])
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3, 4, 5]
    assert not (tmp_path / "pretrained").exists()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # cut off by the kill

    state = train(settings(clips, tmp_path), MODELS["vae"])
    assert_equal_states(state, straight[0])
    assert numbers(tmp_path) == straight[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_leaves_and_the_same_command_goes_on(
    clips, tmp_path, straight, monkeypatch, number
):
    before = signal.getsignal(number)
    record = training._Recorder.__call__

    def signalled(self, step, terms):
        if step == 2:
            os.kill(os.getpid(), number)
        return record(self, step, terms)

    with monkeypatch.context() as patch:
        patch.setattr(training._Recorder, "__call__", signalled)
        state = train(settings(clips, tmp_path, save_model_freq=0), MODELS["vae"])
    assert int(state.step) == 3 and signal.getsignal(number) == before
    assert not (tmp_path / "pretrained").exists()
    assert_equal_states(train(settings(clips, tmp_path), MODELS["vae"]), straight[0])
    assert numbers(tmp_path) == straight[1]


def test_a_run_that_is_done_changes_nothing_when_started_again(clips, tmp_path, straight):
    train(settings(clips, tmp_path), MODELS["vae"])
    state = (tmp_path / "streaming_train_state").read_bytes()
    assert_equal_states(train(settings(clips, tmp_path), MODELS["vae"]), straight[0])
    assert (tmp_path / "streaming_train_state").read_bytes() == state
    assert numbers(tmp_path) == straight[1]


def test_parameters_alone_start_a_new_run(clips, tmp_path, straight):
    train(settings(clips, tmp_path / "a"), MODELS["vae"])
    spec = f"trainstate_params::{tmp_path}/a/streaming_train_state"
    state = train(
        settings(clips, tmp_path / "b", load_checkpoint=spec, total_steps=1), MODELS["vae"]
    )
    assert int(state.step) == 1
    # Step 0 has the learning rate 0: the parameters are still those that were loaded.
    assert_equal_states(state.params, straight[0].params)


def test_the_folder_of_another_model_is_left_alone(clips, tmp_path):
    train(settings(clips, tmp_path, total_steps=1), MODELS["vae"])
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(ValueError, match="holds the run of another model"):
        train(settings(clips, tmp_path, total_steps=2), MODELS["fsq"])
    assert {path: path.read_bytes() for path in before} == before
    other = MODELS["vae"].replace(theta=5e6)
    train(settings(clips, tmp_path, total_steps=1, autoresume=False), other)
    assert len(records(tmp_path)) == 1


def test_a_failed_save_stops_the_run(clips, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_train_state", full)
    with pytest.raises(OSError, match="No space left"):
        train(settings(clips, tmp_path), MODELS["vae"])
    assert not (tmp_path / "streaming_train_state").exists()


def test_a_loss_that_is_no_number_stops_the_run(clips, tmp_path):
    optimizer = OptimizerConfig(
        init_lr=1e30, lr=1e30, end_lr=0.0, lr_warmup_steps=0, lr_decay_steps=9
    )
    with pytest.raises(ValueError, match="The loss is nan"):
        train(settings(clips, tmp_path, optimizer=optimizer), MODELS["vae"])


def test_what_is_not_built_is_refused(clips, tmp_path):
    with pytest.raises(ValueError, match=r"lpips_loss_ratio=0\.1"):
        train(settings(clips, tmp_path / "a"), MODELS["vae"].replace(lpips_loss_ratio=0.1))
    for option in (
        dict(total_steps=0),
        dict(log_freq=0),
        dict(mask_full_fraction=2.0),
        dict(init="zeros"),
        dict(dtype="int8"),
    ):
        with pytest.raises(ValueError, match=next(iter(option))):
            settings(clips, tmp_path / "a", **option)
    assert not (tmp_path / "a").exists()


def test_the_script_trains_with_the_released_flags_on_all_devices(
    clips, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(training, "make_mesh", make_mesh)
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
        "--load_elastic_config=debug", f"--update_elastic_config={sizes}", "--optimizer.type=adamw",
        "--optimizer.accumulate_gradient_steps=1", "--optimizer.adamw_optimizer.lr=1e-3",
        "--optimizer.adamw_optimizer.lr_warmup_steps=1", "--train_dataset.type=vision",
        f"--train_dataset.vision_dataset.path={clips}", "--train_dataset.vision_dataset.ext=mp4",
        "--train_dataset.vision_dataset.resolution=32", "--train_dataset.vision_dataset.chunk_size=8",
        "--checkpointer.save_optimizer_state=True", "--logger.online=False", f"--logger.output_dir={tmp_path}",
        "--logger.experiment_id=one", "--jax_distributed.initialize_jax_distributed=False",
    ]  # fmt: skip
    assert cli.run(train_script.TRAIN, train_script.train, command) == 0
    assert [record["step"] for record in records(tmp_path / "one")] == [1, 2]
    assert (tmp_path / "one" / "pretrained" / "model.safetensors").exists()
    assert "step 2/2" in capsys.readouterr().err
    assert (
        cli.run(
            train_script.TRAIN,
            train_script.train,
            [*command, "--train_dataset.vision_dataset.resolution=64"],
        )
        == 1
    )
    assert "resolution=64, but the frames of this model have 32 rows" in capsys.readouterr().err

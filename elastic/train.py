"""The training loop: a step, a log line, a checkpoint, in that order."""

import contextlib
import dataclasses
import json
import logging
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import serialization
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int, Shaped, UInt8

from elastic import checkpoint, masks, metrics
from elastic.config import ElasticTokConfig, load_config
from elastic.data import ClipSampler, DataConfig
from elastic.linear_start import linear_start
from elastic.logs import MetricsFile, progress_line
from elastic.losses import training_loss
from elastic.mesh import make_mesh
from elastic.model import Batch, ElasticTok, init_params
from elastic.optim import OptimizerConfig, learning_rate, make_optimizer
from elastic.patches import to_unit_range
from elastic.sharding import constrain, fitting_spec, param_shardings
from elastic.token_file import write_atomically
from elastic.tokenizer import parse_dtype

log = logging.getLogger(__name__)

# What a run writes into its folder.
STATE_FILE = "streaming_train_state"  # what it goes on from; also `trainstate_params::`
CONFIG_FILE = "config.json"
METRICS_FILE = "metrics.jsonl"
PRETRAINED = "pretrained"  # at the end: config.json and model.safetensors, for inference
_START_PATCHES = 40_000  # what a linear start is computed from


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What a run is made of, besides the model.

    Attributes:
      data: the files, and how sequences are made of them.
      optimizer: AdamW and its schedule.
      output_dir: the folder of checkpoints and metrics.
      total_steps: updates in all, those before a resumption included.
      log_freq: steps between two records.
      save_model_freq: steps between two checkpoints; 0: only at the end.
      mesh_dim: devices along dp, fsdp, tp and sp.
      dtype: 'fp32' or 'bf16', type of products' operands. Parameters and moments are float32.
      seed: draws parameters, kept masks and the VAE's samples.
      load_checkpoint: parameters to start from; '' makes new ones.
      init: how new ones are made: 'random', or 'linear' (see elastic/linear_start.py).
      autoresume: go on from the checkpoint in `output_dir` when there is one.
      mask_full_fraction: share of blocks that keep every token.
      mask_log_uniform: draw the logarithm of a block's count uniformly.
      float_dtype: float type of the parameters in `pretrained`. The state is always exact.

    Raises:
      ValueError: an option is out of its range.
    """

    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    output_dir: str
    total_steps: int = 10_000
    log_freq: int = 50
    save_model_freq: int = 1000
    mesh_dim: str = "1,-1,1,1"
    dtype: str = "fp32"
    seed: int = 42
    load_checkpoint: str = ""
    init: str = "random"
    autoresume: bool = True
    mask_full_fraction: float = 0.0
    mask_log_uniform: bool = False
    float_dtype: str = "bf16"

    def __post_init__(self):
        for name, least in (("total_steps", 1), ("log_freq", 1), ("save_model_freq", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be {least} or more.")
        if not 0 <= self.mask_full_fraction <= 1:
            raise ValueError(f"mask_full_fraction={self.mask_full_fraction} must lie in 0 to 1.")
        if not self.output_dir:
            raise ValueError("output_dir is empty; name the folder for checkpoints and metrics.")
        if self.float_dtype not in ("fp32", "bf16", "fp16"):
            raise ValueError(f"float_dtype={self.float_dtype!r} must be one of fp32, bf16, fp16.")
        if self.init not in ("random", "linear"):
            raise ValueError(f"init={self.init!r} must be 'random' or 'linear'.")
        parse_dtype(self.dtype)


class TrainState(NamedTuple):
    """Everything that a step changes."""

    step: Int[Array, ""]
    params: dict[str, Any]
    opt_state: optax.OptState


def train_step(
    model: ElasticTok,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    batch: Batch,
    key: Shaped[Array, "*k"] | None,
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """One update, and the terms of the loss. `key` draws the VAE's samples; None decodes the mean."""

    def loss(params: dict[str, Any]) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        return training_loss(model, params, batch, key)

    (_, terms), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    # The released state calls the tree {'params': ...}; the optimizer's moments are named after it.
    updates, opt_state = optimizer.update(
        {"params": grads}, state.opt_state, {"params": state.params}
    )
    params = cast(dict[str, Any], optax.apply_updates({"params": state.params}, updates))["params"]
    terms |= {"gradient_norm": _norm(grads), "param_norm": _norm(params)}
    return TrainState(state.step + 1, params, opt_state), terms


def _norm(tree: Any) -> Float[Array, ""]:
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)))


def new_state(params: dict[str, Any], optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init({"params": params}))


def state_tree(state: TrainState) -> dict[str, Any]:
    """The state as nested dicts of NumPy arrays, named as in a released `streaming_train_state`."""
    return {
        "step": np.asarray(state.step),
        "params": {"params": jax.device_get(state.params)},
        "opt_state": serialization.to_state_dict(jax.device_get(state.opt_state)),
    }


def restore_state(tree: dict[str, Any], like: TrainState, shardings: TrainState) -> TrainState:
    """The inverse of `state_tree`: `like` gives structure and types, `shardings` where arrays lie.

    Raises:
      ValueError: the tree is not of this model and optimizer.
    """
    target = {"step": like.step, "params": {"params": like.params}, "opt_state": like.opt_state}
    found = checkpoint.restore_into(target, tree)
    restored = TrainState(found["step"], found["params"]["params"], found["opt_state"])
    return jax.tree.map(
        lambda x, leaf, place: jax.device_put(np.asarray(x, leaf.dtype), place),
        restored,
        like,
        shardings,
    )


def sample_batch(
    model: ElasticTok, config: TrainConfig, patches: UInt8[Array, "b l p"], key: Shaped[Array, "*k"]
) -> Batch:
    """Pixels and freshly drawn kept masks."""
    elastic = model.config
    blocks = (patches.shape[0], patches.shape[1] // elastic.tokens_per_block)
    num_kept = masks.sample_num_kept(
        key,
        blocks,
        min_kept=elastic.min_toks,
        max_kept=elastic.max_toks,
        keep_fraction=elastic.keep_fraction,
        full_fraction=config.mask_full_fraction,
        log_uniform=config.mask_log_uniform,
    )
    kept = masks.kept_mask(num_kept, elastic.tokens_per_block).reshape(patches.shape[:2])
    x = constrain(to_unit_range(patches), model.mesh, "batch", "sequence", None)
    return Batch(x, constrain(kept, model.mesh, "batch", "sequence"))


def train(config: TrainConfig, elastic: ElasticTokConfig) -> TrainState:
    """Trains until `total_steps`; a run that was stopped goes on at its newest checkpoint.

    It then repeats the same steps with the same numbers. Ctrl-C and SIGTERM save a checkpoint and
    end the run early: the state returned has a smaller `step`.

    Raises:
      ValueError: an option cannot be served, `output_dir` holds the run of another model, or the
        loss is no longer a number.
      OSError: a checkpoint cannot be written.
    """
    if elastic.lpips_loss_ratio:
        raise ValueError(
            f"lpips_loss_ratio={elastic.lpips_loss_ratio}: the perceptual loss is not part of "
            'this version; set --update_elastic_config="dict(lpips_loss_ratio=0.0)".'
        )
    mesh = make_mesh(config.mesh_dim)
    model = ElasticTok(elastic, dtype=parse_dtype(config.dtype), mesh=mesh)
    optimizer = make_optimizer(config.optimizer)
    sampler = ClipSampler(config.data, elastic)
    folder = pathlib.Path(config.output_dir)
    resumes = _resumes(config, elastic)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(elastic.to_json_dict(), indent=2) + "\n"
    write_atomically(folder / CONFIG_FILE, text.encode())

    state, shardings = _first_state(config, elastic, optimizer, mesh, sampler, resumes=resumes)
    first_step = int(state.step)
    log.info("Training in %s from step %d to %d.", folder, first_step, config.total_steps)
    step_fn = step_program(config, model, optimizer, shardings)
    # Each device is sent its own part, not the whole batch.
    shape = (config.data.batch_size, sampler.num_blocks * elastic.tokens_per_block, 1)
    place = NamedSharding(mesh, fitting_spec(mesh, shape, "batch", "sequence", None))
    record = _Recorder(config, first_step, sampler)
    saved = first_step
    with (
        contextlib.closing(sampler.batches(first_step)) as batches,
        MetricsFile(folder / METRICS_FILE, first_step=first_step if resumes else 0) as records,
        _stop_request() as stop,
    ):
        for step in range(first_step + 1, config.total_steps + 1):
            state, terms = step_fn(state, jax.device_put(next(batches), place))
            last = step == config.total_steps or stop.is_set()
            if last or step % config.log_freq == 0:
                entry = record(step, terms)
                records.write(entry)
                log.info("%s", progress_line(entry, config.total_steps))
            if last or (config.save_model_freq and step % config.save_model_freq == 0):
                checkpoint.save_train_state(folder / STATE_FILE, state_tree(state))
                saved = step
            if last:
                break
    if saved < config.total_steps:
        log.warning("Stopped and saved at step %d; the same command goes on from there.", saved)
        return state
    params = jax.device_get(state.params)
    checkpoint.save_pretrained(folder / PRETRAINED, elastic, params, float_dtype=config.float_dtype)
    log.info("Finished; %s is ready for inference.", folder / PRETRAINED)
    return state


def step_program(
    config: TrainConfig,
    model: ElasticTok,
    optimizer: optax.GradientTransformation,
    shardings: TrainState,
) -> Callable[[TrainState, np.ndarray], tuple[TrainState, dict[str, Array]]]:
    """The compiled step. All that it draws comes from the seed and the number of the step."""
    key = jax.random.key(config.seed)

    def step_fn(state: TrainState, patches: Array) -> tuple[TrainState, dict[str, Array]]:
        mask_key, vae_key = jax.random.split(jax.random.fold_in(key, state.step))
        batch = sample_batch(model, config, patches, mask_key)
        return train_step(model, optimizer, state, batch, vae_key)

    # A state comes out as it went in, so that the second step does not compile anew.
    return jax.jit(step_fn, donate_argnums=0, out_shardings=(shardings, None))


class _Recorder:
    """Makes the record of a step out of its terms and the clock."""

    def __init__(self, config: TrainConfig, first_step: int, sampler: ClipSampler):
        self._schedule, self._sampler = learning_rate(config.optimizer), sampler
        self._step, self._time = first_step, time.perf_counter()

    def __call__(self, step: int, terms: dict[str, Array]) -> dict[str, float]:
        """The record after `step` updates.

        Raises:
          ValueError: the loss is no longer a number.
        """
        record = {name: float(value) for name, value in terms.items()}
        if not np.isfinite(record["loss"]):
            raise ValueError(
                f"The loss is {record['loss']} at step {step}; lower "
                "--optimizer.adamw_optimizer.lr and go on from the last checkpoint."
            )
        now = time.perf_counter()
        record |= {
            "step": step,
            "learning_rate": float(np.asarray(self._schedule(step - 1))),
            "psnr": metrics.psnr_of_mse(record["recon_loss"]),
            "seconds_per_step": (now - self._time) / (step - self._step),
            "bad_files": self._sampler.num_bad,
        }
        self._step, self._time = step, now
        return record


def _resumes(config: TrainConfig, elastic: ElasticTokConfig) -> bool:
    """Whether there is a state to go on from.

    Raises:
      ValueError: it is of another model.
    """
    folder = pathlib.Path(config.output_dir)
    if not config.autoresume or not (folder / STATE_FILE).exists():
        return False
    if (folder / CONFIG_FILE).exists():
        found = load_config(str(folder)).config_hash()
        if found != elastic.config_hash():
            raise ValueError(
                f"{folder} holds the run of another model (config {found}, this one is "
                f"{elastic.config_hash()}); choose another output_dir, or start it anew with "
                "--autoresume=False."
            )
    return True


def _first_state(
    config: TrainConfig,
    elastic: ElasticTokConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    sampler: ClipSampler,
    *,
    resumes: bool,
) -> tuple[TrainState, TrainState]:
    """The state in `output_dir`, or new moments around loaded or fresh parameters; its shardings."""

    def fresh() -> TrainState:
        return new_state(init_params(elastic, jax.random.key(config.seed)), optimizer)

    like = jax.eval_shape(fresh)
    shardings = param_shardings(mesh, like)
    if resumes:
        path = pathlib.Path(config.output_dir) / STATE_FILE
        tree = checkpoint.load_train_state(path, elastic)
        return restore_state(tree, like, shardings), shardings
    if config.load_checkpoint:
        loaded = checkpoint.load_params(config.load_checkpoint, elastic, dtype=np.float32)
    elif config.init == "linear":
        drawn = init_params(elastic, jax.random.key(config.seed))
        loaded = linear_start(drawn, elastic, sampler.sample_patches(_START_PATCHES))
    else:
        return jax.jit(fresh, out_shardings=shardings)(), shardings
    start = jax.jit(lambda params: new_state(params, optimizer), out_shardings=shardings)
    return start(loaded), shardings


@contextlib.contextmanager
def _stop_request() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set. A second Ctrl-C acts at once, as ever.

    Signals reach the main thread alone; in any other the event is never set.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, _: Any) -> None:
        if number == signal.SIGINT and stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

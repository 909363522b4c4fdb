"""Where a run begins, and what it leaves behind: files in the released format."""

import dataclasses
import json
import logging
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax
from flax import serialization
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from elastic import checkpoints
from elastic.checkpoints import float8
from elastic.config import ElasticTokConfig, load_config
from elastic.distributed.hosts import is_first_host
from elastic.distributed.sharding import param_shardings
from elastic.io.atomic import atomic_open
from elastic.model import init_params
from elastic.model.add_options import add_options, added_options, before_options
from elastic.model.linear_init import linear_init, sample_size
from elastic.training.checkpoints import Checkpoints, absolute
from elastic.training.config import SaveConfig, TrainConfig
from elastic.training.step import TrainState, new_state
from elastic.training.writers import METRICS_FILE, is_log

log = logging.getLogger(__name__)

MILESTONES = "milestones"  # folders of a run's folder, and their files
PRETRAINED = "pretrained"  # at the end: config.json and model.safetensors, for inference
CONFIG_FILE = "config.json"
STATE_FILE = "streaming_train_state"
PARAMS_FILE = "params"
_START_PATCHES, _START_GROUPS = 40_000, 12_000  # what a linear start is computed from
# Options that decide what a state consists of, and their values in runs that did not know them.
_OF_STATE = {
    "type": "adamw",
    "ema_decay": False,
    "accumulate_gradient_steps": 1,
    "bf16_momentum": False,
}


# The released format


def to_host(tree: Any) -> Any:
    """A tree of arrays as NumPy's, on every host."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def state_tree(state: TrainState) -> dict[str, Any]:
    """A state of NumPy arrays as nested dicts, named as in a released `streaming_train_state`."""
    return {
        "step": np.asarray(state.step),
        "params": {"params": state.params},
        "opt_state": serialization.to_state_dict(state.opt_state),
    }


def restore_state(tree: dict[str, Any], like: TrainState, shardings: TrainState) -> TrainState:
    """The inverse of `state_tree`: `like` gives structure and types, `shardings` where arrays lie.

    Raises:
      ValueError: the tree is not of this model and optimizer.
    """
    target = {"step": like.step, "params": {"params": like.params}, "opt_state": like.opt_state}
    found = checkpoints.restore_into(target, tree)
    params = found["params"]["params"]
    none: Any = np.zeros((), np.int32)
    ema = None if like.ema is None else params
    restored = TrainState(found["step"], params, found["opt_state"], ema, none, none)
    return jax.tree.map(_put, restored, like, shardings)


def _put(x: Any, leaf: Any, place: Any) -> Any:
    x = np.asarray(x, leaf.dtype)
    return jax.make_array_from_callback(x.shape, place, lambda index: x[index])


def used_params(save: SaveConfig, params: dict[str, Any]) -> dict[str, Any]:
    """The parameters, NumPy arrays, that a run computes with: rounded, if float8 will store them."""
    return jax.tree.map(np.asarray, float8.rounded(params)) if save.in_float8 else params


def export(
    folder: pathlib.Path,
    config: TrainConfig,
    model_config: ElasticTokConfig,
    state: TrainState,
    *,
    pretrained: pathlib.Path | None = None,
) -> None:
    """Writes `params`, config.json and, if wanted, `streaming_train_state`: the released files.

    All hosts take part, the first one writes.

    Args:
      pretrained: a folder that also gets what inference reads, config.json and model.safetensors.

    Raises:
      OSError: they cannot be written.
    """
    save = config.save
    wanted = state if save.optimizer_state else state._replace(opt_state=())
    host = TrainState(*to_host(wanted))  # from the devices once, whatever is made of it
    if not is_first_host():
        return
    folder.mkdir(parents=True, exist_ok=True)
    params = used_params(save, host.best_params())
    released = "bf16" if save.in_float8 else save.float_dtype  # the released code reads no float8
    checkpoints.save_params(folder / PARAMS_FILE, params, float_dtype=released)
    if save.optimizer_state:
        checkpoints.save_train_state(folder / STATE_FILE, state_tree(host))
    write_config(folder, model_config)
    if pretrained is not None:
        checkpoints.save_pretrained(pretrained, model_config, params, float_dtype=save.float_dtype)


def write_config(folder: pathlib.Path, model_config: ElasticTokConfig) -> None:
    """Writes config.json."""
    with atomic_open(folder / CONFIG_FILE) as file:
        file.write((json.dumps(model_config.to_json_dict(), indent=2) + "\n").encode())


# Where a run begins


def check_resumable(config: TrainConfig, notes: dict[str, Any]) -> None:
    """Refuses to go on with options under which the saved state would have other parts.

    Args:
      notes: of the checkpoint.

    Raises:
      ValueError: such an option has changed.
    """

    def parts(training: dict[str, Any]) -> list[Any]:
        values = training["optimizer"] | {"ema_decay": training["ema_decay"] > 0}
        return [values.get(name, default) for name, default in _OF_STATE.items()]

    now, then = parts(dataclasses.asdict(config)), parts(notes["training"])
    changed = [
        f"{name} (was {old}, is {new})"
        for name, old, new in zip(_OF_STATE, then, now, strict=True)
        if old != new
    ]
    if changed:
        raise ValueError(
            f"{config.output_dir} was trained with other {', '.join(changed)}, and its moments do not fit; go on with "
            "the old values, or start a new run from its parameters with --load_checkpoint."
        )


def check_new(config: TrainConfig, checkpoints: Checkpoints) -> None:
    """Refuses a folder for a new run in which it would replace what it did not write.

    Raises:
      ValueError: results of an earlier run lie there, whose checkpoints do not, or a file of somebody else's.
    """
    folder = pathlib.Path(config.output_dir)
    results = (PARAMS_FILE, STATE_FILE, PRETRAINED, MILESTONES)
    present = [name for name in results if (folder / name).exists()]
    if not is_log(folder / METRICS_FILE):
        present.append(METRICS_FILE)
    if present:
        raise ValueError(
            f"{folder} holds {', '.join(present)}, but {checkpoints.path} no checkpoint of a run that wrote this; choose another "
            "output_dir, or give the checkpointer.path of that run."
        )


def check_same_run(config: TrainConfig, notes: dict[str, Any]) -> None:
    """Refuses the checkpoints of another run in a folder that was named, and tells which options have changed.

    Args:
      notes: of the checkpoint.

    Raises:
      ValueError: they belong to another run.
    """
    then, now = notes["training"], dataclasses.asdict(config)
    before, here = (absolute(values["output_dir"]) for values in (then, now))
    if config.save.path and before != here:
        raise ValueError(
            f"checkpointer.path={config.save.path} holds the checkpoints of the run in {before}; give {here} a path of its own."
        )
    for name, old, new in _changed(then, now):
        log.info("%s is %r now, and was %r.", name, new, old)


def _changed(then: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(then, dict) and isinstance(now, dict):
        for key in now:
            if key in then and key not in ("output_dir", "total_steps", "log"):
                yield from _changed(then[key], now[key], f"{name}.{key}".lstrip("."))
    elif (list(now) if isinstance(now, tuple) else now) != then:
        yield name, then, now


def check_same_model(config: TrainConfig, model_config: ElasticTokConfig) -> None:
    """Refuses the folder of another model's run.

    Raises:
      ValueError: the folder's config.json is another model's.
    """
    folder = pathlib.Path(config.output_dir)
    if not (folder / CONFIG_FILE).exists():
        return
    try:
        found = load_config(str(folder)).config_hash()
    except ValueError as error:
        raise ValueError(
            f"{folder / CONFIG_FILE} is not of a run ({error}); choose another output_dir."
        ) from error
    if found != model_config.config_hash():
        raise ValueError(
            f"{folder} holds the run of another model (config {found}, this one is "
            f"{model_config.config_hash()}); choose another output_dir."
        )


def state_layout(
    config: TrainConfig,
    model_config: ElasticTokConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
) -> tuple[TrainState, TrainState]:
    """Shapes and shardings of the state."""
    like = jax.eval_shape(lambda: _state_of(_drawn(config, model_config), config, optimizer))
    return like, param_shardings(mesh, like)


def first_state(
    config: TrainConfig,
    model_config: ElasticTokConfig,
    optimizer: optax.GradientTransformation,
    layout: tuple[TrainState, TrainState],
    sample_patches: Callable[[int, tuple[int, int, int]], np.ndarray],
) -> TrainState:
    """The state of a new run: new moments around loaded or fresh parameters, or a released state.

    Args:
      layout: of `state_layout`.
      sample_patches: gives training patches, this many of this size, which a linear start is computed from.
    """
    like, shardings = layout
    if config.load_checkpoint.startswith("trainstate::"):
        return restore_state(
            checkpoints.load_train_state(config.load_checkpoint, model_config), like, shardings
        )
    if config.load_checkpoint:
        stored = checkpoints.load_config(config.load_checkpoint)
        before = before_options(model_config, stored)
        loaded = checkpoints.load_params(config.load_checkpoint, before, dtype=np.float32)
        added = added_options(before, model_config)
        if added:
            log.info("%s gets the options %s.", config.load_checkpoint, ", ".join(added))
            loaded = add_options(loaded, before, model_config)
    elif config.init == "linear":
        # On all hosts alike: NumPy and the seed alone decide.
        size = sample_size(model_config)
        # Groups of patches are larger and their codec takes minutes.
        count = _START_PATCHES if model_config.patch_group == 1 else _START_GROUPS
        log.info("Computing a linear codec of %d samples of %s pixels.", count, size)
        loaded = linear_init(
            _drawn(config, model_config), model_config, sample_patches(count, size)
        )
    else:
        start = jax.jit(
            lambda: _state_of(_drawn(config, model_config), config, optimizer),
            out_shardings=shardings,
        )
        return start()
    placed = jax.tree.map(_put, loaded, like.params, shardings.params)
    start = jax.jit(lambda x: _state_of(x, config, optimizer), out_shardings=shardings)
    return start(placed)


def _drawn(config: TrainConfig, model_config: ElasticTokConfig) -> dict[str, Any]:
    return _init_params(model_config, jax.random.key(config.seed))


# Shapes, values and a second run of the process need one trace of the model.
_init_params = jax.jit(init_params, static_argnums=0)


def _state_of(
    params: dict[str, Any], config: TrainConfig, optimizer: optax.GradientTransformation
) -> TrainState:
    return new_state(params, optimizer, ema=config.ema_decay > 0)

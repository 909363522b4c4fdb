"""The flags of training -> the configuration of a run; scripts/train.py and scripts/check_compile.py share it."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax

from elastic.cli.app import Values, name_flags, words
from elastic.config import ElasticTokConfig, check_resolution, load_config, update_config
from elastic.data.config import DataConfig
from elastic.data.dataset import DataPosition
from elastic.data.packing import sequence_length
from elastic.training.config import EvalConfig, LogConfig, OptimizerConfig, SaveConfig, TrainConfig

_T = TypeVar("_T")


def _under(prefix: str, kind: type) -> dict[str, str]:
    return {field.name: f"{prefix}.{field.name}" for field in dataclasses.fields(kind)}


# Option -> its flag.
_DATA = _under("train_dataset.vision_dataset", DataConfig)
_OPTIMIZER = _under("optimizer.adamw_optimizer", OptimizerConfig) | dict(
    accumulate_gradient_steps="optimizer.accumulate_gradient_steps"
)
_LOG = dict(
    freq="log_freq",
    tensorboard="logger.tensorboard",
    wandb="logger.online",
    wandb_project="logger.project_id",
    wandb_name="logger.experiment_id",
    wandb_dir="logger.wandb_dir",
    profile_steps="profile_steps",
)
_SAVE = dict(
    freq="save_model_freq",
    milestone_freq="save_milestone_freq",
    keep="checkpointer.keep",
    path="checkpointer.path",
    optimizer_state="checkpointer.save_optimizer_state",
    float_dtype="checkpointer.float_dtype",
)
_EVALUATION = dict(
    freq="eval_freq",
    path="eval_dataset.path",
    thresholds="eval_thresholds",
    num_tokens="eval_num_tokens",
    max_files="eval_dataset.max_files",
    max_frames="eval_dataset.max_frames",
)
_RUN = {
    name: name
    for name in (
        "total_steps mesh_dim dtype seed load_checkpoint load_dataset_state init autoresume mask_full_fraction "
        "mask_log_uniform ema_decay max_skipped_steps lpips_weights"
    ).split()
}


def model_of(flags: Values) -> ElasticTokConfig:
    """The model that the flags describe."""
    return update_config(load_config(flags["load_elastic_config"]), flags["update_elastic_config"])


def run_of(
    flags: Values, model_config: ElasticTokConfig, *, only_compiled: bool = False
) -> TrainConfig:
    """The run that the flags describe.

    Args:
      only_compiled: nothing will be read or written, so that no folder need be named.

    Raises:
      ValueError: a value is of no use.
    """
    folder = os.path.join(flags["logger.output_dir"], flags["logger.experiment_id"])
    if only_compiled:
        folder = "not written"
    with _named({"resolution": "train_dataset.vision_dataset.resolution"}):
        check_resolution(flags["train_dataset.vision_dataset.resolution"], model_config)
    thresholds = _numbers("eval_thresholds", flags["eval_thresholds"], float)
    counts = _numbers("eval_num_tokens", flags["eval_num_tokens"], int)
    steps = _pair(flags["profile_steps"])
    config = _made(
        TrainConfig,
        flags,
        _RUN,
        data=_made(DataConfig, flags, _DATA, **(dict(path="not read") if only_compiled else {})),
        optimizer=_made(OptimizerConfig, flags, _OPTIMIZER),
        output_dir=folder.removesuffix(os.sep),
        log=_made(LogConfig, flags, _LOG, profile_steps=steps),
        save=_made(SaveConfig, flags, _SAVE),
        evaluation=_made(EvalConfig, flags, _EVALUATION, thresholds=thresholds, num_tokens=counts),
    )
    if not only_compiled:
        _check_run(config, model_config)
    return config


def _made(kind: Callable[..., _T], flags: Values, names: Mapping[str, str], **others: Any) -> _T:
    """A record of options: what `names` says of the flags, or `others`."""
    with _named(names):
        return kind(
            **{option: flags[flag] for option, flag in names.items() if option not in others},
            **others,
        )


@contextlib.contextmanager
def _named(names: Mapping[str, str]) -> Iterator[None]:
    """An error in here names the flags and not the options behind them."""
    try:
        yield
    except ValueError as error:
        raise ValueError(name_flags(str(error), names)) from error


def _check_run(config: TrainConfig, model_config: ElasticTokConfig) -> None:
    """What can be said of a run before its files are looked through."""
    with _named(_DATA):
        length = sequence_length(config.data, model_config)
        _check_batch(config.data.batch_size, length, model_config.patch_dim)
    most = max(config.evaluation.num_tokens, default=0)
    if config.evaluation.freq and most > model_config.max_toks:
        raise ValueError(
            f"--eval_num_tokens={most} must be at most {model_config.max_toks}, the tokens of a block of this model."
        )
    if config.load_dataset_state:
        try:
            DataPosition.load(config.load_dataset_state)
        except OSError:
            pass  # a run that goes on needs it no more; another says so when it wants it
        except ValueError as error:
            raise ValueError(
                f"--load_dataset_state={config.load_dataset_state} is no saved position in the data; "
                "give the data_position.json of a milestone."
            ) from error


def _check_batch(batch_size: int, length: int, patch_dim: int) -> None:
    """Refuses a batch whose bare pixels are more than the memory of the hosts that share it."""
    needed = batch_size * length * patch_dim
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * jax.process_count()
    if needed > memory:
        raise ValueError(
            f"batch_size={batch_size} sequences of seq_length={length} tokens are {needed / 1e9:.0f} GB of pixels, and there "
            f"are {memory / 1e9:.0f} GB of memory; take fewer or shorter ones."
        )


def _numbers(name: str, text: str, kind: type) -> tuple[Any, ...]:
    """'0.1,0.05', or as the released scripts have it '[0.1, 0.05]' or '(0.1, 0.05)' -> (0.1, 0.05)."""
    try:
        return tuple(kind(word) for word in words(text.strip("[]() ")))
    except ValueError as error:
        wanted = "whole numbers such as 256,512" if kind is int else "numbers such as 0.1,0.05"
        raise ValueError(f"--{name}={text} must be {wanted}.") from error


def _pair(text: str) -> tuple[int, int] | None:
    steps = words(text.strip("[]() "))
    try:
        first, last = map(int, steps) if steps else (0, 0)
    except ValueError as error:
        raise ValueError(f"--profile_steps={text} must be two steps, such as 10,15.") from error
    return (first, last) if steps else None

"""The flags of training -> the configuration of a run; scripts/train.py and scripts/check_compile.py share it."""

import os
from typing import Any

from elastic import runs
from elastic.cli import Values, words
from elastic.config import ElasticTokConfig, load_config, update_config
from elastic.data import DataConfig
from elastic.optim import OptimizerConfig
from elastic.train_config import EvalConfig, LogConfig, SaveConfig, TrainConfig


def model_of(flags: Values) -> ElasticTokConfig:
    """The model that the flags describe."""
    return update_config(load_config(flags["load_elastic_config"]), flags["update_elastic_config"])


def run_of(flags: Values, elastic: ElasticTokConfig, *, only_compiled: bool = False) -> TrainConfig:
    """The run that the flags describe.

    Args:
      only_compiled: nothing will be read or written, so that no folder need be named.

    Raises:
      ValueError: a value is of no use.
    """
    vision = flags.under("train_dataset.vision_dataset")
    folder = os.path.join(flags["logger.output_dir"], flags["logger.experiment_id"])
    if only_compiled:
        vision["path"], folder = "not read", "not written"
    runs.check_resolution(vision.pop("resolution"), elastic)
    same = (
        "total_steps mesh_dim dtype seed load_checkpoint load_dataset_state init autoresume mask_full_fraction "
        "mask_log_uniform ema_decay max_skipped_steps lpips_weights"
    )
    return TrainConfig(
        data=DataConfig(**vision),
        optimizer=OptimizerConfig(
            **flags.under("optimizer.adamw_optimizer"),
            accumulate_gradient_steps=flags["optimizer.accumulate_gradient_steps"],
        ),
        output_dir=folder.removesuffix(os.sep),
        log=LogConfig(
            freq=flags["log_freq"],
            tensorboard=flags["logger.tensorboard"],
            wandb=flags["logger.online"],
            wandb_project=flags["logger.project_id"],
            wandb_name=flags["logger.experiment_id"],
            wandb_dir=flags["logger.wandb_dir"],
            profile_steps=_pair(flags["profile_steps"]),
        ),
        save=SaveConfig(
            freq=flags["save_model_freq"],
            milestone_freq=flags["save_milestone_freq"],
            keep=flags["checkpointer.keep"],
            path=flags["checkpointer.path"],
            optimizer_state=flags["checkpointer.save_optimizer_state"],
            float_dtype=flags["checkpointer.float_dtype"],
        ),
        evaluation=EvalConfig(
            freq=flags["eval_freq"],
            thresholds=_numbers("eval_thresholds", flags["eval_thresholds"], float),
            num_tokens=_numbers("eval_num_tokens", flags["eval_num_tokens"], int),
            **flags.under("eval_dataset"),
        ),
        **{name: flags[name] for name in same.split()},
    )


def _numbers(name: str, text: str, kind: type) -> tuple[Any, ...]:
    """'0.1,0.05', or as the released scripts have it '[0.1, 0.05]' or '(0.1, 0.05)' -> (0.1, 0.05)."""
    try:
        return tuple(kind(word) for word in words(text.strip("[]() ")))
    except ValueError as error:
        raise ValueError(f"{name}={text!r} must be numbers such as '0.1,0.05'.") from error


def _pair(text: str) -> tuple[int, int] | None:
    steps = _numbers("profile_steps", text, int)
    if len(steps) not in (0, 2):
        raise ValueError(f"profile_steps={text!r} must be two steps, such as '10,15'.")
    return (steps[0], steps[1]) if steps else None

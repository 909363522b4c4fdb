"""Fits curves.json, from which the search takes its first guess of a block's token count; `--help` lists the flags."""

import os
import pathlib

from elastic.cli import app
from elastic.cli.commands.sample_blocks import (
    BLOCKS_PER_CLIP,
    INPUT,
    check_at_least,
    sampled_blocks,
)
from elastic.cli.flags import INFERENCE
from elastic.cli.script import Flag, Script

_SHARED = {flag.name: flag for flag in INFERENCE.flags}
_WIDTH = 8  # counts in one call

FIT_CURVES = Script(
    name="scripts/fit_curves.py",
    usage="--load_checkpoint=MODEL_FOLDER --input_path=FOLDER_OF_CLIPS",
    description=(
        "Measures the loss of blocks with counts over the whole range, each block as the first of its clip, and fits a "
        "prior: what a block's pixels tell of its curve. Writes curves.json into the model's folder, whole or not at all. "
        "New weights need a new one."
    ),
    groups={
        "Input and output": (
            Flag("load_checkpoint", "", "a folder with config.json and weights; curves.json goes there", required=True),
            *INPUT,
        ),
        "What is measured": (
            BLOCKS_PER_CLIP,
            Flag("num_counts", 16, "counts of each block, spread geometrically from the fewest to all"),
        ),
        "Computation": (_SHARED["mesh_dim"], _SHARED["dtype"]),
        "Other": (_SHARED["verbose"], _SHARED["debug"]),
    },
)  # fmt: skip


def fit_curves(flags: app.Values) -> int:
    """Measures the blocks, fits the prior, writes curves.json."""
    folder = pathlib.Path(flags["load_checkpoint"])
    if not folder.is_dir():
        raise ValueError(f"--load_checkpoint={flags['load_checkpoint']} must be a model's folder.")
    if not os.access(folder, os.W_OK):  # known before anything is measured
        raise ValueError(
            f"--load_checkpoint={flags['load_checkpoint']}: curves.json goes into this folder, which cannot be written to; "
            "give a copy of it."
        )
    check_at_least(flags, "num_counts", 2, "the fewest tokens and all are measured at least")
    check_at_least(flags, "blocks_per_clip", 1, "without a block there is nothing to measure")

    import numpy as np

    from elastic import checkpoints
    from elastic.distributed import cpu_devices, mesh
    from elastic.io.atomic import atomic_open
    from elastic.pipeline import load_model, tokenize_files
    from elastic.search import curve_prior, geometric_counts, make_search
    from elastic.tokenizer.scheduler import BatchScheduler

    cpu_devices.set_up_cpu()
    config = load_model.model_config(str(folder))
    counts = geometric_counts(config.min_toks, config.max_toks, flags["num_counts"])
    if len(counts) < 2:
        raise ValueError(
            f"--load_checkpoint={flags['load_checkpoint']}: every block of this model has {config.max_toks} tokens, so that "
            "there is no count to guess; give an elastic model."
        )
    tokenizer = tokenize_files.ElasticTokenizer(
        config,
        checkpoints.load_params(str(folder), config),
        dtype=flags["dtype"],
        mesh=mesh.make_mesh(flags["mesh_dim"]),
        window_blocks=1,
        search_width=_WIDTH,
    )
    scheduler = BatchScheduler(tokenizer.codec, tokenizer.weights, width=_WIDTH)
    search = make_search(
        "fixed", min_kept=1, max_kept=config.max_toks, num_tokens=config.max_toks, width=_WIDTH
    )
    blocks, losses, num_clips = [], [], 0
    for chosen in sampled_blocks(flags, config):
        num_clips += 1
        for frames in chosen:
            # Nothing is committed, so every block finds the cache empty.
            scheduler.assign(0, frames, search)
            losses.append(list(scheduler.losses_of(0, counts).values()))
            blocks.append(frames)
    prior = curve_prior.fit(
        blocks,
        np.array(losses),
        counts=counts,
        patch_size=config.patch_size,
        token_order=config.token_order,
    )
    with atomic_open(folder / curve_prior.FILE_NAME) as written:
        written.write(prior.to_json().encode())
    print(
        f"{len(blocks)} blocks of {num_clips} clips; a guess is {prior.residual:.3f} off in log loss."
    )
    return 0

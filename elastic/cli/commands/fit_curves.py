"""Fits curves.json, from which the search takes its first guess of a block's token count; `--help` lists the flags."""

import os
import pathlib

from elastic.cli import app
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
            Flag("input_path", "", "a folder of images and videos that nothing will be measured on", required=True),
            _SHARED["fps"],
            Flag("max_frames", 96, "take no more frames of a video than this; 0: all"),
        ),
        "What is measured": (
            Flag("blocks_per_clip", 3, "blocks taken of a video, from its first to its last whole one"),
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
    for name, least, why in (
        ("num_counts", 2, "the fewest tokens and all are measured at least"),
        ("blocks_per_clip", 1, "without a block there is nothing to measure"),
    ):
        if flags[name] < least:
            raise ValueError(f"--{name}={flags[name]} must be at least {least}: {why}.")

    import numpy as np
    from tqdm import tqdm

    from elastic import checkpoints, media
    from elastic.distributed import cpu_devices, mesh
    from elastic.io.atomic import atomic_open
    from elastic.pipeline import load_model, tokenize_files
    from elastic.search import curve_prior, geometric_counts, make_search
    from elastic.tokenizer.scheduler import BatchScheduler

    cpu_devices.set_up_cpu()
    files = list(tokenize_files.find_inputs(flags["input_path"]))
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
    blocks, losses, bad = [], [], []
    for file in tqdm(files, desc="measuring", unit="clip", disable=None):
        try:
            with media.open_clip(
                file,
                resolution=config.resolution,
                rate=flags["fps"] or None,
                max_frames=flags["max_frames"] or None,
            ) as reader:
                chosen = spread(list(reader.blocks(config.frames_per_block)), flags)
        except (media.MediaError, OSError) as error:
            app.log.warning("Left out: %s", error)
            bad.append(file)
            continue
        for frames in chosen:
            # Nothing is committed, so every block finds the cache empty.
            scheduler.assign(0, frames, search)
            losses.append(list(scheduler.losses_of(0, counts).values()))
            blocks.append(frames)
    if not blocks:
        raise ValueError(
            f"--input_path={flags['input_path']}: none of {len(files)} files could be read, the first is {bad[0]}; give a "
            "folder of images or videos."
        )
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
        f"{len(blocks)} blocks of {len(files) - len(bad)} clips; a guess is {prior.residual:.3f} off in log loss."
    )
    return 0


def spread(blocks: list, flags: app.Values) -> list:
    """Up to `blocks_per_clip` blocks at equal distances; a short last block is used only where it is the only one."""
    whole = [block for block in blocks if len(block) == len(blocks[0])]
    most = min(flags["blocks_per_clip"], len(whole))
    places = {round(i * (len(whole) - 1) / max(most - 1, 1)) for i in range(most)}
    return [whole[place] for place in sorted(places)]

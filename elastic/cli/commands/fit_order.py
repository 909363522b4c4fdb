"""Fits the order 'adaptive' of a block's tokens to a model; `--help` lists the flags."""

import pathlib

from elastic.cli import app
from elastic.cli.commands.sample_blocks import (
    BLOCKS_PER_CLIP,
    INPUT,
    check_at_least,
    sampled_blocks,
)
from elastic.cli.flags import OTHER
from elastic.cli.script import Flag, Script

FIT_ORDER = Script(
    name="scripts/fit_order.py",
    usage="--load_checkpoint=MODEL_FOLDER --input_path=FOLDER_OF_CLIPS --output_folder=NEW_FOLDER",
    description=(
        "Gives a model with groups of patches the token order 'adaptive': groups that have more to say send more of a "
        "block's tokens. Measures what each stage takes off the error, fits what tells it beforehand, and writes the model with "
        "its new order into a new folder, whole or not at all. Some hundred blocks are enough. The search's first guesses "
        "(curves.json) are of the old order; fit them anew."
    ),
    groups={
        "Input and output": (
            Flag("load_checkpoint", "", "a folder with config.json and weights", required=True),
            *INPUT,
            Flag("output_folder", "", "a new folder for the model", required=True),
        ),
        "What is measured": (BLOCKS_PER_CLIP,),
        "Other": OTHER,
    },
)  # fmt: skip


def fit_order(flags: app.Values) -> int:
    """Measures the blocks, fits the order, writes the model."""
    check_at_least(flags, "blocks_per_clip", 1, "without a block there is nothing to measure")
    output = pathlib.Path(flags["output_folder"])
    if (output / "model.safetensors").exists():
        raise ValueError(f"--output_folder={output} holds a model; name a new folder.")

    from elastic import checkpoints
    from elastic.distributed import cpu_devices
    from elastic.model import fit_order as fit
    from elastic.patches import pad_block, patchify, to_unit_range
    from elastic.pipeline import load_model

    cpu_devices.set_up_cpu()
    config = load_model.model_config(flags["load_checkpoint"])
    fit.with_order(config)  # a model that cannot have it is refused before its weights are read
    params = checkpoints.load_params(flags["load_checkpoint"], config)
    params, config = fit.adaptive(params, config)
    measure = fit.StageErrors(params, config)
    measured = []
    for blocks in sampled_blocks(flags, config):
        for frames in blocks:
            whole = to_unit_range(pad_block(frames, config.frames_per_block))
            measured.append(measure(patchify(whole, config.patch_size, config.token_order)))
    params["token_order"] = fit.fit(fit.joined(measured))
    checkpoints.save_pretrained(output, config, params)
    print(f"{output}: the order of {config.num_stages} stages, from {len(measured)} blocks.")
    return 0

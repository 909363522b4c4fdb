"""Takes the parameters out of a training state; `--help` lists the flags."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from elastic import cli
from elastic.cli_flags import Flag, Script

CONVERT = Script(
    name="scripts/trainstate_to_params_only.py",
    usage="--load_checkpoint=trainstate::FILE --output_path=FILE",
    description=(
        "Writes the parameters of a training state as a file `params`, the format of the released models, with their "
        "config.json beside it. Takes a streaming_train_state, or the folder of one of a run's checkpoints. A damaged or "
        "truncated state is refused, and nothing is written."
    ),
    groups={
        "Files": (
            Flag(
                "load_checkpoint",
                "",
                "trainstate::FILE, or the folder of a checkpoint, such as OUT/checkpoints/00001000",
                required=True,
            ),
            Flag("output_path", "", "the file to write", required=True),
            Flag(
                "float_dtype",
                "bf16",
                "float type of the parameters written",
                choices=("fp32", "bf16", "fp16"),
            ),
        ),
        "Model": (
            Flag(
                "load_elastic_config",
                "",
                "the model's shape: a preset or a config.json; without it, the one beside the state",
            ),
            Flag("update_elastic_config", "", 'changes to it, such as "dict(min_toks=128)"'),
        ),
        "Other": (Flag("debug", False, "show the traceback of an error"),),
    },
)


def convert(flags: cli.Values) -> int:
    """Reads, checks and writes."""
    from elastic import checkpoint, runs, train_state

    source, path = flags["load_checkpoint"], pathlib.Path(flags["output_path"])
    preset, changes = flags["load_elastic_config"], flags["update_elastic_config"]
    if train_state.is_checkpoint(source):
        if preset or changes:
            raise ValueError(
                f"{source} says itself what the model is; leave out --load_elastic_config and --update_elastic_config."
            )
        config, params = train_state.load_checkpoint_params(source)
    else:
        config = runs.model_config(source, preset=preset, changes=changes)
        params = checkpoint.load_params(source, config)
    checkpoint.save_params(path, params, float_dtype=flags["float_dtype"])
    if not path.with_name(train_state.CONFIG_FILE).exists():
        train_state.write_config(path.absolute().parent, config)
    print(f"Wrote {path} ({path.stat().st_size / 1e6:.1f} MB).")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(CONVERT, convert))

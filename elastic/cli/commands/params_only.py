"""Takes the parameters out of a training state; `--help` lists the flags."""

import os
import pathlib
from typing import TYPE_CHECKING

from elastic.cli import app
from elastic.cli.script import Flag, Script

if TYPE_CHECKING:
    from elastic.config import ElasticTokConfig

CONVERT = Script(
    name="scripts/trainstate_to_params_only.py",
    usage="--load_checkpoint=trainstate::FILE --output_path=FILE",
    description=(
        "Writes the parameters of a training state as a file `params`, the format of the released models, with their "
        "config.json beside it. Takes a streaming_train_state, or the folder of one of a run's checkpoints. Of a run with "
        "--ema_decay, a checkpoint gives the running mean of the parameters, which the run itself exports as `params`, and a "
        "streaming_train_state the last step's parameters, as it holds no mean; the last line says which were written. A "
        "damaged or truncated state is refused, and nothing is written."
    ),
    groups={
        "Files": (
            Flag(
                "load_checkpoint",
                "",
                "trainstate::FILE, or the folder of a checkpoint, such as OUT/checkpoints/00001000",
                required=True,
            ),
            Flag(
                "output_path",
                "",
                "the file to write; one with parameters is replaced, any other is not",
                required=True,
            ),
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


def convert(flags: app.Values) -> int:
    """Reads, checks and writes."""
    from elastic import checkpoints
    from elastic.pipeline import load_model
    from elastic.training import state
    from elastic.training.checkpoints import is_checkpoint, load_checkpoint_params

    source, path = flags["load_checkpoint"], pathlib.Path(flags["output_path"])
    check_output(path)
    preset, changes = flags["load_elastic_config"], flags["update_elastic_config"]
    if is_checkpoint(source):
        if preset or changes:
            raise ValueError(
                f"{source} says itself what the model is; leave out --load_elastic_config and --update_elastic_config."
            )
        config, params = load_checkpoint_params(source)
        which = kept_in_checkpoint(source)
    else:
        config = load_model.model_config(source, preset=preset, changes=changes)
        params = checkpoints.load_params(source, config)
        which = kept_in_file(source)
    new = check_config(path, config)
    checkpoints.save_params(path, params, float_dtype=flags["float_dtype"])
    if new:
        state.write_config(path.absolute().parent, config)
    print(f"Wrote {path} ({path.stat().st_size / 1e6:.1f} MB): {which}.")
    return 0


def check_output(path: pathlib.Path) -> None:
    """Refuses to replace anything but parameters: asked before a state is loaded.

    Raises:
      ValueError: what lies at `path` is something else, a training state too.
    """
    from elastic.checkpoints.resolve import PARAMS, index_tensors
    from elastic.checkpoints.validate import checkpoint_kind
    from elastic.io.tree import CheckpointError
    from elastic.training.state import CONFIG_FILE

    if path.name == CONFIG_FILE:
        raise ValueError(
            f"--output_path={path}: this name is the model's configuration's; name another file."
        )
    if not os.path.lexists(path):
        return
    try:
        ours = path.is_file() and checkpoint_kind(index_tensors(path)) == PARAMS
    except CheckpointError:
        ours = False
    if not ours:
        raise ValueError(
            f"--output_path={path} exists and is no file of parameters; name another file, so that nothing of yours is "
            "replaced."
        )


def check_config(path: pathlib.Path, config: "ElasticTokConfig") -> bool:
    """Whether a config.json is to be written beside `path`; one that lies there is the one that loading would take.

    Raises:
      ValueError: that is another model's, or no configuration.
    """
    from elastic.config import load_config
    from elastic.training.state import CONFIG_FILE

    beside = path.with_name(CONFIG_FILE)
    if not os.path.lexists(beside):
        return True
    way_out = "name an --output_path in another folder."
    try:
        found = load_config(str(beside))
    except ValueError as error:
        raise ValueError(
            f"--output_path={path}: the {CONFIG_FILE} beside it is no model's ({error}); {way_out}"
        ) from error
    # The shape, and what is no part of it but decides how many tokens a block may have.
    if (found.config_hash(), found.min_toks, found.mask_type) != (
        config.config_hash(),
        config.min_toks,
        config.mask_type,
    ):
        theirs, ours = found.to_json_dict(), config.to_json_dict()
        differing = [
            f"{name}={theirs[name]}, here {ours[name]}"
            for name in ours
            if theirs[name] != ours[name]
        ]
        raise ValueError(
            f"--output_path={path}: the {CONFIG_FILE} beside it is of another model ({'; '.join(differing[:3])}), with "
            f"which these parameters would be loaded; {way_out}"
        )
    return False


def kept_in_file(source: str) -> str:
    """Which parameters `load_params` gives, in words."""
    from elastic.checkpoints.resolve import PARAMS, index_tensors, resolve
    from elastic.checkpoints.validate import checkpoint_kind

    if checkpoint_kind(index_tensors(resolve(source)[0])) == PARAMS:
        return f"those of {source}, which is no training state"
    return (
        "the parameters of the last step; a running mean (--ema_decay), if the run kept one, is in its checkpoints and in the "
        "`params` that it exported"
    )


def kept_in_checkpoint(folder: str) -> str:
    """Which parameters `load_checkpoint_params` gives, in words."""
    import orbax.checkpoint as ocp
    from etils import epath

    notes = ocp.JsonCheckpointHandler().restore(epath.Path(folder).absolute() / "notes")
    decay = notes["training"]["ema_decay"]
    if decay > 0:
        return (
            f"the running mean of the parameters (ema_decay={decay:g}), not those of the last step"
        )
    return "the parameters of the last step; this run kept no running mean (--ema_decay)"

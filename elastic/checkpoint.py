"""Reads and writes a model's parameters and training states: the one door to checkpoint files.

What a checkpoint is called (`spec`):
  params::FILE             the bare parameter tree, streaming format (the released file `params`)
  trainstate_params::FILE  the parameters inside a streaming_train_state
  trainstate::FILE         the same; `load_train_state` takes the whole of it
  flax_params::FILE        the parameter tree as one msgpack blob
  hf::org/name, org/name   a Hugging Face repository with a file `params` or `model.safetensors`
  FOLDER                   a folder that holds one of these files
  FILE                     any of them; its format is recognised

Layers may be stacked in a file (`.../scan_decoder/...`) or numbered (`.../0/...`); either loads
into either. Names and shapes are held against the model's before memory is taken for any tensor.
"""

import json
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import flax.serialization
import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from elastic.checkpoint_source import (
    PARAMS,
    TRAIN_STATE,
    from_hub,
    index_tensors,
    is_repo,
    resolve,
    split_prefix,
)
from elastic.config import ElasticTokConfig
from elastic.config import load_config as read_config
from elastic.layer_layout import STACKED, STACKS, convert_layout, stacked_homes
from elastic.model import param_shapes
from elastic.safetensor_file import write_safetensors
from elastic.streaming import write_stream
from elastic.tensor_file import (
    CheckpointError,
    KeyPath,
    Tensor,
    atomic_file,
    flatten,
    is_float,
    read_into,
    show,
    unflatten,
)

__all__ = [
    "CheckpointError",
    "convert_layout",
    "load_config",
    "load_params",
    "load_train_state",
    "save_params",
    "save_pretrained",
    "save_train_state",
]

_STATE_PARAMS = ("params", "params")  # where a train state keeps the parameters
_PROGRESS_BYTES = 50e6  # smaller files load before a bar could be read
_FLOAT_NAMES = {
    "fp16": np.float16,
    "fp32": np.float32,
    "fp64": np.float64,
    "bf16": ml_dtypes.bfloat16,
}


# Loading


def load_params(
    spec: str | os.PathLike,
    config: ElasticTokConfig,
    *,
    dtype: DTypeLike | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """The parameters that `spec` names (see the top of this file), as nested dicts of NumPy arrays.

    Args:
      spec: prefix and file, repository, folder or file.
      config: the model the parameters must fit; its `scan_layers` picks the layout of the result.
      dtype: float type of the result (a dtype, 'bf16', 'fp32', ...); None keeps the stored one.
      revision: branch, tag or commit of a repository.
      local_files_only: look in the Hugging Face cache only.
      progress: show a bar for files above 50 MB.

    Returns:
      The bare tree `{'encoder': ..., 'decoder': ...}` in the file's order. Peak memory is the
      result's size and a few megabytes.

    Raises:
      CheckpointError: there is no such file, it is damaged or in a foreign format, or it does not
      fit `config`.
    """
    path, wanted = resolve(spec, revision=revision, local_files_only=local_files_only)
    tensors = index_tensors(path)
    holds = _content(tensors)
    if wanted is not None and wanted != holds:
        way = "params" if holds == PARAMS else "trainstate_params"
        raise CheckpointError(f"{path} holds {holds}, not {wanted}; load it as {way}::{path}.")
    groups = _param_groups(tensors)
    prefix = _STATE_PARAMS if holds == TRAIN_STATE else next(iter(groups))
    found = groups.pop(prefix, {})
    _check_fit(found, prefix, config, path)
    if holds == TRAIN_STATE:
        _check_not_cut(groups, tensors, found, path)
    elif groups:
        raise CheckpointError(
            f"{path} holds more than one parameter tree: {show(next(iter(groups)))!r} too."
        )
    flat = _read(
        path, found, scan_layers=config.scan_layers, dtype=_float_dtype(dtype), progress=progress
    )
    return convert_layout(unflatten(flat), scan_layers=config.scan_layers)


def load_train_state(
    path: str | os.PathLike,
    config: ElasticTokConfig,
    *,
    dtype: DTypeLike | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """A whole training state `{'step', 'params': {'params': ...}, 'opt_state': ...}`, NumPy arrays.

    Parameters and moments come in the layout that `config.scan_layers` asks for; keys of
    `opt_state` are strings ('1', '0', 'mu', ...), as `flax.serialization.from_state_dict` takes
    them. `dtype` converts every float, None keeps what is stored. `path` is a file, a folder with a
    `streaming_train_state`, or `trainstate::FILE`.

    Raises:
      CheckpointError: as `load_params`; also when moments are missing or shaped unlike the
      parameters.
    """
    file, _ = resolve(path, names=("streaming_train_state",), local=True)
    tensors = index_tensors(file)
    if _content(tensors) != TRAIN_STATE:
        raise CheckpointError(
            f"{file} holds {PARAMS}, not {TRAIN_STATE}; only load_params can use it."
        )
    groups = _param_groups(tensors)
    params = groups.get(_STATE_PARAMS, {})
    _check_fit(params, _STATE_PARAMS, config, file)
    _check_not_cut(
        {key: group for key, group in groups.items() if key != _STATE_PARAMS}, tensors, params, file
    )
    for prefix, group in groups.items():
        _check_fit(group, prefix, config, file)
    if not any(tensor.path == ("step",) for tensor in tensors):
        raise CheckpointError(f"{file} holds no 'step', so training cannot go on from it.")
    everything = {tensor.path: tensor for tensor in tensors}
    flat = _read(
        file,
        everything,
        scan_layers=config.scan_layers,
        dtype=_float_dtype(dtype),
        progress=progress,
    )
    return convert_layout(unflatten(flat), scan_layers=config.scan_layers)


def load_config(
    spec: str | os.PathLike, *, revision: str | None = None, local_files_only: bool = False
) -> ElasticTokConfig | None:
    """The configuration stored beside the weights that `spec` names, or None when there is none.

    Raises:
      ValueError: there is a config.json that is no configuration of ours.
      CheckpointError: there are no such weights.
    """
    kind, rest = split_prefix(os.fspath(spec))
    if kind == "hf" or (kind is None and is_repo(rest)):
        path = from_hub(
            rest, ("config.json",), revision=revision, local_files_only=local_files_only
        )
    else:
        path = resolve(spec)[0].with_name("config.json")
    return read_config(str(path)) if path is not None and path.is_file() else None


def _content(tensors: Iterable[Tensor]) -> str:
    starts = {tensor.path[0] for tensor in tensors}
    return TRAIN_STATE if starts & {"step", "opt_state"} else PARAMS


def _param_groups(tensors: Iterable[Tensor]) -> dict[KeyPath, dict[KeyPath, Tensor]]:
    """The parameter-shaped trees of a file: {prefix up to the last 'params': {path below: tensor}}.

    A train state has three: the parameters and the two moments. Tensors of a train state outside of
    any (step, counts) are in none; a bare tree has the prefix ().
    """
    state = _content(tensors) == TRAIN_STATE
    groups: dict[KeyPath, dict[KeyPath, Tensor]] = {}
    for tensor in tensors:
        depth = max((at + 1 for at, key in enumerate(tensor.path) if key == "params"), default=0)
        if depth or not state:
            groups.setdefault(tensor.path[:depth], {})[tensor.path[depth:]] = tensor
    return groups


def _check_fit(
    found: Mapping[KeyPath, Tensor], prefix: KeyPath, config: ElasticTokConfig, file: Path
) -> None:
    """Raises unless names and shapes are the model's, in whichever layout the file has."""
    stacked = any(STACKED in path for path in found)
    tree = param_shapes(config.replace(scan_layers=stacked))
    expected = {path: tuple(leaf.shape) for path, leaf in flatten(tree).items()}
    shapes = {path: tensor.shape for path, tensor in found.items()}

    def name(path: KeyPath) -> str:
        return show((*prefix, *path))

    wrong = [
        f"{name(path)}: expected shape {expected[path]}, found {shape}"
        for path, shape in shapes.items()
        if path in expected and shape != expected[path]
    ]
    missing = [
        f"{name(path)}, shape {expected[path]}, is missing"
        for path in expected
        if path not in shapes
    ]
    extra = [
        f"{name(path)}, shape {shapes[path]}, is not in the model"
        for path in shapes
        if path not in expected
    ]
    if wrong or missing or extra:
        shown = [*wrong[:2], *missing[:2], *extra[:2]]
        rest = len(wrong) + len(missing) + len(extra) - len(shown)
        shown += [f"and {rest} more"] if rest else []
        hint = _difference(shapes, expected)
        if not hint and missing and not wrong and not extra:
            hint = " Was the file cut short?"
        raise CheckpointError(f"{file} does not fit the model: {'; '.join(shown)}.{hint}")
    for path, tensor in found.items():
        if not is_float(tensor.dtype):
            raise CheckpointError(
                f"{file}: {name(path)} is of {tensor.dtype}; parameters are floats."
            )


def _difference(found: Mapping[KeyPath, tuple], expected: Mapping[KeyPath, tuple]) -> str:
    """How the file's model differs, in the configuration's words; '' where nothing is certain."""
    ours, theirs = _traits(expected), _traits(found)
    parts = [
        f"{key}={theirs[key]}, not {ours[key]}"
        for key in ours
        if key in theirs and theirs[key] != ours[key]
    ]
    return f" The file's model has {'; '.join(parts)}." if parts else ""


def _traits(shapes: Mapping[KeyPath, tuple]) -> dict[str, Any]:
    traits: dict[str, Any] = {}
    encoder = shapes.get(("encoder", "pre_quant", "kernel"))
    decoder = shapes.get(("decoder", "post_quant", "kernel"))
    if encoder and decoder and len(encoder) == len(decoder) == 2:
        kind = "vae" if encoder[1] == 2 * decoder[0] else "fsq"
        traits |= {
            "hidden_size": decoder[1],
            "bottleneck_type": f"{kind!r} with {decoder[0]} channels",
        }
    for part, stack in STACKS.items():
        layers = {
            path[2]: shape
            for path, shape in shapes.items()
            if len(path) > 2 and path[:2] == (part, stack)
        }
        if layers:
            stacked = layers.get(STACKED)
            traits[f"num_{part}_layers"] = stacked[0] if stacked else len(layers)
    return traits


def _check_not_cut(
    groups: Mapping[KeyPath, Mapping[KeyPath, Tensor]],
    tensors: list[Tensor],
    params: Mapping[KeyPath, Tensor],
    file: Path,
) -> None:
    """Finds what a train state lacks when its end is lost exactly between two records.

    The format stores no count of records, so the optimizer's structure has to tell: moments come
    for all parameters, the second after the first, and the schedule's count after both.
    """
    cut = f"{file} was cut short:"
    paths = {tensor.path for tensor in tensors}
    for prefix, group in groups.items():
        lost = [path for path in params if path not in group]
        if lost:
            raise CheckpointError(
                f"{cut} {show((*prefix, *lost[0]))!r} is missing, and {len(lost) - 1} more."
            )
        if prefix[-2:-1] == ("mu",):
            second = (*prefix[:-2], "nu", "params")
            if second not in groups:
                raise CheckpointError(f"{cut} {show(second)!r} is missing.")
            schedule = (*prefix[:-3], "2", "count")
            if prefix[-3:-2] == ("0",) and schedule not in paths:
                warnings.warn(
                    f"{file} lacks {show(schedule)!r}: unless it was trained at a constant rate, "
                    "its end is lost.",
                    stacklevel=3,
                )
    if not any(path[0] == "opt_state" for path in paths):
        warnings.warn(
            f"{file} holds no optimizer state; if it should, its end is lost.", stacklevel=3
        )


def _read(
    path: Path,
    tensors: Mapping[KeyPath, Tensor],
    *,
    scan_layers: bool,
    dtype: np.dtype | None,
    progress: bool,
) -> dict[KeyPath, np.ndarray]:
    """Reads the tensors, named by the mapping's keys; `scan_layers` stacks numbered layers."""
    homes = stacked_homes(tensors, path) if scan_layers else {}
    num_layers: dict[KeyPath, int] = {}
    for stack, _ in homes.values():
        num_layers[stack] = num_layers.get(stack, 0) + 1
    flat: dict[KeyPath, np.ndarray] = {}
    not_finite = []
    total = sum(tensor.num_bytes for tensor in tensors.values())
    with open(path, "rb") as file, _bar(path, total, progress) as bar:
        for name, tensor in tensors.items():
            wanted = dtype if dtype is not None and is_float(tensor.dtype) else tensor.dtype
            stack, layer = homes.get(name, (name, None))
            if stack not in flat:
                flat[stack] = np.empty(
                    tensor.shape if layer is None else (num_layers[stack], *tensor.shape), wanted
                )
            out = flat[stack] if layer is None else flat[stack][layer, ...]  # a view, 0-d too
            if (out.shape, out.dtype) != (tensor.shape, wanted):
                raise CheckpointError(
                    f"{path}: {show(tensor.path)!r}, {tensor.shape} of {tensor.dtype}, "
                    "is unlike the other layers."
                )
            if not read_into(file, tensor, out, progress=bar.update):
                not_finite.append(show(tensor.path))
    if not_finite:
        warnings.warn(
            f"{path}: {len(not_finite)} tensors hold NaN or infinite values"
            f"{'' if dtype is None else f' as {dtype}'}, the first is {not_finite[0]}.",
            stacklevel=3,
        )
    return flat


def _bar(path: Path, total: int, progress: bool) -> Any:
    from tqdm import tqdm

    disable = not progress or total < _PROGRESS_BYTES
    return tqdm(
        total=total, desc=f"Loading {path.name}", unit="B", unit_scale=True, disable=disable
    )


def _float_dtype(dtype: DTypeLike | None) -> np.dtype | None:
    if dtype is None or (isinstance(dtype, str) and not dtype):
        return None
    names = [*_FLOAT_NAMES, "float16", "float32", "float64", "bfloat16"]
    try:
        found = np.dtype(_FLOAT_NAMES.get(dtype, dtype) if isinstance(dtype, str) else dtype)
    except TypeError:
        found = None
    if found is None or found.name not in names:
        raise CheckpointError(
            f"dtype {dtype!r} is not a float type for weights; use one of {', '.join(names)}."
        )
    return found


# Saving


def save_params(
    path: str | os.PathLike, params: Mapping[str, Any], *, float_dtype: DTypeLike | None = None
) -> None:
    """Writes a parameter tree as a streaming file (`params::FILE`), atomically.

    The order is the tree's own: a loaded tree keeps its file's, so what is read and saved again has
    the same bytes; a tree that JAX made is sorted by key. `float_dtype` converts floats, None keeps
    them.
    """
    write_stream(path, _bare(params), float_dtype=_float_dtype(float_dtype))


def save_train_state(
    path: str | os.PathLike, state_tree: Any, *, float_dtype: DTypeLike | None = None
) -> None:
    """Writes a whole training state as a streaming file (`trainstate::FILE`), atomically.

    `state_tree` is a flax `TrainState` or nested dicts with `step`, `params` (`{'params': tree}`)
    and `opt_state`; these three are written in this order, everything below in the tree's own.
    `float_dtype` converts every float, the moments too: with None a resumed run repeats the numbers
    exactly, with 'bf16' (the released default) it does not.
    """
    state = flax.serialization.to_state_dict(state_tree)
    if "step" not in state or "params" not in state.get("params", {}):
        raise CheckpointError(
            "A training state needs 'step' and 'params', the latter as {'params': tree}."
        )
    first = {key: state[key] for key in ("step", "params", "opt_state") if key in state}
    write_stream(path, first | state, float_dtype=_float_dtype(float_dtype))


def save_pretrained(
    folder: str | os.PathLike,
    config: ElasticTokConfig,
    params: Mapping[str, Any],
    *,
    float_dtype: DTypeLike | None = None,
) -> None:
    """Writes `config.json` and `model.safetensors` into a folder, for `load_config`, `load_params`.

    Both files are complete before either takes its place. Other files of the folder are left alone.
    """
    text = json.dumps(config.to_json_dict(), indent=2) + "\n"
    with (
        atomic_file(Path(folder) / "config.json") as config_file,
        atomic_file(Path(folder) / "model.safetensors") as weights_file,
    ):
        config_file.write(text.encode())
        write_safetensors(weights_file, _bare(params), float_dtype=_float_dtype(float_dtype))


def _bare(params: Any) -> dict[str, Any]:
    tree = flax.serialization.to_state_dict(params)
    return tree["params"] if set(tree) == {"params"} else tree

"""Loads and saves a model's parameters and training states.

How a checkpoint is named (`spec`):
  params::FILE             the parameter tree, streaming format (the released file `params`)
  trainstate_params::FILE  the parameters inside a streaming_train_state
  trainstate::FILE         the same; `load_train_state` loads all of it
  flax_params::FILE        the parameter tree as one msgpack blob
  hf::org/name, org/name   a Hugging Face repository with a file `params` or `model.safetensors`
  small-fsq, ElasticTok-FSQ  a model by its name (named_models.py)
  FOLDER                   a folder that holds one of these files
  FILE                     any of them; its format is recognised

Layers may be stacked in a file (`.../scan_decoder/...`) or numbered (`.../0/...`), whatever the
model has. Names and shapes are compared with the model's before any tensor is allocated.
"""

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import flax.serialization
import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from elastic.checkpoints import float8
from elastic.checkpoints.named_models import preset_of
from elastic.checkpoints.resolve import PARAMS, TRAIN_STATE, index_tensors, repository, resolve
from elastic.checkpoints.scan_layout import convert_layout, stacked_homes
from elastic.checkpoints.validate import (
    STATE_PARAMS,
    check_whole_state,
    checkpoint_kind,
    missing_parts,
    param_groups,
    validate_tensors,
)
from elastic.config import ElasticTokConfig
from elastic.config import load_config as read_config
from elastic.io.atomic import atomic_open
from elastic.io.msgpack_stream import write_stream
from elastic.io.progress import hide_bar
from elastic.io.safetensors_file import write_safetensors
from elastic.io.tensors import BFLOAT16, FLOAT8, Tensor, is_float, read_into
from elastic.io.tree import CheckpointError, KeyPath, flatten, path_name, unflatten

__all__ = [
    "CheckpointError",
    "convert_layout",
    "load_config",
    "load_params",
    "load_train_state",
    "restore_into",
    "save_params",
    "save_pretrained",
    "save_train_state",
]

_State = TypeVar("_State")
_PROGRESS_BYTES = 50e6  # smaller files load at once and need no bar
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
    """The parameters that `spec` names, as nested dicts of NumPy arrays.

    Args:
      spec: prefix and file, repository, folder or file; see the top of this file.
      config: the model that the parameters must fit; its `scan_layers` determines the layout of the result.
      dtype: float dtype of the result (a dtype, 'bf16', 'fp32', ...). None keeps the stored one, but for float8,
        which becomes bfloat16; this is exact.
      revision: branch, tag or commit of a repository.
      local_files_only: look in the Hugging Face cache only.
      progress: show a bar for files above 50 MB.

    Returns:
      The tree `{'encoder': ..., 'decoder': ...}` in the file's order. Peak memory is the size of the
      result and a few megabytes.

    Raises:
      CheckpointError: there is no such file, it is damaged or in an unknown format, or it does not
        fit `config`.
    """
    path, expected = resolve(spec, revision=revision, local_files_only=local_files_only)
    tensors = index_tensors(path)
    kind = checkpoint_kind(tensors)
    if expected is not None and expected != kind:
        prefix = "params" if kind == PARAMS else "trainstate_params"
        raise CheckpointError(f"{path} holds {kind}, not {expected}; load it as {prefix}::{path}.")
    groups = param_groups(tensors)
    above = STATE_PARAMS if kind == TRAIN_STATE else next(iter(groups))
    found = groups.pop(above, {})
    validate_tensors(found, above, config, path)
    if kind == TRAIN_STATE:
        check_whole_state([tensor.path for tensor in tensors], path)
    elif groups:
        raise CheckpointError(
            f"{path} holds more than one parameter tree: '{path_name(next(iter(groups)))}' too."
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

    The keys of `opt_state` are strings ('1', '0', 'mu', ...), as
    `flax.serialization.from_state_dict` takes them.

    Args:
      path: a file, a folder with a `streaming_train_state`, or `trainstate::FILE`.
      config: the model that the state must fit; its `scan_layers` determines the layout of parameters and moments.
      dtype: dtype of all floats; None keeps the stored one.
      progress: show a bar for files above 50 MB.

    Raises:
      CheckpointError: as `load_params`; also where moments and parameters differ in shape.
    """
    file, _ = resolve(path, names=("streaming_train_state",), local=True)
    tensors = index_tensors(file)
    if checkpoint_kind(tensors) != TRAIN_STATE:
        raise CheckpointError(
            f"{file} holds {PARAMS}, not {TRAIN_STATE}; only load_params can use it."
        )
    groups = param_groups(tensors)
    validate_tensors(groups.get(STATE_PARAMS, {}), STATE_PARAMS, config, file)
    check_whole_state([tensor.path for tensor in tensors], file)
    for prefix, group in groups.items():
        validate_tensors(group, prefix, config, file)
    everything = {tensor.path: tensor for tensor in tensors}
    flat = _read(
        file,
        everything,
        scan_layers=config.scan_layers,
        dtype=_float_dtype(dtype),
        progress=progress,
    )
    return convert_layout(unflatten(flat), scan_layers=config.scan_layers)


def restore_into(target: _State, state: Mapping[str, Any]) -> _State:
    """`target` (a flax `TrainState` or any tree of states) with the values of a loaded training state.

    Optimizer states without arrays are not in files; they stay as they are in `target`.

    Raises:
      CheckpointError: an array is missing in `state`, is not in `target`, or has another shape.
    """
    ours, found = flax.serialization.to_state_dict(target), flatten(state)
    expected = flatten(ours)
    problems = [
        *(f"{path_name(path)} is missing" for path in expected if path not in found),
        *(
            f"{path_name(path)} is not in this optimizer's"
            for path in found
            if path not in expected
        ),
        *(
            f"{path_name(path)}: expected shape {np.shape(leaf)}, found {np.shape(found[path])}"
            for path, leaf in expected.items()
            if path in found and np.shape(found[path]) != np.shape(leaf)
        ),
    ]
    if problems:
        rest = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(
            f"The training state does not fit this model and optimizer: {'; '.join(problems[:3])}{rest}."
        )

    def fill(branch: Mapping[str, Any], prefix: KeyPath) -> dict[str, Any]:
        return {
            key: fill(value, (*prefix, key))
            if isinstance(value, Mapping)
            else found.get((*prefix, key), value)
            for key, value in branch.items()
        }

    return cast(_State, flax.serialization.from_state_dict(target, fill(ours, ())))


def load_config(
    spec: str | os.PathLike, *, revision: str | None = None, local_files_only: bool = False
) -> ElasticTokConfig | None:
    """The config stored beside the weights that `spec` names; of a released model, its preset; None if there is none.

    Raises:
      ValueError: there is a config.json that is no config of this model.
      CheckpointError: there are no such weights.
    """
    path = folder_of(spec, revision=revision, local_files_only=local_files_only) / "config.json"
    if path.is_file():
        return read_config(str(path))
    preset = preset_of(repository(spec) or "")
    return read_config(preset) if preset else None


def folder_of(
    spec: str | os.PathLike, *, revision: str | None = None, local_files_only: bool = False
) -> Path:
    """The folder of the weights that `spec` names and of their other files; a repository is downloaded.

    Raises:
      CheckpointError: there are no such weights.
    """
    weights, _ = resolve(spec, revision=revision, local_files_only=local_files_only)
    return weights.parent


def _read(
    path: Path,
    tensors: Mapping[KeyPath, Tensor],
    *,
    scan_layers: bool,
    dtype: np.dtype | None,
    progress: bool,
) -> dict[KeyPath, np.ndarray]:
    """Reads the tensors.

    Args:
      path: the file.
      tensors: name in the result -> tensor in the file.
      scan_layers: stack numbered layers.
      dtype: dtype of all floats; None keeps the stored one.
      progress: show a bar for files above 50 MB.
    """
    homes = stacked_homes(tensors, path) if scan_layers else {}
    num_layers: dict[KeyPath, int] = {}
    for stack, _ in homes.values():
        num_layers[stack] = num_layers.get(stack, 0) + 1
    flat: dict[KeyPath, np.ndarray] = {}
    not_finite = []
    total = sum(tensor.num_bytes for tensor in tensors.values())
    with open(path, "rb") as file, _bar(path, total, progress) as bar:
        for name, tensor in tensors.items():
            stored = BFLOAT16 if tensor.dtype == FLOAT8 else tensor.dtype
            target = dtype if dtype is not None and is_float(tensor.dtype) else stored
            stack, layer = homes.get(name, (name, None))
            if stack not in flat:
                flat[stack] = np.empty(
                    tensor.shape if layer is None else (num_layers[stack], *tensor.shape), target
                )
            out = flat[stack] if layer is None else flat[stack][layer, ...]  # a view, 0-d too
            if (out.shape, out.dtype) != (tensor.shape, target):
                raise CheckpointError(
                    f"{path}: '{path_name(tensor.path)}', {tensor.shape} of {tensor.dtype}, "
                    "is unlike the other layers."
                )
            if not read_into(file, tensor, out, progress=bar.update):
                not_finite.append(path_name(tensor.path))
    if not_finite:
        warnings.warn(
            f"{path}: {len(not_finite)} tensors hold NaN or infinite values"
            f"{'' if dtype is None else f' as {dtype}'}, the first is {not_finite[0]}.",
            stacklevel=3,
        )
    return flat


def _bar(path: Path, total: int, progress: bool) -> Any:
    from tqdm import tqdm

    disable = hide_bar(progress and total >= _PROGRESS_BYTES)
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

    Tensors are written in the tree's own order. A loaded tree has the order of its file, so loading
    and saving gives the same bytes. A tree made by JAX is sorted by key.

    Args:
      path: the file.
      params: the tree; {'params': tree} is accepted, too.
      float_dtype: dtype in which floats are written; None keeps theirs.
    """
    write_stream(path, _bare(params), float_dtype=_float_dtype(float_dtype))


def save_train_state(
    path: str | os.PathLike, state_tree: Any, *, float_dtype: DTypeLike | None = None
) -> None:
    """Writes a whole training state as a streaming file (`trainstate::FILE`), atomically.

    Args:
      path: the file.
      state_tree: a flax `TrainState`, or nested dicts with `step`, `params` (`{'params': tree}`) and
        `opt_state`; these three are written in this order, everything below in the tree's own.
      float_dtype: dtype in which floats are written, moments included. With None a resumed run repeats
        the numbers exactly, with 'bf16' (the released default) it does not.

    Raises:
      CheckpointError: a part is missing without which the file would not load.
    """
    state = flax.serialization.to_state_dict(state_tree)
    first = {key: state[key] for key in ("step", "params", "opt_state") if key in state}
    lost = missing_parts(flatten(first))
    if lost or "params" not in first.get("params", {}):
        what = f" '{path_name(lost[0])}' is missing." if lost else ""
        raise CheckpointError(
            "A training state needs 'step', 'params' as {'params': tree}, and 'opt_state' with the moments of all "
            f"parameters.{what}"
        )
    write_stream(path, first | state, float_dtype=_float_dtype(float_dtype))


def save_pretrained(
    folder: str | os.PathLike,
    config: ElasticTokConfig,
    params: Mapping[str, Any],
    *,
    float_dtype: DTypeLike | None = None,
) -> None:
    """Writes `config.json` and `model.safetensors` into a folder, for `load_config`, `load_params`.

    Both files are complete before either appears. Other files of the folder are not touched.

    Args:
      folder: the folder, which is made if it is missing.
      config: the model's config.
      params: the parameter tree.
      float_dtype: dtype in which floats are written; None keeps theirs. 'fp8' takes half the space of
        'bf16' (see elastic/checkpoints/float8.py).

    Raises:
      CheckpointError: a matrix's values are too large or too small for float8.
    """
    tree = _bare(params)
    if float_dtype == "fp8":
        tree, float_dtype = float8.as_stored(tree), None
    text = json.dumps(config.to_json_dict(), indent=2) + "\n"
    with (
        atomic_open(Path(folder) / "config.json") as config_file,
        atomic_open(Path(folder) / "model.safetensors") as weights_file,
    ):
        config_file.write(text.encode())
        write_safetensors(weights_file, tree, float_dtype=_float_dtype(float_dtype))


def _bare(params: Any) -> dict[str, Any]:
    tree = flax.serialization.to_state_dict(params)
    return tree["params"] if set(tree) == {"params"} else tree

"""Whether the tensors in a file are the model's: names, shapes, and nothing lost at the end."""

import functools
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from elastic.checkpoint_source import PARAMS, TRAIN_STATE
from elastic.config import ElasticTokConfig
from elastic.layer_layout import STACKED, STACKS
from elastic.model import param_shapes
from elastic.tensor_file import CheckpointError, KeyPath, Tensor, flatten, is_float, show

STATE_PARAMS = ("params", "params")  # where a train state keeps the parameters


def content(tensors: Iterable[Tensor]) -> str:
    """`PARAMS` or `TRAIN_STATE`, by the names of the tensors."""
    starts = {tensor.path[0] for tensor in tensors}
    return TRAIN_STATE if starts & {"step", "opt_state"} else PARAMS


def param_groups(tensors: Iterable[Tensor]) -> dict[KeyPath, dict[KeyPath, Tensor]]:
    """The parameter-shaped trees of a file: {prefix up to the last 'params': {path below: tensor}}.

    A train state has three: the parameters and the two moments. Tensors of a train state outside of
    any (step, counts) are in none; a bare tree has the prefix ().
    """
    state = content(tensors) == TRAIN_STATE
    groups: dict[KeyPath, dict[KeyPath, Tensor]] = {}
    for tensor in tensors:
        depth = max((at + 1 for at, key in enumerate(tensor.path) if key == "params"), default=0)
        if depth or not state:
            groups.setdefault(tensor.path[:depth], {})[tensor.path[depth:]] = tensor
    return groups


def check_fit(
    found: Mapping[KeyPath, Tensor], prefix: KeyPath, config: ElasticTokConfig, file: Path
) -> None:
    """Raises unless names and shapes are the model's, in whichever layout the file has."""
    stacked = any(STACKED in path for path in found)
    expected = _expected_shapes(config.replace(scan_layers=stacked))
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


@functools.lru_cache(
    maxsize=2
)  # tracing a model takes a second, and a train state asks three times
def _expected_shapes(config: ElasticTokConfig) -> dict[KeyPath, tuple[int, ...]]:
    return {path: tuple(leaf.shape) for path, leaf in flatten(param_shapes(config)).items()}


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


def check_not_cut(
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
                f"{cut} '{show((*prefix, *lost[0]))}' is missing, and {len(lost) - 1} more."
            )
        if prefix[-2:-1] == ("mu",):
            second = (*prefix[:-2], "nu", "params")
            if second not in groups:
                raise CheckpointError(f"{cut} '{show(second)}' is missing.")
            schedule = (*prefix[:-3], "2", "count")
            if prefix[-3:-2] == ("0",) and schedule not in paths:
                warnings.warn(
                    f"{file} lacks '{show(schedule)}': unless it was trained at a constant rate, "
                    "its end is lost.",
                    stacklevel=3,
                )
    if not groups:
        warnings.warn(
            f"{file} holds no moments of an optimizer; if it should, its end is lost.", stacklevel=3
        )

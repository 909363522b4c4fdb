"""Compares the tensors in a file with the model's: names, shapes, and whether the file is complete."""

import functools
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from elastic.checkpoints.resolve import PARAMS, TRAIN_STATE
from elastic.checkpoints.scan_layout import STACKED, STACKS
from elastic.config import ElasticTokConfig
from elastic.io.tensors import Tensor, is_float
from elastic.io.tree import CheckpointError, KeyPath, flatten, path_name
from elastic.model import param_shapes

_KINDS = "inner_states"  # in the path of the moments, where kinds of parameters have optimizers of their own
STATE_PARAMS = ("params", "params")  # where a train state keeps the parameters


def checkpoint_kind(tensors: Iterable[Tensor]) -> str:
    """`PARAMS` or `TRAIN_STATE`, by the names of the tensors."""
    starts = {tensor.path[0] for tensor in tensors}
    return TRAIN_STATE if starts & {"step", "opt_state"} else PARAMS


def param_groups(tensors: Iterable[Tensor]) -> dict[KeyPath, dict[KeyPath, Tensor]]:
    """The trees in a file that have the shape of the parameters: {path of the tree: {path in it: tensor}}.

    A train state has three: the parameters and the two moments. Its other tensors (step, counts) are
    left out. A parameter tree by itself has the path ().
    """
    state = checkpoint_kind(tensors) == TRAIN_STATE
    groups: dict[KeyPath, dict[KeyPath, Tensor]] = {}
    for tensor in tensors:
        depth = max((at + 1 for at, key in enumerate(tensor.path) if key == "params"), default=0)
        if depth or not state:
            groups.setdefault(tensor.path[:depth], {})[tensor.path[depth:]] = tensor
    return groups


def validate_tensors(
    found: Mapping[KeyPath, Tensor], prefix: KeyPath, config: ElasticTokConfig, file: Path
) -> None:
    """Checks that names and shapes are the model's, in either layout of the layers.

    Args:
      found: the tensors of one parameter tree, by their paths in it.
      prefix: path of the tree in the file, for messages.
      config: the model.
      file: the file, for messages.

    Raises:
      CheckpointError: they differ; the message names the first differences.
    """
    stacked = any(STACKED in path for path in found)
    expected = _expected_shapes(config.replace(scan_layers=stacked))
    shapes = {path: tensor.shape for path, tensor in found.items()}

    def name(path: KeyPath) -> str:
        return path_name((*prefix, *path))

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


@functools.lru_cache(maxsize=2)  # tracing a model takes a second, and a train state has three trees
def _expected_shapes(config: ElasticTokConfig) -> dict[KeyPath, tuple[int, ...]]:
    return {path: tuple(leaf.shape) for path, leaf in flatten(param_shapes(config)).items()}


def _difference(found: Mapping[KeyPath, tuple], expected: Mapping[KeyPath, tuple]) -> str:
    """How the file's model differs, in names of options; '' if that is uncertain."""
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
    for option, stack in STACKS.items():
        layers = {
            path[2]: shape for path, shape in shapes.items() if len(path) > 2 and path[:2] == stack
        }
        if layers:
            stacked = layers.get(STACKED)
            traits[option] = stacked[0] if stacked else len(layers)
    return traits


def check_whole_state(paths: Collection[KeyPath], file: Path) -> None:
    """Checks that a train state has all its parts: a file may be cut short between two records.

    Raises:
      CheckpointError: something is missing.
    """
    lost = missing_parts(paths)
    if lost:
        more = f", and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise CheckpointError(
            f"{file} is not a whole train state: '{path_name(lost[0])}' is missing{more}. Was the file cut short? Copy it "
            "again from where it is whole, or take an earlier one."
        )


def missing_parts(paths: Collection[KeyPath]) -> list[KeyPath]:
    """Step, moments and counts that a train state with these tensors lacks, in the order of a file.

    The format stores no number of records, so this follows from the structure of AdamW: each of its
    moments covers all parameters; the count of the schedule comes after them, then the gradients of
    the steps that make one update. Where kinds of parameters have optimizers of their own (Muon), each parameter needs
    moments of one kind.
    """
    found = set(paths)
    params = [path[2:] for path in paths if path[:2] == STATE_PARAMS]
    moments: dict[
        KeyPath, None
    ] = {}  # paths of trees of the parameters' shape; a dict keeps their order
    for path in paths:
        if path[0] == "opt_state" and "params" in path:
            moments[path[: path.index("params") + 1]] = None
    if any(_KINDS in prefix for prefix in moments):
        return _missing_of_kinds(found, params, list(moments))
    several = any(path[:2] == ("opt_state", "inner_opt_state") for path in paths)
    several = several or ("opt_state", "mini_step") in found
    needed: list[KeyPath] = [("step",)]
    if several:
        needed += [("opt_state", "mini_step"), ("opt_state", "gradient_step")]
    adams = {prefix[:-2]: None for prefix in moments if prefix[-2] in ("mu", "nu")}
    if not adams and (several or not moments):  # another optimizer has moments of other names
        adams = {("opt_state", *(("inner_opt_state",) if several else ()), "1", "0"): None}
    for adam in adams:
        needed.append((*adam, "count"))
        moments |= {(*adam, "mu", "params"): None, (*adam, "nu", "params"): None}
    if several:
        moments[("opt_state", "acc_grads", "params")] = None
    needed += [(*prefix, *path) for prefix in moments for path in params]
    # In AdamW's chain the moments come first and the learning rate last.
    needed += [(*adam[:-1], "2", "count") for adam in adams if adam[-1] == "0"]
    return [path for path in needed if path not in found]


def _missing_of_kinds(
    found: Collection[KeyPath], params: Sequence[KeyPath], moments: Sequence[KeyPath]
) -> list[KeyPath]:
    """As `missing_parts`, of a state in which each kind of parameters has an optimizer of its own."""
    kinds = [prefix for prefix in moments if _KINDS in prefix]
    needed: list[KeyPath] = [("step",), *((*prefix[:-2], "count") for prefix in kinds)]
    for path in params:
        its = [prefix for prefix in kinds if (*prefix, *path) in found] or kinds
        both = [prefix for prefix in kinds if prefix[:-2] == its[0][:-2]]
        of_all = [prefix for prefix in moments if prefix not in kinds]  # accumulated gradients
        needed += [(*prefix, *path) for prefix in both + of_all]
    return [path for path in needed if path not in found]

"""Layouts of the layers in a parameter tree: stacked on a leading axis, or numbered.

The stacked layout (`scan_layers`) has `encoder/encoder_blocks/scan_decoder/ffn_norm/kernel` of shape
[layers, width]; the released format uses the name `scan_decoder` in the encoder, too. The numbered
layout has `encoder/encoder_blocks/0/ffn_norm/kernel` of shape [width].
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from elastic.io.tree import CheckpointError, KeyPath, flatten, path_name, unflatten

# Where the layers are that an option counts.
STACKS = {
    "num_encoder_layers": ("encoder", "encoder_blocks"),
    "num_decoder_layers": ("decoder", "decoder_blocks"),
    "num_group_layers": ("decoder", "group_blocks"),
}
STACKED = "scan_decoder"


def convert_layout(params: Mapping[str, Any], *, scan_layers: bool) -> dict[str, Any]:
    """The same tree with its layers stacked on axis 0 (`scan_layers`) or numbered '0', '1', ...

    Works on parameters, and on any tree that holds trees of their shape, such as a whole training
    state. A tree in this layout already is returned as it is. Numbering gives views, stacking copies.

    Raises:
      CheckpointError: layers are not numbered 0 to n - 1, or differ in shape or dtype.
    """
    flat = flatten(params)
    result: dict[KeyPath, Any] = {}
    if scan_layers:
        homes = stacked_homes(flat, "the tree")
        layers: dict[KeyPath, dict[int, np.ndarray]] = {}
        for path, leaf in flat.items():
            if path in homes:
                stack, layer = homes[path]
                layers.setdefault(stack, {})[layer] = np.asarray(leaf)
                result[stack] = None  # keeps the place of the first layer
            else:
                result[path] = leaf
        for stack, by_number in layers.items():
            if len({(leaf.shape, leaf.dtype) for leaf in by_number.values()}) != 1:
                raise CheckpointError(f"'{path_name(stack)}': the layers differ in shape or dtype.")
            result[stack] = np.stack([by_number[layer] for layer in range(len(by_number))])
    else:
        for path, leaf in flat.items():
            at = _layer_key(path)
            if at is None or path[at] != STACKED:
                result[path] = leaf
                continue
            for layer in range(leaf.shape[0]):
                result[(*path[:at], str(layer), *path[at + 1 :])] = leaf[layer]
    return unflatten(result)


def _layer_key(path: KeyPath) -> int | None:
    """The index in `path` of the layer's key: a number, or `STACKED`."""
    stacks = [stack for _, stack in STACKS.values()]
    return next((at + 1 for at, key in enumerate(path[:-1]) if key in stacks), None)


def stacked_homes(paths: Iterable[KeyPath], where: Any) -> dict[KeyPath, tuple[KeyPath, int]]:
    """{numbered path: (its stacked path, layer)}.

    Raises:
      CheckpointError: layers are not numbered 0 to n - 1; `where` starts the message.
    """
    homes = {}
    for path in paths:
        at = _layer_key(path)
        if at is not None and re.fullmatch(r"0|[1-9]\d{0,5}", path[at], re.ASCII):
            homes[path] = ((*path[:at], STACKED, *path[at + 1 :]), int(path[at]))
    numbers: dict[KeyPath, set[int]] = {}
    for stack, layer in homes.values():
        numbers.setdefault(stack, set()).add(layer)
    for stack, found in numbers.items():
        if found != set(range(len(found))):
            lost = min(set(range(max(found))) - found)
            raise CheckpointError(f"{where}: layer {lost} of '{path_name(stack)}' is missing.")
    return homes

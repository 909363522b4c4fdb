"""Nested dicts <-> flat dicts, whose keys are paths of names.

flax.traverse_util has two similar functions, but importing flax imports jax, which readers of token
files do without; and a key that is no string is an error here, because no file format can hold it.
"""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

KeyPath = tuple[str, ...]


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names the file, the tensor and the reason."""


def path_name(path: KeyPath) -> str:
    """A key path as text for messages: printable and at most 200 characters long."""
    name = "/".join(path)
    name = name if name.isprintable() else ascii(name)[1:-1]
    return name if len(name) <= 200 else f"{name[:197]}..."


def flatten(tree: Mapping[str, Any], prefix: KeyPath = ()) -> dict[KeyPath, Any]:
    """`{'a': {'b': x}}` -> `{('a', 'b'): x}`, in the tree's order; empty branches and None are left out."""
    flat: dict[KeyPath, Any] = {}
    for key, value in tree.items():
        if not isinstance(key, str) or not key:
            raise CheckpointError(
                f"Key {key!r} under '{path_name(prefix)}' is not a name; use strings."
            )
        if isinstance(value, Mapping):
            flat |= flatten(value, (*prefix, key))
        elif value is not None:
            flat[(*prefix, key)] = value
    return flat


def unflatten(flat: Mapping[KeyPath, Any]) -> dict[str, Any]:
    """The inverse of `flatten`, in the order of `flat`."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        branch = tree
        for key in path[:-1]:
            branch = branch.setdefault(key, {})
        branch[path[-1]] = value
    return tree


def tree_digest(tree: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of all arrays of a tree, by name, dtype and shape, to the last bit; the order of keys does not count."""
    digest = hashlib.sha256()
    for path, leaf in sorted(flatten(tree).items()):
        array = np.asarray(leaf)
        digest.update(f"{'/'.join(path)} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()


def check_paths(paths: Iterable[KeyPath], file: Path) -> None:
    """Raises `CheckpointError` unless the paths are distinct and none lies under another one."""
    seen: set[KeyPath] = set()
    branches: set[KeyPath] = set()
    for path in paths:
        if not path or not all(path):
            raise CheckpointError(f"{file}: a tensor has an empty name ({list(path)}).")
        above = [path[:depth] for depth in range(1, len(path))]
        if path in seen:
            raise CheckpointError(f"{file}: tensor '{path_name(path)}' is in the file twice.")
        if path in branches or not seen.isdisjoint(above):
            raise CheckpointError(
                f"{file}: '{path_name(path)}' is both a tensor and a branch of tensors."
            )
        seen.add(path)
        branches.update(above)

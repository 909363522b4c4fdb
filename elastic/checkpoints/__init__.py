"""Checkpoints: loads, validates and saves a model's parameters and training states."""

from elastic.checkpoints.params import (
    folder_of,
    load_config,
    load_params,
    load_train_state,
    restore_into,
    save_params,
    save_pretrained,
    save_train_state,
)
from elastic.io.tree import CheckpointError

__all__ = [
    "CheckpointError",
    "folder_of",
    "load_config",
    "load_params",
    "load_train_state",
    "restore_into",
    "save_params",
    "save_pretrained",
    "save_train_state",
]

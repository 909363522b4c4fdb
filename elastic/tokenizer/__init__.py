"""Clips to tokens and back.

The names are imported when they are first used, so that `elastic.tokenizer.targets` is read without loading jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elastic.tokenizer.result import BlockResult
    from elastic.tokenizer.targets import EncodeOptions
    from elastic.tokenizer.tokenizer import ElasticTokenizer, Reconstruction

__all__ = ["BlockResult", "ElasticTokenizer", "EncodeOptions", "Reconstruction"]

_HOME = {
    "BlockResult": "result",
    "ElasticTokenizer": "tokenizer",
    "EncodeOptions": "targets",
    "Reconstruction": "tokenizer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)

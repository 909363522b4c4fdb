"""ElasticTok: images and long videos as few tokens as their content needs.

The four public names are imported when they are first used: the tokenizer needs jax, token files
and shards do not.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elastic.config import ElasticTokConfig
    from elastic.tokenizer import ElasticTokenizer
    from elastic.tokens import TokenizedClip, TokenShards

__version__ = "0.1.0"  # pyproject.toml reads it from here

__all__ = ["ElasticTokConfig", "ElasticTokenizer", "TokenShards", "TokenizedClip", "__version__"]

_MODULES = {
    "ElasticTokConfig": "elastic.config",
    "ElasticTokenizer": "elastic.tokenizer",
    "TokenShards": "elastic.tokens",
    "TokenizedClip": "elastic.tokens",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'elastic' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value  # found directly from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})

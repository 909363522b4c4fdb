"""ElasticTok: images and long videos as few tokens as their content needs.

The four public names are imported when they are first used: the tokenizer needs jax, token files
and shards do not.
"""

from typing import TYPE_CHECKING

from elastic.io.lazy import lazy_names

if TYPE_CHECKING:
    from elastic.config import ElasticTokConfig
    from elastic.tokenizer import ElasticTokenizer
    from elastic.tokens import TokenizedClip, TokenShards

__version__ = "0.1.0"  # pyproject.toml reads it from here

__all__ = ["ElasticTokConfig", "ElasticTokenizer", "TokenShards", "TokenizedClip", "__version__"]

_MODULES = {
    "ElasticTokConfig": ".config",
    "ElasticTokenizer": ".tokenizer",
    "TokenShards": ".tokens",
    "TokenizedClip": ".tokens",
}
__getattr__ = lazy_names(__name__, _MODULES)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})

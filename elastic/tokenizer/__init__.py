"""Clips to tokens and back.

The names are imported when they are first used, so that `elastic.tokenizer.targets` is read without loading jax.
"""

from typing import TYPE_CHECKING

from elastic.io.lazy import lazy_names

if TYPE_CHECKING:
    from elastic.tokenizer.result import BlockResult
    from elastic.tokenizer.targets import EncodeOptions
    from elastic.tokenizer.tokenizer import ElasticTokenizer, Reconstruction

__all__ = ["BlockResult", "ElasticTokenizer", "EncodeOptions", "Reconstruction"]

__getattr__ = lazy_names(
    __name__,
    {
        "BlockResult": ".result",
        "ElasticTokenizer": ".tokenizer",
        "EncodeOptions": ".targets",
        "Reconstruction": ".tokenizer",
    },
)

"""Clips to tokens and back."""

from elastic.tokenizer.result import BlockResult
from elastic.tokenizer.tokenizer import ElasticTokenizer, Reconstruction

__all__ = ["BlockResult", "ElasticTokenizer", "Reconstruction"]

"""Clips to tokens and back."""

from elastic.tokenizer.tokenizer import ElasticTokenizer

__all__ = ["ElasticTokenizer"]

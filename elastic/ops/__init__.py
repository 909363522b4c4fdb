"""Attention and feed-forward: the arithmetic that the model spends its time in."""

from elastic.ops.attention.api import attention
from elastic.ops.attention.dispatch import IMPLEMENTATIONS, choose_implementation
from elastic.ops.attention.kv_cache import KVCache, attention_with_cache, cache_spec
from elastic.ops.dense import dense
from elastic.ops.feedforward import feedforward

__all__ = [
    "IMPLEMENTATIONS",
    "KVCache",
    "attention",
    "attention_with_cache",
    "cache_spec",
    "choose_implementation",
    "dense",
    "feedforward",
]

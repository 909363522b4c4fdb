"""Attention, feed-forward and matrix products: the operations that take most of the model's time."""

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

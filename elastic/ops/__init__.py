"""Attention and feed-forward: the arithmetic that the model spends its time in."""

from elastic.ops.attention import attention
from elastic.ops.dense import dense
from elastic.ops.feedforward import feedforward
from elastic.ops.kernels import IMPLEMENTATIONS, choose_implementation
from elastic.ops.past import Past, attention_with_past, past_spec

__all__ = [
    "IMPLEMENTATIONS",
    "Past",
    "attention",
    "attention_with_past",
    "choose_implementation",
    "dense",
    "feedforward",
    "past_spec",
]

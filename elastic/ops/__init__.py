"""Attention and feed-forward: the arithmetic that the model spends its time in."""

from elastic.ops.attention import (
    IMPLEMENTATIONS,
    Past,
    attention,
    attention_with_past,
    choose_implementation,
)
from elastic.ops.dense import dense
from elastic.ops.feedforward import feedforward

__all__ = [
    "IMPLEMENTATIONS",
    "Past",
    "attention",
    "attention_with_past",
    "choose_implementation",
    "dense",
    "feedforward",
]

"""Inputs of attention and of its kernels, and what the reference gives for them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import released

from elastic import ops
from elastic.ops.attention.base import MaskArgs, StaticArgs


def normal(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def piece(
    *, queries, keys, dim, block, q_start=0, kv_start=0, kv_length=None, segments=False, hidden=False,
    q_tile=16, kv_tile=32,
):  # fmt: skip
    """q, k, v, a cotangent; what may be seen; static arguments. Two batch elements of two heads."""
    rng = np.random.default_rng(queries + keys)
    q, k, v, dout = (normal(rng, 4, n, dim) for n in (queries, keys, keys, queries))
    kv_length = kv_start + keys if kv_length is None else kv_length
    mask = MaskArgs(*map(jnp.int32, (q_start, kv_start, kv_length, 0)))
    if segments:
        ids = (jnp.asarray(rng.integers(0, 2, (2, n))) for n in (queries, keys))
        mask = mask._replace(**dict(zip(("q_segments", "kv_segments"), ids, strict=True)))
    if hidden:
        mask = mask._replace(valid=jnp.asarray(rng.random((2, keys)) < 0.6))
    return (q, k, v, dout), mask, StaticArgs(block, q_tile, kv_tile, 2)


def make_case(
    dtype, *, length, block_size, q_start=0, q_length=None, kv_length=None, segments=None, hidden=0,
    q_tile=1024, kv_tile=512,
):  # fmt: skip
    """Queries, keys, values, a cotangent; the arguments that say what may be seen; static arguments."""
    batch, heads, dim = 2, 2, 32
    rng = np.random.default_rng(length + block_size)
    lengths = (q_length or length, length, length, q_length or length)
    q, k, v, g = (normal(rng, batch, n, heads, dim).astype(dtype) for n in lengths)
    seen_args = {"q_start": jnp.int32(q_start)}
    if kv_length is not None:
        seen_args["kv_length"] = jnp.int32(kv_length)
    if segments is not None:
        ids = np.repeat(np.arange(len(segments)), segments)
        seen_args["segment_ids"] = jnp.asarray(np.stack([ids, ids[::-1]]))
    if hidden:
        seen_args["valid"] = jnp.asarray(rng.random((batch, length)) >= hidden)
    static = dict(block_size=block_size, q_tile=q_tile, kv_tile=kv_tile)
    return (q, k, v), g.astype(jnp.float32), seen_args, static


def run(implementation, qkv, cotangent, seen_args, static):
    """The output, and the gradients of q, k and v; what may be seen is traced."""

    def loss(qkv, seen_args):
        out = ops.attention(*qkv, **seen_args, **static, implementation=implementation)
        return jnp.sum(out.astype(jnp.float32) * cotangent), out

    with jax.numpy_dtype_promotion("strict"):
        (_, out), grads = released.quick_jit(jax.value_and_grad(loss, has_aux=True))(qkv, seen_args)
    assert out.dtype == qkv[0].dtype and all(g.dtype == out.dtype for g in grads)
    return [np.asarray(x, np.float32) for x in (out, *grads)]


# Compiled: faster than one operation after the other.
attention = released.quick_jit(
    ops.attention, static_argnames=("block_size", "implementation", "q_tile", "kv_tile")
)


def largest_difference(a, b):
    return float(np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).max())


@functools.cache
def _reference(dtype, case):
    return run("reference", *make_case(dtype, **dict(case)))


def reference_of(dtype, case):
    """What `run` gives for a case of `make_case` with the reference: computed once for all implementations."""
    return _reference(dtype, tuple(case.items()))

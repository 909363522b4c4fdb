"""One test body for every implementation of attention, against the plain one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import released
from attention_cases import attention, largest_difference, make_case, reference_of, run
from einops import rearrange
from released import RUNNABLE

from elastic import ops
from elastic.ops.attention import blockwise, reference
from elastic.ops.attention.base import MaskArgs, StaticArgs, attend

FAST = [name for name in RUNNABLE if name != "reference"]
# Lengths and tiles that do and do not divide each other; what a query may see.
CASES = {
    "one block": dict(length=32, block_size=32),
    "tiles divide the blocks": dict(length=128, block_size=32, q_tile=16, kv_tile=8),
    "blocks divide the tiles, segments": dict(
        length=96, block_size=8, segments=(40, 56), q_tile=48, kv_tile=32
    ),
    "nothing divides a prime length, hidden keys": dict(
        length=101, block_size=39, hidden=0.3, q_tile=16, kv_tile=25
    ),
    "queries begin inside a block, some keys are not there": dict(
        length=100, block_size=30, q_start=47, q_length=31, kv_length=71, q_tile=8, kv_tile=16
    ),
    "all at once": dict(
        length=120, block_size=24, q_start=24, q_length=72, kv_length=90, segments=(50, 70),
        hidden=0.2, q_tile=17, kv_tile=19,
    ),
}  # fmt: skip


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_the_reference(implementation, case):
    out, *grads = run(implementation, *make_case(jnp.float32, **CASES[case]))
    expected, *expected_grads = reference_of(jnp.float32, CASES[case])
    assert largest_difference(out, expected) <= 2e-6
    for ours, theirs in zip(grads, expected_grads, strict=True):
        assert largest_difference(ours, theirs) <= 2e-5


@pytest.mark.parametrize("implementation", RUNNABLE)
def test_bfloat16_operands_give_nearly_the_same(implementation):
    arguments = make_case(jnp.bfloat16, **CASES["all at once"])
    ours = run(implementation, *arguments)
    (qkv, *others) = arguments
    exact = run("reference", tuple(x.astype(jnp.float32) for x in qkv), *others)
    for x, expected in zip(ours, exact, strict=True):
        assert largest_difference(x, expected) <= 2e-2 * max(1, np.abs(expected).max())


@pytest.mark.parametrize("case", ["nothing divides a prime length, hidden keys", "all at once"])
def test_the_reference_is_the_definition(case):
    """NumPy, one query at a time, from the text of the contract."""
    (q, k, v), _, seen_args, static = make_case(jnp.float32, **CASES[case])
    out = attention(q, k, v, **seen_args, **static, implementation="reference")
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, length, heads, dim = k.shape
    start, block = int(seen_args["q_start"]), static["block_size"]
    limit = int(seen_args.get("kv_length", length))
    segments = np.asarray(seen_args.get("segment_ids", np.zeros((batch, length))))
    valid = np.asarray(seen_args.get("valid", np.ones((batch, length), bool)))
    for b, i, h in np.ndindex(batch, q.shape[1], heads):
        seen = [
            j
            for j in range(limit)
            if j // block <= (start + i) // block
            and segments[b, j] == segments[b, start + i]
            and valid[b, j]
        ]
        weights = np.exp(k[b, seen, h] @ q[b, i, h] / dim**0.5)
        expected = weights @ v[b, seen, h] / weights.sum() if seen else np.zeros(dim)
        assert largest_difference(out[b, i, h], expected) < 2e-6


@pytest.mark.parametrize("implementation", RUNNABLE)
def test_a_query_that_sees_no_key_gives_zero_and_no_gradient(implementation):
    """Difference 13 in elastic/README.md: the released paths average over hidden keys, each over others."""
    qkv, cotangent, seen_args, static = make_case(
        jnp.float32, length=96, block_size=32, q_tile=32, kv_tile=32
    )
    seen_args["valid"] = jnp.ones((2, 96), bool).at[1, :32].set(False)
    out, *grads = run(implementation, qkv, cotangent, seen_args, static)
    assert not out[1, :32].any() and np.abs(out[1, 32:]).min(axis=-1).max() > 0
    assert all(np.isfinite(g).all() for g in grads)
    assert not grads[0][1, :32].any()  # its own query, and below the hidden keys and values
    assert not grads[1][1, :32].any() and not grads[2][1, :32].any()


@pytest.mark.parametrize("implementation", FAST)
def test_keys_that_the_mask_rules_out_are_never_read(implementation):
    """Not a number times zero would show: whole tiles behind `kv_length`, or in later blocks."""
    options = dict(length=128, block_size=32, kv_length=64, q_tile=32, kv_tile=32)
    (q, k, v), _, seen_args, static = make_case(jnp.float32, **options)
    full = attention(q, k, v, **seen_args, **static, implementation="reference")
    k, v = k.at[:, 64:].set(jnp.nan), v.at[:, 64:].set(jnp.nan)
    out = attention(q, k, v, **seen_args, **static, implementation=implementation)
    assert largest_difference(out, full) <= 2e-6
    del seen_args["kv_length"]
    out = attention(q, k, v, **seen_args, **static, implementation=implementation)
    assert np.isfinite(np.asarray(out[:, :64])).all()
    assert np.isnan(np.asarray(out[:, 64:])).all()


@pytest.mark.parametrize("implementation", FAST)
def test_keys_of_other_segments_are_never_read(implementation):
    """A packed sequence costs what its files cost: forward, and in both passes of the gradient."""
    options = dict(length=96, block_size=32, segments=(64, 32), q_tile=16, kv_tile=16)
    (q, k, v), cotangent, seen_args, static = make_case(jnp.float32, **options)
    seen_args["segment_ids"] = seen_args["segment_ids"].at[1].set(seen_args["segment_ids"][0])
    expected = run(implementation, (q, k, v), cotangent, seen_args, static)
    # What is not a number in the first file may show there alone, and likewise a cotangent that is none.
    q, k, v = (x.at[:, :64].set(jnp.nan) for x in (q, k, v))
    ours = run(implementation, (q, k, v), cotangent.at[:, :64].set(jnp.nan), seen_args, static)
    for x, y in zip(ours, expected, strict=True):
        assert (x[:, 64:] == y[:, 64:]).all()


def sizes(jaxpr):
    """The number of elements of every array in a program, in inner programs too."""
    for eqn in jaxpr.eqns:
        yield from (var.aval.size for var in eqn.outvars)
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_program):
            if is_program(inner):
                yield from sizes(getattr(inner, "jaxpr", inner))


def is_program(x):
    return hasattr(x, "eqns") or hasattr(getattr(x, "jaxpr", None), "eqns")


@pytest.mark.parametrize("implementation", FAST)
def test_no_array_of_queries_by_keys_is_made(implementation):
    length = 4096
    q = jax.ShapeDtypeStruct((1, length, 2, 32), jnp.float32)

    def loss(implementation, q, k, v, valid):
        out = ops.attention(
            q,
            k,
            v,
            block_size=1024,
            valid=valid,
            q_tile=256,
            kv_tile=128,
            implementation=implementation,
        )
        return jnp.sum(out)

    def largest(name):
        grads = jax.grad(functools.partial(loss, name), argnums=(0, 1, 2))
        jaxpr = jax.make_jaxpr(grads)(q, q, q, jax.ShapeDtypeStruct((1, length), bool))
        return max(sizes(jaxpr.jaxpr))

    assert largest(implementation) <= q.size < length * length <= largest("reference")


def test_halves_merge_by_their_logsumexp():
    (q, k, v), _, _, _ = make_case(jnp.float32, **CASES["one block"])
    # Queries are later than every key, so they see all keys.
    mask = MaskArgs(jnp.int32(32), jnp.int32(0), jnp.int32(32), jnp.int32(0))

    @functools.partial(released.quick_jit, static_argnums=(0, 1))
    def dense(start, stop):
        keys = slice(start, stop)
        return reference.attend(q, k[:, keys], v[:, keys], mask, block_size=1)

    @functools.partial(released.quick_jit, static_argnums=(0, 1))
    def tiled(start, stop):
        keys = slice(start, stop)
        rows = (rearrange(x, "b l h d -> (b h) l d") for x in (q, k[:, keys], v[:, keys]))
        out, lse = attend(*rows, mask, StaticArgs(1, 16, 8, 2), blockwise.KERNEL)
        out = rearrange(out, "(b h) l d -> b l h d", h=2)
        return out, rearrange(lse, "(b h) l -> b h l", h=2)

    whole, whole_lse = dense(0, 32)
    for parts in (dense, tiled):
        (a, lse_a), (b, lse_b) = parts(0, 11), parts(11, 32)
        lse = jnp.logaddexp(lse_a, lse_b)
        assert largest_difference(lse, whole_lse) <= 2e-6
        shares = (rearrange(jnp.exp(x - lse), "b h l -> b l h 1") for x in (lse_a, lse_b))
        merged = sum(x * share for x, share in zip((a, b), shares, strict=True))
        assert largest_difference(merged, whole) <= 2e-6
    assert largest_difference(tiled(0, 32)[1], whole_lse) <= 2e-6


def test_what_an_implementation_cannot_do_is_refused_by_name():
    choose = ops.choose_implementation
    with pytest.raises(ValueError, match="'flash' must be one of reference, blockwise"):
        choose("flash")
    for device in ("tpu", "gpu"):
        name = f"pallas_{device}"
        with pytest.raises(
            ValueError, match=f"{name!r} runs on {device}, and the device is cpu; .*"
        ):
            choose(name)
        with pytest.raises(ValueError, match="head_dim=16"):
            choose(f"{name}_interpret", head_dim=16)
        with pytest.raises(ValueError, match="int8"):
            choose(f"{name}_interpret", dtype=jnp.int8)
    (q, k, v), *_ = make_case(jnp.float32, **CASES["one block"])
    with pytest.raises(ValueError, match="'flash' must be one of"):
        ops.attention(q, k, v, block_size=32, implementation="flash")
    with pytest.raises(ValueError, match="'pallas_tpu' runs on tpu"):
        ops.attention(q, k, v, block_size=32, implementation="pallas_tpu")


def test_without_a_name_the_best_for_the_device_is_taken():
    assert ops.choose_implementation() == ops.choose_implementation("") == "blockwise"

"""One test body for every implementation of attention, against the plain one."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import released
from einops import rearrange
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from elastic import ops
from elastic.distributed.mesh import make_mesh
from elastic.ops.attention import blockwise, reference, ring
from elastic.ops.attention.base import MaskArgs, StaticArgs, attend_rows

RUNNABLE = released.RUNNABLE
FAST = [name for name in RUNNABLE if name != "reference"]

# Lengths and tiles that do and do not divide each other; what a query may see.
CASES = {
    "one block": dict(length=32, block_size=32),
    "tiles divide the blocks": dict(length=128, block_size=32, q_tile=16, kv_tile=8),
    "blocks divide the tiles": dict(length=96, block_size=8, q_tile=48, kv_tile=32),
    "nothing divides anything": dict(length=117, block_size=39, q_tile=16, kv_tile=25),
    "a prime length": dict(length=101, block_size=13, q_tile=64, kv_tile=64),
    "queries begin later": dict(length=100, block_size=25, q_start=50, q_length=25, kv_tile=16),
    "queries begin inside a block": dict(
        length=100, block_size=30, q_start=47, q_length=31, q_tile=8, kv_tile=16
    ),
    "some keys are not there": dict(length=96, block_size=32, kv_length=71, q_tile=32, kv_tile=32),
    "segments": dict(length=96, block_size=32, segments=(40, 56), q_tile=24, kv_tile=40),
    "hidden keys": dict(length=96, block_size=32, hidden=0.3, q_tile=32, kv_tile=32),
    "all at once": dict(
        length=120, block_size=24, q_start=24, q_length=72, kv_length=90, segments=(50, 70),
        hidden=0.2, q_tile=17, kv_tile=19,
    ),
}  # fmt: skip


def normal(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def make_case(
    dtype, *, length, block_size, q_start=0, q_length=None, kv_length=None, segments=None, hidden=0,
    q_tile=1024, kv_tile=512,
):  # fmt: skip
    """Queries, keys, values, a cotangent; the arrays of what may be seen; the static options."""
    batch, heads, dim = 2, 2, 32
    rng = np.random.default_rng(length + block_size)
    lengths = (q_length or length, length, length, q_length or length)
    q, k, v, g = (normal(rng, batch, n, heads, dim).astype(dtype) for n in lengths)
    scope = {"q_start": jnp.int32(q_start)}
    if kv_length is not None:
        scope["kv_length"] = jnp.int32(kv_length)
    if segments is not None:
        ids = np.repeat(np.arange(len(segments)), segments)
        scope["segment_ids"] = jnp.asarray(np.stack([ids, ids[::-1]]))
    if hidden:
        scope["valid"] = jnp.asarray(rng.random((batch, length)) >= hidden)
    static = dict(block_size=block_size, q_tile=q_tile, kv_tile=kv_tile)
    return (q, k, v), g.astype(jnp.float32), scope, static


def run(implementation, qkv, cotangent, scope, static):
    """The output, and the gradients of q, k and v; what may be seen is traced."""

    def loss(qkv, scope):
        out = ops.attention(*qkv, **scope, **static, implementation=implementation)
        return jnp.sum(out.astype(jnp.float32) * cotangent), out

    with jax.numpy_dtype_promotion("strict"):
        (_, out), grads = released.quick_jit(jax.value_and_grad(loss, has_aux=True))(qkv, scope)
    assert out.dtype == qkv[0].dtype and all(g.dtype == out.dtype for g in grads)
    return [np.asarray(x, np.float32) for x in (out, *grads)]


# Compiled: faster than one operation after the other.
attention = released.quick_jit(
    ops.attention, static_argnames=("block_size", "implementation", "q_tile", "kv_tile")
)


def largest_difference(a, b):
    return float(np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).max())


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_the_reference(implementation, case):
    arguments = make_case(jnp.float32, **CASES[case])
    out, *grads = run(implementation, *arguments)
    expected, *expected_grads = run("reference", *arguments)
    assert largest_difference(out, expected) <= 2e-6
    for ours, theirs in zip(grads, expected_grads, strict=True):
        assert largest_difference(ours, theirs) <= 2e-5


@pytest.mark.parametrize("implementation", RUNNABLE)
@pytest.mark.parametrize("case", ["nothing divides anything", "all at once"])
def test_bfloat16_operands_give_nearly_the_same(implementation, case):
    arguments = make_case(jnp.bfloat16, **CASES[case])
    ours = run(implementation, *arguments)
    (qkv, *others) = arguments
    exact = run("reference", tuple(x.astype(jnp.float32) for x in qkv), *others)
    for x, expected in zip(ours, exact, strict=True):
        assert largest_difference(x, expected) <= 2e-2 * max(1, np.abs(expected).max())


@pytest.mark.parametrize("case", ["nothing divides anything", "all at once"])
def test_the_reference_is_the_definition(case):
    """NumPy, one query at a time, from the text of the contract."""
    (q, k, v), _, scope, static = make_case(jnp.float32, **CASES[case])
    out = attention(q, k, v, **scope, **static, implementation="reference")
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, length, heads, dim = k.shape
    start, block = int(scope["q_start"]), static["block_size"]
    limit = int(scope.get("kv_length", length))
    segments = np.asarray(scope.get("segment_ids", np.zeros((batch, length))))
    valid = np.asarray(scope.get("valid", np.ones((batch, length), bool)))
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
    qkv, cotangent, scope, static = make_case(jnp.float32, **CASES["hidden keys"])
    scope["valid"] = jnp.ones((2, 96), bool).at[1, :32].set(False)
    out, *grads = run(implementation, qkv, cotangent, scope, static)
    assert not out[1, :32].any() and np.abs(out[1, 32:]).min(axis=-1).max() > 0
    assert all(np.isfinite(g).all() for g in grads)
    assert not grads[0][1, :32].any()  # its own query, and below the hidden keys and values
    assert not grads[1][1, :32].any() and not grads[2][1, :32].any()


@pytest.mark.parametrize("implementation", FAST)
def test_keys_that_the_mask_rules_out_are_never_read(implementation):
    """Not a number times zero would show: whole tiles behind `kv_length`, or in later blocks."""
    options = dict(length=128, block_size=32, kv_length=64, q_tile=32, kv_tile=32)
    (q, k, v), _, scope, static = make_case(jnp.float32, **options)
    full = attention(q, k, v, **scope, **static, implementation="reference")
    k, v = k.at[:, 64:].set(jnp.nan), v.at[:, 64:].set(jnp.nan)
    out = attention(q, k, v, **scope, **static, implementation=implementation)
    assert largest_difference(out, full) <= 2e-6
    del scope["kv_length"]
    out = attention(q, k, v, **scope, **static, implementation=implementation)
    assert np.isfinite(np.asarray(out[:, :64])).all()
    assert np.isnan(np.asarray(out[:, 64:])).all()


@pytest.mark.parametrize("implementation", FAST)
def test_keys_of_other_segments_are_never_read(implementation):
    """A packed sequence costs what its files cost: forward, and in both passes of the gradient."""
    options = dict(length=96, block_size=32, segments=(64, 32), q_tile=16, kv_tile=16)
    (q, k, v), cotangent, scope, static = make_case(jnp.float32, **options)
    scope["segment_ids"] = scope["segment_ids"].at[1].set(scope["segment_ids"][0])
    expected = run(implementation, (q, k, v), cotangent, scope, static)
    # What is not a number in the first file may show there alone, and likewise a cotangent that is none.
    q, k, v = (x.at[:, :64].set(jnp.nan) for x in (q, k, v))
    ours = run(implementation, (q, k, v), cotangent.at[:, :64].set(jnp.nan), scope, static)
    for x, y in zip(ours, expected, strict=True):
        assert (x[:, 64:] == y[:, 64:]).all()


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


def sizes(jaxpr):
    """The number of elements of every array in a program, in inner programs too."""
    for eqn in jaxpr.eqns:
        yield from (var.aval.size for var in eqn.outvars)
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_program):
            if is_program(inner):
                yield from sizes(getattr(inner, "jaxpr", inner))


def is_program(x):
    return hasattr(x, "eqns") or hasattr(getattr(x, "jaxpr", None), "eqns")


def cache_case(num_cached, capacity, candidates, block=24):
    """A cache of two layers with rubbish behind its end, and candidates for the next block."""
    batch, heads, dim, layer = 2, 2, 32, 1
    rng = np.random.default_rng(capacity)
    shape = (2, batch, heads, capacity, dim)
    lengths = [num_cached, max(0, num_cached - block)]  # the second element is a block behind
    cache = ops.KVCache(normal(rng, *shape), normal(rng, *shape), jnp.array(lengths, jnp.int32))
    shape = (batch * candidates, block, heads, dim)
    q, k, v = (normal(rng, *shape) for _ in range(3))

    def one_shot(element, filled):
        mine = slice(element * candidates, (element + 1) * candidates)
        keys, values = (
            jnp.concatenate([jnp.repeat(old, candidates, axis=0), new[mine]], axis=1)
            for old, new in zip(
                (
                    rearrange(x[layer, [element], :, :filled], "b h c d -> b c h d")
                    for x in cache[:2]
                ),
                (k, v),
                strict=True,
            )
        )
        return attention(
            q[mine], keys, values, block_size=block, q_start=filled, implementation="reference"
        )

    whole = jnp.concatenate([one_shot(*pair) for pair in enumerate(lengths)])
    return (q, k, v), cache, jnp.int32(layer), whole


@pytest.mark.parametrize("implementation", RUNNABLE)
@pytest.mark.parametrize(("num_cached", "capacity"), [(0, 0), (0, 72), (24, 72), (72, 72)], ids=str)
@pytest.mark.parametrize("candidates", [1, 3])
def test_candidates_on_a_cached_past_equal_one_shot(
    implementation, num_cached, capacity, candidates
):
    qkv, cache, layer, one_shot = cache_case(num_cached, capacity, candidates)
    attend = functools.partial(
        ops.attention_with_cache, implementation=implementation, q_tile=32, kv_tile=20
    )
    out = released.quick_jit(lambda qkv, cache, layer: attend(*qkv, cache=cache, layer=layer))(
        qkv, cache, layer
    )
    assert largest_difference(out, one_shot) <= 2e-6


@pytest.mark.parametrize("mesh_dim", ["1,1,2,1", "1,1,1,4", "1,1,2,2", "2,1,2,1"])
@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
def test_heads_and_parts_of_a_cached_past_lie_on_several_devices(implementation, mesh_dim):
    (q, k, v), cache, layer, one_shot = cache_case(24, 72, 3)
    mesh = make_mesh(mesh_dim, jax.devices()[: 2 if mesh_dim == "1,1,2,1" else 4])
    size = mesh.shape["sp"]

    def spread(x):  # each device has its part of every block, so the filled positions too
        return rearrange(x, "n b h (blocks s part) d -> n b h (s blocks part) d", blocks=3, s=size)

    cache = cache._replace(keys=spread(cache.keys), values=spread(cache.values))
    attend = functools.partial(ops.attention_with_cache, mesh=mesh, implementation=implementation)
    out = released.quick_jit(lambda cache: attend(q, k, v, cache=cache, layer=layer))(cache)
    assert largest_difference(out, one_shot) <= 2e-6


RING_CASES = {
    "blocks": dict(length=96, block_size=24, q_tile=8, kv_tile=16),
    "all at once": dict(
        length=96, block_size=24, kv_length=77, segments=(40, 56), hidden=0.2, q_tile=8, kv_tile=16
    ),
}
RINGS = [
    *(("all at once", "blockwise", layout, "1,1,1,8") for layout in ring.LAYOUTS),
    *(("all at once", "blockwise", layout, "2,1,2,2") for layout in ring.LAYOUTS),
    *(
        ("all at once", f"pallas_{device}_interpret", layout, "1,1,1,4")
        for device in ("tpu", "gpu")
        for layout in ring.LAYOUTS
    ),
    ("blocks", "blockwise", "balanced", "1,1,1,2"),
    ("blocks", "blockwise", "plain", "1,1,1,8"),
    ("blocks", "pallas_tpu_interpret", "balanced", "1,1,1,4"),
    ("blocks", "pallas_gpu_interpret", "balanced", "1,1,1,4"),
]


@pytest.mark.parametrize(("case", "implementation", "layout", "mesh_dim"), RINGS)
def test_a_ring_is_one_device(case, implementation, layout, mesh_dim):
    qkv, cotangent, scope, static = make_case(jnp.float32, **RING_CASES[case])
    sizes = [int(size) for size in mesh_dim.split(",")]
    mesh = make_mesh(mesh_dim, jax.devices()[: np.prod(sizes)])
    there, back = (
        (lambda x: ring.to_balanced(x, mesh), lambda x: ring.from_balanced(x, mesh))
        if layout == "balanced"
        else (lambda x: x, lambda x: x)
    )

    def loss(qkv, scope):
        placed = {
            name: there(x) if name in ("segment_ids", "valid") else x for name, x in scope.items()
        }
        del placed["q_start"]  # 0
        out = ops.attention(
            *map(there, qkv), **placed, **static, implementation=implementation,
            mesh=mesh, layout=layout,
        )  # fmt: skip
        out = back(out)
        return jnp.sum(out * cotangent), out

    with jax.numpy_dtype_promotion("strict"):
        (_, out), grads = released.quick_jit(jax.value_and_grad(loss, has_aux=True))(qkv, scope)
    expected, *expected_grads = run("reference", qkv, cotangent, scope, static)
    assert largest_difference(out, expected) <= 2e-6
    for ours, theirs in zip(grads, expected_grads, strict=True):
        assert largest_difference(ours, theirs) <= 2e-5


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_the_balanced_layout_pairs_early_and_late_pieces_and_comes_back(size):
    mesh = make_mesh(f"1,1,1,{size}", jax.devices()[:size])
    x = jnp.arange(2 * 16 * 3).reshape(2, 16, 3)
    balanced = ring.to_balanced(x, mesh)
    piece = 16 // (2 * size)
    pieces = [x[:, at * piece : (at + 1) * piece] for at in range(2 * size)]
    pairs = [(pieces[r], pieces[2 * size - 1 - r]) for r in range(size)]
    expected = jnp.concatenate([piece for pair in pairs for piece in pair], axis=1)
    assert (np.asarray(balanced) == np.asarray(expected)).all()
    assert (np.asarray(ring.from_balanced(balanced, mesh)) == np.asarray(x)).all()


def test_halves_merge_by_their_logsumexp():
    (q, k, v), _, _, _ = make_case(jnp.float32, **CASES["one block"])
    scope = dict(block_size=1, q_start=jnp.int32(32))  # later than every key: all are seen

    @functools.partial(released.quick_jit, static_argnums=(0, 1))
    def plain(start, stop):
        keys = slice(start, stop)
        return reference.attend(q, k[:, keys], v[:, keys], **scope, kv_length=jnp.int32(32))

    @functools.partial(released.quick_jit, static_argnums=(0, 1))
    def tiled(start, stop):
        keys = slice(start, stop)
        rows = (rearrange(x, "b l h d -> (b h) l d") for x in (q, k[:, keys], v[:, keys]))
        limits = MaskArgs(jnp.int32(32), jnp.int32(0), jnp.int32(32), jnp.int32(0))
        out, lse = attend_rows(*rows, limits, StaticArgs(1, 16, 8, 2), blockwise.KERNEL)
        out = rearrange(out, "(b h) l d -> b l h d", h=2)
        return out, rearrange(lse, "(b h) l -> b h l", h=2)

    whole, whole_lse = plain(0, 32)
    for attend in (plain, tiled):
        (a, lse_a), (b, lse_b) = attend(0, 11), attend(11, 32)
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


@pytest.mark.parametrize("rows", [1, 37, 512, 2048])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_dense_product_and_its_gradients_are_those_of_a_plain_one(rows, dtype):
    rng = np.random.default_rng(rows)
    x, kernel, cotangent = (normal(rng, *shape) for shape in ((rows, 24), (24, 40), (rows, 40)))

    @released.quick_jit
    def run(x, kernel, cotangent):
        product, vjp = jax.vjp(lambda x, kernel: ops.dense(x, kernel, dtype), x, kernel)
        return product, *vjp(cotangent)

    ours = run(x, kernel, cotangent)
    rounded = [np.asarray(y.astype(dtype), np.float64) for y in (x, kernel, cotangent)]
    x64, kernel64, cotangent64 = rounded
    expected = (x64 @ kernel64, cotangent64 @ kernel64.T, x64.T @ cotangent64)
    for y, exact in zip(ours, expected, strict=True):
        assert y.dtype == jnp.float32 and largest_difference(y, exact) < 1e-5 * np.abs(exact).max()


@pytest.mark.parametrize("num_parts", [1, 2])
@pytest.mark.parametrize("chunk_size", [1, 7, 16, 50, 64])
def test_a_feedforward_in_chunks_is_one_at_once(chunk_size, num_parts):
    rng = np.random.default_rng(0)
    shapes = ((2, 50, 8), (8, 12), (12, 8), (8, 12))
    arrays = tuple(normal(rng, *shape) for shape in shapes)

    def loss(chunk_size, arrays):
        how = dict(dtype=jnp.float32, chunk_size=chunk_size, num_parts=num_parts)
        return jnp.sum(jnp.sin(ops.feedforward(*arrays, **how)))

    both = (
        released.quick_jit(jax.grad(functools.partial(loss, size)))(arrays)
        for size in (chunk_size, None)
    )
    for ours, expected in zip(*both, strict=True):
        assert largest_difference(ours, expected) < 1e-5 * np.abs(np.asarray(expected)).max()


@pytest.mark.parametrize("chunk_size", [None, 8])
def test_a_batch_and_a_sequence_that_are_split_stay_where_they_are(chunk_size):
    """Rows of both as one axis, or a chunk across devices, would be gathered."""
    mesh = make_mesh("1,2,1,4")
    weights = ((8, 12), (12, 8), (8, 12))
    places = (NamedSharding(mesh, spec) for spec in (P("fsdp", "sp"), P(), P(), P()))
    arrays = (
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)
        for shape, place in zip(((4, 64, 8), *weights), places, strict=True)
    )
    how = dict(dtype=jnp.float32, chunk_size=chunk_size, num_parts=mesh.shape["sp"])
    program = jax.jit(functools.partial(ops.feedforward, **how)).lower(*arrays).compile()
    assert not re.search("all-gather|all-to-all|all-reduce|permute", program.as_text())

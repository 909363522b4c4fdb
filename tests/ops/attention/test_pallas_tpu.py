"""Properties of the TPU kernels alone, in interpret mode, compared with `blockwise`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import released
from jax import lax
from jax.sharding import PartitionSpec as P

from elastic.distributed.mesh import make_mesh
from elastic.ops.attention import blockwise, pallas_tpu
from elastic.ops.attention.base import MaskArgs, StaticArgs, attend

# Interpreted kernels compile slowly. `test_api.py` compares them with the reference in the default run.
pytestmark = pytest.mark.slow

KERNELS = (pallas_tpu.INTERPRET_KERNEL, blockwise.KERNEL)

# Pieces as a ring passes them, lengths that fill no tile, odd and even numbers of tiles.
CASES = {
    "keys after the first block": dict(
        num_queries=48, num_keys=40, block_size=24, q_start=48, kv_start=32
    ),
    "all keys in the future": dict(
        num_queries=32, num_keys=32, block_size=16, q_start=16, kv_start=64
    ),
    "queries begin inside a block": dict(
        num_queries=41, num_keys=70, block_size=30, q_start=17, kv_start=0
    ),
    "segments, hidden and missing keys": dict(
        num_queries=50, num_keys=83, block_size=20, q_start=40, kv_start=10, kv_length=75, ids=True
    ),
    "one query, one key": dict(num_queries=1, num_keys=1, block_size=4, q_start=0, kv_start=0),
    "256 channels": dict(
        num_queries=40, num_keys=24, block_size=8, q_start=0, kv_start=0, head_dim=256
    ),
}


def make_case(
    *, num_queries, num_keys, block_size, q_start, kv_start, kv_length=None, ids=False, head_dim=32,
    dtype=jnp.float32,
):  # fmt: skip
    """q, k, v; the gradient of the output; logsumexp and delta over keys of other devices; mask and static arguments."""
    rng = np.random.default_rng(num_queries + num_keys)
    rows, heads = 4, 2
    shapes = [(rows, n, head_dim) for n in (num_queries, num_keys, num_keys, num_queries)]
    q, k, v, dout = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    elsewhere = [jnp.asarray(rng.normal(size=(rows, num_queries)), jnp.float32) for _ in range(2)]
    kv_length = kv_start + num_keys if kv_length is None else kv_length
    mask = MaskArgs(*(jnp.int32(x) for x in (q_start, kv_start, kv_length, 0)))
    if ids:
        segments = [rng.integers(0, 3, (rows // heads, n)) for n in (num_queries, num_keys)]
        q_segments, kv_segments = (jnp.asarray(x, jnp.int32) for x in segments)
        valid = jnp.asarray(rng.random(kv_segments.shape) > 0.3)
        mask = mask._replace(q_segments=q_segments, kv_segments=kv_segments, valid=valid)
    static = StaticArgs(block_size, q_tile=16, kv_tile=24, rows_per_batch=heads)
    return tuple(x.astype(dtype) for x in (q, k, v)), dout, elsewhere, mask, static


@functools.partial(released.quick_jit, static_argnums=(0, 5))
def run(kernel, qkv, dout, elsewhere, mask, static):
    """Output and logsumexp over these keys; gradients of q, k and v that also count keys of other devices."""
    out, lse = kernel.forward(*qkv, mask, static)
    all_lse, delta = elsewhere
    all_lse = jnp.logaddexp(lse, all_lse).at[:, -1].set(-jnp.inf)  # the last query sees no key
    return out, lse, *kernel.backward(*qkv, dout, all_lse, delta, mask, static)


@pytest.mark.parametrize("case", CASES)
def test_pieces_and_their_gradients_are_those_of_blockwise(case):
    arguments = make_case(**CASES[case])
    with jax.numpy_dtype_promotion("strict"):
        ours, expected = (run(kernel, *arguments) for kernel in KERNELS)
    for x, y, limit in zip(ours, expected, [2e-6] * 2 + [2e-5] * 3, strict=True):
        assert x.dtype == jnp.float32
        np.testing.assert_allclose(x, y, rtol=0, atol=limit)
    assert not np.asarray(ours[2])[:, -1].any()
    if "future" in case:
        assert np.isneginf(ours[1]).all() and not any(
            np.asarray(ours[i]).any() for i in (0, 2, 3, 4)
        )


def test_bfloat16_operands_give_nearly_the_same():
    case = CASES["segments, hidden and missing keys"]
    qkv, *others = make_case(**case, dtype=jnp.bfloat16)
    with jax.numpy_dtype_promotion("strict"):
        ours = run(pallas_tpu.INTERPRET_KERNEL, qkv, *others)
        exact = run(blockwise.KERNEL, tuple(x.astype(jnp.float32) for x in qkv), *others)
    for x, y in zip(ours, exact, strict=True):
        assert x.dtype == jnp.float32
        largest = np.abs(y, where=np.isfinite(y), out=np.zeros(y.shape)).max()
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-2 * max(1, largest))


def test_rows_of_a_cache_are_read_in_place_and_nothing_after_its_end():
    (q, *_), *_ = make_case(num_queries=40, num_keys=1, block_size=1, q_start=0, kv_start=0)
    rng = np.random.default_rng(0)
    keys, values = (jnp.asarray(rng.normal(size=(12, 77, 32)), jnp.float32) for _ in range(2))
    length, first_row = 45, 7
    mask = MaskArgs(*(jnp.int32(x) for x in (77, 0, length, first_row)))
    static = StaticArgs(1, q_tile=16, kv_tile=16, rows_per_batch=2)
    forward = [released.quick_jit(x.forward, static_argnums=4) for x in KERNELS]
    expected = forward[1](q, keys, values, mask, static)
    # Neither other rows nor anything after the end is read, not even half of a tile.
    garbage = jnp.full_like(keys, jnp.nan).at[first_row : first_row + 4, :length].set(0)
    ours = forward[0](q, keys + garbage, values + garbage, mask, static)
    for x, y in zip(ours, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-6)


def test_gradients_of_keys_that_do_not_exist_are_zero():
    """Padding after `kv_length` inside a tile reaches no gradient."""
    arguments = make_case(
        num_queries=40, num_keys=40, block_size=8, q_start=8, kv_start=0, kv_length=20
    )
    (q, k, v), *others = arguments
    k, v = (x.at[:, 20:].set(jnp.nan) for x in (k, v))
    grads = run(pallas_tpu.INTERPRET_KERNEL, (q, k, v), *others)[2:]
    expected = run(blockwise.KERNEL, *arguments)[2:]
    for x, y in zip(grads, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-5)
    assert not any(np.asarray(x)[:, 20:].any() for x in grads[1:])


def test_works_where_devices_take_different_branches_in_a_scan_with_remat():
    qkv, dout, _, mask, static = make_case(
        num_queries=16, num_keys=16, block_size=8, q_start=0, kv_start=0
    )

    def local(kernel, qkv):
        def layer(q, _):
            def branch(q):
                return attend(q, *qkv[1:], mask, static, kernel)[0]

            return lax.cond(lax.axis_index("sp") == 0, branch, lambda q: 2 * q, q), None

        return lax.scan(jax.checkpoint(layer), qkv[0], length=2)[0]

    def loss(kernel, qkv):
        mesh = make_mesh("1,1,1,2", jax.devices()[:2])
        out = jax.shard_map(
            functools.partial(local, kernel),
            mesh=mesh, in_specs=P("sp"), out_specs=P("sp"), check_vma=False,
        )(qkv)  # fmt: skip
        return jnp.sum(out * dout)

    grads = [released.quick_jit(jax.grad(functools.partial(loss, x)))(qkv) for x in KERNELS]
    for x, y in zip(*grads, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("num_queries", "num_keys", "head_dim", "dtype", "q_tile", "kv_tile", "expected"),
    [
        (16384, 16384, 128, jnp.bfloat16, 1024, 512, (1024, 512)),
        (16384, 16384, 256, jnp.bfloat16, 1024, 512, (1024, 512)),
        (16384, 16384, 128, jnp.float32, 1024, 512, (512, 512)),
        (16384, 16384, 256, jnp.float32, 1024, 512, (256, 512)),
        (16384, 16384, 128, jnp.bfloat16, 300, 100, (256, 128)),
        (200, 31, 64, jnp.bfloat16, 1024, 512, (256, 128)),
        (16384, 16384, 128, jnp.bfloat16, 4096, 4096, (512, 1024)),
    ],
)
def test_tiles_are_whole_lanes_within_what_was_asked_and_fit_in_vmem(
    num_queries, num_keys, head_dim, dtype, q_tile, kv_tile, expected
):
    static = StaticArgs(4096, q_tile, kv_tile, 8)
    assert pallas_tpu.tiles(num_queries, num_keys, head_dim, dtype, static) == expected


@pytest.mark.parametrize(
    ("head_dim", "dtype", "message"),
    [
        (16, jnp.float32, "head_dim=16 must be a multiple of 8 from 32 to 256"),
        (512, jnp.float32, "head_dim=512 must be a multiple of 8 from 32 to 256"),
        (100, jnp.float32, "head_dim=100 must be .* use another number of heads"),
        (64, jnp.float16, "dtype='float16' must be float32 or bfloat16 .*='blockwise'"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused_by_name(head_dim, dtype, message):
    with pytest.raises(ValueError, match=message):
        pallas_tpu.check(head_dim, dtype)
    pallas_tpu.check(32, jnp.bfloat16)

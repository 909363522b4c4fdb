"""Properties of the GPU kernels alone, in interpret mode; test_api.py compares them with the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import released
from attention_cases import normal, piece
from jax.sharding import PartitionSpec as P

from elastic.distributed.mesh import make_mesh
from elastic.ops.attention import blockwise, pallas_gpu
from elastic.ops.attention.base import Kernel, MaskArgs, StaticArgs, attend

# Interpreted kernels compile slowly. `test_api.py` compares them with the reference in the default run.
pytestmark = pytest.mark.slow

# Pieces as a ring passes them: where queries and keys begin, how many there are, how many are filled.
PIECES = {
    "whole": dict(queries=64, keys=64, dim=32, block=16),
    "keys begin later, queries inside a block": dict(
        queries=31, keys=70, dim=64, block=30, q_start=77, kv_start=40, kv_length=101
    ),
    "keys wholly in the future": dict(queries=40, keys=33, dim=32, block=24, kv_start=96),
    "nothing divides anything": dict(
        queries=101, keys=101, dim=96, block=13, q_tile=40, kv_tile=70
    ),
    "segments and hidden keys": dict(
        queries=50, keys=90, dim=48, block=24, q_start=30, kv_length=80, segments=True, hidden=True
    ),
    "hidden keys alone, many channels": dict(
        queries=20, keys=40, dim=256, block=20, q_start=20, hidden=True
    ),
}


@functools.partial(released.quick_jit, static_argnums=(0, 3))
def run(kernel: Kernel, arrays, mask, static, elsewhere=None):
    """Output, logsumexp and gradients. `elsewhere` is the logsumexp over keys of other devices, as in a ring."""
    q, k, v, dout = arrays
    out, lse = kernel.forward(q, k, v, mask, static)
    whole = lse if elsewhere is None else jnp.logaddexp(lse, elsewhere)
    delta = jnp.sum(out * dout, axis=-1)
    return out, lse, *kernel.backward(q, k, v, dout, whole, delta, mask, static)


def largest_difference(a, b):
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    assert (np.isneginf(a) == np.isneginf(b)).all()
    return float(np.abs(np.subtract(a, b, where=~np.isneginf(a), out=np.zeros_like(a))).max())


@pytest.mark.parametrize("case", PIECES)
def test_pieces_of_a_ring_are_those_of_the_plain_kernel(case):
    arrays, mask, static = piece(**PIECES[case])
    elsewhere = normal(np.random.default_rng(0), *arrays[0].shape[:2])
    with jax.numpy_dtype_promotion("strict"):
        ours = run(pallas_gpu.INTERPRET_KERNEL, arrays, mask, static, elsewhere)
    expected = run(blockwise.KERNEL, arrays, mask, static, elsewhere)
    assert all(x.dtype == jnp.float32 for x in ours)
    for x, y, limit in zip(ours, expected, (2e-6, 2e-6, 2e-5, 2e-5, 2e-5), strict=True):
        assert largest_difference(x, y) <= limit
    if case == "keys wholly in the future":
        assert np.isneginf(np.asarray(ours[1])).all()
        assert not any(np.asarray(x).any() for x in (ours[0], *ours[2:]))


def test_bfloat16_operands_with_float32_sums():
    arrays, mask, static = piece(queries=60, keys=100, dim=128, block=20, q_start=40)
    rounded = tuple(x.astype(jnp.bfloat16) for x in arrays[:3])
    ours = run(pallas_gpu.INTERPRET_KERNEL, (*rounded, arrays[3]), mask, static)
    exact = (*(x.astype(jnp.float32) for x in rounded), arrays[3])
    expected = run(blockwise.KERNEL, exact, mask, static)
    for x, y in zip(ours, expected, strict=True):
        assert x.dtype == jnp.float32
        assert largest_difference(x, y) <= 2e-2 * max(1, np.abs(y).max())
    assert largest_difference(ours[1], expected[1]) <= 2e-6  # its products are exact


def test_the_logsumexp_is_natural():
    arrays, mask, static = piece(queries=16, keys=48, dim=32, block=1, q_start=48)
    q, k, v, _ = arrays
    _, lse = pallas_gpu.INTERPRET_KERNEL.forward(q, k, v, mask, static)
    logits = np.einsum("nqd,nkd->nqk", *(np.asarray(x, np.float64) for x in (q, k))) / 32**0.5
    assert largest_difference(lse, np.log(np.exp(logits).sum(axis=-1))) <= 2e-6


def test_rows_of_a_longer_cache_are_read_in_place_and_padding_after_its_end_never():
    rng = np.random.default_rng(0)
    q, k, v = normal(rng, 2, 24, 32), normal(rng, 6, 90, 32), normal(rng, 6, 90, 32)
    static = StaticArgs(24, 16, 16, 1)

    @released.quick_jit
    def read(k, v, first_row):
        mask = MaskArgs(jnp.int32(72), jnp.int32(0), jnp.int32(41), first_row)
        return pallas_gpu.INTERPRET_KERNEL.forward(q, k, v, mask, static)

    at = slice(3, 5)
    expected = read(k[at], v[at], jnp.int32(0))
    filled = np.zeros((6, 90, 1), bool)
    filled[at, :41] = True
    k, v = (jnp.where(filled, x, jnp.nan) for x in (k, v))
    for ours, theirs in zip(read(k, v, jnp.int32(3)), expected, strict=True):
        assert largest_difference(ours, theirs) == 0


def test_padding_after_the_end_gives_no_gradient_and_gets_none():
    arrays, mask, static = piece(queries=40, keys=40, dim=32, block=16, kv_length=27)
    expected = run(pallas_gpu.INTERPRET_KERNEL, arrays, mask, static)
    q, k, v, dout = arrays
    k, v = (x.at[:, 27:].set(jnp.nan) for x in (k, v))
    ours = run(pallas_gpu.INTERPRET_KERNEL, (q, k, v, dout), mask, static)
    for x, y in zip(ours, expected, strict=True):
        assert largest_difference(x, y) == 0
    assert not np.asarray(ours[3])[:, 27:].any() and not np.asarray(ours[4])[:, 27:].any()


def test_inside_of_shard_map_scan_cond_and_checkpoint():
    """As a model calls it. The output is differentiated, through the gradient that all kernels share."""
    (q, k, v, _), mask, static = piece(queries=32, keys=32, dim=32, block=16)
    mesh = make_mesh("2,1,1,1", jax.devices()[:2])

    def loss(kernel, q):
        def layer(x, _):
            def branch(x):
                return attend(x, k[: len(x)], v[: len(x)], mask, static, kernel)[0]

            return jax.lax.cond(x[0, 0, 0] < 1e9, branch, jnp.zeros_like, x), None

        def per_device(x):
            return jax.lax.scan(jax.checkpoint(layer), x, length=2)[0]

        spec = P(mesh.axis_names[0])
        run = jax.shard_map(per_device, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
        return jnp.sum(jnp.sin(run(q)))

    ours, expected = (
        released.quick_jit(jax.grad(functools.partial(loss, kernel)))(q)
        for kernel in (pallas_gpu.INTERPRET_KERNEL, blockwise.KERNEL)
    )
    assert largest_difference(ours, expected) <= 2e-5


def test_what_it_cannot_do_is_refused_by_name():
    with pytest.raises(ValueError, match=r"head_dim=512: the GPU kernel takes 32 to 256 channels"):
        pallas_gpu.check(512, jnp.float32)
    with pytest.raises(ValueError, match=r"head_dim=16: .* or implementation='blockwise'"):
        pallas_gpu.check(16, jnp.bfloat16)
    with pytest.raises(
        ValueError, match=r"dtype=float16: the GPU kernel takes float32 or bfloat16"
    ):
        pallas_gpu.check(128, jnp.float16)
    pallas_gpu.check(96, jnp.dtype("bfloat16"))
    (q, k, v, _), mask, static = piece(queries=16, keys=16, dim=16, block=16)
    with pytest.raises(ValueError, match="head_dim=16"):  # the kernel checks too
        pallas_gpu.KERNEL.forward(q, k, v, mask, static)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("step", ["forward", "dq", "dkv"])
def test_tiles_are_powers_of_two_within_the_limits(step, head_dim, dtype):
    def cut(lengths, *limits):
        return pallas_gpu.tiles(step, head_dim, dtype, lengths, StaticArgs(1, *limits, 1))

    for tiles in (cut((4096, 4096), 1024, 512), cut((4096, 4096), 24, 100), cut((5, 70), 99, 99)):
        assert tiles.q_tile.bit_count() == tiles.kv_tile.bit_count() == 1
        assert min(tiles.q_tile, tiles.kv_tile) >= 16
        assert tiles.num_warps in (4, 8)
    q_tile, kv_tile, *_ = cut((4096, 4096), 24, 48)
    assert q_tile <= 24 and kv_tile <= 48
    assert cut((5, 9), 1024, 512)[:2] == (16, 16)

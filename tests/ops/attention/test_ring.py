"""Attention on a ring of devices is attention on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import released
from attention_cases import largest_difference, make_case, reference_of

from elastic import ops
from elastic.distributed.mesh import make_mesh
from elastic.ops.attention import ring

RING_CASES = {
    "blocks": dict(length=96, block_size=24, q_tile=8, kv_tile=16),
    "all at once": dict(
        length=96, block_size=24, kv_length=77, segments=(40, 56), hidden=0.2, q_tile=8, kv_tile=16
    ),
}
RINGS = [
    *(("all at once", "blockwise", layout, "1,1,1,8") for layout in ring.LAYOUTS),
    pytest.param("all at once", "blockwise", "balanced", "2,1,2,2", marks=pytest.mark.slow),
    # Interpreted kernels compile slowly; what the ring does with a kernel is the same for all.
    pytest.param(
        "all at once", "pallas_tpu_interpret", "balanced", "1,1,1,4", marks=pytest.mark.slow
    ),
    ("blocks", "pallas_gpu_interpret", "plain", "1,1,1,4"),
]


@pytest.mark.parametrize(("case", "implementation", "layout", "mesh_dim"), RINGS)
def test_a_ring_is_one_device(case, implementation, layout, mesh_dim):
    qkv, cotangent, seen_args, static = make_case(jnp.float32, **RING_CASES[case])
    sizes = [int(size) for size in mesh_dim.split(",")]
    mesh = make_mesh(mesh_dim, jax.devices()[: np.prod(sizes)])
    balance, restore = (
        (lambda x: ring.to_balanced(x, mesh), lambda x: ring.from_balanced(x, mesh))
        if layout == "balanced"
        else (lambda x: x, lambda x: x)
    )

    def loss(qkv, seen_args):
        placed = {
            name: balance(x) if name in ("segment_ids", "valid") else x
            for name, x in seen_args.items()
        }
        del placed["q_start"]  # 0
        out = ops.attention(
            *map(balance, qkv), **placed, **static, implementation=implementation,
            mesh=mesh, layout=layout,
        )  # fmt: skip
        out = restore(out)
        return jnp.sum(out * cotangent), out

    with jax.numpy_dtype_promotion("strict"):
        (_, out), grads = released.quick_jit(jax.value_and_grad(loss, has_aux=True))(qkv, seen_args)
    expected, *expected_grads = reference_of(jnp.float32, RING_CASES[case])
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

"""Attention of a new block on a cache is attention on the whole sequence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import released
from attention_cases import attention, largest_difference, normal
from einops import rearrange
from released import RUNNABLE

from elastic import ops
from elastic.distributed.mesh import make_mesh


def cache_case(num_cached, capacity, candidates, block=24):
    """A cache of two layers with garbage after its end, and candidates for the next block."""
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


@functools.cache
def program(implementation):
    """Compiled once for all caches of one size."""
    attend = functools.partial(
        ops.attention_with_cache, implementation=implementation, q_tile=32, kv_tile=20
    )
    return released.quick_jit(lambda qkv, cache, layer: attend(*qkv, cache=cache, layer=layer))


# Positions filled, positions in all, candidates.
CACHES = [(0, 0, 3), (0, 72, 3), (24, 72, 3), (72, 72, 3), (0, 72, 1), (24, 72, 1), (72, 72, 1)]


@pytest.mark.parametrize("implementation", RUNNABLE)
@pytest.mark.parametrize(("num_cached", "capacity", "candidates"), CACHES, ids=str)
def test_candidates_on_a_cache_equal_one_shot(implementation, num_cached, capacity, candidates):
    qkv, cache, layer, one_shot = cache_case(num_cached, capacity, candidates)
    out = program(implementation)(qkv, cache, layer)
    assert largest_difference(out, one_shot) <= 2e-6


ON_MESHES = [
    ("reference", "1,1,2,2"),
    ("blockwise", "1,1,2,2"),
    ("blockwise", "1,1,1,4"),
    ("blockwise", "2,1,2,1"),
]


@pytest.mark.parametrize(("implementation", "mesh_dim"), ON_MESHES)
def test_heads_and_parts_of_a_cache_lie_on_several_devices(implementation, mesh_dim):
    (q, k, v), cache, layer, one_shot = cache_case(24, 72, 3)
    mesh = make_mesh(mesh_dim, jax.devices()[:4])
    size = mesh.shape["sp"]

    def spread(x):  # each device has its part of every block, so the filled positions too
        return rearrange(x, "n b h (blocks s part) d -> n b h (s blocks part) d", blocks=3, s=size)

    cache = cache._replace(keys=spread(cache.keys), values=spread(cache.values))
    attend = functools.partial(ops.attention_with_cache, mesh=mesh, implementation=implementation)
    out = released.quick_jit(lambda cache: attend(q, k, v, cache=cache, layer=layer))(cache)
    assert largest_difference(out, one_shot) <= 2e-6

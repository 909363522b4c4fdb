"""The feedforward layer in chunks is the whole one."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import released
from attention_cases import largest_difference, normal
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from elastic import ops
from elastic.distributed.mesh import make_mesh


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

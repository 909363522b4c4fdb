"""Attention of a new block to itself and to a cache, which is read where it lies."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Num

from elastic.distributed.sharding import fitting_spec
from elastic.ops import bf16_bits
from elastic.ops.attention import ring
from elastic.ops.attention.api import (
    KV_TILE,
    Q_TILE,
    AttentionInputs,
    How,
    attend_local,
    attend_ring,
)
from elastic.ops.attention.base import MaskArgs, attend_rows, from_rows, rows
from elastic.ops.attention.dispatch import choose_implementation, kernel_of


class KVCache(NamedTuple):
    """Keys (RoPE applied) and values of earlier blocks, for every layer: what a new block attends to besides itself.

    `keys` and `values` are [layers, batch, heads, capacity, head_dim]; of each batch element the first `length` positions are
    filled, in any order. Over a mesh with sp the capacity is split: each device holds its own part of every block, and the first
    `length / sp` positions of each part are filled. On the CPU bfloat16 lies there as its bits (see bits.py).
    """

    keys: Num[Array, "layers b h c d"]
    values: Num[Array, "layers b h c d"]
    length: Int[Array, "b"]


def cache_spec(mesh: Mesh, batch: int, heads: int) -> P:
    """How keys and values of a cache lie on a mesh; what has one entry for each batch element is split like their second axis."""
    batch_axes, head_axes = fitting_spec(mesh, (batch, heads), "batch", "heads")
    return P(None, batch_axes, head_axes, ring.AXIS if mesh.shape[ring.AXIS] > 1 else None, None)


def attention_with_cache(
    q: Float[Array, "n q h d"],
    k: Float[Array, "n q h d"],
    v: Float[Array, "n q h d"],
    *,
    cache: KVCache,
    layer: Int[Array, ""],
    mesh: Mesh | None = None,
    implementation: str | None = None,
    q_tile: int = Q_TILE,
    kv_tile: int = KV_TILE,
) -> Float[Array, "n q h d"]:
    """One new block that sees itself and all of `cache` in layer `layer`.

    There may be several candidates of each block: n = batch * candidates, the candidates of one element side by side. They share
    its cache, which is read in place. Both parts are attended to apart and merged by their logsumexp. The cost follows each
    element's own cache.

    Over a mesh the block's own keys travel round sp. The cache, which may be a thousand times longer than the block, stays where it is:
    the queries visit every part of it, and what they found is merged.
    """
    name = choose_implementation(implementation, head_dim=q.shape[-1], dtype=q.dtype, mesh=mesh)
    how = How(name, q.shape[1], q_tile, kv_tile)
    arguments = (q, k, v, cache.keys, cache.values, cache.length, jnp.asarray(layer))
    if mesh is None or mesh.size == 1:
        return _with_cache(*arguments, how=how, ring_size=1).astype(q.dtype)
    size = mesh.shape[ring.AXIS]
    ring.check_length(q.shape[1], size, "plain")
    kept = cache_spec(mesh, len(cache.length), q.shape[2])
    # Candidates stay with their cache: the batch is split as it is.
    block = P(kept[1], *fitting_spec(mesh, q.shape, None, "sequence", "heads", None)[1:])
    sharded = jax.shard_map(
        functools.partial(_with_cache, how=how, ring_size=size),
        mesh=mesh,
        in_specs=(block, block, block, kept, kept, P(kept[1]), P()),
        out_specs=block,
        check_vma=False,
    )
    return sharded(*arguments).astype(q.dtype)


def _with_cache(
    q: Array,
    k: Array,
    v: Array,
    cached_keys: Array,
    cached_values: Array,
    cached_length: Array,
    layer: Array,
    *,
    how: How,
    ring_size: int,
) -> Array:
    """Output [n, q, h, d] in float32, of one device's part of the block."""
    batch, capacity = cached_keys.shape[1], cached_keys.shape[3]
    call = AttentionInputs(q, k, v, jnp.int32(0), jnp.int32(how.block_size))
    if ring_size == 1:
        own_out, own_lse = attend_local(call, how._replace(whole=True))
    else:
        own_out, own_lse = attend_ring(call, how, ring_size, "plain")
        q = lax.all_gather(q, ring.AXIS, axis=1, tiled=True)
    if capacity == 0:  # a window of one block
        return own_out
    # Candidates side by side: one long query against the cache that they share, all of which it sees.
    length = q.shape[1]
    queries = rearrange(q, "(b n) l h d -> b (n l) h d", b=batch)
    out, lse = _cache_alone(
        queries, cached_keys, cached_values, cached_length // ring_size, layer, how
    )
    out = rearrange(out, "b (n l) h d -> (b n) l h d", l=length)
    lse = rearrange(lse, "b h (n l) -> (b n) l h", l=length)
    if ring_size > 1:
        out, lse = _merge_parts(out, lse)
    return ring.merge(out, lse, own_out, rearrange(own_lse, "b h l -> b l h"))[0]


def _cache_alone(
    q: Array, cached_keys: Array, cached_values: Array, cached_length: Array, layer: Array, how: How
) -> tuple[Array, Array]:
    """Queries [b, q, h, d] that see all of their cache, `cached_length` [b], in one layer; each element reads its own cache and no more."""
    _, batch, heads, capacity, _ = cached_keys.shape
    # Queries and keys as if they lay in one block, which therefore sees all of itself.
    start, how = jnp.int32(0), how._replace(block_size=max(q.shape[1], capacity))
    if how.name != "blockwise":  # which slices bits; the others take numbers
        cached_keys, cached_values = (
            bf16_bits.from_bits(cached_keys),
            bf16_bits.from_bits(cached_values),
        )
    if how.name == "reference":
        keys, values = (
            rearrange(x[layer], "b h c d -> b c h d") for x in (cached_keys, cached_values)
        )
        valid = jnp.arange(capacity)[None] < cached_length[:, None]
        return attend_local(
            AttentionInputs(q, keys, values, start, jnp.int32(capacity), valid=valid), how
        )
    keys, values = (x.reshape(-1, *x.shape[-2:]) for x in (cached_keys, cached_values))
    first_row = (layer * batch * heads).astype(jnp.int32)
    kernel = kernel_of(how.name)
    if kernel.prefixes is not None and batch > 1:
        found = kernel.prefixes(rows(q), keys, values, first_row, cached_length)
        if found is not None:
            return from_rows(*found, heads)

    def of_element(element: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        q, length, number = element
        scope = MaskArgs(start, start, length, first_row + number * heads)
        found = attend_rows(rows(q[None]), keys, values, scope, how.options(heads), kernel)
        out, lse = from_rows(*found, heads)
        return out[0], lse[0]

    elements = (q, cached_length, jnp.arange(batch))
    if batch > 1:
        return lax.map(of_element, elements)
    out, lse = of_element(jax.tree.map(lambda x: x[0], elements))
    return out[None], lse[None]


def _merge_parts(out: Array, lse: Array) -> tuple[Array, Array]:
    """What all queries [n, q, h] found in each device's part of the cache, as what this device's queries found in all of it."""
    top = lax.pmax(lse, ring.AXIS)
    weight = jnp.exp(lse - jnp.where(jnp.isneginf(top), 0.0, top))

    def to_owners(x: Array) -> Array:
        return lax.psum_scatter(x, ring.AXIS, scatter_dimension=1, tiled=True)

    total = to_owners(weight)
    own_top = lax.dynamic_slice_in_dim(
        top, lax.axis_index(ring.AXIS) * total.shape[1], total.shape[1], 1
    )
    found = jnp.where(total > 0, total, 1.0)
    out = to_owners(out * weight[..., None]) / found[..., None]
    return out, jnp.where(total > 0, own_top + jnp.log(found), -jnp.inf)

"""The KV cache, and attention of a new block to itself and to the cache, which kernels read in place."""

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
from elastic.ops.attention.api import KV_TILE, Q_TILE, attend_local, attend_ring
from elastic.ops.attention.base import MaskArgs, StaticArgs, attend, from_rows, rows
from elastic.ops.attention.dispatch import choose_implementation, kernel_of


class KVCache(NamedTuple):
    """Keys (RoPE applied) and values of earlier blocks, for every layer. A new block attends to them and to itself.

    Of each batch element the first `length` positions are filled, in any order. On a mesh with sp the capacity is
    split: each device holds its own part of every block, and the first `length / sp` positions of each part are filled.
    On the CPU bfloat16 is held as uint16 (bf16_bits.py).

    This file only reads a cache: `tokenizer/block_codec.py` allocates it, appends blocks and slides it.
    """

    keys: Num[Array, "layers b h c d"]  # c: capacity in tokens
    values: Num[Array, "layers b h c d"]
    length: Int[Array, "b"]  # tokens


def cache_spec(mesh: Mesh, batch: int, heads: int) -> P:
    """The partition of a cache's keys and values. Its second entry also splits arrays with one entry per batch element."""
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
    """Attention of one new block to itself and to all of `cache` in one layer.

    There may be several candidates of each block: n = batch * candidates, with the candidates of one batch element
    adjacent. They share its cache. Attention to the block and attention to the cache are computed separately and merged
    by their logsumexp. The cost follows the cache length of each element.

    On a mesh the block's own keys travel around sp. The cache may be a thousand times longer than the block, so it
    stays in place: every device attends with all queries to its part of the cache, and the results are merged.

    Args:
      q: queries of the block [n, q, h, d], float32 or bfloat16, RoPE applied.
      k: keys of the block [n, q, h, d], RoPE applied.
      v: values of the block [n, q, h, d].
      cache: keys and values of earlier blocks.
      layer: the layer of the cache to read.
      mesh: batch over dp and fsdp, heads over tp, the block and the capacity over sp; None: one device.
      implementation: a name out of `IMPLEMENTATIONS`; None picks the best for the device.
      q_tile: at most so many queries in a kernel's tile.
      kv_tile: at most so many keys in a kernel's tile.

    Returns:
      The output in the dtype of q.

    Raises:
      ValueError: the implementation is unknown or cannot serve these arrays, or sp does not divide the block.
    """
    name = choose_implementation(implementation, head_dim=q.shape[-1], dtype=q.dtype, mesh=mesh)
    static = StaticArgs(
        block_size=q.shape[1],
        q_tile=q_tile,
        kv_tile=kv_tile,
        rows_per_batch=q.shape[2],
        implementation=name,
    )
    arguments = (q, k, v, cache.keys, cache.values, cache.length, jnp.asarray(layer))
    if mesh is None or mesh.size == 1:
        return _with_cache(*arguments, static=static, ring_size=1).astype(q.dtype)
    size = mesh.shape[ring.AXIS]
    ring.check_length(q.shape[1], size, "plain")
    cached = cache_spec(mesh, len(cache.length), q.shape[2])
    # Candidates stay with their cache: the batch is split as the cache's batch is.
    block = P(cached[1], *fitting_spec(mesh, q.shape, None, "sequence", "heads", None)[1:])
    sharded = jax.shard_map(
        functools.partial(_with_cache, static=static, ring_size=size),
        mesh=mesh,
        in_specs=(block, block, block, cached, cached, P(cached[1]), P()),
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
    static: StaticArgs,
    ring_size: int,
) -> Array:
    """Output [n, q, h, d] in float32, of one device's part of the block."""
    batch, capacity = cached_keys.shape[1], cached_keys.shape[3]
    zero = jnp.int32(0)
    mask = MaskArgs(
        q_start=zero, kv_start=zero, kv_length=jnp.int32(static.block_size), first_row=zero
    )
    if ring_size == 1:
        block_out, block_lse = attend_local(q, k, v, mask, static._replace(whole=True))
    else:
        block_out, block_lse = attend_ring(q, k, v, mask, static, ring_size, "plain")
        q = lax.all_gather(q, ring.AXIS, axis=1, tiled=True)
    if capacity == 0:  # a window of one block
        return block_out
    # All candidates see the whole cache that they share, so they are one long query.
    length = q.shape[1]
    queries = rearrange(q, "(b n) l h d -> b (n l) h d", b=batch)
    out, lse = _attend_cache(
        queries, cached_keys, cached_values, cached_length // ring_size, layer, static
    )
    out = rearrange(out, "b (n l) h d -> (b n) l h d", l=length)
    lse = rearrange(lse, "b h (n l) -> (b n) l h", l=length)
    if ring_size > 1:
        out, lse = _merge_devices(out, lse)
    return ring.merge(out, lse, block_out, rearrange(block_lse, "b h l -> b l h"))[0]


def _attend_cache(
    q: Array,
    cached_keys: Array,
    cached_values: Array,
    cached_length: Array,
    layer: Array,
    static: StaticArgs,
) -> tuple[Array, Array]:
    """Attention of queries [b, q, h, d] to the cache alone, in one layer.

    Each element reads the first `cached_length` [b] positions of its own cache, and no more.
    """
    _, batch, heads, capacity, _ = cached_keys.shape
    # One block holds all queries and keys, so every query sees every key.
    zero = jnp.int32(0)
    static = static._replace(block_size=max(q.shape[1], capacity), rows_per_batch=heads)
    if static.implementation != "blockwise":  # blockwise slices uint16; the others take floats
        cached_keys, cached_values = (
            bf16_bits.from_bits(cached_keys),
            bf16_bits.from_bits(cached_values),
        )
    if static.implementation == "reference":
        keys, values = (
            rearrange(x[layer], "b h c d -> b c h d") for x in (cached_keys, cached_values)
        )
        valid = jnp.arange(capacity)[None] < cached_length[:, None]
        mask = MaskArgs(
            q_start=zero,
            kv_start=zero,
            kv_length=jnp.int32(capacity),
            first_row=zero,
            valid=valid,
        )
        return attend_local(q, keys, values, mask, static)
    keys, values = (x.reshape(-1, *x.shape[-2:]) for x in (cached_keys, cached_values))
    first_row = (layer * batch * heads).astype(jnp.int32)
    kernel = kernel_of(static.implementation)
    if kernel.prefixes is not None and batch > 1:
        of_batch = kernel.prefixes(rows(q), keys, values, first_row, cached_length)
        if of_batch is not None:
            return from_rows(*of_batch, heads)

    def of_element(element: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        queries, length, number = element
        mask = MaskArgs(
            q_start=zero,
            kv_start=zero,
            kv_length=length,
            first_row=first_row + number * heads,
        )
        of_rows = attend(rows(queries[None]), keys, values, mask, static, kernel)
        out, lse = from_rows(*of_rows, heads)
        return out[0], lse[0]

    elements = (q, cached_length, jnp.arange(batch))
    if batch > 1:
        return lax.map(of_element, elements)
    out, lse = of_element(jax.tree.map(lambda x: x[0], elements))
    return out[None], lse[None]


def _merge_devices(out: Array, lse: Array) -> tuple[Array, Array]:
    """Merges the devices' attention to their parts of the cache; each device keeps the result of its own queries.

    Takes the output [n, q, h, d] and logsumexp [n, q, h] of all queries for this device's part.
    """
    top = lax.pmax(lse, ring.AXIS)
    weight = jnp.exp(lse - jnp.where(jnp.isneginf(top), 0.0, top))

    def sum_and_split(x: Array) -> Array:
        return lax.psum_scatter(x, ring.AXIS, scatter_dimension=1, tiled=True)

    total = sum_and_split(weight)
    device_top = lax.dynamic_slice_in_dim(
        top, lax.axis_index(ring.AXIS) * total.shape[1], total.shape[1], 1
    )
    divisor = jnp.where(total > 0, total, 1.0)
    out = sum_and_split(out * weight[..., None]) / divisor[..., None]
    return out, jnp.where(total > 0, device_top + jnp.log(divisor), -jnp.inf)

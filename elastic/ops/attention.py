"""The front door to attention: one contract, several implementations, chosen by name or for the device."""

import functools
import logging
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from elastic.ops import blockwise, reference
from elastic.ops.local import Options, Scope, attend_rows
from elastic.sharding import fitting_spec

log = logging.getLogger(__name__)

IMPLEMENTATIONS = ("reference", "blockwise")
_Q_TILE, _KV_TILE = 1024, 512


class Past(NamedTuple):
    """Keys (RoPE applied) and values of earlier blocks, for every layer: what a new block attends to besides itself.

    `keys` and `values` are [layers, batch, heads, capacity, head_dim]; the first `length` positions are filled, in any order.
    """

    keys: Float[Array, "layers b h c d"]
    values: Float[Array, "layers b h c d"]
    length: Int[Array, ""]


def choose_implementation(name: str | None = None) -> str:
    """The implementation called `name`; None or '' picks the best for the default device, and logs which.

    Raises:
      ValueError: no implementation has that name.
    """
    if not name:
        return _best_for(jax.default_backend())
    if name not in IMPLEMENTATIONS:
        raise ValueError(
            f"attention implementation {name!r} must be one of {', '.join(IMPLEMENTATIONS)}."
        )
    return name


@functools.cache
def _best_for(backend: str) -> str:
    log.info("Attention runs as 'blockwise' on %s.", backend)
    return "blockwise"


def attention(
    q: Float[Array, "b q h d"],
    k: Float[Array, "b k h d"],
    v: Float[Array, "b k h d"],
    *,
    block_size: int,
    q_start: int | Int[Array, ""] = 0,
    kv_length: int | Int[Array, ""] | None = None,
    segment_ids: Int[Array, "b k"] | None = None,
    valid: Bool[Array, "b k"] | None = None,
    mesh: Mesh | None = None,
    implementation: str | None = None,
    q_tile: int = _Q_TILE,
    kv_tile: int = _KV_TILE,
) -> Float[Array, "b q h d"]:
    """Block-causal attention: the query at global position i sees key j when `j // block_size <= i // block_size`.

    Args:
      block_size: tokens per block.
      q_start: the global position of the first query; keys begin at 0.
      kv_length: keys from here on are not there; None: all are. May be a traced number; the cost follows it.
      segment_ids: a query sees the keys of its own segment only. Queries take the ids at their own positions.
      valid: False hides a key from everyone.
      mesh: where the arrays lie; batch over dp and fsdp, heads over tp, queries over sp.
      implementation: a name out of `IMPLEMENTATIONS`; None picks the best for the device.
      q_tile, kv_tile: how many queries and keys the blockwise implementation holds at once.

    Returns:
      In the type of q. A query that sees no key gives 0.

    Raises:
      ValueError: shapes do not agree, or the implementation is unknown.
    """
    name = choose_implementation(implementation)
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(
            f"q {q.shape}, k {k.shape} and v {v.shape} must agree in batch, heads and head_dim, k and v in length too."
        )
    q_start = jnp.asarray(q_start, jnp.int32)
    kv_length = jnp.asarray(k.shape[1] if kv_length is None else kv_length, jnp.int32)
    q_segments = (
        None
        if segment_ids is None
        else lax.dynamic_slice_in_dim(segment_ids, q_start, q.shape[1], 1)
    )
    call = _Call(q, k, v, q_start, kv_length, q_segments, segment_ids, valid)
    how = _How(name, block_size, q_tile, kv_tile)
    if mesh is None or mesh.size == 1:
        return _on_device(call, how)[0].astype(q.dtype)
    return _on_mesh(call, how, mesh).astype(q.dtype)


def attention_with_past(
    q: Float[Array, "n q h d"],
    k: Float[Array, "n q h d"],
    v: Float[Array, "n q h d"],
    *,
    past: Past,
    layer: Int[Array, ""],
    mesh: Mesh | None = None,
    implementation: str | None = None,
    q_tile: int = _Q_TILE,
    kv_tile: int = _KV_TILE,
) -> Float[Array, "n q h d"]:
    """One new block that sees itself and all of `past` in layer `layer`.

    There may be several candidates of each block: n = batch * candidates, the candidates of one element side by side. They share
    its past, which is read in place. Both parts are attended to apart and merged by their logsumexp.
    """
    how = _How(choose_implementation(implementation), q.shape[1], q_tile, kv_tile)
    local = functools.partial(_on_device_with_past, how=how)
    arguments = (q, k, v, past.keys, past.values, past.length, jnp.asarray(layer))
    if mesh is None or mesh.size == 1:
        return local(*arguments).astype(q.dtype)
    heads = fitting_spec(mesh, q.shape, None, None, "heads", None)
    past_heads = P(None, None, heads[2])
    sharded = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(heads, heads, heads, past_heads, past_heads, P(), P()),
        out_specs=heads,
        check_vma=False,
    )
    return sharded(*arguments).astype(q.dtype)


class _Call(NamedTuple):
    """The arrays of one call: what a mesh splits."""

    q: Array  # [b, q, h, d]
    k: Array  # [b, k, h, d]
    v: Array  # [b, k, h, d]
    q_start: Array
    kv_length: Array
    q_segments: Array | None = None  # [b, q]
    kv_segments: Array | None = None  # [b, k]
    valid: Array | None = None  # [b, k]


class _How(NamedTuple):
    """What is known when the program is compiled."""

    name: str
    block_size: int
    q_tile: int
    kv_tile: int


def _on_mesh(call: _Call, how: _How, mesh: Mesh) -> Array:
    """Each device serves its batch elements, heads and queries. Keys are gathered over sp, so that any mesh works."""
    queries = fitting_spec(mesh, call.q.shape, "batch", "sequence", "heads", None)
    batch, sequence, heads, _ = queries
    keys, kv_ids = P(batch, None, heads, None), P(batch, None)
    parts = (queries, keys, keys, P(), P(), P(batch, sequence), kv_ids, kv_ids)
    specs: Any = [None if x is None else part for x, part in zip(call, parts, strict=True)]

    def run(call: _Call) -> Array:
        if sequence:
            first = lax.axis_index(sequence) * call.q.shape[1]
            call = call._replace(q_start=call.q_start + first)
        return _on_device(call, how)[0]

    sharded = jax.shard_map(
        run, mesh=mesh, in_specs=(_Call(*specs),), out_specs=queries, check_vma=False
    )
    return sharded(call)


def _on_device(call: _Call, how: _How) -> tuple[Array, Array]:
    """Output [b, q, h, d] in float32 and logsumexp [b, h, q]."""
    q, k, v, q_start, kv_length, q_segments, kv_segments, valid = call
    if how.name == "reference":
        return reference.attend(
            q,
            k,
            v,
            block_size=how.block_size,
            q_start=q_start,
            kv_length=kv_length,
            q_segments=q_segments,
            kv_segments=kv_segments,
            valid=valid,
        )
    start = jnp.int32(0)
    scope = Scope(q_start, start, kv_length, start, q_segments, kv_segments, valid)
    return _by_rows(q, _rows(k), _rows(v), scope, how)


def _on_device_with_past(
    q: Array,
    k: Array,
    v: Array,
    past_keys: Array,
    past_values: Array,
    past_length: Array,
    layer: Array,
    *,
    how: _How,
) -> Array:
    """Output [n, q, h, d] in float32."""
    (_, length, heads, _), batch, capacity = q.shape, past_keys.shape[1], past_keys.shape[3]
    own_out, own_lse = _on_device(
        _Call(q, k, v, jnp.int32(0), jnp.int32(length)), how._replace(block_size=length)
    )
    if capacity == 0:  # a window of one block
        return own_out
    # Candidates side by side: one long query against the past that they share, all of which it sees.
    queries = rearrange(q, "(b n) l h d -> b (n l) h d", b=batch)
    how, q_start = how._replace(block_size=1), jnp.int32(capacity)
    if how.name == "reference":
        keys, values = (rearrange(x[layer], "b h c d -> b c h d") for x in (past_keys, past_values))
        out, lse = _on_device(_Call(queries, keys, values, q_start, past_length), how)
    else:
        first_row = (layer * batch * heads).astype(jnp.int32)
        scope = Scope(q_start, jnp.int32(0), past_length, first_row)
        keys, values = (x.reshape(-1, *x.shape[-2:]) for x in (past_keys, past_values))
        out, lse = _by_rows(queries, keys, values, scope, how)
    return _merge(
        rearrange(out, "b (n l) h d -> (b n) l h d", l=length),
        rearrange(lse, "b h (n l) -> (b n) l h", l=length),
        own_out,
        rearrange(own_lse, "b h l -> b l h"),
    )


def _rows(x: Array) -> Array:
    return rearrange(x, "b l h d -> (b h) l d")


def _by_rows(q: Array, keys: Array, values: Array, scope: Scope, how: _How) -> tuple[Array, Array]:
    """Blockwise attention of queries [b, q, h, d] to rows of keys and values."""
    heads = q.shape[2]
    options = Options(how.block_size, how.q_tile, how.kv_tile, rows_per_batch=heads)
    out, lse = attend_rows(_rows(q), keys, values, scope, options, blockwise.KERNEL)
    return (
        rearrange(out, "(b h) l d -> b l h d", h=heads),
        rearrange(lse, "(b h) l -> b h l", h=heads),
    )


def _merge(a: Array, lse_a: Array, b: Array, lse_b: Array) -> Array:
    """Two softmax averages over disjoint keys as one; b must have seen at least one key."""
    top = jnp.maximum(lse_a, lse_b)
    weight_a, weight_b = jnp.exp(lse_a - top), jnp.exp(lse_b - top)
    total = weight_a + weight_b
    return a * (weight_a / total)[..., None] + b * (weight_b / total)[..., None]

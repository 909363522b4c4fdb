"""The front door to attention: one contract, several implementations, chosen by name or for the device."""

import functools
import logging
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from elastic.ops import blockwise, reference
from elastic.sharding import fitting_spec, spec

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
        raise ValueError(f"attention implementation {name!r} must be one of {', '.join(IMPLEMENTATIONS)}.")
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
        raise ValueError(f"q {q.shape}, k {k.shape} and v {v.shape} must agree in batch, heads and head_dim, k and v in length too.")
    q_start = jnp.asarray(q_start, jnp.int32)
    kv_length = jnp.asarray(k.shape[1] if kv_length is None else kv_length, jnp.int32)
    q_segments = None if segment_ids is None else lax.dynamic_slice_in_dim(segment_ids, q_start, q.shape[1], 1)
    local = functools.partial(_local, name=name, block_size=block_size, q_tile=q_tile, kv_tile=kv_tile)
    arguments = (q, k, v, q_start, kv_length, q_segments, segment_ids, valid)
    if mesh is None or mesh.size == 1:
        return local(*arguments).astype(q.dtype)
    out = _on_mesh(local, mesh, arguments)
    return out.astype(q.dtype)


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
    name = choose_implementation(implementation)
    local = functools.partial(_local_with_past, name=name, q_tile=q_tile, kv_tile=kv_tile)
    arguments = (q, k, v, past.keys, past.values, past.length, jnp.asarray(layer))
    if mesh is None or mesh.size == 1:
        return local(*arguments).astype(q.dtype)
    heads = fitting_spec(mesh, q.shape, None, None, "heads", None)
    past_heads = P(None, None, heads[2])
    sharded = jax.shard_map(
        local, mesh=mesh, in_specs=(heads, heads, heads, past_heads, past_heads, P(), P()), out_specs=heads, check_vma=False
    )
    return sharded(*arguments).astype(q.dtype)


def _on_mesh(local: Callable[..., Array], mesh: Mesh, arguments: tuple) -> Array:
    """Runs `local` on each device's batch elements, heads and queries. Keys are gathered over sp, so that any mesh works."""
    q, k, _, _, _, q_segments, kv_segments, valid = arguments
    queries = fitting_spec(mesh, q.shape, "batch", "sequence", "heads", None)
    keys = P(queries[0], None, queries[2], None)
    num_parts = mesh.shape["sp"] if queries[1] else 1

    def run(q, k, v, q_start, kv_length, q_segments, kv_segments, valid):
        if num_parts > 1:
            q_start = q_start + lax.axis_index(spec("sequence")[0]) * q.shape[1]
        return local(q, k, v, q_start, kv_length, q_segments, kv_segments, valid)

    flat = lambda x, part: None if x is None else part  # noqa: E731
    in_specs = (
        queries, keys, keys, P(), P(),
        flat(q_segments, P(queries[0], queries[1])), flat(kv_segments, P(queries[0], None)), flat(valid, P(queries[0], None)),
    )  # fmt: skip
    return jax.shard_map(run, mesh=mesh, in_specs=in_specs, out_specs=queries, check_vma=False)(*arguments)


def _local(q, k, v, q_start, kv_length, q_segments, kv_segments, valid, *, name, block_size, q_tile, kv_tile) -> Array:
    if name == "reference":
        return reference.attend(
            q, k, v, block_size=block_size, q_start=q_start, kv_length=kv_length,
            q_segments=q_segments, kv_segments=kv_segments, valid=valid,
        )[0]  # fmt: skip
    options = blockwise.Options(block_size, q_tile, kv_tile, rows_per_batch=q.shape[2])
    scope = blockwise.Scope(q_start, kv_length, jnp.int32(0), q_segments, kv_segments, valid)
    rows = (rearrange(x, "b l h d -> (b h) l d") for x in (q, k, v))
    out, _ = blockwise.attend_rows(*rows, scope, options)
    return rearrange(out, "(b h) l d -> b l h d", b=q.shape[0])


def _local_with_past(q, k, v, past_keys, past_values, past_length, layer, *, name, q_tile, kv_tile) -> Array:
    (num, length, heads, _), batch, capacity = q.shape, past_keys.shape[1], past_keys.shape[3]
    together = "(b n) l h d -> b (n l) h d"  # candidates side by side: one long query against the shared past
    all_keys = dict(block_size=1, q_start=jnp.int32(capacity), kv_length=past_length)
    own = dict(block_size=length, q_start=jnp.int32(0), kv_length=jnp.int32(length))
    if name == "reference":
        keys, values = (rearrange(x[layer], "b h c d -> b c h d") for x in (past_keys, past_values))
        out, lse = reference.attend(rearrange(q, together, b=batch), keys, values, **all_keys)
        own_out, own_lse = reference.attend(q, k, v, **own)
        lse = rearrange(lse, "b h (n l) -> (b n) l h", l=length)
        return _merge(rearrange(out, "b (n l) h d -> (b n) l h d", l=length), lse, own_out, rearrange(own_lse, "b h l -> b l h"))
    rows = lambda x, pattern: rearrange(x, f"{pattern} -> (b h) l d")  # noqa: E731
    num_rows = batch * heads
    scope = blockwise.Scope(all_keys["q_start"], past_length, layer * num_rows, None, None, None)
    flat = lambda x: x.reshape(-1, *x.shape[-2:])  # noqa: E731
    out, lse = blockwise.attend_rows(
        rearrange(q, "(b n) l h d -> (b h) (n l) d", b=batch), flat(past_keys), flat(past_values), scope,
        blockwise.Options(1, q_tile, kv_tile, heads),
    )  # fmt: skip
    own_scope = blockwise.Scope(own["q_start"], own["kv_length"], jnp.int32(0), None, None, None)
    own_out, own_lse = blockwise.attend_rows(
        *(rows(x, "b l h d") for x in (q, k, v)), own_scope, blockwise.Options(length, q_tile, kv_tile, heads)
    )
    to_rows = dict(b=batch, n=num // batch)
    out = rearrange(out, "(b h) (n l) d -> (b n) l h d", **to_rows)
    lse = rearrange(lse, "(b h) (n l) -> (b n) l h", **to_rows)
    own_out, own_lse = rearrange(own_out, "(b h) l d -> b l h d", h=heads), rearrange(own_lse, "(b h) l -> b l h", h=heads)
    return _merge(out, lse, own_out, own_lse)


def _merge(a: Array, lse_a: Array, b: Array, lse_b: Array) -> Array:
    """Two softmax averages over disjoint keys as one; b must have seen at least one key."""
    top = jnp.maximum(lse_a, lse_b)
    weight_a, weight_b = jnp.exp(lse_a - top), jnp.exp(lse_b - top)
    total = weight_a + weight_b
    return a * (weight_a / total)[..., None] + b * (weight_b / total)[..., None]

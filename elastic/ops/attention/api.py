"""The front door to attention: one contract, several implementations, on one device or over a mesh."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from elastic.distributed.sharding import fitting_spec
from elastic.ops.attention import block_mask, reference, ring
from elastic.ops.attention.base import (
    MaskArgs,
    StaticArgs,
    attend_heads,
    attend_rows,
    from_rows,
    rows,
)
from elastic.ops.attention.dispatch import choose_implementation, kernel_of

Q_TILE, KV_TILE = 1024, 512


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
    layout: ring.Layout = "plain",
    q_tile: int = Q_TILE,
    kv_tile: int = KV_TILE,
) -> Float[Array, "b q h d"]:
    """Block-causal attention: the query at global position i sees key j when `j // block_size <= i // block_size`.

    Args:
      block_size: tokens per block.
      q_start: the global position of the first query; keys begin at 0.
      kv_length: keys from here on are not there; None: all are. May be a traced number; the cost follows it.
      segment_ids: a query sees the keys of its own segment only. Queries take the ids at their own positions.
      valid: False hides a key from everyone.
      mesh: where the arrays lie: batch over dp and fsdp, heads over tp, the sequence over sp, as a ring.
      implementation: a name out of `IMPLEMENTATIONS`; None picks the best for the device.
      layout: how the sequence lies on sp: `plain`, or `balanced` (see ring.py; only whole sequences, `q_start` 0).
      q_tile, kv_tile: how many queries and keys a kernel holds at once, at most.

    Returns:
      In the type of q. A query that sees no key gives 0.

    Raises:
      ValueError: shapes do not agree, the implementation is unknown or cannot serve them, or sp does not divide the sequence.
    """
    name = choose_implementation(implementation, head_dim=q.shape[-1], dtype=q.dtype, mesh=mesh)
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(
            f"q {q.shape}, k {k.shape} and v {v.shape} must agree in batch, heads and head_dim, k and v in length too."
        )
    whole = isinstance(q_start, int) and q_start == 0 and kv_length is None and q.shape == k.shape
    q_start = jnp.asarray(q_start, jnp.int32)
    kv_length = jnp.asarray(k.shape[1] if kv_length is None else kv_length, jnp.int32)
    q_segments = segment_ids
    if segment_ids is not None and q.shape[1] != k.shape[1]:
        q_segments = lax.dynamic_slice_in_dim(segment_ids, q_start, q.shape[1], 1)
    call = AttentionInputs(q, k, v, q_start, kv_length, q_segments, segment_ids, valid)
    how = How(name, block_size, q_tile, kv_tile, whole)
    if mesh is None or mesh.size == 1:
        return attend_local(call, how)[0].astype(q.dtype)
    return _on_mesh(call, how, mesh, layout).astype(q.dtype)


class AttentionInputs(NamedTuple):
    """The arrays of one call: what a mesh splits."""

    q: Array  # [b, q, h, d]
    k: Array  # [b, k, h, d]
    v: Array  # [b, k, h, d]
    q_start: Array
    kv_length: Array
    q_segments: Array | None = None  # [b, q]
    kv_segments: Array | None = None  # [b, k]
    valid: Array | None = None  # [b, k]

    def scope(self) -> MaskArgs:
        """The same for a kernel: keys begin at 0, as do their rows."""
        start = jnp.int32(0)
        seen = self.q_segments, self.kv_segments, self.valid
        return MaskArgs(self.q_start, start, self.kv_length, start, *seen)


class How(NamedTuple):
    """What is known when the program is compiled."""

    name: str
    block_size: int
    q_tile: int
    kv_tile: int
    whole: bool = (
        False  # the call is of one whole sequence: q_start is 0, kv_length is that of the keys
    )

    def options(self, heads: int) -> StaticArgs:
        """The same for a kernel, whose rows are heads."""
        return StaticArgs(self.block_size, self.q_tile, self.kv_tile, rows_per_batch=heads)


def _on_mesh(call: AttentionInputs, how: How, mesh: Mesh, layout: ring.Layout) -> Array:
    """Each device serves its batch elements, heads and queries; keys travel round sp."""
    size = mesh.shape[ring.AXIS]
    for x in (call.q, call.k):
        ring.check_length(x.shape[1], size, layout)
    spec = fitting_spec(mesh, call.q.shape, "batch", "sequence", "heads", None)
    ids = P(*spec[:2])
    parts = (spec, spec, spec, P(), P(), ids, ids, ids)
    specs: Any = [None if x is None else part for x, part in zip(call, parts, strict=True)]

    def run(call: AttentionInputs) -> Array:
        if size == 1:
            return attend_local(call, how)[0]
        if how.name == "reference":
            return _gathered(call, how, layout)
        return attend_ring(call, how, size, layout)[0]

    sharded = jax.shard_map(
        run, mesh=mesh, in_specs=(AttentionInputs(*specs),), out_specs=spec, check_vma=False
    )
    return sharded(call)


def attend_ring(
    call: AttentionInputs, how: How, size: int, layout: ring.Layout
) -> tuple[Array, Array]:
    """Output [b, q, h, d] and logsumexp [b, h, q] of one device's part of the sequence, inside `shard_map`."""
    heads = call.q.shape[2]
    out, lse = ring.ring_attend(
        rows(call.q),
        rows(call.k),
        rows(call.v),
        ring.GlobalRange(call.q_start, call.kv_length),
        block_mask.ids_of(call.scope(), call.q.shape[1]),
        ring.Ring(size, layout, kernel_of(how.name), how.options(heads)),
    )
    return from_rows(out, lse, heads)


def _gathered(call: AttentionInputs, how: How, layout: ring.Layout) -> Array:
    """The reference needs all keys at once, and their order."""
    if layout != "plain":
        raise ValueError(f"implementation='reference' has no {layout!r} layout; use 'plain'.")

    def gather(x: Array | None) -> Array | None:
        return None if x is None else lax.all_gather(x, ring.AXIS, axis=1, tiled=True)

    whole = {name: gather(getattr(call, name)) for name in ("k", "v", "kv_segments", "valid")}
    first = call.q_start + lax.axis_index(ring.AXIS) * call.q.shape[1]
    return attend_local(call._replace(q_start=first, **whole), how)[0]


def attend_local(call: AttentionInputs, how: How) -> tuple[Array, Array]:
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
    scope, heads = call.scope(), q.shape[2]
    options, kernel = how.options(heads)._replace(whole=how.whole), kernel_of(how.name)
    if kernel.in_place is not None:
        return attend_heads(q, k, v, scope, options, kernel.in_place)
    out, lse = attend_rows(rows(q), rows(k), rows(v), scope, options, kernel)
    return from_rows(out, lse, heads)

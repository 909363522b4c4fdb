"""`attention(...)`: checks its arguments and runs the chosen implementation on one device or over a mesh."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from elastic.distributed.sharding import fitting_spec
from elastic.ops.attention import block_mask, reference, ring
from elastic.ops.attention.base import MaskArgs, StaticArgs, attend, from_rows, rows
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
      q: queries [b, q, h, d], float32 or bfloat16; logits are scaled by 1 / sqrt(d).
      k: keys [b, k, h, d], of the same dtype.
      v: values [b, k, h, d], of the same dtype.
      block_size: tokens per block.
      q_start: the global position of the first query, in tokens; keys begin at 0.
      kv_length: keys at this position and later do not exist; None: all exist. A traced number is allowed, and the
        cost follows its value.
      segment_ids: [b, k]; a query sees the keys of its own segment only. A query takes the id at its own position.
      valid: [b, k]; False hides a key from every query.
      mesh: where the arrays lie: batch over dp and fsdp, heads over tp, the sequence over sp, as a ring.
      implementation: a name out of `IMPLEMENTATIONS`; None picks the best for the device.
      layout: how the sequence lies on sp: `plain` or `balanced` (ring.py). `balanced` needs a whole sequence with
        `q_start` 0.
      q_tile: at most so many queries in a kernel's tile.
      kv_tile: at most so many keys in a kernel's tile.

    Returns:
      The output in the dtype of q. A query that sees no key gives 0.

    Raises:
      ValueError: shapes do not agree, the implementation is unknown or cannot serve them, or sp does not divide the
        sequence.
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
    zero = jnp.int32(0)
    mask = MaskArgs(q_start, zero, kv_length, zero, q_segments, segment_ids, valid)
    static = StaticArgs(block_size, q_tile, kv_tile, q.shape[2], whole, name)
    if mesh is None or mesh.size == 1:
        return attend_local(q, k, v, mask, static)[0].astype(q.dtype)
    return _on_mesh(q, k, v, mask, static, mesh, layout).astype(q.dtype)


def _on_mesh(
    q: Array, k: Array, v: Array, mask: MaskArgs, static: StaticArgs, mesh: Mesh, layout: ring.Layout
) -> Array:  # fmt: skip
    """Each device computes its batch elements, heads and queries; keys travel around sp."""
    size = mesh.shape[ring.AXIS]
    for x in (q, k):
        ring.check_length(x.shape[1], size, layout)
    spec = fitting_spec(mesh, q.shape, "batch", "sequence", "heads", None)
    per_token = P(*spec[:2])
    mask_specs: Any = [None if x is None else per_token if x.ndim else P() for x in mask]

    def run(q: Array, k: Array, v: Array, mask: MaskArgs) -> Array:
        if size == 1:
            return attend_local(q, k, v, mask, static)[0]
        if static.implementation == "reference":
            return _attend_gathered(q, k, v, mask, static, layout)
        return attend_ring(q, k, v, mask, static, size, layout)[0]

    sharded = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(spec, spec, spec, MaskArgs(*mask_specs)),
        out_specs=spec,
        check_vma=False,
    )
    return sharded(q, k, v, mask)


def attend_ring(
    q: Array, k: Array, v: Array, mask: MaskArgs, static: StaticArgs, size: int, layout: ring.Layout
) -> tuple[Array, Array]:  # fmt: skip
    """Attention of one device's part of the sequence to the keys of all devices. Call it inside `shard_map`.

    Args:
      q: this device's queries [b, q, h, d].
      k: this device's keys [b, k, h, d].
      v: this device's values [b, k, h, d].
      mask: segment ids and `valid` of this device's part; `q_start` and `kv_length` of the whole sequence.
      static: block size and tiles, in tokens.
      size: devices in the ring.
      layout: how the sequence lies on them.

    Returns:
      The output [b, q, h, d] and the natural logsumexp [b, h, q], float32.
    """
    heads = q.shape[2]
    out, lse = ring.ring_attend(
        rows(q),
        rows(k),
        rows(v),
        block_mask.valid_as_segments(mask, q.shape[1]),
        static=static._replace(rows_per_batch=heads, whole=False),
        kernel=kernel_of(static.implementation),
        size=size,
        layout=layout,
    )
    return from_rows(out, lse, heads)


def _attend_gathered(
    q: Array, k: Array, v: Array, mask: MaskArgs, static: StaticArgs, layout: ring.Layout
) -> Array:
    """`reference` over sp: it needs all keys at once, in their order."""
    if layout != "plain":
        raise ValueError(f"implementation='reference' has no {layout!r} layout; use 'plain'.")

    def gather(x: Array | None) -> Any:
        return None if x is None else lax.all_gather(x, ring.AXIS, axis=1, tiled=True)

    first = mask.q_start + lax.axis_index(ring.AXIS) * q.shape[1]
    kv_segments, valid = gather(mask.kv_segments), gather(mask.valid)
    mask = mask._replace(q_start=first, kv_segments=kv_segments, valid=valid)
    return attend_local(q, gather(k), gather(v), mask, static)[0]


def attend_local(
    q: Array, k: Array, v: Array, mask: MaskArgs, static: StaticArgs
) -> tuple[Array, Array]:
    """Attention on one device, by the implementation that `static` names.

    Args:
      q: queries [b, q, h, d], float32 or bfloat16.
      k: keys [b, k, h, d].
      v: values [b, k, h, d].
      mask: what each query may see; keys begin at 0.
      static: block size and tiles, in tokens; `rows_per_batch` is taken from q.

    Returns:
      The output [b, q, h, d] and the natural logsumexp [b, h, q], float32.
    """
    if static.implementation == "reference":
        return reference.attend(q, k, v, mask, block_size=static.block_size)
    heads, kernel = q.shape[2], kernel_of(static.implementation)
    static = static._replace(rows_per_batch=heads)
    if kernel.on_heads is not None:
        return attend(q, k, v, mask, static, kernel.on_heads)
    out, lse = attend(rows(q), rows(k), rows(v), mask, static, kernel)
    return from_rows(out, lse, heads)

"""RingAttention (Liu et al. 2023): the sequence is split over the devices of `sp`, and keys and values travel around them.

Every device keeps its queries and attends to one device's keys at a time, with any kernel. The sends of a step are
issued before its arithmetic, and nothing in the step needs the data that they bring, so that the two overlap. Pairs of
pieces that are masked entirely are not computed.

A sequence has one of two layouts on n devices. `plain` cuts n pieces and gives piece r to device r; under a causal mask
the last device then has about twice the mean work. `balanced` cuts 2n pieces and gives the pieces r and 2n - 1 - r to
device r: an early piece, which sees few keys, and a late piece, which sees many (as zigzag rings do; Striped Attention,
Brandon et al. 2023, balances by tokens). `to_balanced` and `from_balanced` move tokens between the layouts.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Shaped

from elastic.distributed.sharding import fitting_spec
from elastic.ops.attention.base import Kernel, MaskArgs, StaticArgs, save
from elastic.ops.attention.block_mask import any_visible

AXIS = "sp"
Layout = Literal["plain", "balanced"]
LAYOUTS = ("plain", "balanced")


class _Ring(NamedTuple):
    """What is known about a ring when the program is compiled."""

    static: StaticArgs
    kernel: Kernel
    size: int  # devices
    layout: Layout

    @property
    def pieces(self) -> int:
        """Contiguous pieces of the sequence that one device holds."""
        return 2 if self.layout == "balanced" else 1


class _Keys(NamedTuple):
    """What travels: keys and values in one array, since a TPU runs two sends at a time and the other sends gradients."""

    kv_2NKD: Array
    segments: Array | None


def ring_attend(
    q_NQD: Float[Array, "N Q D"],
    k_NKD: Float[Array, "N K D"],
    v_NKD: Float[Array, "N K D"],
    mask: MaskArgs,
    *,
    static: StaticArgs,
    kernel: Kernel,
    size: int,
    layout: Layout,
) -> tuple[Float[Array, "N Q D"], Float[Array, "N Q"]]:
    """Attention of this device's queries to the keys of all devices. Call it inside `shard_map`.

    Differentiable in q, k and v through the output.

    Args:
      q_NQD: this device's queries, float32 or bfloat16.
      k_NKD: this device's keys.
      v_NKD: this device's values.
      mask: `q_start` and `kv_length` of the whole sequence, the same on every device; segment ids of this device's
        queries and keys, as `block_mask.valid_as_segments` gives them (`valid` is None).
      static: block size and tiles, in tokens.
      kernel: the kernel for one pair of pieces.
      size: devices in the ring.
      layout: how the sequence lies on them.

    Returns:
      The output and the natural logsumexp, float32.
    """
    return _attend(q_NQD, k_NKD, v_NKD, mask, _Ring(static, kernel, size, layout))


def _forward(
    q_NQD: Array, k_NKD: Array, v_NKD: Array, mask: MaskArgs, ring: _Ring
) -> tuple[Array, Array]:
    device = lax.axis_index(AXIS)

    def step(s: Array, carry):
        keys, out, lse = carry
        arriving = _send(keys)
        source_device = (device - s) % ring.size
        outs, lses = _pieces(out, ring), _pieces(lse, ring)
        for at, piece in _piece_pairs(device, source_device, q_NQD, keys, mask, ring):
            merged = functools.partial(_merge_forward, piece, outs[at], lses[at], ring)
            unchanged = functools.partial(_unchanged, outs[at], lses[at])
            outs[at], lses[at] = lax.cond(piece.visible, merged, unchanged)
        return arriving, jnp.concatenate(outs, axis=1), jnp.concatenate(lses, axis=1)

    rows, length, dim = q_NQD.shape
    keys = _Keys(jnp.stack([k_NKD, v_NKD]), mask.kv_segments)
    start = keys, jnp.zeros((rows, length, dim)), jnp.full((rows, length), -jnp.inf)
    _, out, lse = lax.fori_loop(0, ring.size, step, start)
    return out, lse


_attend = jax.custom_vjp(_forward, nondiff_argnums=(4,))


def _attend_fwd(q: Array, k: Array, v: Array, mask: MaskArgs, ring: _Ring):
    saved, out = save(q, k, v, *_attend(q, k, v, mask, ring))
    return (out, saved.lse), (saved, mask)


def _attend_bwd(ring: _Ring, residuals, gradients):
    """Keys and values travel once more; the sums of their gradients follow one step behind.

    A step adds to the sums that arrive only after its own arithmetic, so that their sends overlap too. (If they
    travelled together with their keys, each send would wait for the kernel that computes them.) In the balanced layout
    a device's own keys are halved: it computes the first half while the first keys travel, and the second half while
    the sums return.
    """
    saved, mask = residuals
    q_NQD, k_NKD, v_NKD, out, lse = saved.as_floats()
    dout = gradients[0]
    delta = jnp.sum(out.astype(dout.dtype) * dout, axis=-1)
    device = lax.axis_index(AXIS)
    # Operands of products, rounded once here and not in every step.
    douts, lses, deltas = (_pieces(x, ring) for x in (dout.astype(q_NQD.dtype), lse, delta))

    def add(source_device: Array, keys: _Keys, key_pieces: range, dq: Array) -> tuple[Array, Array]:
        """The gradients [2, N, K, D] of some pieces of the present keys and values, and dq with their contribution."""
        dqs = _pieces(dq, ring)
        parts = [jnp.zeros(x.shape) for x in jnp.split(keys.kv_2NKD, ring.pieces, axis=2)]
        for at, piece in _piece_pairs(device, source_device, q_NQD, keys, mask, ring):
            if piece.key_piece not in key_pieces:
                continue
            before = dqs[at], parts[piece.key_piece]
            gradients_of = functools.partial(
                _add_backward, piece, before, douts[at], lses[at], deltas[at], ring
            )
            dqs[at], parts[piece.key_piece] = lax.cond(
                piece.visible, gradients_of, functools.partial(_unchanged, *before)
            )
        return jnp.concatenate(parts, axis=2), jnp.concatenate(dqs, axis=1)

    def step(s: Array, carry):
        keys, sums, dq = carry
        arriving, arriving_sums = _send(keys), _send(sums)
        found, dq = add((device - s) % ring.size, keys, range(ring.pieces), dq)
        return arriving, arriving_sums + found, dq

    local_keys = _Keys(jnp.stack([k_NKD, v_NKD]), mask.kv_segments)
    arriving = _send(local_keys)
    first_half, dq = add(device, local_keys, range(1), jnp.zeros(q_NQD.shape))
    nothing = jnp.zeros(local_keys.kv_2NKD.shape)
    _, sums, dq = lax.fori_loop(1, ring.size, step, (arriving, nothing, dq))
    returned = _send(sums)  # after the last step each device holds its neighbour's sums
    second_half, dq = add(device, local_keys, range(1, ring.pieces), dq)
    dk, dv = returned + (first_half + second_half)
    return dq.astype(q_NQD.dtype), dk.astype(k_NKD.dtype), dv.astype(v_NKD.dtype), None


_attend.defvjp(_attend_fwd, _attend_bwd)


class _PiecePair(NamedTuple):
    """A piece of this device's queries and a piece of the present keys."""

    key_piece: int
    visible: Bool[Array, ""]  # whether any query sees any key
    q: Array
    k: Array
    v: Array
    mask: MaskArgs


def _piece_pairs(
    device: Array, source_device: Array, q: Array, keys: _Keys, mask: MaskArgs, ring: _Ring
) -> Iterator[tuple[int, _PiecePair]]:
    """Every pair of a piece of queries and a piece of keys, with the number of the piece of queries."""

    def cut(x: Array | None) -> Any:
        return [None] * ring.pieces if x is None else _pieces(x, ring)

    qs, ks, vs = cut(q), cut(keys.kv_2NKD[0]), cut(keys.kv_2NKD[1])
    q_ids, kv_ids = cut(mask.q_segments), cut(keys.segments)
    q_starts = _starts(device, qs[0].shape[1], ring)
    kv_starts = _starts(source_device, ks[0].shape[1], ring)
    block = ring.static.block_size
    for i in range(ring.pieces):
        q_start = mask.q_start + q_starts[i]
        sees_until = ((q_start + qs[i].shape[1] - 1) // block + 1) * block
        for j in range(ring.pieces):
            visible = kv_starts[j] < jnp.minimum(sees_until, mask.kv_length)
            if q_ids[i] is not None:
                visible &= any_visible(q_ids[i], kv_ids[j])
            piece_mask = MaskArgs(
                q_start, kv_starts[j], mask.kv_length, jnp.int32(0), q_ids[i], kv_ids[j]
            )
            yield i, _PiecePair(j, visible, qs[i], ks[j], vs[j], piece_mask)


def _starts(device: Array, piece: int, ring: _Ring) -> list[Array]:
    """The positions at which the pieces of a device begin; `piece` is the length of one."""
    if ring.layout == "plain":
        return [device * piece]
    return [device * piece, (2 * ring.size - 1 - device) * piece]


def _merge_forward(
    piece: _PiecePair, out: Array, lse: Array, ring: _Ring
) -> tuple[Float[Array, "N Q D"], Float[Array, "N Q"]]:
    found = ring.kernel.forward(piece.q, piece.k, piece.v, piece.mask, ring.static)
    return merge(out, lse, *found)


def _add_backward(
    piece: _PiecePair,
    before: tuple[Array, Array],
    dout: Array,
    lse: Array,
    delta: Array,
    ring: _Ring,
) -> tuple[Array, Array]:
    dq, dk, dv = ring.kernel.backward(
        piece.q, piece.k, piece.v, dout, lse, delta, piece.mask, ring.static
    )
    return before[0] + dq, before[1] + jnp.stack([dk, dv])


def _unchanged(*arrays: Array) -> tuple[Array, ...]:
    return arrays


def _pieces(x: Array, ring: _Ring) -> list[Array]:
    return jnp.split(x, ring.pieces, axis=1)


def _send(tree: Any) -> Any:
    """Sends every array of a tree to the next device of the ring."""
    size = lax.axis_size(AXIS)
    following = [(device, (device + 1) % size) for device in range(size)]
    return jax.tree.map(lambda x: lax.ppermute(x, AXIS, following), tree)


def merge(
    out_a: Float[Array, "*n D"],
    lse_a: Float[Array, "*n"],
    out_b: Float[Array, "*n D"],
    lse_b: Float[Array, "*n"],
) -> tuple[Float[Array, "*n D"], Float[Array, "*n"]]:
    """Merges attention to two disjoint sets of keys: `out = sum_i exp(lse_i - lse) out_i`, `lse = log sum_i exp(lse_i)`.

    Args:
      out_a: output over the first set, float32.
      lse_a: natural logsumexp over the first set. An empty set has output 0 and logsumexp -inf.
      out_b: output over the second set.
      lse_b: natural logsumexp over the second set.

    Returns:
      Output and logsumexp over both sets.
    """
    lse = jnp.logaddexp(lse_a, lse_b)
    finite = jnp.where(jnp.isneginf(lse), 0.0, lse)
    share_a, share_b = jnp.exp(lse_a - finite), jnp.exp(lse_b - finite)
    return out_a * share_a[..., None] + out_b * share_b[..., None], lse


def check_length(length: int, size: int, layout: Layout) -> None:
    """Checks that a sequence of `length` tokens divides into the pieces of a ring of `size` devices.

    Raises:
      ValueError: it does not.
    """
    parts = size * (2 if layout == "balanced" else 1)
    if length % parts:
        hint = ", or ring_layout='plain'" if layout == "balanced" and length % size == 0 else ""
        raise ValueError(
            f"A sequence of {length} tokens cannot be cut into {parts} equal pieces for sp={size} ({layout} ring); "
            f"choose an sp that divides it, such as {math.gcd(length, parts)}{hint}."
        )


def to_balanced(x: Shaped[Array, "b l *c"], mesh: Mesh) -> Shaped[Array, "b l *c"]:
    """A sequence in the plain layout on `sp`, moved to the balanced layout. Each piece is sent at most once."""
    return _exchange(x, mesh, inverse=False)


def from_balanced(x: Shaped[Array, "b l *c"], mesh: Mesh) -> Shaped[Array, "b l *c"]:
    """The inverse of `to_balanced`."""
    return _exchange(x, mesh, inverse=True)


def _exchange(x: Array, mesh: Mesh, *, inverse: bool) -> Array:
    size = mesh.shape[AXIS]
    check_length(x.shape[1], size, "balanced")
    spec = fitting_spec(mesh, x.shape, "batch", "sequence", *(None,) * (x.ndim - 2))
    # Device r holds the pieces 2r and 2r + 1. All even pieces go to different devices, and so do all odd ones; so two
    # exchanges are enough.
    even, odd = ([_balanced_device(2 * r + parity, size) for r in range(size)] for parity in (0, 1))

    def run(x: Array) -> Array:
        at_even = lax.axis_index(AXIS) % 2 == 0
        first, second = jnp.split(x, 2, axis=1)
        if inverse:  # on an even device the early piece has an even number
            first, second = _swap_unless(at_even, first, second)
        first = lax.ppermute(first, AXIS, _routes(even, inverse))
        second = lax.ppermute(second, AXIS, _routes(odd, inverse))
        if not inverse:
            first, second = _swap_unless(at_even, first, second)
        return jnp.concatenate([first, second], axis=1)

    return jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(x)


def _balanced_device(piece: int, size: int) -> int:
    """The device that holds a piece in the balanced layout."""
    return piece if piece < size else 2 * size - 1 - piece


def _routes(targets: list[int], inverse: bool) -> list[tuple[int, int]]:
    return [(target, r) if inverse else (r, target) for r, target in enumerate(targets)]


def _swap_unless(condition: Array, a: Array, b: Array) -> tuple[Array, Array]:
    return jnp.where(condition, a, b), jnp.where(condition, b, a)

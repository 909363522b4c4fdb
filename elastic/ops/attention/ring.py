"""RingAttention (Liu et al. 2023): the sequence lies in pieces on the devices of `sp`, and keys and values travel round them.

Every device keeps its queries and sees one device's keys at a time, with any kernel. The sends of a step are issued before its arithmetic
and nothing in the step needs what they bring, so that they overlap. What a step's mask rules out as a whole is not computed.

Two layouts of a sequence over n devices: `plain` gives device r the r-th of n pieces; under a causal rule the last device then has
about twice the work of the mean. `balanced` cuts 2n pieces and gives device r the pieces r and 2n - 1 - r: an early one, which sees
little, and a late one, which sees much (as in Striped Attention, Brandon et al. 2023, and zigzag rings). `to_balanced` and
`from_balanced` move tokens between the two.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Shaped

from elastic.distributed.sharding import fitting_spec
from elastic.ops.attention.base import Kernel, MaskArgs, StaticArgs, save
from elastic.ops.attention.block_mask import SegmentIds, any_meet

AXIS = "sp"
Layout = Literal["plain", "balanced"]
LAYOUTS = ("plain", "balanced")


class Ring(NamedTuple):
    """What is known about a ring when the program is compiled."""

    size: int
    layout: Layout
    kernel: Kernel
    options: StaticArgs

    @property
    def pieces(self) -> int:
        """Contiguous pieces of the sequence that a device holds."""
        return 2 if self.layout == "balanced" else 1


class GlobalRange(NamedTuple):
    """Where queries lie and which keys there are; whole-sequence numbers, the same on every device."""

    q_start: Int[Array, ""]
    kv_length: Int[Array, ""]


class _Keys(NamedTuple):
    """What travels. Keys and values are one array: a TPU has two sends under way at a time, and the sums want one."""

    kv_2NKD: Array
    ids: Array | None


def ring_attend(
    q_NQD: Float[Array, "N Q D"],
    k_NKD: Float[Array, "N K D"],
    v_NKD: Float[Array, "N K D"],
    places: GlobalRange,
    ids: SegmentIds | None,
    ring: Ring,
) -> tuple[Float[Array, "N Q D"], Float[Array, "N Q"]]:
    """Output and logsumexp (float32) of this device's queries over the keys of all devices. Call it inside `shard_map`.

    `ids` are those of this device's queries and keys.
    Differentiable in q, k and v through the output.
    """
    return _attend(q_NQD, k_NKD, v_NKD, places, ids, ring)


def _forward(
    q_NQD: Array,
    k_NKD: Array,
    v_NKD: Array,
    places: GlobalRange,
    ids: SegmentIds | None,
    ring: Ring,
) -> tuple[Array, Array]:
    own = lax.axis_index(AXIS)

    def step(s: Array, carry):
        keys, out, lse = carry
        arriving = _send(keys)
        owner = (own - s) % ring.size
        outs, lses = _pieces(out, ring), _pieces(lse, ring)
        for at, piece in _visible_pairs(own, owner, q_NQD, keys, places, ids, ring):
            merged = functools.partial(_merge_forward, piece, outs[at], lses[at], ring)
            kept = functools.partial(_keep, outs[at], lses[at])
            outs[at], lses[at] = lax.cond(piece.seen, merged, kept)
        return arriving, jnp.concatenate(outs, axis=1), jnp.concatenate(lses, axis=1)

    rows, length, dim = q_NQD.shape
    keys = _Keys(jnp.stack([k_NKD, v_NKD]), None if ids is None else ids.keys)
    start = keys, jnp.zeros((rows, length, dim)), jnp.full((rows, length), -jnp.inf)
    _, out, lse = lax.fori_loop(0, ring.size, step, start)
    return out, lse


_attend = jax.custom_vjp(_forward, nondiff_argnums=(5,))


def _attend_fwd(
    q: Array, k: Array, v: Array, places: GlobalRange, ids: SegmentIds | None, ring: Ring
):
    saved, out = save(q, k, v, *_attend(q, k, v, places, ids, ring))
    return (out, saved.lse), (saved, places, ids)


def _attend_bwd(ring: Ring, residuals, gradients):
    """Keys and values travel once more, with the sums of their gradients one step behind them.

    A step's sums need what arrives only after its arithmetic, so that their sends overlap too. (Sent together with their keys, they
    would wait for the kernel that they are the result of.) In the balanced layout a device's own keys are halved: the first half is
    worked on while the first keys are on their way, the second while the sums come home.
    """
    saved, places, ids = residuals
    q_NQD, k_NKD, v_NKD, out, lse = saved.shown()
    dout = gradients[0]
    delta = jnp.sum(out.astype(dout.dtype) * dout, axis=-1)
    own = lax.axis_index(AXIS)
    # What products take, rounded once and not in every step.
    douts, lses, deltas = (_pieces(x, ring) for x in (dout.astype(q_NQD.dtype), lse, delta))

    def add(owner: Array, keys: _Keys, key_pieces: range, dq: Array) -> tuple[Array, Array]:
        """The gradients [2, N, K, D] of some pieces of the keys at hand, and dq with what they add."""
        dqs = _pieces(dq, ring)
        parts = [jnp.zeros(x.shape) for x in jnp.split(keys.kv_2NKD, ring.pieces, axis=2)]
        for at, piece in _visible_pairs(own, owner, q_NQD, keys, places, ids, ring):
            if piece.key_piece not in key_pieces:
                continue
            before = dqs[at], parts[piece.key_piece]
            gradients_of = functools.partial(
                _add_backward, piece, before, douts[at], lses[at], deltas[at], ring
            )
            dqs[at], parts[piece.key_piece] = lax.cond(
                piece.seen, gradients_of, functools.partial(_keep, *before)
            )
        return jnp.concatenate(parts, axis=2), jnp.concatenate(dqs, axis=1)

    def step(s: Array, carry):
        keys, sums, dq = carry
        arriving, arriving_sums = _send(keys), _send(sums)
        found, dq = add((own - s) % ring.size, keys, range(ring.pieces), dq)
        return arriving, arriving_sums + found, dq

    own_keys = _Keys(jnp.stack([k_NKD, v_NKD]), None if ids is None else ids.keys)
    arriving = _send(own_keys)
    early, dq = add(own, own_keys, range(1), jnp.zeros(q_NQD.shape))
    nothing = jnp.zeros(own_keys.kv_2NKD.shape)
    _, sums, dq = lax.fori_loop(1, ring.size, step, (arriving, nothing, dq))
    home = _send(sums)  # the last step leaves each device with its neighbour's
    late, dq = add(own, own_keys, range(1, ring.pieces), dq)
    dk, dv = home + (early + late)
    return dq.astype(q_NQD.dtype), dk.astype(k_NKD.dtype), dv.astype(v_NKD.dtype), None, None


_attend.defvjp(_attend_fwd, _attend_bwd)


class _Piece(NamedTuple):
    """A piece of this device's queries and one of the keys at hand."""

    key_piece: int
    seen: Bool[Array, ""]  # whether any query sees any key
    q: Array
    k: Array
    v: Array
    scope: MaskArgs


def _visible_pairs(
    own: Array,
    owner: Array,
    q: Array,
    keys: _Keys,
    places: GlobalRange,
    ids: SegmentIds | None,
    ring: Ring,
) -> Iterator[tuple[int, _Piece]]:
    """Every pair of pieces, with the number of the piece of queries."""

    def cut(x: Array | None) -> Any:
        return [None] * ring.pieces if x is None else _pieces(x, ring)

    qs, ks, vs = cut(q), cut(keys.kv_2NKD[0]), cut(keys.kv_2NKD[1])
    q_ids, kv_ids = cut(None if ids is None else ids.queries), cut(keys.ids)
    q_starts = _starts(own, qs[0].shape[1], ring)
    kv_starts = _starts(owner, ks[0].shape[1], ring)
    block = ring.options.block_size
    for i in range(ring.pieces):
        q_start = places.q_start + q_starts[i]
        sees_until = ((q_start + qs[i].shape[1] - 1) // block + 1) * block
        for j in range(ring.pieces):
            seen = kv_starts[j] < jnp.minimum(sees_until, places.kv_length)
            if ids is not None:
                seen &= any_meet(q_ids[i], kv_ids[j])
            scope = MaskArgs(
                q_start, kv_starts[j], places.kv_length, jnp.int32(0), q_ids[i], kv_ids[j]
            )
            yield i, _Piece(j, seen, qs[i], ks[j], vs[j], scope)


def _starts(device: Array, piece: int, ring: Ring) -> list[Array]:
    """The positions at which the pieces of a device begin."""
    if ring.layout == "plain":
        return [device * piece]
    return [device * piece, (2 * ring.size - 1 - device) * piece]


def _merge_forward(
    piece: _Piece, out: Array, lse: Array, ring: Ring
) -> tuple[Float[Array, "N Q D"], Float[Array, "N Q"]]:
    return merge(
        out, lse, *ring.kernel.forward(piece.q, piece.k, piece.v, piece.scope, ring.options)
    )


def _add_backward(
    piece: _Piece,
    before: tuple[Array, Array],
    dout: Array,
    lse: Array,
    delta: Array,
    ring: Ring,
) -> tuple[Array, Array]:
    dq, dk, dv = ring.kernel.backward(
        piece.q, piece.k, piece.v, dout, lse, delta, piece.scope, ring.options
    )
    return before[0] + dq, before[1] + jnp.stack([dk, dv])


def _keep(*arrays: Array) -> tuple[Array, ...]:
    return arrays


def _pieces(x: Array, ring: Ring) -> list[Array]:
    return jnp.split(x, ring.pieces, axis=1)


def _send(tree: Any) -> Any:
    """Every array to the next device of the ring."""
    size = lax.axis_size(AXIS)
    following = [(device, (device + 1) % size) for device in range(size)]
    return jax.tree.map(lambda x: lax.ppermute(x, AXIS, following), tree)


def merge(
    out_a: Float[Array, "*n D"],
    lse_a: Float[Array, "*n"],
    out_b: Float[Array, "*n D"],
    lse_b: Float[Array, "*n"],
) -> tuple[Float[Array, "*n D"], Float[Array, "*n"]]:
    """Softmax averages over two disjoint sets of keys as one over both; either may be empty (0 and -inf)."""
    lse = jnp.logaddexp(lse_a, lse_b)
    finite = jnp.where(jnp.isneginf(lse), 0.0, lse)
    share_a, share_b = jnp.exp(lse_a - finite), jnp.exp(lse_b - finite)
    return out_a * share_a[..., None] + out_b * share_b[..., None], lse


def check_length(length: int, size: int, layout: Layout) -> None:
    """Raises ValueError where a sequence of so many tokens has no whole pieces on a ring of so many devices."""
    parts = size * (2 if layout == "balanced" else 1)
    if length % parts:
        hint = ", or ring_layout='plain'" if layout == "balanced" and length % size == 0 else ""
        raise ValueError(
            f"A sequence of {length} tokens cannot be cut into {parts} equal pieces for sp={size} ({layout} ring); "
            f"choose an sp that divides it, such as {math.gcd(length, parts)}{hint}."
        )


def to_balanced(x: Shaped[Array, "b l *c"], mesh: Mesh) -> Shaped[Array, "b l *c"]:
    """A sequence that lies on `sp` in order, as the balanced ring wants it. Each piece moves at most once."""
    return _exchange(x, mesh, inverse=False)


def from_balanced(x: Shaped[Array, "b l *c"], mesh: Mesh) -> Shaped[Array, "b l *c"]:
    """The inverse of `to_balanced`."""
    return _exchange(x, mesh, inverse=True)


def _exchange(x: Array, mesh: Mesh, *, inverse: bool) -> Array:
    size = mesh.shape[AXIS]
    check_length(x.shape[1], size, "balanced")
    spec = fitting_spec(mesh, x.shape, "batch", "sequence", *(None,) * (x.ndim - 2))
    # Pieces 2r and 2r + 1 lie on device r. Even ones go to different devices, and so do odd ones: two exchanges.
    even, odd = ([_home(2 * r + parity, size) for r in range(size)] for parity in (0, 1))

    def run(x: Array) -> Array:
        at_even = lax.axis_index(AXIS) % 2 == 0
        first, second = jnp.split(x, 2, axis=1)
        if inverse:  # an even device's early piece is an even one
            first, second = _swap_unless(at_even, first, second)
        first = lax.ppermute(first, AXIS, _routes(even, inverse))
        second = lax.ppermute(second, AXIS, _routes(odd, inverse))
        if not inverse:
            first, second = _swap_unless(at_even, first, second)
        return jnp.concatenate([first, second], axis=1)

    return jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(x)


def _home(piece: int, size: int) -> int:
    """The device on which a piece of the balanced layout lies."""
    return piece if piece < size else 2 * size - 1 - piece


def _routes(homes: list[int], inverse: bool) -> list[tuple[int, int]]:
    return [(home, r) if inverse else (r, home) for r, home in enumerate(homes)]


def _swap_unless(condition: Array, a: Array, b: Array) -> tuple[Array, Array]:
    return jnp.where(condition, a, b), jnp.where(condition, b, a)

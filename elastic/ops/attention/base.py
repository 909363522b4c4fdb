"""What attention on one device is asked, the gradient that all its kernels share, and their common shapes.

A kernel is a pair of functions on rows, a row being one head of one batch element. Shapes: N rows of queries, M rows of keys,
Q and K positions, D channels. The ring calls the same pairs with one piece of the keys at a time.
"""

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, Num

from elastic.ops import bf16_bits

# What the backward pass needs, by the names that policies of jax.checkpoint know it under. Values are one product away from the
# layer's input; queries and keys need their rotation besides.
SAVED, VALUES = "attention", "attention_values"


class StaticArgs(NamedTuple):
    """What is known when the program is compiled."""

    block_size: int
    q_tile: int
    kv_tile: int
    rows_per_batch: int  # heads: row n belongs to batch element n // rows_per_batch
    whole: bool = False  # queries are those of the keys: both begin at 0, and every key is there


class MaskArgs(NamedTuple):
    """What a query may see, known when the program runs.

    The query at global position i sees the key at global position j when `j // block_size <= i // block_size`, `j < kv_length`,
    its segment is the same and it is valid.
    """

    q_start: Int[Array, ""]  # global position of the first query
    kv_start: Int[Array, ""]  # global position of the first key
    kv_length: Int[Array, ""]  # keys at this global position and later are not there
    first_row: Int[Array, ""]  # row n of the queries attends to row first_row + n of the keys
    q_segments: Int[Array, "b Q"] | None = None
    kv_segments: Int[Array, "b K"] | None = None
    valid: Bool[Array, "b K"] | None = None


class Forward(Protocol):
    """Output and natural logsumexp of each query, in float32; 0 and -inf for one that sees no key.

    Keys are read tile by tile where they lie, so that a cache with more rows than `q` can be passed as it is. Tiles that no query
    may see are never read. Any length, also one that is no multiple of a tile.
    """

    def __call__(
        self,
        q_NQD: Float[Array, "N Q D"],
        k_MKD: Float[Array, "M K D"],
        v_MKD: Float[Array, "M K D"],
        scope: MaskArgs,
        options: StaticArgs,
        /,
    ) -> tuple[Float[Array, "N Q D"], Float[Array, "N Q"]]: ...


class Backward(Protocol):
    """Gradients of q, k and v in float32 (FlashAttention-2, algorithm 2), with N == M and `first_row` 0.

    `lse_NQ` may count keys outside of this call (the ring's do), and `delta_NQ` is the sum of `out * dout` over channels for
    the output over all of them: the gradients of several pieces then add up. A query with `lse` -inf has no gradient.
    """

    def __call__(
        self,
        q_NQD: Float[Array, "N Q D"],
        k_NKD: Float[Array, "N K D"],
        v_NKD: Float[Array, "N K D"],
        dout_NQD: Float[Array, "N Q D"],
        lse_NQ: Float[Array, "N Q"],
        delta_NQ: Float[Array, "N Q"],
        scope: MaskArgs,
        options: StaticArgs,
        /,
    ) -> tuple[Float[Array, "N Q D"], Float[Array, "N K D"], Float[Array, "N K D"]]: ...


class Prefixes(Protocol):
    """The forward pass of b batch elements at once, N = b * heads, each of which sees the first `lengths` keys of its own rows.

    The queries attend to the rows from `first_row` on. None for heads and types that it cannot serve.
    """

    def __call__(
        self,
        q_NQD: Float[Array, "N Q D"],
        k_MKD: Float[Array, "M K D"],
        v_MKD: Float[Array, "M K D"],
        first_row: Int[Array, ""],
        lengths: Int[Array, " b"],
        /,
    ) -> tuple[Float[Array, "N Q D"], Float[Array, "N Q"]] | None: ...


class Kernel(NamedTuple):
    """One implementation of attention on one device."""

    forward: Forward
    backward: Backward
    in_place: "Kernel | None" = (
        None  # for `attend_heads`; it saves the move of heads to rows and back
    )
    prefixes: Prefixes | None = None


def attend_rows(
    q_NQD: Float[Array, "N Q D"],
    k_MKD: Num[Array, "M K D"],
    v_MKD: Num[Array, "M K D"],
    scope: MaskArgs,
    options: StaticArgs,
    kernel: Kernel,
) -> tuple[Float[Array, "N Q D"], Float[Array, "N Q"]]:
    """`kernel.forward`, differentiable in q, k and v through the output; the logsumexp carries no gradient.

    `blockwise` also takes keys and values as the bits of bfloat16 (see bits.py).
    """
    return _attend(q_NQD, k_MKD, v_MKD, scope, options, kernel)


def attend_heads(
    q: Float[Array, "b Q h D"],
    k: Float[Array, "b K h D"],
    v: Float[Array, "b K h D"],
    scope: MaskArgs,
    options: StaticArgs,
    kernel: Kernel,
) -> tuple[Float[Array, "b Q h D"], Float[Array, "b h Q"]]:
    """The same by a kernel that takes heads where they lie."""
    return _attend(q, k, v, scope, options, kernel)


def _forward(
    q: Array, k: Array, v: Array, scope: MaskArgs, options: StaticArgs, kernel: Kernel
) -> tuple[Array, Array]:
    return kernel.forward(q, k, v, scope, options)


_attend = jax.custom_vjp(_forward, nondiff_argnums=(4, 5))


class Saved(NamedTuple):
    """What the backward pass needs of the forward pass, known to policies of jax.checkpoint by the name `SAVED`."""

    q: Array  # these four in the type of the operands; bfloat16 as bits, because a scan over layers stacks it
    k: Array
    v: Array
    out: Array
    lse: Array

    def shown(self) -> "Saved":
        """The same as numbers."""
        return Saved(*(bf16_bits.from_bits(x) for x in self))


def save(q: Array, k: Array, v: Array, out: Array, lse: Array) -> tuple[Saved, Array]:
    """What to save, and the output made of it: so nothing computed before it is needed again."""
    arrays = (*(bf16_bits.to_bits(x) for x in (q, k, v, out.astype(q.dtype))), lse)
    names = (SAVED, SAVED, VALUES, SAVED, SAVED)
    saved = Saved(*(checkpoint_name(x, name) for x, name in zip(arrays, names, strict=True)))
    return saved, bf16_bits.from_bits(saved.out).astype(out.dtype)


def _attend_fwd(q: Array, k: Array, v: Array, scope: MaskArgs, options: StaticArgs, kernel: Kernel):
    saved, out = save(q, k, v, *kernel.forward(q, k, v, scope, options))
    return (out, saved.lse), (saved, scope)


def _attend_bwd(options: StaticArgs, kernel: Kernel, residuals, gradients):
    (q, k, v, out, lse), scope = residuals[0].shown(), residuals[1]
    dout = gradients[0]
    delta = jnp.sum(out.astype(dout.dtype) * dout, axis=-1)
    dq, dk, dv = kernel.backward(q, k, v, dout, lse, delta, scope, options)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_attend_fwd, _attend_bwd)


def rows(x: Float[Array, "b l h d"]) -> Float[Array, "n l d"]:
    """Heads as rows, those of one batch element side by side."""
    return rearrange(x, "b l h d -> (b h) l d")


def heads_of(x: Float[Array, "n l d"], heads: int) -> Float[Array, "b l h d"]:
    """The inverse of `rows`."""
    return rearrange(x, "(b h) l d -> b l h d", h=heads)


def from_rows(
    out: Float[Array, "n l d"], lse: Float[Array, "n l"], heads: int
) -> tuple[Float[Array, "b l h d"], Float[Array, "b h l"]]:
    """The same for a kernel's results."""
    return heads_of(out, heads), rearrange(lse, "(b h) l -> b h l", h=heads)

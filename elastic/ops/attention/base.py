"""The contract of an attention kernel: what it is given, what it gives, and the gradient that all kernels share.

A kernel is a pair of functions, `forward` and `backward`, on rows; a row is one head of one batch element. The ring
(ring.py) calls the same pair with one piece of the keys at a time.

Letters of a shape: N rows of queries, M rows of keys, Q query positions, K key positions, D channels of a head,
b batch elements, h heads.
"""

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, Num

from elastic.ops import bf16_bits

# The names under which a policy of jax.checkpoint finds what the backward pass needs. Values have a name of their own
# because they are cheap to recompute: one product from the layer's input. Queries and keys need RoPE as well.
SAVED, VALUES = "attention", "attention_values"


class StaticArgs(NamedTuple):
    """What is known when the program is compiled."""

    block_size: int  # tokens
    q_tile: int  # at most so many queries in a tile
    kv_tile: int  # at most so many keys in a tile
    rows_per_batch: int  # heads: row n belongs to batch element n // rows_per_batch
    whole: bool = False  # one whole sequence: queries and keys both begin at 0, no key is missing
    implementation: str = ""  # a name out of `dispatch.IMPLEMENTATIONS`; kernels do not read it


class MaskArgs(NamedTuple):
    """What a query may see, known when the program runs.

    The query at global position i sees the key at global position j if all of these hold:
    `j // block_size <= i // block_size`, `j < kv_length`, both have the same segment id, and the key is valid.
    """

    q_start: Int[Array, ""]  # global position of the first query
    kv_start: Int[Array, ""]  # global position of the first key
    kv_length: Int[Array, ""]  # keys at this global position and later do not exist
    first_row: Int[Array, ""]  # row n of the queries attends to row first_row + n of the keys
    q_segments: Int[Array, "b Q"] | None = None
    kv_segments: Int[Array, "b K"] | None = None
    valid: Bool[Array, "b K"] | None = None  # False hides the key from every query


class Forward(Protocol):
    """The forward pass: attention output and natural logsumexp of each query's logits, both float32.

    A query that sees no key gets output 0 and logsumexp -inf. The kernel reads tiles of keys in place, so `k` and `v`
    may be a cache with more rows than `q`, and it never reads a tile that no query may see. Lengths need not be
    multiples of a tile.
    """

    def __call__(
        self,
        q_NQD: Float[Array, "N Q D"],
        k_MKD: Float[Array, "M K D"],
        v_MKD: Float[Array, "M K D"],
        mask: MaskArgs,
        static: StaticArgs,
        /,
    ) -> tuple[Float[Array, "N Q D"], Float[Array, "N Q"]]: ...


class Backward(Protocol):
    """The backward pass: gradients of q, k and v in float32 (FlashAttention-2, algorithm 2).

    Requires N == M and `mask.first_row` 0. `lse_NQ` may include keys outside of this call, as in a ring. `delta_NQ` is
    the sum over channels of `out * dout`, with the output over all those keys. The gradients of several pieces of the
    keys then add up. A query whose `lse` is -inf has gradient 0.
    """

    def __call__(
        self,
        q_NQD: Float[Array, "N Q D"],
        k_NKD: Float[Array, "N K D"],
        v_NKD: Float[Array, "N K D"],
        dout_NQD: Float[Array, "N Q D"],
        lse_NQ: Float[Array, "N Q"],
        delta_NQ: Float[Array, "N Q"],
        mask: MaskArgs,
        static: StaticArgs,
        /,
    ) -> tuple[Float[Array, "N Q D"], Float[Array, "N K D"], Float[Array, "N K D"]]: ...


class Prefixes(Protocol):
    """The forward pass for b batch elements with caches of different lengths, in one call.

    N = b * heads. Every query of element e sees the first `lengths[e]` keys of its own rows, which begin at
    `first_row`. Returns None for a head_dim or dtype that it cannot serve.
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
    on_heads: "Kernel | None" = None  # the same on [b, Q, h, D]: saves the transposition to rows
    prefixes: Prefixes | None = None


def attend(
    q: Float[Array, "*q D"],
    k: Num[Array, "*k D"],
    v: Num[Array, "*k D"],
    mask: MaskArgs,
    static: StaticArgs,
    kernel: Kernel,
) -> tuple[Float[Array, "*q D"], Float[Array, "..."]]:
    """`kernel.forward`, differentiable in q, k and v through the output; the logsumexp carries no gradient.

    Args:
      q: queries, float32 or bfloat16: rows [N, Q, D], or heads [b, Q, h, D] for a kernel that is some kernel's
        `on_heads`.
      k: keys in the same layout, [M, K, D] or [b, K, h, D]. `blockwise` also takes bfloat16 as uint16
        (bf16_bits.py).
      v: values, as `k`.
      mask: what each query may see.
      static: block size and tiles, in tokens.
      kernel: the implementation.

    Returns:
      The output in the layout of q, and the natural logsumexp [N, Q] or [b, h, Q]; both float32.
    """
    return _attend(q, k, v, mask, static, kernel)


def _forward(
    q: Array, k: Array, v: Array, mask: MaskArgs, static: StaticArgs, kernel: Kernel
) -> tuple[Array, Array]:
    return kernel.forward(q, k, v, mask, static)


_attend = jax.custom_vjp(_forward, nondiff_argnums=(4, 5))


class Saved(NamedTuple):
    """What the forward pass saves for the backward pass; policies of jax.checkpoint find it by the name `SAVED`.

    The first four have the dtype of the operands. bfloat16 is held as uint16, because a scan over layers stacks it.
    """

    q: Array
    k: Array
    v: Array
    out: Array
    lse: Array

    def as_floats(self) -> "Saved":
        """The same arrays as floating-point numbers."""
        return Saved(*(bf16_bits.from_bits(x) for x in self))


def save(q: Array, k: Array, v: Array, out: Array, lse: Array) -> tuple[Saved, Array]:
    """The record to save, and the output derived from it.

    Because the output derives from the saved arrays, rematerialization needs nothing that was computed before them.

    Args:
      q: queries, float32 or bfloat16, in any layout.
      k: keys, likewise.
      v: values, likewise.
      out: attention output, float32, in the layout of q. It is saved in the dtype of q.
      lse: natural logsumexp, float32.
    """
    arrays = (*(bf16_bits.to_bits(x) for x in (q, k, v, out.astype(q.dtype))), lse)
    names = (SAVED, SAVED, VALUES, SAVED, SAVED)
    saved = Saved(*(checkpoint_name(x, name) for x, name in zip(arrays, names, strict=True)))
    return saved, bf16_bits.from_bits(saved.out).astype(out.dtype)


def _attend_fwd(q: Array, k: Array, v: Array, mask: MaskArgs, static: StaticArgs, kernel: Kernel):
    saved, out = save(q, k, v, *kernel.forward(q, k, v, mask, static))
    return (out, saved.lse), (saved, mask)


def _attend_bwd(static: StaticArgs, kernel: Kernel, residuals, gradients):
    (q, k, v, out, lse), mask = residuals[0].as_floats(), residuals[1]
    dout = gradients[0]
    delta = jnp.sum(out.astype(dout.dtype) * dout, axis=-1)
    dq, dk, dv = kernel.backward(q, k, v, dout, lse, delta, mask, static)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_attend_fwd, _attend_bwd)


def rows(x: Float[Array, "b l h d"]) -> Float[Array, "n l d"]:
    """Heads as rows; the heads of one batch element are adjacent."""
    return rearrange(x, "b l h d -> (b h) l d")


def heads_of(x: Float[Array, "n l d"], heads: int) -> Float[Array, "b l h d"]:
    """The inverse of `rows`."""
    return rearrange(x, "(b h) l d -> b l h d", h=heads)


def from_rows(
    out: Float[Array, "n l d"], lse: Float[Array, "n l"], heads: int
) -> tuple[Float[Array, "b l h d"], Float[Array, "b h l"]]:
    """The inverse of `rows` for a kernel's output and logsumexp."""
    return heads_of(out, heads), rearrange(lse, "(b h) l -> b h l", h=heads)

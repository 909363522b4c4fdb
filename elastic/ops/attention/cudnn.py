"""Block-causal attention for NVIDIA GPUs by cuDNN where it can serve, and by our Pallas kernels (pallas_gpu.py) everywhere else.

cuDNN knows no blocks, but the queries of one block all see the same keys, the first so many of them: one call for each chunk of
queries, on all keys as they lie, told when it runs how many it may read. It reads no further, so the cost follows the mask. Its
gradient takes the logsumexp as an input, which may count keys of other devices, as a ring needs. Measured on one H100 in bfloat16
(README, "On one H100"), it is a third faster than our own kernels; it takes 16-bit numbers only, and no segments.

Which of the two runs is known when the program is compiled, but for one thing: packed sequences carry segment ids, and whether all
are of one file is seen when they are there. Then both are compiled and one runs.

jax.nn.dot_product_attention takes no logsumexp for the gradient, so this calls what it calls (`_primitive`): internal names of jax,
which `check` looks for and tests/test_cudnn.py holds to their form.

Shapes as in local.py, or with heads in place: q [b, Q, h, D], k and v [b, K, h, D], logsumexp [b, h, Q].
"""

import math
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from elastic.ops.attention import block_mask, pallas_gpu
from elastic.ops.attention.base import Kernel, MaskArgs, StaticArgs, from_rows, heads_of, rows

_SMALLEST_CHUNK = 128  # of queries: a call for fewer leaves the GPU idle
_MOST_CALLS = 16
_NOTHING = 1e30  # a logsumexp beside which every weight is 0, finite


def serves(head_dim: int, dtype: jax.typing.DTypeLike) -> bool:
    """Whether cuDNN takes such heads, forward and backward, on sm_80 and later."""
    return jnp.dtype(dtype) == jnp.bfloat16 and head_dim <= 128 and head_dim % 8 == 0


class Fused(Protocol):
    """What is asked of cuDNN: attention of queries to the first `kv_length` keys, or with None to all, each of which all of them see.

    A `kv_length` [b] is of the rows of b batch elements, which lie side by side.
    """

    def forward(self, q: Array, k: Array, v: Array, kv_length: Array | None) -> tuple[Array, Array]:
        """Output in the type of q, and natural logsumexp in float32; where there is no key, anything."""
        ...

    def backward(
        self, q: Array, k: Array, v: Array, dout: Array, out: Array, lse: Array, kv_length: Array | None
    ) -> tuple[Array, Array, Array]:  # fmt: skip
        """Gradients of q, k and v in their type; of keys from `kv_length` on, and where there is no key, anything."""
        ...


class _Cudnn(NamedTuple):
    """cuDNN's fused attention through jax's primitives; `heads_in_place` as the module's docstring says."""

    heads_in_place: bool

    def forward(self, q: Array, k: Array, v: Array, kv_length: Array | None) -> tuple[Array, Array]:
        settings = self._settings(q, kv_length)
        out, lse = _primitive("fwd").bind(
            *self._batched(kv_length, q, k, v),
            *self._lengths(q, kv_length),
            **settings,
            is_training=True,
        )
        return self._plain(out), self._plain(lse)

    def backward(
        self, q: Array, k: Array, v: Array, dout: Array, out: Array, lse: Array, kv_length: Array | None
    ) -> tuple[Array, Array, Array]:  # fmt: skip
        settings = self._settings(q, kv_length)
        lse, out, dout = self._batched(kv_length, lse, out, dout)
        dq, dk, dv = _primitive("bwd").bind(
            *self._batched(kv_length, q, k, v),
            *self._lengths(q, kv_length),
            lse,
            out,
            dout,
            **settings,
        )
        return self._plain(dq), self._plain(dk), self._plain(dv)

    def _batched(self, kv_length: Array | None, *arrays: Array) -> tuple[Array, ...]:
        """Rows are the heads of one batch element, or of as many as there are lengths."""
        if self.heads_in_place:
            return arrays
        batch = 1 if kv_length is None else kv_length.size
        return tuple(x.reshape(batch, -1, *x.shape[1:]) for x in arrays)

    def _plain(self, x: Array) -> Array:
        return x if self.heads_in_place else x.reshape(-1, *x.shape[2:])

    def _lengths(self, q: Array, kv_length: Array | None) -> tuple[Array, ...]:
        """Bias, lengths of queries and keys, and four things for packed and paged keys; what there is not has no elements."""
        absent = jnp.zeros(0, q.dtype)
        if kv_length is None:
            return (absent,) * 7
        batch = len(q) if self.heads_in_place else kv_length.size
        lengths = (jnp.full(batch, x, jnp.int32) for x in (q.shape[1], kv_length))
        return (absent, *lengths, *(absent,) * 4)

    def _settings(self, q: Array, kv_length: Array | None) -> dict[str, Any]:
        from jax._src.cudnn.fused_attention_stablehlo import AttentionLayout, MaskType

        layout = AttentionLayout.BTNH if self.heads_in_place else AttentionLayout.BNTH
        return dict(
            scale=q.shape[-1] ** -0.5,
            seed=0,
            dropout_rate=0.0,
            variadic_args=(False, False),  # no bias, no gradient of one
            mask_type=MaskType.NO_MASK if kv_length is None else MaskType.PADDING,
            layout=layout.value,
            sliding_window_length=None,
        )


def _primitive(direction: str) -> Any:
    from jax._src.cudnn import fused_attention_stablehlo

    return getattr(fused_attention_stablehlo, f"_dot_product_attention_{direction}_p_wrapper")


class _Chunks(NamedTuple):
    """The queries of a call in chunks of `size`, each of which sees the first so many keys: a number, or an array read from the scope."""

    size: int
    num_keys: list[int] | list[Array]
    even: (
        bool | Array
    )  # whether all queries of a chunk see the same keys, as they do where none crosses a block

    def of(self, x: Array, number: Array | int, axis: int = 1) -> Array:
        """A chunk's part of an array."""
        if isinstance(number, int):
            return lax.slice_in_dim(x, number * self.size, (number + 1) * self.size, axis=axis)
        return lax.dynamic_slice_in_dim(x, number * self.size, self.size, axis)

    def put(self, x: Array, part: Array, number: Array, axis: int = 1) -> Array:
        """The array with a chunk's part written."""
        return lax.dynamic_update_slice_in_dim(x, part, number * self.size, axis)

    @property
    def unrolled(self) -> bool:
        """Whether chunks are few enough to be calls of their own, which saves copies; else one call is compiled, in a loop."""
        return len(self.num_keys) <= _MOST_CALLS


def _chunks(scope: MaskArgs, options: StaticArgs, num_queries: int, num_keys: int) -> _Chunks:
    block, size = options.block_size, math.gcd(options.block_size, num_queries)
    if size < min(_SMALLEST_CHUNK, num_queries):
        size = num_queries
    firsts = range(0, num_queries, size)
    if options.whole:
        until = [min((first // block + 1) * block, num_keys) for first in firsts]
        return _Chunks(size, until, size <= block)
    limit = jnp.clip(scope.kv_length - scope.kv_start, 0, num_keys)

    def seen_until(query: int) -> Array:
        own = lax.div(scope.q_start + query, jnp.int32(block))
        return jnp.clip((own + 1) * block - scope.kv_start, 0, limit)

    found, even = [], jnp.bool_(True)
    for first in firsts:
        found.append(seen_until(first))
        even &= found[-1] == seen_until(first + size - 1)
    return _Chunks(size, found, even)


def _there(x: Array, num_keys: Array) -> Array:
    """What a library wrote of keys that it was given; it does not write the rest."""
    there = jnp.arange(x.shape[1]) < num_keys
    return jnp.where(there.reshape(1, -1, *(1,) * (x.ndim - 2)), x, 0)


def _plus(x: Array, first: Array) -> Array:
    """The array with something added to its first positions. (As `x.at[].add`, a scatter, XLA crashes with several GPUs.)"""
    length = first.shape[1]
    return x + first if length == x.shape[1] else x.at[:, :length].set(x[:, :length] + first)


def _own_rows(x: Array, q: Array, first_row: Array) -> Array:
    """The rows of keys that the queries attend to: all, or some of a cache, which are copied."""
    return x if len(x) == len(q) else lax.dynamic_slice_in_dim(x, first_row, len(q))


def _one_segment(scope: MaskArgs, num_queries: int) -> bool | Array:
    """Whether every key may be seen by every query, as far as segments and hidden keys go."""
    ids = block_mask.ids_of(scope, num_queries)
    if ids is None:
        return True
    first = ids.queries[:, :1]
    return jnp.all(ids.queries == first) & jnp.all(ids.keys == first)


class Chunked(NamedTuple):
    """A kernel that gives chunks of queries to a library, and to another kernel what the library cannot serve."""

    fused: Fused
    other: Kernel
    heads_in_place: bool

    def forward(
        self, q: Array, k: Array, v: Array, scope: MaskArgs, options: StaticArgs
    ) -> tuple[Array, Array]:
        """As `local.Forward`."""
        chunks = _chunks(scope, options, q.shape[1], k.shape[1])

        def by_fused() -> tuple[Array, Array]:
            keys, values = (_own_rows(x, q, scope.first_row) for x in (k, v))

            def of_chunk(i: Any, num_keys: int | Array) -> tuple[Array, Array]:
                if isinstance(num_keys, int):
                    seen = slice(0, num_keys)
                    return self.fused.forward(chunks.of(q, i), keys[:, seen], values[:, seen], None)
                out, lse = self.fused.forward(chunks.of(q, i), keys, values, num_keys)
                any_key = num_keys > 0
                return jnp.where(any_key, out, 0), jnp.where(any_key, lse, -jnp.inf)

            if chunks.unrolled:
                found = [of_chunk(i, num_keys) for i, num_keys in enumerate(chunks.num_keys)]
                outs, lses = zip(*found, strict=True)
                out, lse = jnp.concatenate(outs, axis=1), jnp.concatenate(lses, axis=-1)
                return out.astype(jnp.float32), lse
            num_keys = jnp.asarray(chunks.num_keys)

            def step(i: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
                out, lse = of_chunk(i, num_keys[i])
                return chunks.put(found[0], out, i), chunks.put(found[1], lse, i, axis=-1)

            nothing = jnp.zeros_like(q), jnp.zeros(self._lse_shape(q), jnp.float32)
            out, lse = lax.fori_loop(0, len(chunks.num_keys), step, nothing)
            return out.astype(jnp.float32), lse

        def by_other() -> tuple[Array, Array]:
            q_NQD, k_MKD, v_MKD = (self._rows(x) for x in (q, k, v))
            out, lse = self.other.forward(q_NQD, k_MKD, v_MKD, scope, options)
            return from_rows(out, lse, q.shape[2]) if self.heads_in_place else (out, lse)

        return self._either(q, scope, chunks.even, by_fused, by_other)

    def backward(
        self, q: Array, k: Array, v: Array, dout: Array, lse: Array, delta: Array, scope: MaskArgs, options: StaticArgs
    ) -> tuple[Array, Array, Array]:  # fmt: skip
        """As `local.Backward`."""
        chunks = _chunks(scope, options, q.shape[1], k.shape[1])
        dout = dout.astype(q.dtype)

        def by_fused() -> tuple[Array, Array, Array]:
            # The library makes delta by itself, the sum of output * dout. Any output with that sum will do: here dout, scaled.
            wide = dout.astype(jnp.float32)
            power = jnp.sum(jnp.square(wide), axis=-1)
            share = jnp.where(power > 0, delta / jnp.where(power > 0, power, 1.0), 0.0)
            out = (wide * share[..., None]).astype(q.dtype)
            weighed = jnp.where(jnp.isneginf(lse), _NOTHING, lse)

            def of_chunk(i: Any, num_keys: int | Array) -> tuple[Array, Array, Array]:
                q_part, dout_part, out_part = (chunks.of(x, i) for x in (q, dout, out))
                parts = dout_part, out_part, chunks.of(weighed, i, axis=-1)
                if isinstance(num_keys, int):
                    seen = slice(0, num_keys)
                    return self.fused.backward(q_part, k[:, seen], v[:, seen], *parts, None)
                dq, dk, dv = self.fused.backward(q_part, k, v, *parts, num_keys)
                return jnp.where(num_keys > 0, dq, 0), _there(dk, num_keys), _there(dv, num_keys)

            dk, dv = (jnp.zeros(x.shape, jnp.float32) for x in (k, v))
            if chunks.unrolled:
                dqs = []
                for i, num_keys in enumerate(chunks.num_keys):
                    dq, more_k, more_v = of_chunk(i, num_keys)
                    dqs.append(dq)
                    dk, dv = _plus(dk, more_k), _plus(dv, more_v)
                return jnp.concatenate(dqs, axis=1).astype(jnp.float32), dk, dv
            num_keys = jnp.asarray(chunks.num_keys)

            def step(i: Array, found: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
                dq, more_k, more_v = of_chunk(i, num_keys[i])
                return chunks.put(found[0], dq, i), found[1] + more_k, found[2] + more_v

            start = jnp.zeros_like(q), dk, dv
            dq, dk, dv = lax.fori_loop(0, len(chunks.num_keys), step, start)
            return dq.astype(jnp.float32), dk, dv

        def by_other() -> tuple[Array, Array, Array]:
            q_NQD, k_NKD, v_NKD, dout_NQD = (self._rows(x) for x in (q, k, v, dout))
            lse_NQ = lse.reshape(-1, q.shape[1])
            delta_NQ = self._rows(delta[..., None])[..., 0]
            found = self.other.backward(
                q_NQD, k_NKD, v_NKD, dout_NQD, lse_NQ, delta_NQ, scope, options
            )
            if self.heads_in_place:
                found = [heads_of(x, q.shape[2]) for x in found]
            dq, dk, dv = found
            return dq, dk, dv

        return self._either(q, scope, chunks.even, by_fused, by_other)

    def prefixes(
        self, q: Array, k: Array, v: Array, first_row: Array, lengths: Array
    ) -> tuple[Array, Array] | None:
        """As `local.Prefixes`, by the library alone."""
        if not serves(q.shape[-1], q.dtype):
            return None
        keys, values = (_own_rows(x, q, first_row) for x in (k, v))
        out, lse = self.fused.forward(q, keys, values, lengths)
        any_key = jnp.repeat(lengths > 0, len(q) // len(lengths))[:, None]
        out = jnp.where(any_key[..., None], out, 0).astype(jnp.float32)
        return out, jnp.where(any_key, lse, -jnp.inf)

    def _either(
        self, q: Array, scope: MaskArgs, even: bool | Array, by_fused: Any, by_other: Any
    ) -> Any:
        if even is False or not serves(q.shape[-1], q.dtype):
            return by_other()
        served = even & _one_segment(scope, q.shape[1])
        return by_fused() if served is True else lax.cond(served, by_fused, by_other)

    def _rows(self, x: Array) -> Array:
        return rows(x) if self.heads_in_place else x

    def _lse_shape(self, q: Array) -> tuple[int, ...]:
        return (q.shape[0], q.shape[2], q.shape[1]) if self.heads_in_place else q.shape[:2]


_ROWS, _HEADS = (Chunked(_Cudnn(there), pallas_gpu.KERNEL, there) for there in (False, True))

KERNEL = Kernel(
    _ROWS.forward, _ROWS.backward, Kernel(_HEADS.forward, _HEADS.backward), _ROWS.prefixes
)


def check(head_dim: int, dtype: jax.typing.DTypeLike) -> None:
    """Raises ValueError for what neither part can do, and where this jax does not have what cuDNN is called by."""
    pallas_gpu.check(head_dim, dtype)
    try:
        for direction in ("fwd", "bwd"):
            _primitive(direction)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"jax {jax.__version__} has no {error.name!r}, by which attention calls cuDNN; use "
            "attention_implementation='pallas_gpu', or jax 0.10 or 0.11."
        ) from error

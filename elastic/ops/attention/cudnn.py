"""Block-causal attention for NVIDIA GPUs: cuDNN where it can serve, our Pallas kernels (pallas_gpu.py) elsewhere.

cuDNN has no block-causal mask. But all queries of one block see the same keys: a prefix. So cuDNN is called once per
chunk of queries, on all keys in place, with the length of the prefix, which may be traced. It reads no key after the
prefix, so the cost follows the mask. Its backward pass takes the logsumexp as an input, so keys on other devices may
count, as a ring needs. In bfloat16 it is a third faster than our kernels (one H100, scripts/bench/README.md). It takes
16-bit numbers only, and no segments.

Which of the two runs is known at compile time, except for packed sequences: whether all tokens have one segment id is
known at run time. Then both are compiled and one of them runs.

jax.nn.dot_product_attention does not pass a logsumexp to the backward pass, so this file binds the primitives under it
(`_primitive`). Those are internal names of jax: `check` looks for them, and tests/ops/attention/test_cudnn.py checks
how they are called.

Shapes are as in base.py, or with heads in place: q [b, Q, h, D], k and v [b, K, h, D], logsumexp [b, h, Q].
"""

import functools
import inspect
import math
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from elastic.ops.attention import block_mask, pallas_gpu
from elastic.ops.attention.base import Kernel, MaskArgs, StaticArgs, from_rows, heads_of, rows

_SMALLEST_CHUNK = 128  # queries; a call for fewer leaves the GPU partly idle
_MOST_CALLS = 16  # with more chunks than this, one call is compiled in a loop
_HUGE_LSE = 1e30  # a finite logsumexp that makes every weight 0


def serves(head_dim: int, dtype: jax.typing.DTypeLike) -> bool:
    """Whether cuDNN serves this head size and dtype, forward and backward, on sm_80 and later."""
    return jnp.dtype(dtype) == jnp.bfloat16 and head_dim <= 128 and head_dim % 8 == 0


class Fused(Protocol):
    """The attention that cuDNN computes: every query sees the first `kv_length` keys, or with None all keys.

    `kv_length` is a scalar, or [b] with one length for each of b batch elements, whose rows are adjacent. Arrays are
    rows or heads, as in the module's docstring.
    """

    def forward(self, q: Array, k: Array, v: Array, kv_length: Array | None) -> tuple[Array, Array]:
        """The output in the dtype of q, and the natural logsumexp in float32. Both are undefined where there is no key."""
        ...

    def backward(
        self, q: Array, k: Array, v: Array, dout: Array, out: Array, lse: Array, kv_length: Array | None
    ) -> tuple[Array, Array, Array]:  # fmt: skip
        """Gradients of q, k and v in their dtype; undefined for keys from `kv_length` on, and where there is no key."""
        ...


class _Cudnn(NamedTuple):
    """cuDNN's fused attention through jax's primitives, on heads in place or on rows."""

    heads_in_place: bool

    def forward(self, q: Array, k: Array, v: Array, kv_length: Array | None) -> tuple[Array, Array]:
        settings = self._settings(q, kv_length)
        out, lse = _primitive("fwd").bind(
            *self._batched(kv_length, q, k, v),
            *self._lengths(q, kv_length),
            **settings,
            **_neutral_settings("fwd"),
            is_training=True,
        )
        return self._unbatched(out), self._unbatched(lse)

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
            **_neutral_settings("bwd"),
        )
        return self._unbatched(dq), self._unbatched(dk), self._unbatched(dv)

    def _batched(self, kv_length: Array | None, *arrays: Array) -> tuple[Array, ...]:
        """Splits the rows into batch elements: one, or as many as there are lengths."""
        if self.heads_in_place:
            return arrays
        batch = 1 if kv_length is None else kv_length.size
        return tuple(x.reshape(batch, -1, *x.shape[1:]) for x in arrays)

    def _unbatched(self, x: Array) -> Array:
        return x if self.heads_in_place else x.reshape(-1, *x.shape[2:])

    def _lengths(self, q: Array, kv_length: Array | None) -> tuple[Array, ...]:
        """Bias, lengths of queries and of keys, and four inputs for packed and paged keys. Absent inputs have no elements."""
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


# What the primitives take in jax 0.10 and 0.11, in the order of their implementation's parameters.
_SHARED_INPUTS = (
    "query key value bias q_seqlen kv_seqlen q_offsets kv_offsets page_table_k page_table_v"
)
_SHARED_SETTINGS = "scale seed dropout_rate variadic_args mask_type layout sliding_window_length"
_PARAMETERS = {
    "fwd": f"{_SHARED_INPUTS} {_SHARED_SETTINGS} is_training".split(),
    "bwd": f"{_SHARED_INPUTS} activation fwd_output grad_output {_SHARED_SETTINGS}".split(),
}
# What jax 0.12 adds: a function of the scores and its arguments. None of either leaves the scores as they are.
_NEUTRAL: dict[str, Any] = {"score_mod": None}
_ADDED = {"score_mod", "score_mod_args"}


@functools.cache
def _neutral_settings(direction: str) -> dict[str, Any]:
    """The settings that the installed jax wants beyond those of jax 0.10, at values that change nothing.

    Raises:
      AttributeError: it lacks the primitive, or takes parameters that are not known here.
    """
    from jax._src.cudnn import fused_attention_stablehlo

    name = f"_dot_product_attention_{direction}_impl"
    found = list(inspect.signature(getattr(fused_attention_stablehlo, name)).parameters)
    if [parameter for parameter in found if parameter not in _ADDED] != _PARAMETERS[direction]:
        differing = ({*found} - _ADDED) ^ {*_PARAMETERS[direction]}
        other = ", ".join(sorted(differing)) or "another order"
        raise AttributeError(f"{name} takes other parameters: {other}", name=name)
    return {name: value for name, value in _NEUTRAL.items() if name in found}


class _Chunks(NamedTuple):
    """The queries of a call, divided into chunks whose queries all see the same prefix of the keys."""

    size: int  # queries in a chunk
    num_keys: list[int] | list[Array]  # per chunk: the keys in its prefix; traced if `mask` decides
    uniform: (
        bool | Array
    )  # True if no chunk crosses the end of a block, so that the prefixes are right

    def of(self, x: Array, number: Array | int, axis: int = 1) -> Array:
        """The part of an array that belongs to one chunk."""
        if isinstance(number, int):
            return lax.slice_in_dim(x, number * self.size, (number + 1) * self.size, axis=axis)
        return lax.dynamic_slice_in_dim(x, number * self.size, self.size, axis)

    def set(self, x: Array, part: Array, number: Array, axis: int = 1) -> Array:
        """The array with the part of one chunk replaced."""
        return lax.dynamic_update_slice_in_dim(x, part, number * self.size, axis)

    @property
    def unrolled(self) -> bool:
        """Whether every chunk gets a call of its own, which saves copies; otherwise one call is compiled in a loop."""
        return len(self.num_keys) <= _MOST_CALLS


def _chunks(mask: MaskArgs, static: StaticArgs, num_queries: int, num_keys: int) -> _Chunks:
    block, size = static.block_size, math.gcd(static.block_size, num_queries)
    if size < min(_SMALLEST_CHUNK, num_queries):
        size = num_queries
    firsts = range(0, num_queries, size)
    if static.whole:
        until = [min((first // block + 1) * block, num_keys) for first in firsts]
        return _Chunks(size, until, size <= block)
    limit = jnp.clip(mask.kv_length - mask.kv_start, 0, num_keys)

    def seen_until(query: int) -> Array:
        number = lax.div(mask.q_start + query, jnp.int32(block))
        return jnp.clip((number + 1) * block - mask.kv_start, 0, limit)

    found, uniform = [], jnp.bool_(True)
    for first in firsts:
        found.append(seen_until(first))
        uniform &= found[-1] == seen_until(first + size - 1)
    return _Chunks(size, found, uniform)


def _zero_unwritten(x: Array, num_keys: Array) -> Array:
    """Gradients of keys with zeros after the first `num_keys`; cuDNN does not write that memory."""
    written = jnp.arange(x.shape[1]) < num_keys
    return jnp.where(written.reshape(1, -1, *(1,) * (x.ndim - 2)), x, 0)


def _add_to_prefix(x: Array, first: Array) -> Array:
    """`x` with `first` added to its first positions. With `x.at[].add`, a scatter, XLA crashes on several GPUs."""
    length = first.shape[1]
    return x + first if length == x.shape[1] else x.at[:, :length].set(x[:, :length] + first)


def _rows_of_queries(x: Array, q: Array, first_row: Array) -> Array:
    """The rows of keys that the queries attend to: all rows, or a copy of some rows of a cache."""
    return x if len(x) == len(q) else lax.dynamic_slice_in_dim(x, first_row, len(q))


def _one_segment(mask: MaskArgs, num_queries: int) -> bool | Array:
    """Whether all queries and keys have the same segment id and no key is hidden."""
    mask = block_mask.valid_as_segments(mask, num_queries)
    if mask.q_segments is None or mask.kv_segments is None:
        return True
    first = mask.q_segments[:, :1]
    return jnp.all(mask.q_segments == first) & jnp.all(mask.kv_segments == first)


class Chunked(NamedTuple):
    """A kernel that calls `fused` on chunks of queries, and `other` (on rows) where `fused` cannot serve."""

    fused: Fused
    other: Kernel
    heads_in_place: bool

    def forward(
        self, q: Array, k: Array, v: Array, mask: MaskArgs, static: StaticArgs
    ) -> tuple[Array, Array]:
        """The forward pass, as `base.Forward`."""
        chunks = _chunks(mask, static, q.shape[1], k.shape[1])

        def by_fused() -> tuple[Array, Array]:
            keys, values = (_rows_of_queries(x, q, mask.first_row) for x in (k, v))

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
                return chunks.set(found[0], out, i), chunks.set(found[1], lse, i, axis=-1)

            nothing = jnp.zeros_like(q), jnp.zeros(self._lse_shape(q), jnp.float32)
            out, lse = lax.fori_loop(0, len(chunks.num_keys), step, nothing)
            return out.astype(jnp.float32), lse

        def by_other() -> tuple[Array, Array]:
            q_NQD, k_MKD, v_MKD = (self._rows(x) for x in (q, k, v))
            out, lse = self.other.forward(q_NQD, k_MKD, v_MKD, mask, static)
            return from_rows(out, lse, q.shape[2]) if self.heads_in_place else (out, lse)

        return self._either(q, mask, chunks.uniform, by_fused, by_other)

    def backward(
        self, q: Array, k: Array, v: Array, dout: Array, lse: Array, delta: Array, mask: MaskArgs, static: StaticArgs
    ) -> tuple[Array, Array, Array]:  # fmt: skip
        """The backward pass, as `base.Backward`."""
        chunks = _chunks(mask, static, q.shape[1], k.shape[1])
        dout = dout.astype(q.dtype)

        def by_fused() -> tuple[Array, Array, Array]:
            # cuDNN computes delta = sum(output * dout) itself and uses the output for nothing else. So any output with the
            # given delta will do; this one is dout times a factor.
            wide = dout.astype(jnp.float32)
            power = jnp.sum(jnp.square(wide), axis=-1)
            share = jnp.where(power > 0, delta / jnp.where(power > 0, power, 1.0), 0.0)
            out = (wide * share[..., None]).astype(q.dtype)
            finite_lse = jnp.where(jnp.isneginf(lse), _HUGE_LSE, lse)

            def of_chunk(i: Any, num_keys: int | Array) -> tuple[Array, Array, Array]:
                q_part, dout_part, out_part = (chunks.of(x, i) for x in (q, dout, out))
                parts = dout_part, out_part, chunks.of(finite_lse, i, axis=-1)
                if isinstance(num_keys, int):
                    seen = slice(0, num_keys)
                    return self.fused.backward(q_part, k[:, seen], v[:, seen], *parts, None)
                dq, dk, dv = self.fused.backward(q_part, k, v, *parts, num_keys)
                return (
                    jnp.where(num_keys > 0, dq, 0),
                    _zero_unwritten(dk, num_keys),
                    _zero_unwritten(dv, num_keys),
                )

            dk, dv = (jnp.zeros(x.shape, jnp.float32) for x in (k, v))
            if chunks.unrolled:
                dqs = []
                for i, num_keys in enumerate(chunks.num_keys):
                    dq, more_k, more_v = of_chunk(i, num_keys)
                    dqs.append(dq)
                    dk, dv = _add_to_prefix(dk, more_k), _add_to_prefix(dv, more_v)
                return jnp.concatenate(dqs, axis=1).astype(jnp.float32), dk, dv
            num_keys = jnp.asarray(chunks.num_keys)

            def step(i: Array, found: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
                dq, more_k, more_v = of_chunk(i, num_keys[i])
                return chunks.set(found[0], dq, i), found[1] + more_k, found[2] + more_v

            start = jnp.zeros_like(q), dk, dv
            dq, dk, dv = lax.fori_loop(0, len(chunks.num_keys), step, start)
            return dq.astype(jnp.float32), dk, dv

        def by_other() -> tuple[Array, Array, Array]:
            q_NQD, k_NKD, v_NKD, dout_NQD = (self._rows(x) for x in (q, k, v, dout))
            lse_NQ = lse.reshape(-1, q.shape[1])
            delta_NQ = self._rows(delta[..., None])[..., 0]
            found = self.other.backward(
                q_NQD, k_NKD, v_NKD, dout_NQD, lse_NQ, delta_NQ, mask, static
            )
            if self.heads_in_place:
                found = [heads_of(x, q.shape[2]) for x in found]
            dq, dk, dv = found
            return dq, dk, dv

        return self._either(q, mask, chunks.uniform, by_fused, by_other)

    def prefixes(
        self, q: Array, k: Array, v: Array, first_row: Array, lengths: Array
    ) -> tuple[Array, Array] | None:
        """As `base.Prefixes`, by `fused` alone."""
        if not serves(q.shape[-1], q.dtype):
            return None
        keys, values = (_rows_of_queries(x, q, first_row) for x in (k, v))
        out, lse = self.fused.forward(q, keys, values, lengths)
        any_key = jnp.repeat(lengths > 0, len(q) // len(lengths))[:, None]
        out = jnp.where(any_key[..., None], out, 0).astype(jnp.float32)
        return out, jnp.where(any_key, lse, -jnp.inf)

    def _either(
        self, q: Array, mask: MaskArgs, uniform: bool | Array, by_fused: Any, by_other: Any
    ) -> Any:
        if uniform is False or not serves(q.shape[-1], q.dtype):
            return by_other()
        served = uniform & _one_segment(mask, q.shape[1])
        return by_fused() if served is True else lax.cond(served, by_fused, by_other)

    def _rows(self, x: Array) -> Array:
        return rows(x) if self.heads_in_place else x

    def _lse_shape(self, q: Array) -> tuple[int, ...]:
        return (q.shape[0], q.shape[2], q.shape[1]) if self.heads_in_place else q.shape[:2]


_ROWS, _HEADS = (Chunked(_Cudnn(x), pallas_gpu.KERNEL, heads_in_place=x) for x in (False, True))

KERNEL = Kernel(
    _ROWS.forward, _ROWS.backward, Kernel(_HEADS.forward, _HEADS.backward), _ROWS.prefixes
)


def check(head_dim: int, dtype: jax.typing.DTypeLike) -> None:
    """Checks that cuDNN or our kernels can serve a head size and a dtype, and that jax has the primitives used here.

    Raises:
      ValueError: neither can serve them, or this version of jax has no such primitives.
    """
    pallas_gpu.check(head_dim, dtype)
    try:
        for direction in ("fwd", "bwd"):
            _primitive(direction)
            _neutral_settings(direction)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"Attention cannot call cuDNN through jax {jax.__version__}: {error}; use "
            "attention_implementation='pallas_gpu', or jax 0.10 to 0.12."
        ) from error

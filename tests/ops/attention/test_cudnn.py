"""What surrounds cuDNN: chunks, lengths, the logsumexp, delta, and what the other kernel serves.

cuDNN itself needs a GPU. A library with the same contract in jax.numpy replaces it, which writes nan wherever cuDNN
leaves memory unwritten. A test that lowers for CUDA checks how cuDNN is called.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import released
from attention_cases import piece

from elastic.ops.attention import blockwise, cudnn, dispatch
from elastic.ops.attention.base import (
    Kernel,
    MaskArgs,
    StaticArgs,
    attend,
    from_rows,
    heads_of,
    rows,
)


class JaxLibrary:
    """Rows [N, Q, D]."""

    def forward(self, q, k, v, kv_length):
        logits = jnp.einsum("nqd,nkd->nqk", q, k, preferred_element_type=jnp.float32)
        kv_length = k.shape[1] if kv_length is None else kv_length
        seen = (jnp.arange(k.shape[1]) < kv_length)[None, None]
        logits = jnp.where(seen, logits * q.shape[-1] ** -0.5, -jnp.inf)
        lse = jax.nn.logsumexp(logits, axis=-1)
        weights = jnp.where(seen, jnp.exp(logits - lse[..., None]), 0.0)
        out = jnp.einsum("nqk,nkd->nqd", weights, v.astype(jnp.float32)).astype(q.dtype)
        return tuple(jnp.where(kv_length > 0, x, jnp.nan) for x in (out, lse))

    def backward(self, q, k, v, dout, out, lse, kv_length):
        q32, k32, v32, dout32, out32 = (x.astype(jnp.float32) for x in (q, k, v, dout, out))
        scale, kv_length = q.shape[-1] ** -0.5, k.shape[1] if kv_length is None else kv_length
        logits = jnp.einsum("nqd,nkd->nqk", q32, k32) * scale
        seen = (jnp.arange(k.shape[1]) < kv_length)[None, None]
        weights = jnp.where(seen, jnp.exp(logits - lse[..., None]), 0.0)
        delta = jnp.sum(out32 * dout32, axis=-1, keepdims=True)
        dlogits = weights * (jnp.einsum("nqd,nkd->nqk", dout32, v32) - delta) * scale
        found = (
            jnp.einsum("nqk,nkd->nqd", dlogits, k32),
            jnp.einsum("nqk,nqd->nkd", dlogits, q32),
            jnp.einsum("nqk,nqd->nkd", weights, dout32),
        )
        exists = (jnp.arange(k.shape[1]) < kv_length)[None, :, None]
        written = jnp.bool_(True) & (kv_length > 0), exists, exists
        return tuple(
            jnp.where(x, y, jnp.nan).astype(q.dtype) for x, y in zip(written, found, strict=True)
        )


def by_rows(method, q, k, v, *rest):
    """A method of `JaxLibrary` with heads in place."""

    rest = [
        x if x is None or x.ndim == 0 else rows(x) if x.ndim == 4 else x.reshape(-1, x.shape[-1])
        for x in rest
    ]
    found = method(*map(rows, (q, k, v)), *rest)
    heads = q.shape[2]
    return from_rows(*found, heads) if len(found) == 2 else tuple(heads_of(x, heads) for x in found)


class JaxLibraryOnHeads:
    """The same, [b, Q, h, D]."""

    forward = staticmethod(functools.partial(by_rows, JaxLibrary().forward))
    backward = staticmethod(functools.partial(by_rows, JaxLibrary().backward))


class Refuses:
    """Replaces a part that must not be called: it returns nan, which the comparison would find."""

    def __init__(self, dtype):
        self.dtype = dtype

    def forward(self, q, k, *_):
        lse = q.shape[:2] if q.ndim == 3 else (len(q), q.shape[2], q.shape[1])
        return jnp.full(q.shape, jnp.nan, self.dtype), jnp.full(lse, jnp.nan)

    def backward(self, q, k, *_):
        return tuple(jnp.full(x.shape, jnp.nan, self.dtype) for x in (q, k, k))


NO_LIBRARY, NO_OTHER = Refuses(jnp.bfloat16), Refuses(jnp.float32)


def chunked(library, other, heads=False) -> Kernel:
    found = cudnn.Chunked(library, other, heads)
    return Kernel(found.forward, found.backward)


# Pieces as a ring or a cache passes them, and whether the library serves them.
PIECES = {
    "whole": (dict(queries=512, keys=512, dim=32, block=128), True),
    "a ring's piece inside a block": (
        dict(queries=128, keys=192, dim=32, block=256, q_start=384, kv_start=64, kv_length=230),
        True,
    ),
    "first chunk sees nothing": (
        dict(queries=256, keys=128, dim=32, block=128, kv_start=128),
        True,
    ),
    "more chunks than calls": (dict(queries=2304, keys=2304, dim=32, block=128), True),
    "few queries": (dict(queries=40, keys=90, dim=32, block=90), True),
    "chunks would cross blocks": (
        dict(queries=256, keys=256, dim=32, block=128, q_start=64),
        False,
    ),
    "blocks too small for calls of their own": (
        dict(queries=256, keys=256, dim=32, block=16),
        False,
    ),
    "segments": (dict(queries=128, keys=128, dim=32, block=128, segments=True), False),
    "hidden keys": (dict(queries=128, keys=128, dim=32, block=128, hidden=True), False),
}


@functools.partial(released.quick_jit, static_argnums=(0, 3))
def run(kernel, arrays, mask, static, elsewhere):
    """Output, logsumexp and gradients. `elsewhere` is the logsumexp over keys of other devices, as in a ring."""
    q, k, v, dout = arrays
    out, lse = kernel.forward(q, k, v, mask, static)
    far = jnp.logaddexp(lse, elsewhere)
    share = jnp.where(jnp.isneginf(lse), 0.0, jnp.exp(lse - far))
    delta = jnp.sum(out * share[..., None] * dout, axis=-1)
    return out, lse, *kernel.backward(q, k, v, dout, far, delta, mask, static)


@pytest.mark.parametrize("name", PIECES)
def test_the_library_and_the_other_kernel_share_the_work_and_the_numbers(name):
    makings, served = PIECES[name]
    arrays, mask, static = piece(**makings)
    arrays = tuple(x.astype(jnp.bfloat16) for x in arrays)
    elsewhere = jnp.asarray(np.random.default_rng(0).normal(size=arrays[0].shape[:2]), jnp.float32)
    # The part that must not be called would return nan.
    parts = (JaxLibrary(), NO_OTHER) if served else (NO_LIBRARY, blockwise.KERNEL)
    ours = run(chunked(*parts), arrays, mask, static, elsewhere)
    expected = run(blockwise.KERNEL, arrays, mask, static, elsewhere)
    for got, wanted in zip(ours, expected, strict=True):
        np.testing.assert_allclose(got, wanted, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("whole", [False, True])
def test_heads_in_place_give_what_rows_give(whole):
    rng = np.random.default_rng(1)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 256, 3, 32)), jnp.bfloat16) for _ in range(3))
    static = StaticArgs(128, 64, 64, rows_per_batch=3, whole=whole)

    def results(mask, *parts):
        def loss(q, k, v):
            out, lse = attend(q, k, v, mask, static, chunked(*parts, heads=True))
            return jnp.sum(jnp.sin(out)), (out, lse)

        return released.quick_jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)

    mask = MaskArgs(*map(jnp.int32, (0, 0, 256, 0)))
    one, two = jnp.zeros((2, 256), jnp.int32), jnp.arange(256)[None].repeat(2, 0) // 128
    library = results(mask._replace(q_segments=one, kv_segments=one), JaxLibraryOnHeads(), NO_OTHER)
    _, (out, _) = results(mask, NO_LIBRARY, blockwise.KERNEL)  # here the library must be called
    assert np.isnan(out).all()
    packed = mask._replace(q_segments=two, kv_segments=two)
    rest = results(packed, NO_LIBRARY, blockwise.KERNEL)
    for name, found, segments in (("one", library, one), ("two", rest, two)):
        expected = reference(q, k, v, segments)
        for got, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(
                np.asarray(got, np.float32), np.asarray(wanted, np.float32), atol=2e-2, err_msg=name
            )


def reference(q, k, v, segments):
    from elastic.ops.attention import reference

    def loss(q, k, v):
        mask = MaskArgs(*map(jnp.int32, (0, 0, 256, 0)), q_segments=segments, kv_segments=segments)
        out, lse = reference.attend(q, k, v, mask, block_size=128)
        return jnp.sum(jnp.sin(out)), (out, lse)

    return jax.grad(loss, (0, 1, 2), has_aux=True)(*(x.astype(jnp.float32) for x in (q, k, v)))


def test_elements_with_caches_of_different_lengths_share_a_call():
    rng = np.random.default_rng(2)
    shapes = ((6, 40, 32), (6, 96, 32), (6, 96, 32))
    q, k, v = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes)
    lengths = jnp.array([96, 0, 33])

    class OfElements:
        def forward(self, q, k, v, kv_length):
            parts = [
                JaxLibrary().forward(*(x[2 * i : 2 * i + 2] for x in (q, k, v)), n)
                for i, n in enumerate(kv_length)
            ]
            return tuple(jnp.concatenate(x) for x in zip(*parts, strict=True))

    ours = cudnn.Chunked(OfElements(), NO_OTHER, False).prefixes(q, k, v, jnp.int32(0), lengths)
    assert ours is not None
    for i, length in enumerate(lengths):
        mine = slice(2 * i, 2 * i + 2)
        mask = MaskArgs(*map(jnp.int32, (0, 0, length, 0)))
        expected = blockwise.KERNEL.forward(
            q[mine], k[mine], v[mine], mask, StaticArgs(96, 64, 64, 2)
        )
        for got, wanted in zip(ours, expected, strict=True):
            np.testing.assert_allclose(got[mine], wanted, atol=2e-2)


def test_keys_lie_in_a_cache_of_more_rows():
    (q, k, v, _), mask, static = piece(queries=128, keys=128, dim=32, block=128)
    q = q.astype(jnp.bfloat16)
    cache = [jnp.concatenate([x * 3, x, x * 5]).astype(jnp.bfloat16) for x in (k, v)]
    mask = mask._replace(first_row=jnp.int32(4))
    got = chunked(JaxLibrary(), NO_OTHER).forward(q, *cache, mask, static)
    expected = blockwise.KERNEL.forward(q, *cache, mask, static)
    for ours, wanted in zip(got, expected, strict=True):
        np.testing.assert_allclose(ours, wanted, atol=2e-2)


@pytest.mark.parametrize("heads", [False, True])
def test_cudnn_is_called_as_this_jax_knows_it(heads):
    """Lowered for CUDA, forward and backward are one call of cuDNN each, with a mask of lengths and the layout asked for."""
    library = cudnn._Cudnn(heads)
    shape = (2, 256, 3, 64) if heads else (6, 256, 64)
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    lse = jax.ShapeDtypeStruct((2, 3, 256) if heads else (6, 256), jnp.float32)
    lengths = {"PADDING": (), "NO_MASK": None} | ({} if heads else {"PADDING of each": (2,)})

    def lowered(function, *shapes):
        traced = jax.jit(function).trace(*shapes)
        shown = [y.shape for y in jax.tree.leaves(traced.out_info)]
        assert shown == [shape, lse.shape] or shown == [shape] * 3
        return traced.lower(lowering_platforms=("cuda",)).as_text()

    for kind, length in lengths.items():
        given = None if length is None else jax.ShapeDtypeStruct(length, jnp.int32)
        forward = lowered(library.forward, x, x, x, given)
        backward = lowered(library.backward, x, x, x, x, x, lse, given)
        for text, target in ((forward, "fmhaSoftmax"), (backward, "fmhaSoftmaxBackward")):
            assert text.count(f"@__cudnn${target}(") == 1
            assert f'"mask_type": "{kind.split()[0]}"' in text.replace("\\22", '"')


def test_what_cudnn_serves():
    assert cudnn.serves(128, jnp.bfloat16) and cudnn.serves(64, jnp.bfloat16)
    assert not cudnn.serves(128, jnp.float32)
    assert not cudnn.serves(256, jnp.bfloat16)
    assert not cudnn.serves(100, jnp.bfloat16)


def test_a_jax_without_the_parts_is_refused_and_pallas_chosen(monkeypatch, caplog):
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.delattr(fused_attention_stablehlo, "_dot_product_attention_bwd_p_wrapper")
    with pytest.raises(
        ValueError, match=r"no attribute '_dot_product_attention_bwd_p_wrapper'.*pallas_gpu"
    ):
        cudnn.check(128, jnp.bfloat16)
    assert dispatch._best.__wrapped__("gpu", 128, jnp.dtype("bfloat16")) == "pallas_gpu"
    assert "does not run as 'gpu'" in caplog.text
    monkeypatch.undo()
    assert dispatch._best.__wrapped__("gpu", 128, jnp.dtype("bfloat16")) == "gpu"


def test_gpu_by_name_is_refused_on_a_cpu():
    with pytest.raises(ValueError, match=r"'gpu' runs on gpu.*pallas_gpu_interpret"):
        dispatch.choose_implementation("gpu")


def test_a_jax_whose_cudnn_takes_other_parameters_is_refused_by_their_name(monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo

    name = "_dot_product_attention_bwd_impl"
    known = getattr(fused_attention_stablehlo, name)
    signature = inspect.signature(known)
    more = inspect.Parameter("softcap", inspect.Parameter.KEYWORD_ONLY)

    def of_tomorrow(*args, **kwargs):
        return known(*args, **kwargs)

    of_tomorrow.__signature__ = signature.replace(parameters=[*signature.parameters.values(), more])
    monkeypatch.setattr(fused_attention_stablehlo, name, of_tomorrow)
    cudnn._neutral_settings.cache_clear()
    with pytest.raises(ValueError, match=r"takes other parameters: softcap.*pallas_gpu"):
        cudnn.check(128, jnp.bfloat16)
    cudnn._neutral_settings.cache_clear()

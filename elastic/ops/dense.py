"""Matrix products with operands in a chosen dtype and float32 sums, written so that XLA:CPU runs them fast too."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from elastic.ops import bf16_bits


def dot(a: Array, b: Array, contract: tuple[int, int] = (1, 0)) -> Array:
    """The product of two arrays over axis `contract[0]` of a and `contract[1]` of b, summed in float32."""
    return lax.dot_general(
        a, b, (((contract[0],), (contract[1],)), ((), ())), preferred_element_type=jnp.float32
    )


def dense(
    x: Float[Array, "*b i"], kernel: Float[Array, "i o"], dtype: DTypeLike
) -> Float[Array, "*b o"]:
    """`x @ kernel` with both operands rounded to `dtype` and a float32 result; gradients likewise.

    The result is float32 on every device, because XLA:CPU runs at half the speed if asked for bfloat16, as a linen
    Dense does. The axes of x are not merged: if batch and sequence are both split over devices, merging them would
    gather x.
    """
    return _dense(x, kernel, jnp.dtype(dtype))


def _product(x: Array, kernel: Array, dtype: jnp.dtype) -> Array:
    return dot(x.astype(dtype), kernel.astype(dtype), (x.ndim - 1, 0))


_dense = jax.custom_vjp(_product, nondiff_argnums=(2,))


def _dense_fwd(x: Array, kernel: Array, dtype: jnp.dtype):
    # Saving the rounded operand halves the memory of bfloat16 training. It is saved as uint16, because a scan stacks it.
    return _dense(x, kernel, dtype), (
        bf16_bits.to_bits(x.astype(dtype)),
        kernel,
        jnp.zeros((), x.dtype),
    )


def _dense_bwd(dtype: jnp.dtype, saved, gradient: Array):
    x, kernel, x_like = saved
    gradient = gradient.astype(dtype)
    dx = dot(gradient, kernel.astype(dtype), (x.ndim - 1, 1)).astype(x_like.dtype)
    return dx, _weight_gradient(bf16_bits.from_bits(x), gradient).astype(kernel.dtype)


_dense.defvjp(_dense_fwd, _dense_bwd)


def _weight_gradient(x: Array, gradient: Array) -> Array:
    """x^T @ gradient over all axes but the last, in float32."""
    rows = tuple(range(x.ndim - 1))

    def at_once(x: Array, gradient: Array) -> Array:
        return lax.dot_general(
            x, gradient, ((rows, rows), ((), ())), preferred_element_type=jnp.float32
        )

    def as_matrices(x: Array, gradient: Array) -> Array:
        # The barrier computes the matrix before it is transposed: computing it in transposed order takes 3 times as long.
        x, gradient = (lax.optimization_barrier(y.reshape(-1, y.shape[-1])) for y in (x, gradient))
        if x.shape[1] > gradient.shape[1]:  # transposing is expensive: transpose the narrower one
            return transposed_in_memory(dot(transposed_in_memory(gradient), x))
        return dot(transposed_in_memory(x), gradient)

    return lax.platform_dependent(x, gradient, cpu=as_matrices, default=at_once)


def transposed_in_memory(x: Float[Array, "a b"]) -> Float[Array, "b a"]:
    """The transposed matrix, for use as the left operand of a product on the CPU.

    If XLA:CPU recognizes a transposition of the left operand, it multiplies in float32 and not in bfloat16: 250 instead
    of 800 GFLOP/s at 1024 x 4096 x 1024 on two cores. It does not recognize a transposition of three axes. The barrier
    makes XLA transpose the array in memory.
    """
    rows, columns = x.shape
    halves = x.reshape(2, rows // 2, columns) if rows % 2 == 0 else x[None]
    return lax.optimization_barrier(halves.transpose(2, 0, 1)).reshape(columns, rows)

"""Matrix products with operands in a chosen type and sums in float32, phrased so that CPUs run them fast too."""

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
    """`x @ kernel` with both operands rounded to `dtype` and a float32 result, gradients likewise.

    Asking XLA:CPU for a bfloat16 result, as a linen Dense does, halves the rate; hence the float32 result on every device. The axes of x
    stay apart: rows of a batch and of a sequence that are both split over devices would have to be gathered to become one axis.
    """
    return _dense(x, kernel, jnp.dtype(dtype))


def _product(x: Array, kernel: Array, dtype: jnp.dtype) -> Array:
    return dot(x.astype(dtype), kernel.astype(dtype), (x.ndim - 1, 0))


_dense = jax.custom_vjp(_product, nondiff_argnums=(2,))


def _dense_fwd(x: Array, kernel: Array, dtype: jnp.dtype):
    # Saving the operand as it was multiplied halves what bfloat16 training keeps; as bits, because a scan stacks it.
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
        # Made first, then turned: what is made in the order of the turned matrix takes three times as long.
        x, gradient = (lax.optimization_barrier(y.reshape(-1, y.shape[-1])) for y in (x, gradient))
        if x.shape[1] > gradient.shape[1]:  # turning is dear: the narrower of the two
            return transposed_in_memory(dot(transposed_in_memory(gradient), x))
        return dot(transposed_in_memory(x), gradient)

    return lax.platform_dependent(x, gradient, cpu=as_matrices, default=at_once)


def transposed_in_memory(x: Float[Array, "a b"]) -> Float[Array, "b a"]:
    """The transposed matrix, to be the left operand of a product on the CPU.

    XLA:CPU multiplies in bfloat16 only if it sees no transposition of the left operand, else in float32: 250 against 800 GFLOP/s at
    1024 x 4096 x 1024 on two cores. It does not see one of three axes. The barrier makes it a transposition in memory.
    """
    rows, columns = x.shape
    halves = x.reshape(2, rows // 2, columns) if rows % 2 == 0 else x[None]
    return lax.optimization_barrier(halves.transpose(2, 0, 1)).reshape(columns, rows)

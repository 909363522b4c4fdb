"""Dense products have float32 sums and plain gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import released
from attention_cases import largest_difference, normal

from elastic import ops


@pytest.mark.parametrize("rows", [1, 37, 512, 2048])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_dense_product_and_its_gradients_are_those_of_a_plain_one(rows, dtype):
    rng = np.random.default_rng(rows)
    x, kernel, cotangent = (normal(rng, *shape) for shape in ((rows, 24), (24, 40), (rows, 40)))

    @released.quick_jit
    def run(x, kernel, cotangent):
        product, vjp = jax.vjp(lambda x, kernel: ops.dense(x, kernel, dtype), x, kernel)
        return product, *vjp(cotangent)

    ours = run(x, kernel, cotangent)
    rounded = [np.asarray(y.astype(dtype), np.float64) for y in (x, kernel, cotangent)]
    x64, kernel64, cotangent64 = rounded
    expected = (x64 @ kernel64, cotangent64 @ kernel64.T, x64.T @ cotangent64)
    for y, exact in zip(ours, expected, strict=True):
        assert y.dtype == jnp.float32 and largest_difference(y, exact) < 1e-5 * np.abs(exact).max()

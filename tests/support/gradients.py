"""Losses and gradients of a model on a released batch, and when two are the same."""

import jax
import numpy as np
import pytest
import released

from elastic.training.loss import training_loss


def loss_and_gradients(model, params, case):
    @released.quick_jit
    def run(params, batch):
        loss = lambda params: training_loss(model, params, batch)[0]  # noqa: E731
        return jax.value_and_grad(loss)(params)

    # Two segments, and a fifth of the keys hidden.
    batch = released.batch(case, "packed")._replace(valid=released.batch(case, "keymask").valid)
    loss, gradients = run(params, batch)
    return float(loss), jax.device_get(gradients)


def assert_same(ours, expected):
    """Losses within 1e-6; gradients within 1e-5 as vectors, and single weights' within 2e-5 of their tensor's largest.

    Merging eight pieces rounds a little more than one softmax, most in the gradients of queries and keys.
    """
    assert ours[0] == pytest.approx(expected[0], rel=1e-6)
    errors = jax.tree.map(released.relative_error, ours[1], expected[1])
    assert max(jax.tree.leaves(errors)) < 2e-5
    distances = jax.tree.map(
        lambda a, b: np.linalg.norm(a - b) / np.linalg.norm(b),
        *map(jax.device_get, (ours[1], expected[1])),
    )
    assert max(jax.tree.leaves(distances)) < 1e-5

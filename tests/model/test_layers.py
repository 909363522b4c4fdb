"""Layers: rotary embeddings at any position, and what rematerialization saves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import released

from elastic.model.layers import LayerStack
from elastic.model.rope import apply_rope, deinterleave_rope, rope_angles

SCAN = {True: "scan", False: "unscan"}


def error(ours, theirs):
    assert ours.shape == theirs.shape
    return float(np.abs(np.asarray(ours, np.float64) - theirs).max())


@pytest.mark.parametrize("policy", ["nothing_saveable", "everything_saveable"])
@pytest.mark.parametrize("scan_layers", [True, False], ids=SCAN.get)
def test_rematerialization_saves_what_its_name_says(policy, scan_layers):
    """Without it XLA, which merges equal work, would undo the recomputation of numbered layers."""
    config = released.config("vae", remat_block=policy, scan_layers=scan_layers, theta=1e4)
    stack = LayerStack(config=config, num_layers=2)
    x = jnp.ones((1, 32, 64))
    positions = jnp.arange(32)[None]
    params = jax.eval_shape(stack.init, jax.random.key(0), x, positions)
    loss = jax.grad(lambda params: jnp.sum(stack.apply(params, x, positions)[0]))
    text = str(jax.make_jaxpr(loss)(params))
    assert f"prevent_cse={not scan_layers}" in text and policy in text


def test_angles_are_exact_at_positions_far_out():
    """Difference 9 in elastic/README.md: no table of a million rows; in bfloat16 positions would repeat from 256 on."""
    positions = jnp.asarray([[0, 1, 255, 257, 16_383, 1_000_003]])
    cos, sin = rope_angles(positions, 128, 5e7)
    assert cos.dtype == sin.dtype == jnp.float32
    frequency = 1 / np.float32(5e7) ** (np.arange(0, 128, 2, dtype=np.float32) / 128)
    angle = np.float32(np.asarray(positions)[0, :, None] * np.float64(frequency))
    assert error(cos[0, :, 0], np.cos(angle.astype(np.float64))) < 1e-6
    assert error(sin[0, :, 0], np.sin(angle.astype(np.float64))) < 1e-6
    exact = np.asarray(positions)[0, :, None] * 5e7 ** (-np.arange(0, 128, 2) / 128)
    # What float32 loses: half a unit in the last place of the largest angle, 0.03 at 10^6.
    assert np.abs(np.asarray(cos[0, :, 0]) - np.cos(exact))[:5].max() < 2e-3


def test_no_two_positions_of_a_long_sequence_turn_alike():
    cos, sin = rope_angles(jnp.arange(16_384)[None], 4, 5e7)
    pairs = np.stack([np.asarray(cos)[0, :, 0], np.asarray(sin)[0, :, 0]], -1).reshape(16_384, -1)
    assert len(np.unique(pairs, axis=0)) == 16_384


def test_deinterleaved_rope_is_the_interleaved_rotation_with_its_channels_moved():
    """The released models turn the pairs (x[2i], x[2i + 1])."""
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.normal(size=(n, 16)), jnp.float32) for n in (6, 16))
    angles = rope_angles(jnp.arange(6)[None], 8, 100.0)
    ours = apply_rope((x @ deinterleave_rope(kernel, 8)).reshape(1, 6, 2, 8), angles)
    plain = np.asarray(x @ kernel).reshape(1, 6, 2, 4, 2)
    turn = np.asarray(angles[0] + 1j * angles[1])
    turned = (plain[..., 0] + 1j * plain[..., 1]) * turn
    assert error(ours, np.concatenate([turned.real, turned.imag], -1)) < 1e-5


def test_angles_of_far_positions_are_exact():
    """What an endless video gets to; up to a million tokens they are the released ones, to the bit."""
    positions = np.array([0, 5, 2**20 - 1, 2**20, 3_000_003, 2**30 + 12_345, 2**31 - 1], np.int32)
    cos, sin = rope_angles(jnp.asarray(positions)[None], 128, 5e7)
    frequency = 1.0 / 5e7 ** (np.arange(0, 128, 2, dtype=np.float32) / 128)
    exact = positions[:, None].astype(np.float64) * frequency.astype(np.float64)
    np.testing.assert_allclose(np.asarray(cos)[0, :, 0], np.cos(exact), atol=0.07)
    np.testing.assert_allclose(np.asarray(sin)[0, :, 0], np.sin(exact), atol=0.07)
    near = jnp.arange(0, 2**20, 997)
    released = near[:, None].astype(jnp.float32) * frequency[None]
    np.testing.assert_array_equal(rope_angles(near[None], 128, 5e7)[0][0, :, 0], jnp.cos(released))

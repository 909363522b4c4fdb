"""LPIPS against the released numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastic.metrics.lpips import lpips, lpips_of_frames, resize, vgg16

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def table(golden):
    with np.load(golden / "unit" / "lpips.npz") as file:
        return dict(file)


def pixels(images):
    """As the released numbers were made: another rounding of one pixel turns a ReLU off or on."""
    return jnp.asarray(images.astype(np.float32) / np.float32(127.5) - 1)


distance = jax.jit(lpips, static_argnames="dtype")


@functools.partial(jax.jit, static_argnames="dtype")
def mean_and_gradients(weights, a, b, *, dtype=jnp.float32):
    loss = lambda a, b: jnp.mean(lpips(weights, a, b, dtype=dtype))  # noqa: E731
    return jax.value_and_grad(loss, argnums=(0, 1))(a, b)


# The distance
@pytest.mark.parametrize("size", [64, 224])
def test_distances_are_the_released_ones(table, weights, size):
    ours = distance(weights, pixels(table[f"a_{size}"]), pixels(table[f"b_{size}"]))
    assert np.abs(ours - table[f"lpips_{size}"].ravel()).max() < TOLERANCE


def test_resized_images_and_their_distances_are_the_released_ones(table, weights):
    a, b = (resize(pixels(table[name])) for name in ("a_64", "b_64"))
    smaller = resize(pixels(table["img256"]))
    for image, name in (
        (a, "resize_64_to_224_first_image_every8th"),
        (smaller, "resize_256_to_224_every8th"),
    ):
        assert np.abs(image[0, ::8, ::8] - table[name]).max() < TOLERANCE
    ours = distance(weights, a, b)
    assert np.abs(ours - table["lpips_64_resized_to_224"].ravel()).max() < TOLERANCE


def test_the_gradient_is_the_released_one_and_none_flows_into_the_original(table, weights):
    _, (ours, none) = mean_and_gradients(weights, pixels(table["a_64"]), pixels(table["b_64"]))
    expected = table["grad_lpips64_wrt_a"]
    assert np.abs(ours[:2] - expected).max() < TOLERANCE * np.abs(expected).max()
    assert (none == 0).all()


@pytest.mark.slow
def test_gradients_of_flat_and_of_equal_images_are_finite(table, weights):
    texture = pixels(table["a_64"][:1, :32, :32])
    flat = jnp.stack([jnp.full(texture.shape[1:], level) for level in (-1.0, 0.0, 1.0)])
    ours = jnp.concatenate([flat, flat, texture])
    theirs = jnp.concatenate([flat, jnp.repeat(texture, 4, axis=0)])
    _, (gradient, _) = mean_and_gradients(weights, ours, theirs)
    assert np.isfinite(gradient).all()
    found = distance(weights, ours, theirs)
    equal = np.array([1, 1, 1, 0, 0, 0, 1], bool)
    assert (found[equal] < 1e-10).all() and (found[~equal] > 0.1).all()
    # Features that are all zero, which these weights' biases rule out: sqrt(0) has no slope.
    dead = jax.tree.map(jnp.zeros_like, weights)
    value, (gradient, _) = mean_and_gradients(dead, ours, theirs)
    assert value == 0 and (gradient == 0).all()


def test_bfloat16_operands_give_nearly_the_same_distance_and_direction(table, weights):
    a, b = (pixels(table[name][:, :32, :32]) for name in ("a_64", "b_64"))
    (one, (exact, _)), (two, (rounded, _)) = (
        mean_and_gradients(weights, a, b, dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert 0 < abs(one - two) < 0.01 * one
    cosine = jnp.vdot(exact, rounded) / jnp.linalg.norm(exact) / jnp.linalg.norm(rounded)
    assert 0.95 < cosine < 1


def test_each_stage_is_half_as_large_as_the_one_before(weights):
    shapes = jax.eval_shape(lambda: vgg16(weights, jnp.zeros((2, 50, 33, 3))))
    assert [stage.shape[1:] for stage in shapes] == [
        (50, 33, 64), (25, 16, 128), (12, 8, 256), (6, 4, 512), (3, 2, 512)
    ]  # fmt: skip
    assert shapes._fields == ("relu1_2", "relu2_2", "relu3_3", "relu4_3", "relu5_3")


def test_an_image_too_small_for_four_poolings_is_refused(weights):
    small = jnp.zeros((1, 15, 64, 3))
    with pytest.raises(ValueError, match=r"16 x 16 pixels or more, not \(15, 64\); use `resize`"):
        lpips(weights, small, small)


@pytest.mark.parametrize("num", [0, 1, 5])
def test_frames_have_the_same_distances_in_batches(table, weights, num):
    """Five frames in batches of two: the last one is filled up."""
    a, b = (np.tile(table[name][:, :32, :32], (2, 1, 1, 1))[:num] for name in ("a_64", "b_64"))
    found = lpips_of_frames(weights, a, b, batch_size=2)
    assert found.shape == (num,)
    if num:
        assert np.allclose(found, distance(weights, pixels(a), pixels(b)), atol=TOLERANCE)

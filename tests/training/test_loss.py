"""The training loss: which tokens it counts, which frames LPIPS compares, and that a mesh changes neither."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import released
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from elastic.distributed.mesh import make_mesh
from elastic.distributed.sharding import param_shardings
from elastic.metrics import load_lpips_weights
from elastic.model import Batch, ElasticTok
from elastic.patches import patchify
from elastic.training import loss as losses
from elastic.training.loss import training_loss

LPIPS = dict(lpips_loss_ratio=0.1)


def bare(case):
    """The inputs of a case without ids: those of a part are then a part of them."""
    return Batch(*released.batch(case)[:2])


def part(batch, tokens):
    return jax.tree.map(lambda x: x[:, :tokens], batch)


@pytest.fixture
def cheap_lpips(monkeypatch):
    """A stand-in for the network: the mean squared error, each number with its own weight."""

    def distance(weights, images, originals):
        del weights
        values = np.random.default_rng(0).uniform(0.5, 1.5, (1, *images.shape[1:]))
        return jnp.mean(jnp.square(images - originals) * jnp.asarray(values), axis=(1, 2, 3))

    monkeypatch.setattr(losses, "lpips", distance)
    monkeypatch.setattr(losses, "resize", lambda images: images)


def config(case, **changes):
    """With the attention that compiles fastest."""
    return released.config(case, scan_attention=False, **changes)


@functools.cache
def program(case):
    model = ElasticTok(config(case))
    loss = functools.partial(training_loss, model)
    return released.quick_jit(jax.value_and_grad(loss, has_aux=True))


def value_and_gradient(case, batch):
    (_, terms), gradient = program(case)(released.params(case), batch)
    return terms, flatten_dict(gradient, sep="/")


def assert_same(ours, expected, tolerance=1e-5):
    for mine, theirs in zip(ours, expected, strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            assert released.relative_error(mine[name], value) < tolerance, name


# What counts


def test_padding_changes_no_term_and_no_gradient():
    """Blocks that are not counted, at the end: all is as if they were not there, whatever they hold."""
    case = "vae"  # which has an auxiliary loss
    batch, length = bare(case), config(case).tokens_per_block
    counted = jnp.broadcast_to(jnp.arange(batch.kept.shape[1])[None] < length, batch.kept.shape)
    padded = batch._replace(counted=counted)
    ours = value_and_gradient(case, padded)
    assert_same(ours, value_and_gradient(case, part(batch, length)))
    other = padded._replace(patches=jnp.where(counted[..., None], batch.patches, 1.0))
    assert_same(value_and_gradient(case, other), ours)
    # And where all counts, it is the loss of a batch that does not say what does.
    every = value_and_gradient(case, batch._replace(counted=jnp.ones_like(counted)))
    assert_same(every, value_and_gradient(case, batch))


# LPIPS


def test_a_ratio_of_0_computes_nothing_of_lpips(monkeypatch):
    monkeypatch.setattr(losses, "_perceptual_loss", None)  # not even called
    loss = functools.partial(training_loss, ElasticTok(config("fsq")), perceptual={})
    _, terms = jax.eval_shape(loss, released.params("fsq"), bare("fsq"))
    assert "lpips_loss" not in terms


def test_a_ratio_without_weights_or_key_is_refused_with_the_way_out():
    model = ElasticTok(config("fsq", **LPIPS))
    call = functools.partial(training_loss, model, released.params("fsq"), part(bare("fsq"), 32))
    with pytest.raises(ValueError, match=r"lpips_loss_ratio=0\.1 .*perceptual=None") as caught:
        call()
    assert "load_lpips_weights()" in str(caught.value) and "ratio=0." in str(caught.value)
    with pytest.raises(ValueError, match="but frame_key=None"):
        call(perceptual={})


@pytest.mark.parametrize(
    ("case", "num_blocks", "mesh"),
    [("fsq", 4, None), ("vae", 3, None), ("fsq", 3, "1,1,1,4"), ("vae", 3, "2,1,1,4")],
)
def test_every_frame_that_counts_is_drawn_and_no_other(monkeypatch, case, num_blocks, mesh):
    """Three blocks of two or four frames do not divide among four devices; their tokens do."""
    model = config(case)
    frames, size = num_blocks * model.frames_per_block, model.resolution
    video = np.random.default_rng(0).uniform(-1, 1, (2, frames, size, size, 3)).astype(np.float32)
    patches = patchify(
        video.reshape(2, num_blocks, model.frames_per_block, size, size, 3), model.patch_size
    ).reshape(2, num_blocks * model.tokens_per_block, -1)
    blocks = np.ones((2, num_blocks), bool)
    blocks[0, 1] = blocks[0, 2] = False
    counted = np.repeat(blocks, model.tokens_per_block, axis=1)
    batch = Batch(jnp.asarray(patches), jnp.ones(counted.shape, bool), counted=jnp.asarray(counted))

    traced = []

    def which(weights, images, originals):  # frame of the video the two images are
        del weights
        same = [jnp.all(video == x[:, None], axis=(2, 3, 4)) for x in (images, originals)]
        traced.append(same[0] & same[1])
        return jnp.ones(len(images))

    monkeypatch.setattr(losses, "lpips", which)
    monkeypatch.setattr(losses, "resize", lambda images: images)
    devices = None if mesh is None else make_mesh(mesh, jax.devices()[: 8 if mesh[0] == "2" else 4])

    @jax.jit
    def run(batch, key):
        value = losses._perceptual_loss(model, devices, {}, batch.patches, batch, key)
        return value, traced.pop()

    drawn = np.zeros((2, frames), int)
    for seed in range(80):
        value, frame = run(batch, jax.random.key(seed))
        assert value == 1 and (frame.sum(1) == 1).all()  # of both the same frame, and whole
        drawn += np.asarray(frame)
    expected = np.repeat(blocks, model.frames_per_block, axis=1)
    assert ((drawn > 0) == expected).all()


def test_a_sequence_without_a_block_that_counts_is_left_out(cheap_lpips):
    batch = bare("vae")
    loss = functools.partial(losses._perceptual_loss, config("vae"), None, {})
    loss = jax.jit(functools.partial(loss, jnp.zeros_like(batch.patches)))

    def draws(counted):
        keys = [jax.random.key(seed) for seed in range(64)]
        return np.unique([loss(batch._replace(counted=counted), key) for key in keys])

    none = jnp.zeros_like(batch.kept)
    first, second = none.at[0, :32].set(True), none.at[1, :32].set(True)
    assert len(draws(first)) == len(draws(second)) == 4  # one block of four frames
    every_pair = (draws(first)[:, None] + draws(second)[None]).ravel() / 2
    assert np.isclose(draws(first | second)[:, None], every_pair[None]).any(axis=1).all()
    assert (draws(none) == 0).all()


# Meshes


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return load_lpips_weights()


def largest_collective(text, width):
    """Numbers in the largest array of rows of `width` that an all-gather, an all-to-all or an all-reduce gives."""
    found = [0]
    for line in text.splitlines():
        if before := re.match(r"(.*?) (?:all-gather|all-to-all|all-reduce)(?:-start)?\(", line):
            for shape in re.findall(r"\w+\[([\d,]+)\]", before[1]):
                sizes = [int(n) for n in shape.split(",")]
                found += [int(np.prod(sizes))] if sizes[-1] == width else []
    return max(found)


def placed(mesh, tree):
    place = lambda x: NamedSharding(mesh, P(("dp", "fsdp"), "sp", *[None] * (x.ndim - 2)))  # noqa: E731
    return jax.tree.map(lambda x: jax.device_put(x, place(x)), tree)


def test_loss_and_gradients_do_not_depend_on_the_mesh_and_no_sequence_travels(cheap_lpips):
    case = "vae"  # a patch of two frames
    batch = bare(case)
    batch = batch._replace(counted=jnp.arange(batch.kept.shape[1])[None] < jnp.array([[96], [128]]))

    def run(mesh):
        model = ElasticTok(config(case, **LPIPS), mesh=mesh)

        def loss(params, batch, key):
            return training_loss(model, params, batch, perceptual={}, frame_key=key)

        params, inputs = released.params(case), batch
        if mesh is not None:
            params = jax.device_put(params, param_shardings(mesh, params))
            inputs = placed(mesh, batch)
        arguments = (params, inputs, jax.random.key(5))
        program = released.quick_jit(jax.value_and_grad(loss, has_aux=True))
        program = program.lower(*arguments).compile()
        (_, terms), gradient = program(*arguments)
        return (terms, flatten_dict(gradient, sep="/")), program.as_text()

    one, _ = run(None)
    assert one[0]["loss"] == pytest.approx(
        one[0]["recon_loss"] + one[0]["aux_loss"] + 0.1 * one[0]["lpips_loss"]
    )
    several, text = run(make_mesh("2,1,1,4"))
    assert_same(several, one, 2e-5)
    assert 0 < largest_collective(text, batch.patches.shape[-1]) < batch.patches[0].size


@pytest.mark.slow
def test_lpips_itself_does_not_depend_on_the_mesh(weights):
    """With a wider tolerance for gradients: rounding turns ReLUs of VGG16 on and off."""
    batch = jax.tree.map(lambda x: x[:1], bare("fsq"))
    noise = jax.random.normal(jax.random.key(0), batch.patches.shape)

    def run(mesh, batch, noise):
        loss = functools.partial(losses._perceptual_loss, config("fsq"), mesh)
        program = jax.jit(jax.value_and_grad(loss, argnums=1))
        return program(weights, batch.patches + 0.1 * noise, batch, jax.random.key(5))

    mesh = make_mesh("1,1,1,2", jax.devices()[:2])
    one, two = run(None, batch, noise), run(mesh, *placed(mesh, (batch, noise)))
    assert one[0] > 0.05 and two[0] == pytest.approx(float(one[0]), rel=1e-5)
    assert released.relative_error(two[1], one[1]) < 1e-3
    touched = np.flatnonzero(np.any(np.asarray(one[1]) != 0, axis=(0, 2)))
    assert len(touched) == touched[-1] - touched[0] + 1 == 16  # one frame of 4 x 4 patches


def test_the_logarithm_divides_the_gradient_of_each_block_by_its_error():
    """Padding counts neither in the mean nor in the gradient."""
    model = ElasticTok(config("vae"))
    batch = bare("vae")
    length = model.config.tokens_per_block
    counted = jnp.arange(batch.kept.shape[1])[None] < 2 * length
    batch = batch._replace(counted=jnp.broadcast_to(counted, batch.kept.shape))

    @released.quick_jit
    def both(params):
        def errors(params):
            y, encoded = model.apply({"params": params}, batch)
            squares = jnp.mean(jnp.square(y - batch.patches), axis=-1)
            return jnp.mean(squares[:, : 2 * length].reshape(-1, length), axis=-1), encoded.aux_loss

        values, pull, aux = jax.vjp(errors, params, has_aux=True)
        (expected,) = pull(1 / (values + losses._LEAST_ERROR) / len(values))
        loss = functools.partial(training_loss, model, log_error=True)
        (value, terms), gradient = jax.value_and_grad(loss, has_aux=True)(params, batch)
        return values, aux, value, terms["recon_loss"], expected, gradient

    values, aux, value, recon_loss, expected, gradient = jax.device_get(
        both(released.params("vae"))
    )
    assert value == pytest.approx(np.mean(np.log(values + losses._LEAST_ERROR)) + aux, rel=1e-5)
    assert recon_loss == pytest.approx(np.mean(values), rel=1e-5)
    # The weight of the KL term has a gradient of its own, which the decoder does not see.
    for a, b in zip(*map(jax.tree.leaves, (gradient["decoder"], expected["decoder"])), strict=True):
        assert released.relative_error(a, b) < 1e-4

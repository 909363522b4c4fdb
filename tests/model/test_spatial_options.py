"""The options that released models do not have: token order, positions in space, conditioned decoder, lapped patches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import released
from gradients import assert_same, loss_and_gradients

from elastic.config import ElasticTokConfig
from elastic.distributed.mesh import make_mesh
from elastic.distributed.sharding import param_shardings
from elastic.model import Batch, ElasticTok, init_params, lapped, lapped_filter, param_shapes
from elastic.model.add_options import add_options, before_options
from elastic.model.rope import apply_rope, model_angles
from elastic.patches import reorder, token_numbers, token_places, unpatchify

OPTIONS = dict(
    token_order="coarse_to_fine",
    rope="3d",
    rope_split=(4, 6, 6),
    condition_decoder=True,
    lapped_input=True,
    lapped_output=True,
    patch_group=4,
    haar_groups=True,
    num_group_layers=1,
    bounded_output=False,
)


ALONE = dict(patch_group=1, haar_groups=False, num_group_layers=0)  # without groups


@functools.cache
def params(case="vae"):
    return jax.device_get(init_params(released.config(case, **OPTIONS), jax.random.key(1)))


@functools.cache
def baseline():
    model = ElasticTok(released.config("vae", **OPTIONS))
    return loss_and_gradients(model, params(), "vae")


@pytest.mark.slow
def test_the_mesh_changes_no_number():
    mesh = make_mesh("1,1,2,2", jax.devices()[:4])
    placed = jax.device_put(params(), param_shardings(mesh, params()))
    model = ElasticTok(released.config("vae", **OPTIONS), mesh=mesh)
    assert_same(loss_and_gradients(model, placed, "vae"), baseline())


def test_a_block_does_not_depend_on_later_blocks_and_sees_all_of_itself():
    """By gradients that are zero to the last bit, and by one of every token of a block that is not."""
    model, batch = ElasticTok(released.config("vae", **OPTIONS)), released.batch("vae")
    batch = batch._replace(valid=None)

    @released.quick_jit
    def reach(patches):
        def second_block(patches):
            recon, _ = model.apply({"params": params()}, batch._replace(patches=patches))
            return jnp.sum(recon[:, 32:64] * jnp.arange(1.0, 33).reshape(1, 32, 1))

        return jnp.max(jnp.abs(jax.grad(second_block)(patches)), axis=(0, 2))

    found = np.asarray(reach(batch.patches))
    assert (found[:64] > 0).all() and (found[64:] == 0).all()


@pytest.mark.parametrize("sizes", [(4, 4), (16, 16), (32, 16), (8, 32), (24, 24), (5, 7)], ids=str)
def test_every_prefix_of_the_order_is_spread_over_the_slice(sizes):
    """No place is farther from the first n tokens than twice the spacing of n places on a square lattice.

    A frame is square, so distances are counted in shares of its side. The best lattice leaves holes of 0.71 spacings.
    """
    rows, columns = sizes
    places = token_places(rows, columns, "coarse_to_fine")
    assert sorted(places.tolist()) == list(range(rows * columns))
    numbers = token_numbers(rows, columns, "coarse_to_fine")
    assert (places[numbers] == np.arange(rows * columns)).all()
    where = np.stack([places // columns / rows, places % columns / columns], axis=1)
    distance = np.abs(where[:, None] - where[None])
    distance = np.sqrt((np.minimum(distance, 1 - distance) ** 2).sum(-1))  # around the edges
    hole = np.minimum.accumulate(distance, axis=1).max(axis=0)
    spacing = 1 / np.sqrt(np.arange(1, rows * columns + 1))
    assert (hole <= 2 * np.sqrt(0.5) * spacing + 1e-9).all()


def test_raster_order_is_no_order_at_all():
    assert token_places(4, 4, "raster") is None and token_numbers(4, 4, "raster") is None
    x = np.arange(32.0).reshape(32, 1)
    assert reorder(x, None) is x


@pytest.mark.parametrize("token_order", ["raster", "coarse_to_fine"])
def test_logits_depend_on_the_distance_in_time_rows_and_columns_alone(token_order):
    config = released.config("vae", **OPTIONS | ALONE | dict(token_order=token_order))
    rows, columns = config.slice_shape
    numbers = token_numbers(rows, columns, token_order)

    def token(time, row, column):
        place = row * columns + column
        return time * rows * columns + (place if numbers is None else numbers[place])

    rng = np.random.default_rng(0)
    query, key = (jnp.asarray(rng.normal(size=config.head_dim), jnp.float32) for _ in range(2))

    def logit(first, second):
        ids = jnp.asarray([[token(*first), token(*second)]], jnp.int32)
        angles = model_angles(ids, config)
        turned = apply_rope(jnp.stack([query, key])[None, :, None], angles)[0, :, 0]
        return float(turned[0] @ turned[1])

    near = logit((0, 0, 1), (1, 2, 3))
    assert logit((70, 1, 0), (71, 3, 2)) == pytest.approx(near, abs=1e-4)
    for other in ((1, 2, 2), (1, 1, 3), (2, 2, 3)):
        assert abs(logit((0, 0, 1), other) - near) > 1e-3


def test_an_order_with_positions_in_one_dimension_keeps_those_of_the_places():
    config = released.config("vae", token_order="coarse_to_fine")
    ids = jnp.arange(64, dtype=jnp.int32)[None]
    places = token_places(*config.slice_shape, "coarse_to_fine")
    expected = model_angles(
        jnp.asarray(reorder(np.arange(64)[:, None], places)[None, :, 0]), released.config("vae")
    )
    for ours, raster in zip(model_angles(ids, config), expected, strict=True):
        np.testing.assert_array_equal(ours, raster)


def test_options_added_to_trained_parameters_begin_with_what_the_model_computed():
    """With every token kept the order and the embeddings change nothing, but for the order itself."""
    old = released.config("vae")
    before = jax.device_get(init_params(old, jax.random.key(2)))
    new = old.replace(token_order="coarse_to_fine", condition_decoder=True)
    batch = released.batch("vae")._replace(segment_ids=None, valid=None)
    batch = batch._replace(kept=jnp.ones_like(batch.kept))
    places = token_places(*old.slice_shape, "coarse_to_fine")

    def reconstruct(config, params, patches):
        return ElasticTok(config).apply({"params": params}, batch._replace(patches=patches))[0]

    expected = released.quick_jit(reconstruct, static_argnums=0)(old, before, batch.patches)
    found = released.quick_jit(reconstruct, static_argnums=0)(
        new, add_options(before, old, new), reorder(batch.patches, places)
    )
    np.testing.assert_allclose(found, reorder(expected, places), atol=2e-5)


def test_added_options_give_the_tree_of_the_new_model_and_none_is_taken_away():
    old = released.config("vae", condition_encoder=False)
    new = old.replace(**OPTIONS | ALONE, condition_encoder=True)
    before = jax.device_get(init_params(old, jax.random.key(2)))
    after = add_options(before, old, new)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), param_shapes(new))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == shapes
    # A window is its patch, with the border's pixels around it; the encoder sees nothing in them at first.
    frames, rows, columns = old.patch_size
    for coder, name in (("decoder", "out_proj"), ("encoder", "in_proj")):
        (kernel, window) = (
            tree[coder][name]["kernel"].T if coder == "encoder" else tree[coder][name]["kernel"]
            for tree in (before, after)
        )
        window = window.reshape(-1, frames, 2 * rows, 2 * columns, 3)
        inner = window[:, :, rows // 2 : -(rows // 2), columns // 2 : -(columns // 2)]
        np.testing.assert_array_equal(inner.reshape(kernel.shape), kernel)
        assert np.isclose(np.abs(window).sum(), np.abs(inner).sum()) == (coder == "encoder")
    assert before_options(new, old) == old and before_options(new, None) == new
    with pytest.raises(ValueError, match="lapped_input=True, lapped_output=True"):
        before_options(old, new)


@pytest.mark.parametrize("token_order", ["raster", "coarse_to_fine"])
@pytest.mark.parametrize("patch_size", [(2, 8, 8), (1, 4, 8)], ids=str)
def test_windows_cut_from_a_picture_blend_to_that_picture(patch_size, token_order):
    """The windows sum to one everywhere, and every token stands at its place; beyond the edges is a mirror."""
    config = ElasticTokConfig(
        patch_size=patch_size, max_toks=(64 if patch_size[0] == 2 else 256) // 2, min_toks=1,
        frames_per_block=4, max_sequence_length=1024, token_order=token_order, lapped_output=True,
    )  # fmt: skip
    frames, rows, columns = patch_size
    down, right = config.slice_shape
    blocks, side = 2, config.resolution
    inside = np.random.default_rng(0).normal(
        size=(blocks * config.slices_per_block, frames, side, side, 3)
    )
    beyond = ((0, 0), (0, 0), (rows // 2, rows // 2), (columns // 2, columns // 2), (0, 0))
    picture = np.pad(inside, beyond, mode="symmetric")
    windows = np.stack(
        [
            picture[:, :, i * rows : (i + 2) * rows, j * columns : (j + 2) * columns]
            for i in range(down)
            for j in range(right)
        ],
        axis=1,
    ).reshape(1, blocks * config.max_toks, -1)
    windows = reorder(windows, token_places(down, right, token_order))
    blended = lapped.overlap_add(jnp.asarray(windows, jnp.float32), config)
    ours = unpatchify(np.asarray(blended), patch_size, side, side, token_order)[0]
    np.testing.assert_allclose(ours, inside.reshape(ours.shape), atol=1e-5)
    # These are the windows that a lapped input sees.
    np.testing.assert_allclose(lapped.windows(blended, config), windows, atol=1e-5)


@pytest.mark.parametrize("size", [2, 8, 16])
def test_what_is_filtered_over_the_borders_of_patches_comes_back(size):
    """At the edges of the frame too, where windows are mirrored, and folded back. A level picture stays as it is."""
    patches, half = 5, size // 2
    row = np.random.default_rng(0).normal(size=patches * size)
    mirrored = np.pad(row, half, mode="symmetric")
    painted = np.zeros(len(mirrored))
    for start in range(0, len(row), size):
        numbers = lapped_filter.prefilter(size) @ mirrored[start : start + 2 * size]
        painted[start : start + 2 * size] += lapped_filter.postfilter(size) @ numbers
    back = painted[half:-half]
    back[:half] += painted[half - 1 :: -1]
    back[-half:] += painted[: -half - 1 : -1]
    np.testing.assert_allclose(back, row, atol=1e-12)
    np.testing.assert_allclose(lapped_filter.prefilter(size) @ np.ones(2 * size), 1.0, atol=1e-12)


def test_a_dropped_token_has_a_voice_only_with_a_conditioned_decoder():
    """With zeros as codes and no tokens kept, the released decoder gives every token the same numbers: those of nothing."""
    for condition in (False, True):
        config = released.config("vae", condition_decoder=condition)
        tree = init_params(config, jax.random.key(0))
        batch = Batch(jnp.zeros((1, 32, 0)), jnp.zeros((1, 32), bool))
        codes = jnp.zeros((1, 32, config.code_dim))
        out, _ = ElasticTok(config).apply({"params": tree}, codes, batch, method="decode")
        assert bool(jnp.any(out != 0)) == condition


def test_an_output_without_bounds_is_what_the_tanh_would_bound():
    config = released.config("vae")
    batch, tree = released.batch("vae"), released.params("vae")
    bounded, free = (
        ElasticTok(config.replace(bounded_output=on)).apply({"params": tree}, batch)[0]
        for on in (True, False)
    )
    np.testing.assert_array_equal(bounded, jnp.tanh(free))


def test_the_options_are_part_of_the_models_identity_and_their_absence_is_not():
    plain = released.config("vae")
    alone = OPTIONS | ALONE
    hashes = {plain.replace(**{name: value}).config_hash() for name, value in alone.items()}
    grouped = OPTIONS | dict(haar_groups=False, num_group_layers=0)
    for name in ("patch_group", "haar_groups", "num_group_layers"):
        grouped |= {name: OPTIONS[name]}
        hashes.add(plain.replace(**grouped).config_hash())
    # One of them is of the model without options, where an option of groups has its default.
    assert len(hashes) == len(OPTIONS) + 1 and plain.config_hash() in hashes
    assert ElasticTokConfig().config_hash() == "b93a4635ccfd1c51"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(token_order="spiral"), "token_order='spiral' must be of type"),
        (dict(rope="3d", rope_split=(1, 2, 3)), r"rope_split=\(1, 2, 3\) must be .* the sum 16"),
        (dict(rope_bases=(1000, 100)), r"rope_bases=\(1000, 100\) must be three numbers"),
        (dict(lapped_output=True, patch_size=(1, 1, 1), max_toks=2, min_toks=1), "needs patches of even"),
        (dict(lapped_input=True, patch_size=(1, 1, 1), max_toks=2, min_toks=1), "lapped_input=True needs patches of even"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        released.config("fsq", **changes)

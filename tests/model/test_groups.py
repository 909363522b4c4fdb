"""Groups of patches: the tokens of a square code it together, each what the ones before it have missed."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import released

from elastic.config import ElasticTokConfig
from elastic.model import Batch, ElasticTok, groups, init_params, linear_groups
from elastic.model.add_options import before_options
from elastic.model.bottleneck import FSQ
from elastic.model.linear_init import linear_init, sample_size
from elastic.patches import patchify, token_places

SMALL = dict(
    hidden_size=128, intermediate_size=64, num_encoder_layers=1, num_decoder_layers=2, num_attention_heads=1,
    frames_per_block=4, min_toks=4, token_order="coarse_to_fine", rope="3d", condition_decoder=True,
)  # fmt: skip


def config(patch_size=(4, 4, 4), max_toks=64, patch_group=16, **changes):
    return ElasticTokConfig(
        **SMALL
        | dict(
            patch_size=patch_size,
            max_toks=max_toks,
            patch_group=patch_group,
            max_sequence_length=max_toks,
        )
        | changes
    )


@pytest.mark.parametrize(
    ("patch_size", "max_toks", "patch_group", "shape"),
    [
        ((4, 4, 4), 256, 16, (4, 4)),
        ((4, 4, 4), 256, 4, (2, 2)),
        ((2, 8, 8), 128, 4, (2, 2)),
        ((4, 4, 8), 128, 8, (4, 2)),
        ((4, 4, 4), 144, 4, (2, 2)),
    ],
    ids=str,
)
def test_a_group_has_the_pixels_that_one_large_patch_has(patch_size, max_toks, patch_group, shape):
    """In the same order of groups; and the patches come back."""
    made = config(patch_size, max_toks, patch_group)
    assert made.group_shape == shape
    video = np.random.default_rng(0).integers(
        0, 256, (1, 8, made.resolution, made.resolution, 3), np.uint8
    )
    patches = patchify(video, patch_size, made.token_order).reshape(1, 2 * max_toks, -1)
    joined = groups.join(jnp.asarray(patches), made)
    large = patchify(video, made.group_size, made.token_order)
    np.testing.assert_array_equal(joined, large.reshape(joined.shape))
    np.testing.assert_array_equal(groups.split(joined, made), patches)


@pytest.mark.parametrize("adaptive", [False, True])
def test_every_stage_codes_what_the_stages_before_it_have_missed(adaptive):
    """A number coded by stages of finer steps: each divides the error. A gain known to both sides does not harm."""
    made, fsq = config(fsq_quant_levels=(5,)), FSQ((5,))
    x = np.random.default_rng(0).uniform(-1, 1, (3, 4)).astype(np.float32)
    reach = 0.5  # of the latents, where the levels are nearly even
    gains, slopes = reach * 4.0 ** np.arange(16), 4.0 ** -np.arange(16) / np.tanh(reach)
    few = 5  # more stages are finer than float32
    latents = np.zeros((3, 64, 1), np.float32)
    weights = np.zeros((16, 16, 1), np.float32)
    for stage in range(few):
        latents[:, stage * 4 : stage * 4 + 4, 0] = gains[stage] * x
        weights[stage, :stage, 0] = -gains[stage] * slopes[:stage]
    logarithms = np.zeros((16, 17, 1), np.float32)
    if adaptive:
        logarithms[:] = np.random.default_rng(1).uniform(-0.2, 0.2, (16, 17, 1))
        logarithms[0] = 0
    cube = jnp.full((16, 1), 0.05 if adaptive else 0.0)
    steps = groups.Steps(jnp.asarray(logarithms), cube)
    corrected = groups.correct(jnp.asarray(latents), jnp.asarray(weights), steps, fsq, made)
    quantized = fsq.quantize(corrected)
    numbers = groups.numbers_of(quantized, steps, made)
    assert bool(jnp.all(numbers == quantized)) != adaptive
    codes = np.asarray(numbers)[..., 0].reshape(3, 16, 4)
    errors = [
        np.abs(np.einsum("s,bsn->bn", slopes[:n], codes[:, :n]) - x).max() for n in range(few + 1)
    ]
    assert all(after < 0.7 * before for before, after in itertools.pairwise(errors))
    np.testing.assert_array_equal(corrected[:, :4], latents[:, :4])


@functools.cache
def smooth_squares(count, size):
    """Pictures of soft waves: what a few components describe well, and more describe better."""
    rng = np.random.default_rng(0)
    frames, rows, columns = size
    y, x = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    waves = rng.normal(size=(count, 6, 2)) * 2 * np.pi / rows * 0.3
    phase = waves[..., 0, None, None] * y + waves[..., 1, None, None] * x
    height = rng.normal(size=(count, 6, 1, 1)) * 25
    shift = rng.uniform(0, 6.3, (count, 6, 1, 1))
    picture = 120 + np.sum(height * np.cos(phase + shift), axis=1)
    return np.broadcast_to(picture[:, None, :, :, None], (count, frames, rows, columns, 3)).astype(
        np.float32
    )


@pytest.mark.slow
@pytest.mark.parametrize("options", ["output", "both", "haar"])
@pytest.mark.parametrize("case", ["fsq", "vae"])
def test_a_linear_start_shows_the_whole_picture_from_the_first_stage_on(case, options):
    """And a better one with every stage."""
    lapped = "output" if options == "output" else "both"
    made = config(
        (4, 2, 2), 256, 16, bottleneck_type=case, fsq_quant_levels=(15, 7, 5), vae_bottleneck_dim=3,
        lapped_output=True, lapped_input=lapped == "both", bounded_output=case == "fsq", min_toks=8,
        haar_groups=options == "haar", num_group_layers=int(options == "haar"),
    )  # fmt: skip
    size = sample_size(made)
    assert size == ((4, 32, 32) if lapped == "both" else (4, 16, 16))
    squares = smooth_squares(2000, size).clip(0, 255).astype(np.uint8)
    drawn = init_params(made, jax.random.key(0))
    started = linear_init(drawn, made, squares.reshape(len(squares), -1))
    assert jax.tree.map(np.shape, started) == jax.tree.map(np.shape, drawn)
    # A picture of 32 x 32 pixels is four squares.
    pictures = smooth_squares(40, (4, 32, 32)).clip(0, 255)
    patches = patchify(pictures, made.patch_size, made.token_order).reshape(40, 256, -1)
    x = jnp.asarray(patches / 127.5 - 1, jnp.float32)

    @released.quick_jit
    def error(params, count):
        kept = jnp.broadcast_to(jnp.arange(256) < count, x.shape[:2])
        recon, _ = ElasticTok(made).apply({"params": params}, Batch(x, kept))
        return jnp.mean(jnp.square(recon - x))

    spread = float(x.var())
    errors = [float(error(started, count)) for count in (8, 16, 32, 64, 256)]
    assert errors[0] < spread / 8  # half of the groups are guessed from their neighbours
    assert errors[1] < spread / 20
    # The last errors come from colours outside the range of a pixel; no stage mends them.
    assert all(after < 1.01 * before for before, after in itertools.pairwise(errors))
    assert errors[-1] < spread / (100 if lapped == "output" else 80)


@pytest.mark.parametrize("side", [32, 48])
def test_bands_are_sums_and_differences_of_two_by_two_neighbours(side):
    """And groups come back from them, also where the first channels are mixed."""
    tokens = (side // 2) ** 2
    made = config((4, 2, 2), tokens, 16, haar_groups=True)
    down, right = made.grid_shape
    rng = np.random.default_rng(0)
    picture = rng.normal(size=(down, right, 20)).astype(np.float32)
    places = token_places(down, right, made.token_order)
    x = jnp.asarray(picture.reshape(-1, 20)[places])[None]
    size = 4 * groups.num_exchanged(made)
    bands = np.asarray(groups.to_bands(x, jnp.eye(size), made))[0]
    found = np.empty_like(picture)
    found.reshape(-1, 20)[places] = bands
    top, bottom = picture[::2], picture[1::2]
    sums, differences = (top + bottom) / 2, (top - bottom) / 2
    assert np.allclose(found[::2, ::2], sums[:, ::2] + sums[:, 1::2], atol=1e-6)
    assert np.allclose(found[1::2, 1::2], differences[:, ::2] + differences[:, 1::2], atol=1e-6)
    assert np.allclose(found[::2, 1::2], sums[:, ::2] - sums[:, 1::2], atol=1e-6)
    assert np.allclose(found[1::2, ::2], differences[:, ::2] - differences[:, 1::2], atol=1e-6)
    turned, _ = np.linalg.qr(rng.normal(size=(size, size)).astype(np.float32))
    back = groups.from_bands(groups.to_bands(x, turned, made), turned.T, made)
    np.testing.assert_allclose(back, x, atol=1e-5)


@pytest.mark.parametrize(("case", "min_toks"), [("fsq", 4), ("fsq", 16), ("vae", 16)])
def test_the_first_code_has_the_strongest_axes_where_it_may_be_all_that_is_sent(case, min_toks):
    """Where every band sends a code of FSQ, whose channels have more and fewer levels, all four get as much."""
    made = config(
        (4, 2, 2), 256, 16, bottleneck_type=case, fsq_quant_levels=(15, 7, 5), vae_bottleneck_dim=3,
        haar_groups=True, min_toks=min_toks,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    pictures = rng.normal(size=(500, 4, 10)) @ rng.normal(size=(10, 10)) * 0.7 ** np.arange(10)
    exchange = linear_groups._exchange(made, pictures.reshape(-1, 10).astype(np.float32))
    np.testing.assert_allclose(exchange @ exchange.T, np.eye(24), atol=1e-5)
    bands = np.einsum("rq,nqc->rnc", linear_groups._HAAR, pictures)
    mixed = np.asarray(groups.exchanged(bands, exchange))[:, :, :6]
    variance = mixed.var(axis=1)
    strongest = np.sort(variance.ravel())[::-1]
    if case == "fsq" and min_toks == 16:
        assert set(np.argsort(-variance.ravel())[:4] // 6) == {0, 1, 2, 3}
    else:
        np.testing.assert_allclose(variance[0, :3], strongest[:3], rtol=1e-5)


def test_a_model_with_too_few_squares_or_too_narrow_has_no_linear_start():
    made = config((4, 2, 2), 256, 16)
    squares = np.zeros((100, 4 * 16 * 16 * 3), np.uint8)
    with pytest.raises(ValueError, match="100 patches are too few"):
        linear_init(init_params(made, jax.random.key(0)), made, squares)
    with pytest.raises(ValueError, match="hidden_size of 40 and"):
        linear_init({}, made.replace(hidden_size=32), squares)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(token_order="raster"), "patch_group=16 needs token_order='coarse_to_fine'"),
        (dict(condition_decoder=False), "patch_group=16 needs .* condition_decoder=True"),
        (dict(patch_group=8), r"patch_group=8 patches of patch_size=\(4, 4, 4\) are no square"),
        (dict(patch_group=0), "patch_group=0 must be a finite number above 0"),
        (dict(patch_group=1, haar_groups=True), "haar_groups=True needs groups of patches"),
        (dict(patch_group=1, num_group_layers=2), "num_group_layers=2 needs groups of patches"),
        (dict(num_group_layers=-1), "num_group_layers=-1 must be 0 or above"),
        (
            dict(patch_group=64, haar_groups=True),
            r"haar_groups=True needs an even number .* \(1, 1\)",
        ),
        (dict(max_toks=36), "patch_group=16 .* divide the frame's 24 pixels"),
    ],
)
def test_groups_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_trained_parameters_keep_their_groups():
    with pytest.raises(ValueError, match=r"the checkpoint has patch_group=16, .* patch_group=4"):
        before_options(config(patch_group=4), config())
    with pytest.raises(ValueError, match=r"the checkpoint has haar_groups=False, .*=True"):
        before_options(config(patch_group=4, haar_groups=True), config(patch_group=4))

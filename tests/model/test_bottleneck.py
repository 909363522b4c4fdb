"""FSQ and VAE against the released numbers and against NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import released

from elastic.model import bottleneck, make_bottleneck
from elastic.model.bottleneck import FSQ, VAE

LEVELS = (8, 8, 8, 5, 5, 5)


@pytest.fixture(scope="module")
def table(golden):
    with np.load(golden / "unit" / "fsq_table.npz") as file:
        return dict(file)


def test_codes_and_indices_are_the_released_ones(table):
    fsq = FSQ(LEVELS)
    latents = jnp.asarray(table["z"])
    assert np.abs(np.asarray(fsq.bound(latents)) - table["bound"]).max() < 2e-6
    codes = fsq.quantize(latents)
    assert (np.asarray(codes) == table["codes"]).all()
    assert (np.asarray(fsq.codes_to_indices(codes)) == table["indexes"]).all()
    assert fsq.basis == tuple(table["basis"]) and fsq.codebook_size == 64_000


def test_indices_give_the_released_codes_back(table):
    codes = FSQ(LEVELS).indices_to_codes(jnp.asarray(table["sample_indexes"], jnp.int32))
    assert (np.asarray(codes) == table["sample_codes"]).all()


@pytest.mark.parametrize(
    "levels",
    [
        LEVELS,
        (47,),
        (99,),
        (2,),
        (3, 3, 3, 3),
        (7, 5, 5, 5, 5),
        (8, 6, 5),
        (255, 257),
        (16, 47, 99),
    ],
    ids=str,
)
def test_every_code_has_an_index_of_its_own_and_comes_back(levels):
    """Difference 3 in elastic/README.md: rounded; truncation loses a code of 47 or of 99 levels."""
    fsq = FSQ(levels)
    indices = jnp.arange(fsq.codebook_size)
    codes = fsq.indices_to_codes(indices)
    assert float(jnp.max(jnp.abs(codes))) == 1
    assert (np.asarray(fsq.codes_to_indices(codes)) == np.asarray(indices)).all()


@pytest.mark.parametrize("levels", [LEVELS, (47,), (99,), (2, 3)], ids=str)
def test_quantized_latents_have_the_index_of_their_levels(levels):
    """Difference 3 in elastic/README.md, for codes that came from latents."""
    fsq = FSQ(levels)
    latents = jax.random.normal(jax.random.key(0), (5000, len(levels))) * 3
    digits = np.rint(np.asarray(fsq.bound(latents))) + np.array(levels) // 2
    assert (digits >= 0).all() and (digits < levels).all()
    expected = (digits * np.array(fsq.basis)).sum(-1)
    assert (np.asarray(fsq.codes_to_indices(fsq.quantize(latents))) == expected).all()


def test_every_level_can_be_reached():
    for level in (2, 3, 5, 8, 99):
        latents = jnp.linspace(-20, 20, 20_001)[:, None]
        codes = np.unique(np.asarray(FSQ((level,)).quantize(latents)))
        assert len(codes) == level


def test_rounding_lets_the_gradient_of_the_squashing_through():
    fsq = FSQ(LEVELS)
    latents = jax.random.normal(jax.random.key(0), (4, 6))
    half_width = jnp.array([level // 2 for level in LEVELS]).reshape(1, 6)
    ours = jax.grad(lambda z: jnp.sum(fsq.quantize(z)))(latents)
    smooth = jax.grad(lambda z: jnp.sum(fsq.bound(z) / half_width))(latents)
    assert np.abs(np.asarray(ours - smooth)).max() < 1e-6


@pytest.mark.parametrize(
    "large", [1 << 20, 4]
)  # from how many codes on no array has a number for each
def test_statistics_count_kept_tokens_only(monkeypatch, large):
    """Differences 4 and 11: counted without a one-hot array, and without the dropped tokens."""
    monkeypatch.setattr(bottleneck, "_LARGE_CODEBOOK", large)
    rng = np.random.default_rng(0)
    fsq = FSQ((3, 3))
    indices, kept = rng.integers(0, 7, (2, 50)), rng.random((2, 50)) < 0.4
    ours = fsq.statistics(fsq.indices_to_codes(jnp.asarray(indices)), jnp.asarray(kept))
    share = np.bincount(indices[kept], minlength=9) / kept.sum()
    entropy = -sum(p * np.log(p) for p in share if p > 0)
    assert float(ours["perplexity"]) == pytest.approx(np.exp(entropy), rel=1e-5)
    assert float(ours["codebook_usage"]) == pytest.approx((share > 0).mean())
    none = fsq.statistics(fsq.indices_to_codes(jnp.asarray(indices)), jnp.zeros_like(kept))
    assert float(none["perplexity"]) == 1 and float(none["codebook_usage"]) == 0


def test_statistics_of_all_tokens_are_the_released_ones(table):
    codes = jnp.asarray(table["codes"])
    ours = FSQ(LEVELS).statistics(codes, jnp.ones(len(codes), bool))
    assert float(ours["perplexity"]) == pytest.approx(float(table["perplexity"]), rel=2e-5)
    usage = float(table["codebook_usage"])
    assert float(ours["codebook_usage"]) == pytest.approx(usage, rel=2e-5)


@pytest.mark.parametrize("levels", [LEVELS, (67, 19, 11, 9, 7, 7, 5, 5, 3, 3)], ids=len)
def test_statistics_make_no_array_of_tokens_by_codebook(levels):
    """Difference 4 in elastic/README.md. Of the 10^9 codes that an index has room for there is none for each code either."""
    shapes = jax.ShapeDtypeStruct((4096, len(levels)), jnp.float32), jax.ShapeDtypeStruct((4096,), bool)  # fmt: skip
    jaxpr = jax.make_jaxpr(FSQ(levels).statistics)(*shapes)
    largest = max(var.aval.size for eqn in jaxpr.eqns for var in eqn.outvars)
    assert largest <= 64_000


def vae_latents(seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (2, 12, 6)) * 3


@pytest.mark.parametrize("tokens_per_block", [3, 4, 12])
def test_the_divergence_is_summed_over_a_block_s_kept_tokens(tokens_per_block):
    """Difference 5 in elastic/README.md: by the block size, not by 2048 tokens."""
    latents = vae_latents()
    kept = np.random.default_rng(1).random((2, 12)) < 0.5
    loss = VAE(3).aux_loss(latents, jnp.asarray(kept), tokens_per_block=tokens_per_block)
    mean, logvar = np.split(np.asarray(latents, np.float64), 2, axis=-1)
    kl = 0.5 * (mean**2 + np.exp(logvar) - 1 - logvar).sum(-1) * kept
    expected = 1e-8 * np.mean([kl[b, i : i + tokens_per_block].sum() for b, i in
                               itertools.product(range(2), range(0, 12, tokens_per_block))])  # fmt: skip
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert (np.asarray(VAE(3).codes(latents)) == np.asarray(latents[..., :3])).all()


def test_a_key_draws_a_sample_around_the_mean():
    latents = jnp.concatenate([jnp.full((1, 4000, 1), 2.0), jnp.full((1, 4000, 1), -2.0)], -1)
    codes = VAE(1).codes(latents, key=jax.random.key(0))
    assert float(jnp.mean(codes)) == pytest.approx(2, abs=0.02)
    assert float(jnp.std(codes)) == pytest.approx(np.exp(-1), abs=0.02)


def test_a_huge_variance_gives_no_infinity():
    latents = jnp.full((1, 4, 2), 1e4).at[..., 0].set(0.0)
    loss = VAE(1).aux_loss(latents, jnp.ones((1, 4), bool), tokens_per_block=4)
    assert np.isfinite(VAE(1).codes(latents, key=jax.random.key(0))).all() and np.isfinite(loss)


def test_the_config_chooses():
    fsq, vae = (make_bottleneck(released.config(case)) for case in released.CASES)
    assert isinstance(fsq, FSQ) and (fsq.num_latents, fsq.code_dim) == (6, 6)
    assert isinstance(vae, VAE) and (vae.num_latents, vae.code_dim) == (16, 8)

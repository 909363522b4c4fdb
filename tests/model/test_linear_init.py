"""A model that starts linear is a transform codec before its first step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import released

from elastic.config import ElasticTokConfig
from elastic.model import Batch, ElasticTok, init_params, token_masks
from elastic.model.linear_init import linear_init

SMALL = dict(
    hidden_size=128, intermediate_size=64, num_encoder_layers=1, num_decoder_layers=3, num_attention_heads=1,
    theta=1e4, frames_per_block=4, patch_size=(2, 4, 4), max_toks=32, min_toks=4, max_sequence_length=64,
)  # fmt: skip
CONFIGS = {
    "fsq": ElasticTokConfig(**SMALL, fsq_quant_levels=(20, 8, 5, 5)),
    "vae": ElasticTokConfig(**SMALL, bottleneck_type="vae", vae_bottleneck_dim=4),
}


def smooth_patches(count):
    """Patches of soft gradients, with a little noise: what a few components describe."""
    rng = np.random.default_rng(0)
    t, y, x = np.meshgrid(np.arange(2), np.linspace(-1, 1, 4), np.linspace(-1, 1, 4), indexing="ij")
    shapes = np.stack([np.ones_like(x), x, y, x * y, t - 0.5]).reshape(5, -1, 1)
    weights = rng.normal(size=(count, 5, 1, 3)) * np.array([50, 25, 25, 5, 5]).reshape(1, 5, 1, 1)
    patches = 120 + np.sum(weights.mean(-1, keepdims=True) * shapes, axis=1)
    return (
        np.clip(patches + rng.normal(size=(count, 32, 3)), 0, 255)
        .astype(np.uint8)
        .reshape(count, -1)
    )


def errors(config, params, x):
    """Mean squared errors of x [blocks, 16 places, p], shown still over both slices of a block, with all tokens and with half."""
    still = jnp.asarray(np.concatenate([x, x], axis=1))

    @released.quick_jit
    def error(num_kept):
        kept = token_masks.kept_mask(jnp.full(len(x), num_kept), 32)
        recon, _ = ElasticTok(config).apply({"params": params}, Batch(still, kept))
        return jnp.mean(jnp.square(recon - still))

    return float(error(32)), float(error(16))


@pytest.mark.slow
@pytest.mark.parametrize("case", CONFIGS)
def test_the_first_reconstruction_is_that_of_a_linear_codec(case):
    config, patches = CONFIGS[case], smooth_patches(4096)
    x = patches[:512].reshape(32, 16, -1).astype(np.float32) / 127.5 - 1
    # What four components keep, without quantization: the best that a linear codec can do.
    flat = x.reshape(-1, x.shape[-1])
    _, _, basis = np.linalg.svd(flat - flat.mean(0), full_matrices=False)
    kept = (flat - flat.mean(0)) @ basis[:4].T @ basis[:4] + flat.mean(0)
    best, spread = np.mean((kept - flat) ** 2), flat.var()

    drawn = init_params(config, jax.random.key(0))
    started = linear_init(drawn, config, patches)
    assert jax.tree.map(np.shape, started) == jax.tree.map(np.shape, drawn)
    ours, half = errors(config, started, x)
    assert errors(config, drawn, x)[0] > 0.5 * spread
    # Levels and the tanh cost some of it: a tenth of the spread at most, a twenty-fifth without levels.
    assert best < ours < spread / (10 if case == "fsq" else 25)
    # The second slice of a still block need not be sent: it is copied. Grey in its place would cost half of the spread; so small a grid
    # confuses some places at its edge.
    assert half < spread / 4


def test_what_cannot_start_linear_is_refused():
    config, patches = CONFIGS["fsq"], smooth_patches(400)
    params = init_params(config, jax.random.key(0))
    with pytest.raises(ValueError, match="needs scan_layers=True"):
        linear_init(params, config.replace(scan_layers=False), patches)
    with pytest.raises(ValueError, match="lapped_input=True needs patch_group above 1"):
        linear_init(params, config.replace(lapped_input=True), patches)
    with pytest.raises(ValueError, match=r"300 patches are too few .*; use 384 or more"):
        linear_init(params, config, patches[:300])
    with pytest.raises(ValueError, match="intermediate_size of 8 or more, not 128 and 6"):
        linear_init(params, config.replace(intermediate_size=6), patches)

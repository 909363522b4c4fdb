"""Block by block equals one-shot, equals the released system; candidates do not touch the cache."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from elastic import checkpoints
from elastic.config import PRESETS, ElasticTokConfig, load_config
from elastic.model import Batch, ElasticTok, init_params, param_shapes, token_masks
from elastic.patches import to_unit_range
from elastic.tokenizer.block_codec import Codec


@pytest.fixture(scope="module", params=["fsq", "vae"])
def case(request, golden):
    return load(golden, request.param)


@pytest.fixture(scope="module")
def fsq(golden):
    """For what does not depend on the bottleneck."""
    return load(golden, "fsq")


def load(golden, kind):
    """The golden model of one bottleneck: config, parameters, uint8 patches [2, 4 blocks, 32, p], the cached losses."""
    folder = golden / kind
    released = json.loads((folder / "meta.json").read_text())["config"]
    config = ElasticTokConfig.from_json_dict(released | {"bottleneck_type": kind})
    params = jax.device_put(
        checkpoints.load_params(f"params::{folder}/ckpt/params_scan_fp32", config)
    )
    patches = np.load(folder / "inputs.npz")["vision"].reshape(2, 4, 32, -1)
    return config, params, patches, np.load(folder / "kvcache.npz")


def commit(codec, params, cache, patches, counts):
    """One block at known counts: the new cache, its losses and what was committed."""
    trial = codec.try_counts(params, cache, patches, np.asarray(counts, np.int32)[:, None])
    cache, committed = codec.commit(cache, trial, np.zeros(len(counts), np.int32))
    return cache, trial, committed


def test_every_cached_block_loss_equals_the_released_one(case):
    """Design section 4, line 1: the released argument n keeps n + 1 tokens, so its row n is our count n + 1."""
    config, params, patches, released = case
    codec = Codec(config, window_blocks=4)
    cache = codec.new_cache(batch=2)
    kept = np.minimum(released["table_ntoks"] + 1, 32).astype(np.int32)
    for block in range(4):
        trial = codec.try_counts(
            params, cache, patches[:, block], np.tile(kept, (2, 1)), keep=False
        )
        np.testing.assert_allclose(
            trial.losses.T, released["table_dense"][block], rtol=0, atol=2e-6
        )
        counts = np.full(2, min(released["table_commit_ntoks"][block] + 1, 32))
        cache, _, _ = commit(codec, params, cache, patches[:, block], counts)


def test_block_by_block_equals_one_shot_and_decoding_repeats_it(case):
    config, params, patches, _ = case
    counts = np.array([[4, 32, 11, 7], [32, 5, 20, 13]], np.int32)
    codec = Codec(config, window_blocks=4)
    cache, decoder_cache = codec.new_cache(batch=2), codec.new_decoder_cache(batch=2)
    losses = []
    for block in range(4):
        cache, trial, committed = commit(codec, params, cache, patches[:, block], counts[:, block])
        losses.append(np.asarray(trial.losses)[:, 0])
        decoder_cache, pixels = codec.decode(
            params, decoder_cache, committed.tokens, counts[:, block]
        )
        np.testing.assert_array_equal(pixels, committed.pixels)

    x = to_unit_range(jnp.asarray(patches.reshape(2, 128, -1)))
    kept = token_masks.kept_mask(jnp.asarray(counts), 32).reshape(2, 128)
    out, _ = ElasticTok(config).apply({"params": params}, Batch(x, kept))
    error = jnp.square(jnp.clip(out, -1, 1) - x).reshape(2, 4, -1).mean(axis=-1)
    np.testing.assert_allclose(np.stack(losses, 1), error, rtol=0, atol=1e-6)
    np.testing.assert_allclose(
        committed.pixels, (np.clip(out[:, 96:], -1, 1) + 1) * 127.5, atol=0.51
    )


def test_a_model_with_every_spatial_option_gives_block_by_block_what_one_shot_gives(golden):
    """Positions go on from block to block; the decoder sees the counts, of a token file too."""
    released = json.loads((golden / "vae" / "meta.json").read_text())["config"]
    config = ElasticTokConfig.from_json_dict(
        released
        | dict(bottleneck_type="vae", token_order="coarse_to_fine", rope="3d")
        | dict(condition_decoder=True, lapped_output=True, patch_group=4, condition_encoder=False)
    )
    params = jax.device_get(init_params(config, jax.random.key(0)))
    patches = np.load(golden / "vae" / "inputs.npz")["vision"].reshape(2, 4, 32, -1)[:, :3]
    counts = np.array([[4, 32, 11], [32, 5, 20]], np.int32)
    codec = Codec(config, window_blocks=3)
    cache, decoder_cache = codec.new_cache(batch=2), codec.new_decoder_cache(batch=2)
    for block in range(3):
        cache, _, committed = commit(codec, params, cache, patches[:, block], counts[:, block])
        decoder_cache, pixels = codec.decode(
            params, decoder_cache, committed.tokens, counts[:, block]
        )
        np.testing.assert_array_equal(pixels, committed.pixels)
    x = to_unit_range(jnp.asarray(patches.reshape(2, 96, -1)))
    kept = token_masks.kept_mask(jnp.asarray(counts), 32).reshape(2, 96)
    out, _ = jax.jit(ElasticTok(config).apply)({"params": params}, Batch(x, kept))
    np.testing.assert_allclose(
        committed.pixels, (np.clip(out[:, 64:], -1, 1) + 1) * 127.5, atol=0.51
    )


def test_a_draft_is_a_pass_whose_layers_over_tokens_change_nothing():
    """Of short blocks and of weighted pixels too."""
    config = ElasticTokConfig(
        hidden_size=32, intermediate_size=32, num_encoder_layers=1, num_decoder_layers=1, num_attention_heads=1,
        num_group_layers=1, frames_per_block=4, patch_size=(2, 4, 4), max_toks=128, min_toks=32, max_sequence_length=256,
        token_order="adaptive", condition_encoder=False, condition_decoder=True, rope="3d", patch_group=4,
        haar_groups=True, lapped_output=True, bounded_output=False, fsq_quant_levels=(7, 5, 4),
    )  # fmt: skip
    params = jax.device_get(init_params(config, jax.random.key(0)))
    outputs = ("wo", "w2")  # of the layers' two parts, which are added to the tokens
    idle = {
        path: np.zeros_like(x) if "decoder_blocks" in path and set(outputs) & set(path) else x
        for path, x in flatten_dict(params).items()
    }
    idle = unflatten_dict(idle)
    codec, rng = Codec(config, window_blocks=2), np.random.default_rng(0)
    patches = rng.integers(0, 256, (2, 128, config.patch_dim), np.uint8)
    counts = np.array([[33], [90]], np.int32)
    plane = rng.random((2, config.resolution)).astype(np.float32)
    options: dict[str, Any] = dict(
        num_frames=np.array([4, 3], np.int32), weights=(plane, plane[::-1].copy())
    )
    cache = codec.new_cache(batch=2)
    for tree in (params, idle):
        encoded = codec.encode(tree, cache, patches)
        assert encoded is not None
        drafts = np.array(codec.draft(tree, patches, counts, encoded, **options))
        trial = codec.try_counts(tree, cache, patches, counts, encoded=encoded, **options)
        off = np.abs(drafts / np.array([trial.losses, trial.pixel_losses]) - 1)
        assert off.max() < 1e-5 if tree is idle else off.min() > 1e-4


def test_a_codec_drafts_where_that_is_cheap():
    can_draft = {name: Codec(load_config(name)).can_draft for name in PRESETS}
    assert [name for name, can in can_draft.items() if can] == ["small-fsq"]
    # Without groups of patches nothing but the layers over tokens knows what a dropped token shows.
    assert not Codec(ElasticTokConfig(condition_encoder=False)).can_draft


def test_candidates_tried_together_equal_candidates_tried_alone(case):
    config, params, patches, _ = case
    codec = Codec(config, window_blocks=4)
    cache, _, _ = commit(codec, params, codec.new_cache(batch=2), patches[:, 0], [9, 30])
    counts = np.array([[4, 17, 32], [8, 8, 21]], np.int32)
    together = codec.try_counts(params, cache, patches[:, 1], counts)
    alone = [codec.try_counts(params, cache, patches[:, 1], counts[:, k : k + 1]) for k in range(3)]
    np.testing.assert_allclose(
        together.losses, np.concatenate([t.losses for t in alone], 1), rtol=0, atol=1e-6
    )
    # The second element commits its third candidate, the first its second: as if tried alone.
    cache_after, committed = codec.commit(cache, together, np.array([1, 2], np.int32))
    expected = np.stack([np.asarray(alone[1].pixels)[0], np.asarray(alone[2].pixels)[1]])
    np.testing.assert_allclose(np.asarray(committed.pixels, int), expected, atol=1)
    assert cache_after.num_blocks.tolist() == [2, 2]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_trial_reads_the_past_in_place(fsq, dtype):
    """No array of the cache's size is made by a trial: it is an argument, and no result of an operation, nor of a conversion."""
    config, params, patches, _ = fsq
    codec = Codec(config.replace(scan_attention=True), dtype=dtype, window_blocks=1000)
    cache = codec.new_cache(batch=1)
    lowered = codec._try.lower(
        params,
        cache,
        patches[:1, 0],
        np.array([[9]], np.int32),
        np.array([config.frames_per_block], np.int32),
        keep=True,
    )
    memory = lowered.compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.02 * codec.cache_bytes()


def test_the_window_forgets_the_oldest_block_only(fsq):
    """With a window of 3 blocks the fourth sees two: what came before changes no code, if layers do not hand it on."""
    config, params, patches, _ = fsq
    one_layer = config.replace(
        num_encoder_layers=1, num_decoder_layers=1, max_sequence_length=32 * 8
    )
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: x[:1] if "scan_decoder" in str(path) else x, params
    )
    codec = Codec(one_layer, window_blocks=3)

    def last_tokens(first_block):
        cache = codec.new_cache(batch=2)
        for block in (first_block, patches[:, 1], patches[:, 2]):
            cache, _, _ = commit(codec, params, cache, block, [20, 20])
        return np.asarray(commit(codec, params, cache, patches[:, 3], [20, 20])[2].tokens)

    same, other = last_tokens(patches[:, 0]), last_tokens(255 - patches[:, 0])
    np.testing.assert_array_equal(same, other)


def test_a_window_of_one_block_has_no_past(fsq):
    config, params, patches, _ = fsq
    codec = Codec(config, window_blocks=1)
    cache, _, _ = commit(codec, params, codec.new_cache(batch=2), patches[:, 0], [20, 20])
    assert codec.cache_bytes() == 0 and cache.encoder.keys.size == 0
    fresh = Codec(config, window_blocks=4)
    _, first, _ = commit(fresh, params, fresh.new_cache(batch=2), patches[:, 1], [9, 9])
    _, later, _ = commit(codec, params, cache, patches[:, 1], [9, 9])
    np.testing.assert_allclose(
        later.losses, first.losses, rtol=0, atol=1e-5
    )  # rotated further, alike


def test_errors_name_the_way_out(fsq):
    config, params, patches, _ = fsq
    with pytest.raises(ValueError, match="window_blocks=0 must be 1 or more"):
        Codec(config, window_blocks=0)
    codec = Codec(config, window_blocks=2)
    cache = codec.new_cache(batch=2)
    trial = codec.try_counts(params, cache, patches[:, 0], np.full((2, 1), 9, np.int32), keep=False)
    with pytest.raises(ValueError, match="keep=True"):
        codec.commit(cache, trial, np.zeros(2, np.int32))


def test_bfloat16_is_near_float32(fsq):
    config, params, patches, _ = fsq
    counts = np.full((2, 1), 24, np.int32)
    exact, rounded = (
        Codec(config, dtype=dtype, window_blocks=2) for dtype in (jnp.float32, jnp.bfloat16)
    )
    in_bits = rounded.stored(jax.tree.map(lambda x: np.asarray(x, jnp.bfloat16), params))
    assert all(x.dtype == np.uint16 for x in jax.tree.leaves(in_bits))
    losses = []
    for codec, weights in ((exact, params), (rounded, params), (rounded, in_bits)):
        cache, _, _ = commit(codec, weights, codec.new_cache(2), patches[:, 0], [24, 24])
        losses.append(codec.try_counts(weights, cache, patches[:, 1], counts).losses)
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.05)
    np.testing.assert_allclose(losses[2], losses[0], rtol=0.05)
    assert rounded.cache_bytes() * 2 == exact.cache_bytes()


def test_an_unconditioned_encoder_runs_once_for_all_counts(fsq):
    """Without the embeddings of kept and dropped tokens, fewer tokens are the first of the same tokens."""
    config, params, patches, _ = fsq
    config = config.replace(condition_encoder=False)
    embeddings = {"is_kept_embed", "is_masked_embed"}
    encoder = {name: leaf for name, leaf in params["encoder"].items() if name not in embeddings}
    params = params | {"encoder": encoder}
    shapes = jax.tree.map(jnp.shape, param_shapes(config))
    assert jax.tree.map(jnp.shape, params) == shapes
    assert config.config_hash() != config.replace(condition_encoder=True).config_hash()

    codec = Codec(config, window_blocks=3)
    cache, _, _ = commit(codec, params, codec.new_cache(batch=2), patches[:, 0], [9, 30])
    counts = np.array([[4, 20], [32, 7]], np.int32)
    together = codec.try_counts(params, cache, patches[:, 1], counts)
    assert together.encoder_new[0].shape[1] == 2 and together.decoder_new[0].shape[1] == 4
    for candidate in range(2):
        alone = codec.try_counts(params, cache, patches[:, 1], counts[:, candidate : candidate + 1])
        np.testing.assert_allclose(together.losses[:, candidate], alone.losses[:, 0], rtol=1e-6)
    codes = np.asarray(together.codes).reshape(2, 2, *together.codes.shape[1:])
    np.testing.assert_array_equal(codes[0, 0, :4], codes[0, 1, :4])
    encoded = codec.encode(params, cache, patches[:, 1])
    once = codec.try_counts(params, cache, patches[:, 1], counts, encoded=encoded)
    np.testing.assert_allclose(once.losses, together.losses, rtol=1e-6)
    np.testing.assert_array_equal(once.codes, together.codes)

    chosen = counts[[0, 1], [1, 0]]
    beside, _, _ = commit(codec, params, codec.new_cache(batch=2), patches[:, 0], [9, 30])
    beside, _, _ = commit(codec, params, beside, patches[:, 1], chosen)
    later, committed = codec.commit(cache, together, np.array([1, 0], np.int32))
    assert later.num_blocks.tolist() == [2, 2]
    for both in zip(jax.tree.leaves(later), jax.tree.leaves(beside), strict=True):
        np.testing.assert_allclose(*both, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(committed.pixels[1], together.pixels[2])

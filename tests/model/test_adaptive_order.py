"""The order 'adaptive': groups that have more to say send more tokens, and the decoder finds out from the codes alone."""

import functools
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import released
from gradients import assert_same, loss_and_gradients
from tiny_run import make_clips

from elastic.checkpoints.params import save_pretrained
from elastic.cli import app
from elastic.config import ElasticTokConfig, load_config
from elastic.distributed.mesh import make_mesh
from elastic.distributed.sharding import param_shardings
from elastic.io.tree import flatten
from elastic.media import open_clip
from elastic.model import Batch, ElasticTok, adaptive_order, fit_order, init_params
from elastic.model.add_options import add_options, before_options
from elastic.model.bottleneck import FSQ, VAE
from elastic.model.linear_init import linear_init, sample_size
from elastic.patches import patchify
from elastic.tokenizer import ElasticTokenizer
from elastic.tokenizer.block_codec import Codec
from elastic.tokens import raster_places
from elastic.training.config import OptimizerConfig
from elastic.training.optimizer import make_optimizer
from scripts import fit_order as fit_order_script

LEVELS = (7, 5, 4)
OPTIONS = dict(
    token_order="adaptive", condition_encoder=False, condition_decoder=True, rope="3d", patch_group=4,
    fsq_quant_levels=LEVELS,
)  # fmt: skip


def config(**changes):
    """Blocks of two slices of 8 by 8 patches."""
    sizes = dict(
        hidden_size=32,
        intermediate_size=32,
        num_encoder_layers=1,
        num_decoder_layers=1,
        num_attention_heads=1,
    )
    blocks = dict(
        frames_per_block=4, patch_size=(2, 4, 4), max_toks=128, min_toks=32, max_sequence_length=256
    )
    return ElasticTokConfig(**sizes | blocks | OPTIONS | changes)  # fmt: skip


CONFIGS = pytest.mark.parametrize(
    "made", [config(), config(haar_groups=True)], ids=["groups", "haar"]
)
VAE_OPTIONS = dict(bottleneck_type="vae", vae_bottleneck_dim=3)
MODELS = pytest.mark.parametrize(
    "made",
    [config(), config(haar_groups=True), config(haar_groups=True, **VAE_OPTIONS)],
    ids=["groups", "haar", "vae"],
)


def promise(made, seed=0):
    rng = np.random.default_rng(seed)
    stages, channels = made.num_stages, made.code_dim
    start = np.sort(rng.uniform(-4, 4, stages))[::-1]
    weight = rng.normal(size=(stages, channels, stages)) * 0.3
    return adaptive_order.Promise(
        jnp.asarray(weight, jnp.float32), jnp.asarray(start.copy(), jnp.float32)
    )


def sizes(made, blocks=3):
    return np.random.default_rng(1).integers(0, 4, (blocks, made.tokens_per_block, made.code_dim))


def places_of(sizes, made, promise, num_sent=None, *, sent=False):
    count = np.full(len(sizes), made.tokens_per_block if num_sent is None else num_sent)
    return np.asarray(
        adaptive_order.sent_places(
            jnp.asarray(sizes, jnp.int32), jnp.asarray(count, jnp.int32), promise, made, sent=sent
        )
    )


def one_at_a_time(sizes, made, promise):
    """The same rule as a plain loop: the largest promise is next; among equal ones each group has a turn."""
    stages = made.num_stages
    alike = made.tokens_per_block // made.slices_per_block // stages
    weight, start = (
        np.rint(np.asarray(x).astype(ml_dtypes.bfloat16).astype(float) * 1024).astype(int)
        for x in promise
    )
    first = np.concatenate(
        [s * stages * alike + np.arange(alike) for s in range(made.slices_per_block)]
    )
    sums = np.tile(start, (len(first), 1))
    stage, best, found = np.zeros(len(first), int), np.full(len(first), start[0] // 256), []
    while len(found) < made.tokens_per_block:
        for group in np.flatnonzero(best == best.max()):
            place = first[group] + stage[group] * alike
            found.append(place)
            sums[group] += sizes[place] @ weight[stage[group]]
            stage[group] += 1
            left = stage[group] < stages
            best[group] = min(best[group], sums[group, stage[group]] // 256) if left else -(2**31)
    return found


@CONFIGS
def test_every_token_is_sent_once_and_the_largest_promise_comes_first(made):
    found = places_of(sizes(made), made, promise(made))
    np.testing.assert_array_equal(np.sort(found), np.tile(np.arange(128), (3, 1)))
    np.testing.assert_array_equal(
        found, [one_at_a_time(block, made, promise(made)) for block in sizes(made)]
    )
    # Content decides; and a prefix of one token for each group has all groups.
    assert len({tuple(row) for row in found}) == 3
    in_first = 128 // made.num_stages
    assert len({tuple(np.sort(row[:in_first])) for row in found}) == 1


@CONFIGS
@pytest.mark.parametrize("num_sent", [1, 17, 40, 128])
def test_the_decoder_finds_the_order_from_the_codes_that_it_has(made, num_sent):
    """What comes later, or never, changes nothing."""
    rng, known = np.random.default_rng(2), promise(made)
    codes = sizes(made)
    places = places_of(codes, made, known)
    sent = np.array(adaptive_order.to_sent(jnp.asarray(codes), jnp.asarray(places)))
    sent[:, num_sent:] = rng.integers(0, 4, sent[:, num_sent:].shape)
    found = places_of(sent, made, known, num_sent, sent=True)
    np.testing.assert_array_equal(found[:, :num_sent], places[:, :num_sent])
    back = np.asarray(adaptive_order.to_network(jnp.asarray(sent), jnp.asarray(found)))
    for block, original, rows in zip(back, codes, places, strict=True):
        kept = rows[:num_sent]
        np.testing.assert_array_equal(block[kept], original[kept])


def test_the_order_is_the_same_in_bfloat16():
    made, known = config(haar_groups=True), promise(config(haar_groups=True))
    stored = jax.tree.map(lambda x: x.astype(jnp.bfloat16), known)
    assert np.any(np.asarray(stored.weight, np.float32) != known.weight)
    np.testing.assert_array_equal(
        places_of(sizes(made), made, known), places_of(sizes(made), made, stored)
    )


def test_sizes_are_whole_levels_from_the_middle():
    fsq = FSQ(LEVELS)
    codes = fsq.indices_to_codes(jnp.arange(fsq.codebook_size))
    found = fsq.sizes(codes)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, np.rint(np.abs(codes) * [3, 2, 2]))


def test_sizes_of_the_vae_count_half_octaves():
    """Without a logarithm, which devices may round in two ways."""
    numbers = np.array([0, 0.05, 1 / 16, 0.0937, 0.09376, 1 / 8, 1, 1.49, 1.5, 15.99, 1e30, np.inf])
    found = VAE(1).sizes(jnp.asarray(np.concatenate([numbers, -numbers]), jnp.float32))
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, [0, 0, 0, 0, 1, 2, 8, 8, 9, 15, 16, 16] * 2)


def test_the_divergence_is_that_of_the_tokens_that_are_sent():
    made = config(haar_groups=True, **VAE_OPTIONS)
    patches = jnp.asarray(np.random.default_rng(0).normal(size=(1, 128, made.patch_dim)) / 3)
    whole = jnp.ones((1, 128), bool)
    model, variables = ElasticTok(made), {"params": params(made)}

    def latents(model, batch):
        return model.encoder(batch)[0]

    all_latents = model.apply(variables, Batch(patches, whole), method=latents)
    mean, logvar = np.split(np.asarray(all_latents, np.float64)[0], 2, axis=-1)
    logvar = logvar.clip(-30, 20)
    divergence = 0.5 * (mean**2 + np.exp(logvar) - 1 - logvar).sum(-1)
    sizes = model.bottleneck.sizes(jnp.asarray(mean[None]))
    places = places_of(sizes, made, adaptive_order.Promise(**params(made)["token_order"]))[0]
    for count in (20, 77):
        counted = jnp.arange(128)[None] != places[3]  # of the network's tokens, as padding is
        batch = Batch(patches, jnp.arange(128)[None] < count, counted=counted)
        encoded = model.apply(variables, batch, method="encode")
        np.testing.assert_allclose(encoded.codes[0, :count], mean[places[:count]], rtol=1e-6)
        sent = np.delete(divergence[places[:count]], 3)
        np.testing.assert_allclose(encoded.aux_loss, 1e-8 * sent.sum(), rtol=1e-5)


def drawn(made):
    """Random parameters."""
    return jax.tree.map(
        np.array, released.quick_jit(lambda: init_params(made, jax.random.key(0)))()
    )


@functools.cache
def params(made):
    tree = drawn(made)
    tree["encoder"]["pre_quant"]["kernel"] *= 50  # so that codes differ
    weight, start = promise(made)
    return tree | {"token_order": {"weight": np.asarray(weight), "start": np.asarray(start)}}


@CONFIGS
def test_at_first_it_is_the_order_coarse_to_fine(made):
    """To the last bit, also where the encoder saw which tokens are kept."""
    before = made.replace(token_order="coarse_to_fine", condition_encoder=True)
    old = drawn(before)
    old["encoder"]["is_masked_embed"] = old["encoder"]["is_kept_embed"]
    new, after = fit_order.adaptive(old, before)
    assert after == made
    pixels = np.random.default_rng(0).normal(size=(1, 256, made.patch_dim)) / 3
    patches = jnp.asarray(pixels, jnp.float32)
    in_turn = np.arange(128)
    if made.slices_per_block > 1:  # a slice after the other, or of all slices a stage
        in_turn = (
            in_turn.reshape(made.slices_per_block, made.num_stages, -1).swapaxes(0, 1).reshape(-1)
        )
    kept = jnp.tile(jnp.argsort(in_turn) < 50, 2)[None]
    recon, encoded = released.quick_jit(ElasticTok(before).apply)(
        {"params": old}, Batch(patches, kept)
    )
    ours, sent = released.quick_jit(ElasticTok(made).apply)(
        {"params": new}, Batch(patches, jnp.tile(jnp.arange(128) < 50, 2)[None])
    )
    np.testing.assert_allclose(ours, recon, atol=1e-6)
    codes = np.asarray(encoded.codes).reshape(2, 128, -1)[:, in_turn].reshape(sent.codes.shape)
    np.testing.assert_array_equal(sent.codes, codes)

    # So does it where training adds it to a model whose encoder runs once.
    once = before.replace(condition_encoder=False)
    added = add_options({"encoder": {}, "decoder": {}}, before_options(made, once), made)
    assert set(added["token_order"]) == {"weight", "start"}
    with pytest.raises(ValueError, match="token_order='adaptive', which cannot be taken away"):
        before_options(once, made)


@MODELS
def test_block_by_block_and_one_shot_decode_alike(made):
    """A token file holds the first tokens of every block, in the order in which they are sent."""
    codec, tree = Codec(made, window_blocks=2), params(made)
    rng = np.random.default_rng(0)
    patches = rng.integers(0, 256, (2, 2, 128, made.patch_dim), np.uint8)
    counts = np.array([[33, 128], [90, 40]], np.int32)
    cache, reader = codec.new_cache(batch=2), codec.new_decoder_cache(batch=2)
    codes, pixels = [], []
    for block in range(2):
        trial = codec.try_counts(tree, cache, patches[:, block], counts[:, block, None])
        cache, committed = codec.commit(cache, trial, np.zeros(2, np.int32))
        kept = jnp.arange(128)[None] < counts[:, block, None]
        is_fsq = isinstance(codec.bottleneck, FSQ)
        marks = kept if is_fsq else kept[..., None]
        tokens = jnp.where(marks, committed.tokens, 0)  # a file has none there
        reader, decoded = codec.decode(tree, reader, tokens, counts[:, block])
        np.testing.assert_array_equal(decoded, committed.pixels)
        block_codes = codec.bottleneck.indices_to_codes(tokens) if is_fsq else tokens
        codes.append(jnp.where(kept[..., None], block_codes, 0))
        pixels.append(np.asarray(committed.pixels))
    kept = (jnp.arange(128)[None, None] < counts[..., None]).reshape(2, 256)
    out, _ = ElasticTok(made).apply(
        {"params": tree},
        jnp.concatenate(codes, 1),
        Batch(jnp.zeros((2, 256, 0)), kept),
        method="decode",
    )
    levels = (np.clip(out, -1, 1) + 1) * 127.5
    np.testing.assert_allclose(np.concatenate(pixels, 1), levels, atol=0.51)


@pytest.mark.slow
def test_the_mesh_changes_no_number():
    made = released.config(
        "fsq", **OPTIONS | dict(haar_groups=True, fsq_quant_levels=(8, 8, 8, 5, 5, 5))
    )
    tree = jax.device_get(init_params(made, jax.random.key(1)))
    weight, start = promise(made)
    tree["token_order"] = {"weight": weight, "start": start}
    mesh = make_mesh("1,1,2,2", jax.devices()[:4])
    placed = jax.device_put(tree, param_shardings(mesh, tree))
    alone = loss_and_gradients(ElasticTok(made), tree, "fsq")
    shared = loss_and_gradients(ElasticTok(made, mesh=mesh), placed, "fsq")
    # Whole numbers decide the order, so it has no gradient.
    found, expected = (dict(flatten(gradients)) for _, gradients in (shared, alone))
    still = [path for path, gradient in expected.items() if not np.any(gradient)]
    assert ("token_order", "weight") in still and ("encoder", "in_proj", "kernel") not in still
    assert not any(np.any(found.pop(path)) or np.any(expected.pop(path)) for path in still)
    assert_same((shared[0], found), (alone[0], expected))


def half_quiet(count, size):
    """Pictures that are level on the left and squares of 4 by 4 pixels on the right."""
    rng = np.random.default_rng(0)
    time, rows, columns = size
    noise = rng.normal(size=(count, 1, rows // 4, columns // 4, 3)) * 40
    noise[:, :, :, : columns // 8] *= 0.04
    noise = noise.repeat(4, axis=2).repeat(4, axis=3)
    level = rng.uniform(60, 200, (count, 1, 1, 1, 3))
    return np.broadcast_to((level + noise).clip(0, 255), (count, time, rows, columns, 3)).astype(
        np.uint8
    )


@pytest.mark.slow
def test_a_fitted_order_shows_more_with_as_many_tokens():
    made = config(
        hidden_size=128, fsq_quant_levels=(9, 7, 5), bounded_output=False, lapped_output=True, frames_per_block=2,
        max_toks=64, min_toks=16, max_sequence_length=64,
    )  # fmt: skip
    shape = sample_size(made)
    squares = half_quiet(2000, (shape[0], 32, 32))[
        :, :, : shape[1], 16 - shape[2] // 2 : 16 + shape[2] // 2
    ]
    drawn = init_params(made, jax.random.key(0))
    start = linear_init(drawn, made, squares.reshape(2000, -1))
    assert jax.tree.map(np.shape, start) == jax.tree.map(np.shape, drawn)
    patches = patchify(half_quiet(40, (2, 32, 32)), made.patch_size, "adaptive") / 127.5 - 1
    patches = jnp.asarray(patches, jnp.float32)
    measure = fit_order.StageErrors(start, made)
    measured = fit_order.joined([measure(block) for block in patches[:30]])
    assert measured.errors.shape == (30 * 16, 4)
    fitted = start | {"token_order": fit_order.fit(measured)}

    @released.quick_jit
    def error(tree, count):
        kept = jnp.broadcast_to(jnp.arange(64) < count, (10, 64))
        recon, _ = ElasticTok(made).apply({"params": tree}, Batch(patches[30:], kept))
        return jnp.mean(jnp.square(recon - patches[30:]))

    # Stage 0 tells nothing of what follows, the mean; after stage 1 it is clear which half is level.
    for count, factor in ((16, 1.001), (32, 1.001), (48, 0.7), (64, 1.001)):
        assert error(fitted, count) <= factor * error(start, count), count


def test_training_does_not_change_the_order():
    """It has no gradient; and weights that decay would change it."""
    tree = {
        "token_order": {"weight": jnp.ones((2, 1, 2))},
        "encoder": {"in_proj": {"kernel": jnp.ones((2, 2))}},
    }
    nothing = jax.tree.map(jnp.zeros_like, tree)
    for changes in (dict(decay_norms=True), dict(decay_norms=False), dict(type="muon")):
        options = OptimizerConfig(
            lr=1.0, init_lr=1.0, end_lr=1.0, lr_warmup_steps=0, weight_decay=0.1, **changes
        )
        optimizer = make_optimizer(options)
        updates, _ = optimizer.update(nothing, optimizer.init(tree), tree)
        assert not np.any(updates["token_order"]["weight"])
        assert np.all(updates["encoder"]["in_proj"]["kernel"] != 0)


@pytest.mark.slow
def test_the_command_writes_a_new_model_whose_tokens_decode(tmp_path, capsys):
    made = config(haar_groups=True)
    before = made.replace(token_order="coarse_to_fine", condition_encoder=True)
    save_pretrained(tmp_path / "model", before, drawn(before))
    (tmp_path / "clips").mkdir()
    make_clips(tmp_path / "clips")

    def run(model="model", output="new"):
        command = [f"--load_checkpoint={tmp_path / model}", f"--input_path={tmp_path / 'clips'}"]
        command += [f"--output_folder={tmp_path / output}"]
        return app.run(fit_order_script.FIT_ORDER, fit_order_script.fit_order, command)

    assert run() == 0
    assert "the order of 16 stages, from 3 blocks" in capsys.readouterr().out
    assert load_config(str(tmp_path / "new")) == made
    mesh = make_mesh("1,1,1,1", jax.devices()[:1])
    tokenizer = ElasticTokenizer.from_pretrained(tmp_path / "new", mesh=mesh)
    tokens = tokenizer.encode(tmp_path / "clips" / "pan.mp4", num_tokens=50)
    tokens.save(tmp_path / "tokens.npz")
    assert tokens.token_order == "adaptive"
    with pytest.raises(ValueError, match="each block has an order of its own"):
        raster_places(tokens)
    decoded = tokenizer.decode(tmp_path / "tokens.npz")
    losses = [block.loss for block in tokens.blocks]
    with open_clip(tmp_path / "clips" / "pan.mp4", resolution=32) as reader:
        errors = np.square((decoded.astype(float) - reader.read()) / 127.5)
    assert np.all(errors.reshape(2, -1).mean(axis=1) <= np.array(losses) + 1e-6)

    assert run() == 1
    assert "holds a model; name a new folder" in capsys.readouterr().err
    (tmp_path / "alone").mkdir()
    alone = before.replace(patch_group=1, haar_groups=False).to_json_dict()
    (tmp_path / "alone" / "config.json").write_text(json.dumps(alone))
    (tmp_path / "alone" / "model.safetensors").touch()  # it is not read
    assert run("alone", "newer") == 1
    assert "token_order='adaptive' needs groups of patches" in capsys.readouterr().err
    assert not (tmp_path / "newer").exists()


@pytest.mark.parametrize(
    "changes",
    [dict(condition_encoder=True), dict(patch_group=1)],
    ids=str,
)
def test_a_model_that_cannot_have_the_order_is_refused(changes):
    with pytest.raises(ValueError, match="token_order='adaptive' needs groups of patches"):
        config(**changes)

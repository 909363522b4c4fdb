"""Clips to tokens and back through the user's door."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import load_tokenizer as load

from elastic import checkpoints, media
from elastic.distributed.mesh import make_mesh
from elastic.tokenizer import ElasticTokenizer, block_codec
from elastic.tokens import BlockTokens, TokenizedClip


@pytest.mark.slow
@pytest.mark.usefixtures("optimized_test")
def test_a_mesh_changes_no_token(golden, clip):
    """Heads over tp in the released spelling of a mesh, the sequence and its cache over sp; a window that slides."""
    one = load(golden, "fsq", window_blocks=3)
    mesh = make_mesh("!1,1,2,2", jax.devices()[:4])
    many = ElasticTokenizer(one.config, one.params, mesh=mesh, window_blocks=3)
    tokens = [t.encode(clip, num_tokens=20) for t in (one, many)]
    for a, b in zip(tokens[0].blocks, tokens[1].blocks, strict=True):
        np.testing.assert_array_equal(a.indices, b.indices)
        np.testing.assert_allclose(a.loss, b.loss, rtol=1e-5)  # rounding of float32 sums
    apart = np.abs(one.decode(tokens[0]).astype(int) - many.decode(tokens[0]))
    assert apart.max() <= 1


@pytest.fixture(scope="module", params=["fsq", "vae"])
def tokenizer(request, golden):
    return load(golden, request.param)


@pytest.fixture
def clip(golden):
    """11 frames, so that the last block of both models is short."""
    with media.open_clip(golden / "media" / "clip_160x120_30fps_97f.mp4", resolution=32) as reader:
        return reader.read()[:11]


@pytest.fixture(scope="module")
def tiled(golden):
    """A tokenizer whose kernels' tiles are as long as a block, so that caches of several lengths give the same bits."""
    whole = load(golden, "fsq")
    config = whole.config.replace(scan_key_chunk_size=whole.config.tokens_per_block)
    return ElasticTokenizer(config, whole.params, mesh=whole.mesh, window_blocks=4)


@pytest.mark.parametrize(("num_blocks", "cached"), [(1, 0), (2, 1), (3, 2), (6, 3)])
def test_a_cache_is_as_long_as_the_clip_needs_and_changes_no_bit(tiled, clip, num_blocks, cached):
    """Of frames that arrive one by one nobody knows the number, so that their cache serves a whole window."""
    frames = clip[: 2 * num_blocks]
    assert tiled.codec.cached_blocks(num_blocks) == cached
    assert tiled.codec.new_cache(num_blocks=num_blocks).encoder.keys.shape[3] == cached * 32
    known = tiled.reconstruct(frames, threshold=0.4)
    unknown = tiled.reconstruct(iter(frames), threshold=0.4)
    assert known.tokens == unknown.tokens
    np.testing.assert_array_equal(known.frames, unknown.frames)
    np.testing.assert_array_equal(tiled.decode(known.tokens), known.frames)


def test_a_picture_needs_no_cache_and_a_clip_beside_it_lengthens_it(tiled, clip):
    """Clips that share a batch share a cache, which grows with the first one that needs it."""
    clips = [clip[0], clip[:2], clip[:5], clip]
    alone = [tiled.encode(one, threshold=0.4) for one in clips]
    together = dict(tiled.encode_many(clips, batch=2, threshold=0.4))
    for number, tokens in enumerate(alone):
        for one, other in zip(together[number].blocks, tokens.blocks, strict=True):
            np.testing.assert_array_equal(one.indices, other.indices)


def test_only_a_clip_whose_own_cache_exceeds_the_memory_is_refused(tiled, clip, monkeypatch):
    block = tiled.codec.trial_bytes()
    monkeypatch.setattr(block_codec, "memory_limit", lambda mesh: 1.5 * block)
    assert tiled.codec.cache_bytes() == 3 * block  # a whole window does not fit
    tokens = tiled.encode(clip[:4], threshold=0.4)
    np.testing.assert_equal(tiled.decode(tokens).shape[0], 4)
    for longer in (clip[:5], iter(clip[:4])):  # nobody knows how many frames will arrive
        with pytest.raises(
            ValueError, match=r"A cache of [23] blocks .*; hold fewer than 2 blocks"
        ):
            tiled.encode(longer, threshold=0.4)
    with pytest.raises(ValueError, match="fewer clips at once"):
        list(tiled.encode_many([clip[:4]] * 2, batch=2, threshold=0.4))
    monkeypatch.setattr(block_codec, "memory_limit", lambda mesh: 0)
    assert len(tiled.encode(clip[0], threshold=0.4)) == 1


def block_errors(tokens, original, decoded):
    """Mean squared error of each block over its real frames, pixels in [-1, 1]."""
    error = (original.astype(np.float64) - decoded) / 127.5
    frames = tokens.frames_per_block
    return [np.mean(np.square(error[i : i + frames])) for i in range(0, len(error), frames)]


def test_what_is_reported_is_what_the_decoded_token_file_gives(tokenizer, clip, tmp_path):
    """Design section 4, lines 2 and 6: blocks reported as met are under the threshold, the short tail included."""
    losses = [b.loss for b in tokenizer.encode(clip, num_tokens=32).blocks]
    threshold = float(np.median(losses)) * 1.01
    made = tokenizer.reconstruct(clip, threshold=threshold)
    made.tokens.save(tmp_path / "tokens.npz")
    tokens = TokenizedClip.load(tmp_path / "tokens.npz")
    decoded = tokenizer.decode(tokens)
    np.testing.assert_array_equal(decoded, made.frames)
    assert decoded.shape == clip.shape
    met = [block.met_threshold for block in tokens.blocks]
    assert any(met) and not all(met)
    for block, error in zip(tokens.blocks, block_errors(tokens, clip, decoded), strict=True):
        assert (error <= threshold) or not block.met_threshold
        assert error <= block.loss + 1e-6
        assert block.met_threshold or block.num_kept == 32


def test_binary_finds_what_trying_every_count_finds(golden, clip):
    """On a curve that falls; where it does not, both still return a count that was measured to meet the threshold."""
    tokenizer = load(golden, "fsq")
    full = tokenizer.encode(clip, num_tokens=32)
    threshold = float(np.median([b.loss for b in full.blocks])) * 1.02
    for search in ("binary", "linear", "predict"):
        encoding = tokenizer.stream(clip, threshold=threshold, search=search)
        for result in encoding:
            assert result.passes == len(result.tried)  # nothing twice, and no pass for the commit
            assert result.tried[result.tokens.num_kept] == result.tokens.loss
            assert result.tokens.met_threshold == any(v <= threshold for v in result.tried.values())


def test_trying_several_counts_a_call_changes_no_result(golden, clip):
    one, three = (load(golden, "fsq", search_width=width) for width in (1, 3))
    threshold = float(np.median([b.loss for b in one.encode(clip, num_tokens=32).blocks])) * 1.02
    counts = [t.encode(clip, threshold=threshold, search="linear").counts for t in (one, three)]
    np.testing.assert_array_equal(*counts)


def test_restart_empties_the_context_and_carry_does_not(golden, clip):
    """Design section 4, line 6: the released code forgets everything after each window."""
    carry, restart = (
        load(golden, "fsq", window_blocks=2, context=context) for context in ("carry", "restart")
    )
    carried, restarted = (t.encode(clip, num_tokens=12) for t in (carry, restart))
    alone = restart.encode(clip[4:8], num_tokens=12)  # blocks 2 and 3, a window of their own
    np.testing.assert_array_equal(restarted.blocks[2].indices, alone.blocks[0].indices)
    np.testing.assert_array_equal(restarted.blocks[3].indices, alone.blocks[1].indices)
    assert carried.blocks[2].loss != restarted.blocks[2].loss
    for tokens in (carried, restarted):  # any tokenizer of the same model decodes either
        np.testing.assert_allclose(
            carry.decode(tokens).astype(int), restart.decode(tokens).astype(int), atol=1
        )


@pytest.mark.parametrize(
    "options",
    [dict(threshold=0.5), dict(avg_tokens=16, budget_counts=4, delay_blocks=3)],
    ids=["threshold", "budget"],
)
def test_progress_moves_with_the_passes_of_the_first_block(golden, clip, options):
    session = load(golden, "fsq").stream(clip[:6], **options)
    seen = []
    session.on_progress = seen.append
    blocks = iter(session)
    next(blocks)
    assert len(seen) > 1 and 0 < seen[0] < seen[1] and seen[0] < 1
    list(blocks)
    assert max(seen) <= session.num_blocks == session.num_done


def test_a_picture_is_one_block_of_one_frame(tokenizer, golden):
    made = tokenizer.reconstruct(golden / "media" / "img_101x67.png", num_tokens=12)
    assert made.frames.shape == (1, 32, 32, 3) and made.tokens.is_image
    assert made.tokens.source == (101, 67) and len(made.tokens.blocks) == 1
    picture = np.asarray(made.frames[0])
    again = tokenizer.encode(picture, num_tokens=32)
    assert again.is_image and again.num_frames == 1


def test_a_shortened_record_decodes(golden, clip):
    """Tail dropping: the first n tokens of a block decode by themselves."""
    tokenizer = load(golden, "fsq")
    full = tokenizer.encode(clip, num_tokens=32)
    short = full.truncate(8)
    assert short.counts.tolist() == [8] * len(full.blocks)
    decoded = tokenizer.decode(short)
    assert decoded.shape == clip.shape and (decoded != tokenizer.decode(full)).any()


def test_a_fixed_length_beside_a_threshold_is_refused_as_on_the_command_line(tokenizer, clip):
    with pytest.raises(ValueError, match=r"threshold= and num_tokens= are 2 targets; give one\."):
        tokenizer.encode(clip, num_tokens=12, threshold=1e-9)


def test_errors_name_the_way_out(tokenizer, golden, clip, tmp_path):
    with pytest.raises(ValueError, match="Give threshold="):
        tokenizer.encode(clip)
    with pytest.raises(ValueError, match="must be uint8"):
        tokenizer.encode(clip.astype(np.float32), threshold=0.1)
    with pytest.raises(ValueError, match="context='forget'"):
        load(golden, "fsq", context="forget")
    with pytest.raises(ValueError, match="iterate to the end first"):
        tokenizer.stream(clip, num_tokens=12).tokens()
    other = load(golden, "vae" if tokenizer.config.bottleneck_type == "fsq" else "fsq")
    with pytest.raises(ValueError, match="load the model that made them"):
        other.decode(tokenizer.encode(clip[:4], num_tokens=12))
    checkpoints.save_params(tmp_path / "params", tokenizer.params)
    with pytest.raises(ValueError, match=r"no config.json beside it"):
        ElasticTokenizer.from_pretrained(f"params::{tmp_path}/params")


def test_tokens_are_decoded_by_the_weights_that_made_them_alone(tokenizer, clip):
    """In whatever type these are stored; others of the same shape would give another clip."""
    tokens = TokenizedClip.from_bytes(tokenizer.encode(clip[:4], num_tokens=12).to_bytes())

    def like(change):
        params = jax.tree.map(lambda leaf: change(np.asarray(leaf)), tokenizer.params)
        return tokenizer.with_params(params)  # of the same compiled programs

    stored = like(lambda leaf: leaf.astype(jnp.bfloat16))
    assert np.abs(stored.decode(tokens).astype(int) - tokenizer.decode(tokens)).mean() < 3
    with pytest.raises(ValueError, match="load the model that made them"):
        like(lambda leaf: np.roll(leaf, 1, axis=-1)).decode(tokens)
    with pytest.raises(ValueError, match="load the model that made them"):
        tokenizer.decode(dataclasses.replace(tokens, weights=(0.5,) * len(tokens.weights)))
    unknown = dataclasses.replace(tokens, weights=())  # a file of before they were noted
    np.testing.assert_array_equal(tokenizer.decode(unknown), tokenizer.decode(tokens))


def test_a_forged_record_is_refused(tokenizer, clip):
    tokens = tokenizer.encode(clip[:2], num_tokens=4)
    with pytest.raises(ValueError, match="resolution=64, but their model has 32"):
        tokenizer.decode(dataclasses.replace(tokens, resolution=64))
    values = np.zeros((4, 3), np.float32) if tokens.codebook_size is None else np.full(4, 10**6)
    kind = "vectors" if tokens.codebook_size is None else "indices"
    block = BlockTokens(num_kept=4, loss=0.1, met_threshold=False, **{kind: values})
    book = None if tokens.codebook_size is None else 2**24
    forged = dataclasses.replace(tokens, blocks=(block,), codebook_size=book)
    with pytest.raises(ValueError, match=r"Block 0 holds (vectors of 3|index 1000000)"):
        tokenizer.decode(forged)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tokens": True}, "num_tokens=True must be a whole number"),
        ({"num_tokens": 33}, "num_tokens=33 must lie between 1 and 32"),
        ({"num_tokens": 0}, "num_tokens=0 must lie between 1 and 32"),
        ({"num_tokens": 8, "max_frames": -1}, "max_frames=-1 must be at least 1"),
        ({"num_tokens": 8, "rate": 0}, "rate=0 must be a positive number"),
    ],
)
def test_an_option_out_of_range_is_refused_by_name(tokenizer, clip, options, message):
    for source in (clip, iter(clip)):
        with pytest.raises(ValueError, match=message):
            tokenizer.encode(source, **options)


def test_a_fixed_count_below_the_least_of_training_may_be_all_that_is_allowed(golden, clip):
    """The range of a budget or a search is not that of a count that is given."""
    with pytest.warns(UserWarning, match="num_tokens=2 is below 4, the fewest tokens of a block"):
        tokens = load(golden, "fsq").encode(clip[:2], num_tokens=2, max_fraction=0.07)
    assert tokens.counts.tolist() == [2]

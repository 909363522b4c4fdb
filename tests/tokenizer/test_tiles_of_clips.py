"""Frames in several tiles: each tile is a clip of its own, and the frame is put together from them, whatever its size."""

import logging
import types
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import CASES, read_frames
from small_models import load_tokenizer as load

from elastic.config import ElasticTokConfig
from elastic.media import MediaError
from elastic.tokenizer.block_codec import Committed, Trial
from elastic.tokenizer.clip_source import open_clip
from elastic.tokenizer.decoder import blocks_of, decode_blocks
from elastic.tokenizer.session import EncodeSession, TokenizerContext
from elastic.tokenizer.targets import EncodeOptions
from elastic.tokens import TokenizedClip, TokenShards, write_shard
from elastic.tokens.batches import Vocabulary, token_batches

CLIP = "media/clip_160x120_30fps_97f.mp4"
# A token is a vector of the pixels of its patch.
LOSSLESS = ElasticTokConfig(**CASES["vae"] | dict(vae_bottleneck_dim=2 * 8 * 8 * 3))


class Cache(NamedTuple):
    """The patches that each slot has committed last: what a tile's next block is predicted from."""

    num_blocks: np.ndarray
    before: np.ndarray

    def forget(self, emptied):
        keep = ~np.asarray(emptied)
        return Cache(self.num_blocks * keep, self.before * keep[:, None, None])


class LosslessCodec:
    """In place of a model: tokens are the difference to the block before in the same slot, so that a tile needs its own cache."""

    config, mesh, window_blocks, dtype = LOSSLESS, None, 3, np.dtype(np.float32)
    model_seconds, can_draft = 0.0, False

    def new_cache(self, batch=1, *, num_blocks=None):
        shape = (batch, LOSSLESS.tokens_per_block, LOSSLESS.patch_dim)
        return Cache(np.zeros(batch, int), np.zeros(shape, np.float32))

    new_decoder_cache = new_cache

    def lengthened(self, cache, num_blocks):
        return cache

    def trial_bytes(self, candidates=1):
        return 1

    def encode(self, params, cache, patches):
        return None

    def try_counts(self, params, cache, patches, counts, *, num_frames, weights, encoded, keep):
        codes, losses = patches - cache.before, np.zeros(counts.shape, np.float32)
        new: Any = (patches.astype(np.float32),) * 2
        return Trial(losses, losses, codes, patches.astype(np.float32), new, new)

    def select(self, selected, trial, choice, elements):
        if selected is None:
            return trial
        at = elements[:, None, None]
        codes, pixels = (
            np.where(at, new, old)
            for new, old in ((trial.codes, selected.codes), (trial.pixels, selected.pixels))
        )
        return trial._replace(codes=codes, pixels=pixels)

    def commit(self, cache, trial, choice, elements):
        at = np.ones(len(choice), bool) if elements is None else elements
        before = np.where(at[:, None, None], trial.pixels, cache.before)
        return Cache(cache.num_blocks + at, before), Committed(trial.codes, trial.pixels)

    def decode(self, params, cache, tokens, num_kept, *, rounded):
        pixels = cache.before + tokens
        cache = Cache(cache.num_blocks + 1, pixels)
        return cache, pixels.astype(np.uint8) if rounded else pixels


@settings(max_examples=40)
@given(
    size=st.tuples(st.integers(1, 100), st.integers(1, 100)),
    num_frames=st.integers(1, 9),
    batch=st.integers(1, 5),
    overlap=st.integers(0, 20),
    seed=st.integers(0, 9),
)
def test_a_lossless_model_gives_the_clip_back_to_the_bit(size, num_frames, batch, overlap, seed):
    """In encoding and in decoding, with any number of tiles at once: no tile meets the cache of another one."""
    rng = np.random.default_rng(seed)
    clip = rng.integers(0, 256, (num_frames, *size, 3), dtype=np.uint8)
    codec: Any = LosslessCodec()
    context = TokenizerContext(codec, {}, "lossless", "carry", search_width=1)
    context.__dict__["fingerprint"] = ()
    options = EncodeOptions(
        num_tokens=LOSSLESS.max_toks, fit="tile", resolution=0, tile_overlap=overlap
    )
    opened = open_clip(
        clip, 32, rate=None, max_frames=None, fit="tile", short_side=0, overlap=overlap
    )
    session = EncodeSession(context, opened, options, batch=batch)
    blocks = list(session)
    np.testing.assert_array_equal(np.concatenate([b.frames for b in blocks]), clip)
    np.testing.assert_array_equal(np.concatenate([b.reconstruction for b in blocks]), clip)
    tokens = session.tokens()
    assert len(tokens) == tokens.num_blocks * tokens.num_tiles
    assert TokenizedClip.from_bytes(tokens.to_bytes()) == tokens
    decoded = decode_blocks(
        codec, {}, blocks_of(tokens), window_blocks=3, context="carry", layout=tokens.layout,
        num_blocks=tokens.num_blocks, batch=min(batch, 3),
    )  # fmt: skip
    np.testing.assert_array_equal(np.concatenate(list(decoded)), clip)


@pytest.fixture(scope="module")
def tokenizer(golden):
    return load(golden, "fsq")


@pytest.fixture(scope="module")
def wide(golden):
    """5 frames of 48x40, which four tiles of 32x32 cover and the last block of two frames does not fill."""
    return read_frames(golden, 5, resolution=48)[:, :40]


TILE: dict[str, Any] = dict(fit="tile", resolution=0)


@pytest.mark.parametrize("threshold", [0.62, 0.56, 0.5])
def test_a_frame_meets_the_threshold_that_its_tiles_meet(tokenizer, wide, threshold):
    """Measured on the decoded 8-bit frames; the mean of the tiles' losses is an upper bound."""
    blocks = list(tokenizer.stream(wide, threshold=threshold, batch=2, **TILE))
    assert any(part.tokens.met_threshold for block in blocks for part in block.parts)
    for block in blocks:
        assert len(block.tiles) == 4
        assert block.frame_loss <= block.tokens.loss
        assert block.tokens.num_kept == sum(part.tokens.num_kept for part in block.tiles)
        if block.tokens.met_threshold:
            assert block.frame_loss <= threshold


def test_every_way_to_the_tokens_gives_the_same(tokenizer, wide, tmp_path):
    """Beside other clips, killed and resumed, from a growing file; and decoding gives the frames of encoding."""
    options = TILE | dict(threshold=0.56)
    made = tokenizer.reconstruct(wide, batch=2, **options)
    assert made.frames.shape == wide.shape
    np.testing.assert_array_equal(tokenizer.decode(made.tokens, batch=3), made.frames)
    beside = dict(tokenizer.encode_many([wide, wide[:3], wide[0]], batch=2, **options))
    assert beside[0] == made.tokens
    assert [beside[k].num_blocks for k in range(3)] == [3, 2, 1]
    path = tmp_path / "tokens.part"
    session = iter(tokenizer.stream(wide, record=path, batch=2, **options))
    next(session), next(session)
    session.close()
    with open(path, "r+b") as file:  # the last record of the second block is not whole
        file.truncate(path.stat().st_size - 10)
    seen = np.concatenate(list(tokenizer.decode_stream(path, batch=2)))
    np.testing.assert_array_equal(seen, made.frames[:2])
    resumed = tokenizer.stream(wide, record=path, batch=2, **options)
    assert resumed.num_recorded == 1
    frames = np.concatenate([block.reconstruction for block in resumed])
    assert resumed.tokens() == made.tokens
    np.testing.assert_array_equal(frames, made.frames)
    np.testing.assert_array_equal(tokenizer.decode(path, batch=2), frames)


def test_shards_hold_clips_of_mixed_sizes_and_batches_say_which_tile_a_token_is_of(
    tokenizer, wide, tmp_path
):
    clips = [
        tokenizer.encode(frames, num_tokens=count, batch=2, **TILE)
        for frames, count in ((wide, 5), (wide[:2, :20], 7), (wide[0], 32))
    ]
    assert [clip.num_tiles for clip in clips] == [4, 2, 4]
    write_shard(tmp_path / "a.parquet", zip("abc", clips, strict=True))
    shards = TokenShards(tmp_path)
    assert [*shards] == clips
    vocabulary = Vocabulary.of(shards)
    found = {}
    for batch in token_batches(shards, sequence_length=35, batch_size=2, num_epochs=1):
        for row, ids in enumerate(batch.segment_ids):
            for segment in range(1, ids.max() + 1):
                at = ids == segment
                blocks = vocabulary.blocks(batch.tokens[row][at])
                first = np.cumsum([0, *(block.num_kept + 1 for block in blocks[:-1])]) + 1
                for block, place in zip(blocks, first, strict=True):
                    key = tuple(batch.tile_places[row][at][place].tolist())
                    number = int(batch.block_ids[row][at][place])
                    tile = int(batch.tile_ids[row][at][place])
                    found.setdefault((block.num_kept, number, tile), (key, block.values.tolist()))
    for clip, count in zip(clips, (5, 7, 32), strict=True):
        for entry, block in enumerate(clip.blocks):
            number, tile = divmod(entry, clip.num_tiles)
            expected = (clip.layout.places[tile], block.values.tolist())
            assert found[count, number, tile] == expected


def test_tiles_without_the_moving_object_take_the_fewest_tokens(tokenizer):
    rng = np.random.default_rng(0)
    clip = np.full((4, 64, 96, 3), 128, np.uint8)
    for number in range(4):
        at = 4 + 2 * number
        clip[number, 8:24, at : at + 16] = rng.integers(0, 256, (16, 16, 3))
    tokens = tokenizer.encode(clip, threshold=0.15, tile_overlap=0, batch=2, **TILE)
    counts = tokens.counts.reshape(2, 6)
    assert (counts[:, 0] == 32).all()
    assert (counts[:, 1:] == tokenizer.config.min_toks).all()


def test_a_budget_is_shared_by_the_tiles_of_all_blocks(tokenizer, wide):
    spent = tokenizer.encode(wide, avg_tokens=16, budget_counts=4, **TILE)
    assert len(spent) == 12
    assert spent.mean_tokens <= 16
    assert len(set(spent.counts.tolist())) > 1
    bits = spent.bits_per_token
    kbit = 4 * 16 * bits * 12 / 1000  # 12 blocks of two frames a second, of four tiles
    options = TILE | dict(budget_counts=4)
    at_rate = tokenizer.encode(wide, bitrate=kbit, **options)
    np.testing.assert_array_equal(at_rate.counts, spent.counts)


def test_a_slice_or_a_list_of_counts_that_fits_no_tiles_is_refused(tokenizer, wide):
    tokens = tokenizer.encode(wide, num_tokens=8, batch=2, **TILE)
    assert tokens[:4].num_frames == 2
    with pytest.raises(
        ValueError, match=r"5 tiles are no whole blocks of 4 tiles; take tokens\[:4\]"
    ):
        tokens[:5]
    short = tokens.truncate(np.arange(12).reshape(3, 4) % 4 + 1)
    np.testing.assert_array_equal(short.counts, np.arange(12) % 4 + 1)
    assert "3 blocks of 4 tiles" in repr(tokens)


def test_caches_are_stated_once_and_refused_where_they_cannot_fit(tokenizer, wide, caplog):
    narrow = wide[:, :36]
    tokens = tokenizer.encode(wide, num_tokens=8, batch=2, **TILE)
    with caplog.at_level(logging.INFO, logger="elastic"):
        for _ in range(2):
            tokenizer.stream(narrow, num_tokens=8, **TILE)
        tokenizer.stream(narrow[0], num_tokens=8, **TILE)
    kilobytes = 2 * tokenizer.codec.trial_bytes() / 1e6
    assert caplog.messages == [
        f"48x36: 4 tiles of 32x32 (2 by 2); their KV caches take {4 * kilobytes:,.0f} MB ({kilobytes:,.1f} MB a tile)",
        "48x36: 4 tiles of 32x32 (2 by 2)",
    ]
    with pytest.MonkeyPatch.context() as patch:
        from elastic.tokenizer import tokenizer as module

        limited = types.SimpleNamespace(**vars(module.meshes) | {"memory_limit": lambda mesh: 10})
        patch.setattr(module, "meshes", limited)
        with pytest.raises(MediaError, match="The clip has 4 tiles, whose caches take"):
            tokenizer.stream(narrow, num_tokens=8, **TILE)
        with pytest.raises(MediaError, match="The clip has 4 tiles, whose caches take"):
            tokenizer.decode(tokens)


def test_options_of_tiles_beside_another_fit_are_refused(tokenizer, wide):
    with pytest.raises(ValueError, match="tile_overlap=8 is for fit='tile'"):
        tokenizer.encode(wide, num_tokens=8, tile_overlap=8)
    with pytest.raises(ValueError, match="resolution=64, but the frames of this model have 32"):
        tokenizer.encode(wide, num_tokens=8, resolution=64)

"""Frames that are not square: what 'pad' and 'stretch' tokenize, what decoding gives back, and what every file says of it."""

import logging

import numpy as np
import pytest
from small_models import load_tokenizer as load
from small_models import read_frames

from elastic import media
from elastic.tiles import layout_of
from elastic.tokenizer.frame_tiles import from_tile, to_tile
from elastic.tokens import TokenizedClip, TokenShards, write_shard

CLIP = "media/clip_160x120_30fps_97f.mp4"  # 4:3


@pytest.fixture(scope="module")
def tokenizer(golden):
    return load(golden, "fsq")


@pytest.fixture(scope="module")
def wide(golden):
    """5 frames of 48x32, which the last block of two frames does not fill."""
    return read_frames(golden, 5, resolution=48)[:, 8:40]


@pytest.mark.parametrize(("fit", "size"), [("pad", (32, 21)), ("stretch", (48, 32))])
def test_decoding_gives_back_the_shape_of_the_original(tokenizer, wide, fit, size, tmp_path):
    made = tokenizer.reconstruct(wide, num_tokens=32, fit=fit)
    assert made.frames.shape == (5, size[1], size[0], 3)
    assert (made.tokens.fit, made.tokens.frame) == (fit, size)
    made.tokens.save(tmp_path / "tokens.npz")
    tokens = TokenizedClip.load(tmp_path / "tokens.npz")
    assert tokens == made.tokens
    np.testing.assert_array_equal(tokenizer.decode(tokens), made.frames)
    np.testing.assert_array_equal(tokenizer.decode(tokens.truncate(8)).shape, made.frames.shape)
    assert tokens.bits_per_pixel == tokens.num_bits / (5 * size[0] * size[1])


@pytest.mark.parametrize(("fit", "apart"), [("pad", 0), ("stretch", 25)])
def test_what_comes_out_of_the_tile_is_what_went_in(wide, fit, apart):
    """To the bit with 'pad'; squeezing loses what is finer than the tile's pixels."""
    layout = layout_of((48, 32), 32, fit=fit)
    frames = np.stack([media.scale_frame(frame, layout.frame) for frame in wide])
    tile = to_tile(layout, frames)
    assert tile.shape == (5, 32, 32, 3)
    error = from_tile(layout, tile).astype(float) - frames
    assert np.sqrt(np.mean(error**2)) <= apart


def test_the_border_of_pad_counts_in_no_loss(tokenizer, wide):
    """The threshold holds for the decoded frames, without the border around them."""
    blocks = list(tokenizer.stream(wide, threshold=0.4, fit="pad"))
    for block in blocks:
        error = (block.frames.astype(np.float64) - block.reconstruction) / 127.5
        assert block.frames.shape[1:] == (21, 32, 3)
        assert np.mean(error**2) <= block.tokens.loss + 1e-6
        assert np.mean(error**2) == pytest.approx(block.tokens.loss, rel=0.05)


@pytest.mark.parametrize("fit", ["pad", "stretch"])
def test_every_way_to_the_tokens_gives_the_same(tokenizer, wide, golden, fit, tmp_path):
    """Side by side, from frames that arrive one by one, resumed, followed and from a shard; a budget fits too."""
    threshold = 0.4
    alone = tokenizer.encode(wide, threshold=threshold, fit=fit)
    assert tokenizer.encode(iter(wide), threshold=threshold, fit=fit).blocks[0].loss > 0
    beside = dict(tokenizer.encode_many([wide, wide[:3]], batch=2, threshold=threshold, fit=fit))
    np.testing.assert_array_equal(beside[0].counts, alone.counts)
    path = tmp_path / "tokens.part"
    options = dict(threshold=threshold, fit=fit)
    session = iter(tokenizer.stream(wide, record=path, **options))
    next(session)
    session.close()
    resumed = tokenizer.stream(wide, record=path, **options)
    frames = np.concatenate([block.reconstruction for block in resumed])
    assert resumed.tokens() == alone
    np.testing.assert_array_equal(np.concatenate(list(tokenizer.decode_stream(path))), frames)
    with pytest.raises(ValueError, match="another layout"):
        tokenizer.stream(wide, record=path, threshold=threshold)
    shard = tmp_path / "shard.parquet"
    small = tokenizer.encode(wide[:, :, :40], **options)
    write_shard(shard, [("a", alone), ("b", small)])
    assert [*TokenShards(shard)] == [alone, small]
    assert alone.frame != small.frame
    with pytest.raises(ValueError, match="fit='crop', but"):
        cropped = tokenizer.encode(wide, threshold=threshold)
        write_shard(tmp_path / "other.parquet", [("a", alone), ("b", cropped)])
    spent = tokenizer.encode(wide, avg_tokens=16, budget_counts=4, fit=fit)
    assert spent.mean_tokens <= 16


def test_cropping_is_told_once_for_a_size(tokenizer, wide, caplog):
    with caplog.at_level(logging.INFO, logger="elastic"):
        for _ in range(2):
            tokenizer.encode(wide[:1, :31], num_tokens=8)
            tokenizer.encode(wide[:1, :31], num_tokens=8, fit="pad")
            tokenizer.encode(wide[:1, :32, :32], num_tokens=8)
    assert caplog.messages == ["48x31: the middle 31x31, scaled to 32x32; --fit=tile keeps all"]


def test_a_fit_that_there_is_not_and_a_reader_of_another_fit_are_refused(tokenizer, wide, golden):
    with pytest.raises(ValueError, match="fit='tiles' must be one of crop, pad, stretch"):
        tokenizer.encode(wide, num_tokens=8, fit="tiles")
    with (
        media.open_clip(golden / CLIP, resolution=32) as reader,
        pytest.raises(ValueError, match="opened with fit='crop'"),
    ):
        tokenizer.encode(reader, num_tokens=8, fit="pad")
    with pytest.raises(ValueError, match="call encode_many"):
        tokenizer.encode_batch(wide[None], num_tokens=8, fit="pad")

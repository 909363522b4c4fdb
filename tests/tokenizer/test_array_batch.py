"""Batches as arrays: what `encode` gives clip by clip, in shapes that do not depend on the counts; and what the class saves."""

import json
import re

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from folder_hub import use_folder_as_hub
from PIL import Image
from small_models import load_tokenizer

from elastic.tokenizer import ElasticTokenizer
from elastic.tokenizer.array_batch import TokenBatch
from elastic.tokens import TokenFileError, write_shard


@pytest.fixture(scope="module", params=["fsq", "vae"])
def tokenizer(request, golden):
    return load_tokenizer(golden, request.param)


@pytest.fixture(scope="module")
def clips():
    """Two clips of 6 frames, the second one plainer: blocks of several counts."""
    noise = np.random.default_rng(0).integers(0, 256, (2, 6, 32, 32, 3), np.uint8)
    noise[1] //= 8
    return noise


@pytest.fixture(scope="module")
def batch(tokenizer, clips):
    return tokenizer.encode_batch(clips, threshold=0.35)


def test_a_batch_is_the_clips_one_by_one_in_arrays_of_fixed_shape(tokenizer, clips, batch):
    alone = [tokenizer.encode(clip, threshold=0.35) for clip in clips]
    blocks, full = len(alone[0]), tokenizer.config.tokens_per_block
    assert batch.mask.shape == batch.ids.shape[:3] == (2, blocks, full)
    np.testing.assert_array_equal(batch.counts, [clip.counts for clip in alone])
    np.testing.assert_array_equal(batch.mask.sum(-1), batch.counts)
    for found, mask, clip in zip(batch.ids, batch.mask, alone, strict=True):
        np.testing.assert_allclose(found[mask], clip.padded()[0][clip.padded()[1]], atol=1e-5)
    # A pytree of arrays, which a compiled function takes as it is.
    total = jax.jit(lambda tokens: jnp.where(tokens.mask, 1, 0).sum())(batch)
    assert total == batch.counts.sum()


def test_a_decoded_batch_is_the_clips_one_by_one(tokenizer, clips, batch):
    frames = tokenizer.decode_batch(batch.ids, batch.counts, num_frames=6)
    assert frames.shape == clips.shape and frames.dtype == np.uint8
    for found, clip in zip(frames, clips, strict=True):
        alone = tokenizer.decode(tokenizer.encode(clip, threshold=0.35)).astype(int)
        assert np.abs(alone - found).max() <= 1
    whole = tokenizer.decode_batch(jnp.asarray(batch.ids), jnp.asarray(batch.counts))
    np.testing.assert_array_equal(whole[:, :6], frames)


def test_what_stands_after_a_block_s_tokens_is_not_read(tokenizer, batch):
    other = np.where(
        batch.mask.reshape(*batch.mask.shape, *(1,) * (batch.ids.ndim - 3)), batch.ids, 7
    )
    np.testing.assert_array_equal(
        tokenizer.decode_batch(other.astype(batch.ids.dtype), batch.counts),
        tokenizer.decode_batch(batch.ids, batch.counts),
    )


def test_a_batch_that_is_none_is_refused(tokenizer, clips, batch):
    with pytest.raises(
        ValueError, match=r"must have five axes, .*; for one clip give frames\[None\]"
    ):
        tokenizer.encode_batch(clips[0], num_tokens=4)
    with pytest.raises(ValueError, match="Clips of 4 and 6 frames make no array"):
        tokenizer.encode_batch([clips[0], clips[1][:4]], num_tokens=4)
    with pytest.raises(ValueError, match="A batch of no clips"):
        tokenizer.encode_batch([], num_tokens=4)
    with pytest.raises(TypeError, match="Did you mean 'threshold'"):
        tokenizer.encode_batch(clips, treshold=0.1)
    ids, counts = batch.ids, batch.counts
    for wrong, message in [
        ((ids[0], counts[0]), "of one clip give ids[None] and counts[None]"),
        ((ids, counts + 99), "must lie in 1 to 32, the tokens of a block"),
        ((ids, counts * 0), "counts from 0 to 0 must lie in 1"),
        ((ids > 3, counts), "of type bool and counts of type int32 must be"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            tokenizer.decode_batch(*wrong)
    with pytest.raises(ValueError, match="num_frames=99 must fill"):
        tokenizer.decode_batch(ids, counts, num_frames=99)
    if tokenizer.config.bottleneck_type == "fsq":
        with pytest.raises(ValueError, match="must lie in 0 to 63999, the model's codes"):
            tokenizer.decode_batch(ids + 64_000, counts)


@pytest.mark.parametrize(
    "convert",
    [
        lambda clip: (clip.astype(np.float32) / 255, dict(value_range=(0, 1))),
        lambda clip: (np.moveaxis(clip, -1, 1), {}),
        lambda clip: (jnp.asarray(clip), {}),
        lambda clip: ([Image.fromarray(frame) for frame in clip], {}),
        lambda clip: (list(clip.astype(np.float32) / 127.5 - 1), dict(value_range=(-1, 1))),
    ],
    ids=["floats", "channels-first", "jax", "pictures", "live-floats"],
)
def test_encode_takes_a_clip_as_people_hold_it(tokenizer, clips, convert):
    source, options = convert(clips[0])
    found = tokenizer.encode(source, num_tokens=8, **options)
    assert found.to_numpy()["counts"].tolist() == [8] * len(found)
    expected = tokenizer.encode(clips[0], num_tokens=8)
    # Of frames that arrive one by one the cache is longer, which changes the last bits of a vector.
    np.testing.assert_allclose(found.padded()[0], expected.padded()[0], atol=1e-4)
    picture = tokenizer.encode(Image.fromarray(clips[0][0]), num_tokens=8)
    assert picture.is_image


def test_the_range_of_floats_is_for_arrays_alone(tokenizer):
    with pytest.raises(
        ValueError, match=r"value_range= and layout= are for arrays; 'a\.mp4' is none"
    ):
        tokenizer.encode("a.mp4", num_tokens=8, value_range=(0, 1))


def test_a_file_of_any_kind_decodes_by_its_path(tokenizer, clips, tmp_path, capsys):
    tokens = tokenizer.encode(clips[0], num_tokens=8, progress=True)
    assert "block" in capsys.readouterr().err
    tokens.save(tmp_path / "tokens.npz")
    write_shard(tmp_path / "one.parquet", [("a", tokens)])
    write_shard(tmp_path / "two.parquet", [("a", tokens), ("b", tokens)])
    for _ in tokenizer.stream(clips[0], num_tokens=8, record=tmp_path / "tokens.part"):
        pass
    expected = tokenizer.decode(tokens, progress=True)
    assert "block" in capsys.readouterr().err
    for name in ("tokens.npz", "tokens.part", "one.parquet"):
        np.testing.assert_array_equal(tokenizer.decode(tmp_path / name), expected)
    (tmp_path / "text").write_text("no tokens")
    for name, message in [
        ("two.parquet", "holds 2 clips; choose one: tokenizer.decode(TokenShards("),
        ("text", "is no file of tokens (tokens.npz, tokens.part or a shard)"),
        ("", "is a folder; give a token file, or read its shards with TokenShards("),
    ]:
        with pytest.raises(TokenFileError, match=re.escape(message)):
            tokenizer.decode(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        tokenizer.decode(tmp_path / "none.npz")


def test_a_tokenizer_says_what_it_is(tokenizer):
    config = tokenizer.config
    assert f"{config.bottleneck_type}, 4 to 32 tokens per block of" in repr(tokenizer)
    assert repr(tokenizer).startswith("ElasticTokenizer('") and "0x" not in repr(tokenizer)


def test_a_saved_tokenizer_loads_again_to_the_bit(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "model")
    again = ElasticTokenizer.from_pretrained(tmp_path / "model", mesh=tokenizer.mesh)
    assert again.weights_digest == tokenizer.weights_digest
    assert again.config == tokenizer.config and again.prior is None
    (tmp_path / "model" / "curves.json").write_text("of earlier weights")
    tokenizer.save_pretrained(tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    return use_folder_as_hub(monkeypatch, tmp_path / "hub")


def test_a_pushed_tokenizer_has_a_card_and_loads_from_the_hub(tokenizer, hub, tmp_path):
    (tmp_path / "run").mkdir()
    records = [{"step": 1, "eval/psnr": 20.5}, {"step": 2, "loss": 0.25}]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "run" / "metrics.jsonl").write_text(lines)
    made = tokenizer.push_to_hub("me/mine", run=tmp_path / "run", float_dtype="fp32")
    assert made.startswith("commit: Upload ")
    card = huggingface_hub.ModelCard.load(hub / "me" / "mine" / "README.md")
    assert (
        card.data.library_name == "elastictok"
        and card.data.tags[-1] == tokenizer.config.bottleneck_type
    )
    for words in (
        'from_pretrained("me/mine")',
        "| Tokens of a block | 4 to 32 |",
        "| eval/psnr | 20.5 |",
        "| step | 2 |",
    ):
        assert words in card.text
    again = ElasticTokenizer.from_pretrained("me/mine", mesh=tokenizer.mesh)
    assert again.weights_digest == tokenizer.weights_digest
    # A card that somebody has written stays.
    (hub / "me" / "mine" / "README.md").write_text("by hand")
    tokenizer.push_to_hub("me/mine")
    assert (hub / "me" / "mine" / "README.md").read_text() == "by hand"


def test_what_cannot_be_pushed_is_refused_before_anything_is_uploaded(tokenizer, hub, tmp_path):
    with pytest.raises(ValueError, match="repo_id='mine' must be 'owner/name'"):
        tokenizer.push_to_hub("mine")
    with pytest.raises(
        ValueError, match=r"has no metrics\.jsonl; give the folder that training wrote into"
    ):
        tokenizer.push_to_hub("me/mine", run=tmp_path)
    assert not hub.exists()


def test_a_batch_of_records_has_the_same_arrays(tokenizer, clips, batch):
    alone = [tokenizer.encode(clip, threshold=0.35) for clip in clips]
    again = TokenBatch.of(alone)
    np.testing.assert_array_equal(again.mask, batch.mask)

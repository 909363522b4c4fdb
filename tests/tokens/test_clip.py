"""The record of a tokenized clip: its sizes, its truncation, and the rules that its fields keep."""

import dataclasses
import math

import numpy as np
import pytest
from clip_cases import example

from elastic.patches import patchify
from elastic.tokens import BlockTokens, TokenizedClip, raster_places


def test_two_bytes_per_fsq_token():
    few, many = example(counts=(4,)), example(counts=(8,))
    assert len(many.to_bytes()) - len(few.to_bytes()) == 2 * 4
    assert (many.bits_per_token, many.num_bits) == (16, 16 * 8)
    vae = example("vae")
    assert vae.num_bits == 16 * 4 * 32
    assert many.compression_ratio == pytest.approx(3 * 16 * 16 * 3 * 8 / (16 * 8))
    assert many.bits_per_pixel == pytest.approx(16 * 8 / (3 * 16 * 16))


@pytest.mark.parametrize("bottleneck_type", ["fsq", "vae"])
def test_truncation_keeps_a_prefix_and_claims_no_loss(bottleneck_type):
    clip = example(bottleneck_type)
    shorter = clip.truncate(4)
    name = "indices" if bottleneck_type == "fsq" else "vectors"
    assert shorter.counts.tolist() == [3, 4, 4]
    for before, after in zip(clip.blocks, shorter.blocks, strict=True):
        np.testing.assert_array_equal(getattr(before, name)[:4], getattr(after, name))
    assert shorter.blocks[0] is clip.blocks[0]
    assert math.isnan(shorter.blocks[2].loss) and not shorter.blocks[2].met_threshold
    assert shorter.truncate(2) == clip.truncate(2) and clip.truncate(8) == clip
    assert TokenizedClip.from_bytes(shorter.to_bytes()) == shorter
    with pytest.raises(ValueError, match="num_tokens=0"):
        clip.truncate(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kept": 0}, "num_kept=0"),
        ({"num_kept": 4}, r"shape \(3,\) must have shape \(4,\)"),
        ({"indices": np.zeros(3)}, "float64 must be integers"),
        ({"indices": np.array([0, -1, 2])}, "must lie in"),
        ({"indices": np.array([0, 2**31, 2])}, "must lie in"),
        ({"vectors": np.zeros((3, 2))}, "either indices"),
        ({"indices": None, "vectors": np.zeros((3, 0))}, "must have shape"),
        ({"indices": None}, "either indices"),
        ({"loss": math.nan}, "cannot have met"),
    ],
)
def test_a_block_that_contradicts_itself_is_refused(change, message):
    fields = {"num_kept": 3, "loss": 0.1, "met_threshold": True, "indices": np.arange(3)}
    with pytest.raises(ValueError, match=message):
        BlockTokens(**(fields | change))


def test_a_clip_does_not_change_with_the_array_it_was_made_from():
    indices = np.arange(3)
    block = BlockTokens(num_kept=3, loss=0.0, met_threshold=True, indices=indices)
    indices[:] = 9
    assert block.indices is not None and block.indices.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="read-only"):
        block.indices[0] = 1
    assert repr(example()).count("\n") == 0 and len(repr(example())) < 150


# --- What a generator takes ----------------------------------------------------------------------


@pytest.fixture(params=["fsq", "vae"])
def record(request):
    return example(request.param)


def test_flat_and_padded_tokens_are_the_blocks(record):
    values = record.ids if record.bottleneck_type == "fsq" else record.vectors
    np.testing.assert_array_equal(values, np.concatenate([block.values for block in record]))
    padded, mask = record.padded(fill=-7)
    assert mask.shape == padded.shape[:2] == (len(record), record.tokens_per_block)
    assert padded.dtype == values.dtype and (padded[~mask] == -7).all()
    np.testing.assert_array_equal(padded[mask], values)
    np.testing.assert_array_equal(mask.sum(1), record.counts)
    longer, mask = record.padded(fill=-7, blocks=len(record) + 2)
    np.testing.assert_array_equal(longer[: len(record)], padded)
    assert (longer[len(record) :] == -7).all() and not mask[len(record) :].any()
    with pytest.raises(
        ValueError, match=rf"blocks={len(record) - 1} is less than the {len(record)}"
    ):
        record.padded(blocks=len(record) - 1)
    found = record.to_numpy()
    name = "ids" if record.bottleneck_type == "fsq" else "vectors"
    assert list(found) == [name, "counts", "losses", "met"]
    np.testing.assert_array_equal(found[name], values)


def test_the_other_kind_of_tokens_is_refused_with_the_name_of_what_there_is(record):
    other, there = ("vectors", "ids") if record.bottleneck_type == "fsq" else ("ids", "vectors")
    with pytest.raises(ValueError, match=rf"use tokens\.{there}"):
        getattr(record, other)


def test_a_clip_is_a_sequence_of_its_blocks(record):
    assert len(record) == len(record.blocks) and list(record) == list(record.blocks)
    assert record[0] is record.blocks[0] and record[-1] is record.blocks[-1]
    assert record[:] == record and len(record[:1]) == 1
    assert record[:1].num_frames == min(record.num_frames, record.frames_per_block)
    with pytest.raises(
        IndexError, match=f"There is no block {len(record)}; there are {len(record)}"
    ):
        record[len(record)]
    for wrong in (slice(1, None), slice(0, 0), slice(None, None, 2)):
        if record.blocks[wrong] != record.blocks:
            with pytest.raises(
                ValueError, match="a block needs those before it; take the first ones"
            ):
                record[wrong]


def test_blocks_are_truncated_by_one_number_or_by_one_each(record):
    counts = [1 + number % 2 for number in range(len(record))]
    for given in (counts, np.array(counts), tuple(counts)):
        assert record.truncate(given).counts.tolist() == [
            min(count, block.num_kept) for count, block in zip(counts, record, strict=True)
        ]
    assert record.truncate([2] * len(record)) == record.truncate(2) == record.truncate(np.int64(2))
    with pytest.raises(ValueError, match=f"has {len(record) + 1} numbers for {len(record)} blocks"):
        record.truncate([*counts, 1])
    with pytest.raises(ValueError, match="must be a whole number, or one for each block"):
        record.truncate(np.array(1.5))
    with pytest.raises(ValueError, match="num_tokens=0 must be at least 1"):
        record.truncate([0] * len(record))


@pytest.mark.parametrize("order", ["raster", "coarse_to_fine"])
def test_a_reader_undoes_the_order_of_the_tokens(order):
    """Patches of a block in the record's order, put at their places, are those in raster order."""
    clip = dataclasses.replace(
        example(), token_order=order, patch_size=(2, 8, 8) if order == "coarse_to_fine" else ()
    )
    assert TokenizedClip.from_bytes(clip.to_bytes()) == clip
    assert TokenizedClip.from_bytes(clip.to_bytes()).token_order == order
    video = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    raster = np.empty((8, 2 * 8 * 8 * 3), np.uint8)
    raster[raster_places(clip)] = patchify(video, (2, 8, 8), order)
    np.testing.assert_array_equal(raster, patchify(video, (2, 8, 8)))


def test_a_record_says_how_its_frames_lie_in_the_tile():
    clip = dataclasses.replace(
        example(), fit="pad", frame=(16, 9), tile_rows=(-3,), tile_columns=(0,)
    )
    assert TokenizedClip.from_bytes(clip.to_bytes()) == clip
    assert clip.bits_per_pixel == clip.num_bits / (clip.num_frames * 16 * 9)
    plain = example().to_bytes()
    assert b"tile_rows" not in plain and b"token_order" not in plain  # as files of before
    for changes in (
        dict(tile_rows=(0,), frame=(16, 17)),
        dict(tile_rows=(-16,)),
        dict(frame=(0, 9)),
        dict(tile_rows=()),
        dict(token_order="coarse_to_fine"),
        dict(token_order="coarse_to_fine", patch_size=(3, 8, 8)),
    ):
        with pytest.raises(ValueError, match=r"cover|positive|patch_size|tile"):
            dataclasses.replace(clip, **changes)

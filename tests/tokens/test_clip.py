"""The record of a tokenized clip: its sizes, its truncation, and the rules that its fields keep."""

import math

import numpy as np
import pytest
from clip_cases import example

from elastic.tokens import BlockTokens, TokenizedClip


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

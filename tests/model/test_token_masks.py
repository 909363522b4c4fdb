"""Kept masks: exactly as many tokens as asked for, drawn as the released models were trained."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import released

from elastic.model import token_masks
from elastic.ops.attention import block_mask


def test_a_block_keeps_exactly_the_number_asked_for():
    """Difference 1 in elastic/README.md: the released code keeps one more."""
    counts = jnp.arange(33).reshape(3, 11)
    kept = np.asarray(token_masks.kept_mask(counts, 32))
    assert kept.shape == (3, 11, 32)
    assert (kept.sum(-1) == np.asarray(counts)).all()
    assert (np.diff(kept.astype(int), axis=-1) <= 0).all()  # always the first ones


@pytest.mark.parametrize("case", released.CASES)
def test_the_released_masks_are_ours_of_one_token_more(case):
    """Difference 1 in elastic/README.md, seen in the masks that the released search built (it keeps argument + 1)."""
    kv = released.arrays(case, "kvcache")
    ours = token_masks.kept_mask(jnp.minimum(jnp.asarray(kv["table_ntoks"]) + 1, 32), 32)
    assert (np.asarray(ours) == kv["table_masks"]).all()


@pytest.mark.parametrize("log_uniform", [False, True])
def test_training_draws_from_just_above_the_least_up_to_all_tokens(log_uniform):
    draw = token_masks.sample_num_kept(
        jax.random.key(0), (40, 500), min_kept=4, max_kept=12, log_uniform=log_uniform
    )
    counts = np.bincount(np.asarray(draw).ravel(), minlength=14)
    assert counts[:5].sum() == 0 and counts[13] == 0
    share = counts[5:13] / draw.size
    assert (share > 0).all()
    expected = np.full(8, 1 / 8)
    if log_uniform:
        expected = np.log(np.arange(6, 14) / np.arange(5, 13)) / np.log(13 / 5)
    assert np.abs(share - expected).max() < 0.012


def test_the_smallest_range_is_one_number():
    draw = token_masks.sample_num_kept(jax.random.key(0), (100,), min_kept=8, max_kept=8)
    assert (np.asarray(draw) == 8).all()


def test_a_fixed_share_keeps_that_share():
    """Difference 1 in elastic/README.md: half of 32 is 16, the released code keeps 17."""
    draw = token_masks.sample_num_kept(
        jax.random.key(0), (2, 3), min_kept=4, max_kept=32, keep_fraction=0.5
    )
    assert draw.shape == (2, 3) and (np.asarray(draw) == 16).all()


def test_a_share_of_the_blocks_keeps_every_token():
    draw = token_masks.sample_num_kept(
        jax.random.key(1), (20_000,), min_kept=1, max_kept=1000, full_fraction=0.25
    )
    assert abs(float(np.mean(np.asarray(draw) == 1000)) - 0.25) < 0.02


def test_dropping_the_tail_zeroes_it_and_nothing_else():
    codes = jnp.arange(1.0, 25.0).reshape(2, 4, 3)
    kept = token_masks.kept_mask(jnp.array([1, 3]), 4)
    out = np.asarray(token_masks.drop_tail(codes, kept))
    assert (out[np.asarray(kept)] == np.asarray(codes)[np.asarray(kept)]).all()
    assert not out[~np.asarray(kept)].any()


def test_a_token_sees_its_own_block_and_earlier_ones():
    i, j = np.arange(5, 20), np.arange(24)
    seen = block_mask.visible(jnp.asarray(i), jnp.asarray(j), block_size=6)
    assert (np.asarray(seen) == [[b // 6 <= a // 6 for b in j] for a in i]).all()

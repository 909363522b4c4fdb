"""Blocks that share a batch: each has the result that it has alone, and none waits for the slowest."""

import types
from typing import Any, NamedTuple

import numpy as np
import pytest

from elastic.search import make_search
from elastic.tokenizer.block_codec import Committed, Trial
from elastic.tokenizer.scheduler import BatchScheduler

CONFIG = types.SimpleNamespace(
    tokens_per_block=16, patch_dim=48, frames_per_block=4, patch_size=(1, 4, 4), bottleneck_type="fsq",
    token_order="raster",
)  # fmt: skip


class Cache(NamedTuple):
    """The counts of the blocks that each slot has committed."""

    counts: list[list[int]]

    def forget(self, emptied):
        return Cache([[] if e else c for e, c in zip(emptied, self.counts, strict=True)])


class ModelCodec:
    """Arithmetic in place of a model: a block's loss is its first pixel, over the count; its pixels say the count.

    With `once` an encoder that sees no count gives the block, and the loss is that of what it gave.
    """

    config, mesh, model_seconds = CONFIG, None, 0.0

    def __init__(self, trial_bytes=0, once=False):
        self.bytes, self.calls, self.once, self.num_encoded = trial_bytes, [], once, 0
        self.num_drafts = 0

    def new_cache(self, batch, *, num_blocks):
        return Cache([[] for _ in range(batch)])

    def lengthened(self, cache, num_blocks):
        return cache

    def trial_bytes(self, candidates):
        return self.bytes

    def encode(self, params, cache, patches):
        self.num_encoded += 1
        return patches.copy() if self.once else None

    def draft(self, params, patches, counts, encoded, *, num_frames, weights):
        self.num_drafts += np.count_nonzero(counts > 1)
        losses = encoded[:, :1, 0] / counts
        return losses, losses

    def try_counts(self, params, cache, patches, counts, *, num_frames, weights, encoded, keep):
        self.calls.append(counts.copy())
        losses = (patches if encoded is None else encoded)[:, :1, 0] / counts
        pixels = np.broadcast_to(counts.reshape(-1, 1, 1), (counts.size, 16, 48)).astype(np.uint8)
        new: Any = (pixels, pixels) if keep else None
        return Trial(losses, losses, pixels, pixels, new, new)

    def select(self, selected, trial, choice, newer):
        at = np.arange(len(choice)) * (len(trial.pixels) // len(choice)) + choice
        pixels = trial.pixels[at]
        if selected is not None:
            pixels = np.where(newer[:, None, None], pixels, selected.pixels)
        return trial._replace(pixels=pixels, encoder_new=(pixels, pixels))

    def commit(self, cache, trial, choice, elements):
        assert trial.encoder_new is not None, "what is committed was not kept"
        batch = len(choice)
        pixels = trial.pixels[np.arange(batch) * (len(trial.pixels) // batch) + choice]
        for slot in range(batch) if elements is None else np.flatnonzero(elements):
            cache.counts[slot].append(int(pixels[slot, 0, 0]))
        return cache, Committed(pixels[:, :, 0].astype(np.int32), pixels)


def block(loss, num_frames=4):
    return np.full((num_frames, 8, 8, 3), loss, np.uint8)


def search(threshold=None, **options):
    """The smallest of 1 to 16 tokens whose loss is at most the threshold."""
    name = "fixed" if threshold is None else "binary"
    return make_search(name, min_kept=1, max_kept=16, threshold=threshold, **options)


def finish(scheduler):
    """{slot: result} of the blocks that every slot has now."""
    results = {}
    while len(scheduler.free_slots) < scheduler.batch:
        results |= dict(scheduler.step())
    return results


def same(a, b):
    for name in ("num_kept", "loss", "met_threshold"):
        assert getattr(a.tokens, name) == getattr(b.tokens, name)
    np.testing.assert_array_equal(a.tokens.indices, b.tokens.indices)
    np.testing.assert_array_equal(a.reconstruction, b.reconstruction)


@pytest.mark.parametrize("width", [1, 3])
def test_a_block_has_beside_others_the_result_that_it_has_alone(width):
    blocks = [(block(5), 1.0), (block(200), 20.0), (block(90, num_frames=3), 7.0)]
    together = BatchScheduler(ModelCodec(), {}, batch=3, width=width)
    for slot, (frames, threshold) in enumerate(blocks):
        together.assign(slot, frames, search(threshold, width=width))
    results = finish(together)
    for slot, (frames, threshold) in enumerate(blocks):
        alone = BatchScheduler(ModelCodec(), {}, width=width)
        alone.assign(0, frames, search(threshold, width=width))
        result = finish(alone)[0]
        same(results[slot], result)
        assert (results[slot].passes, results[slot].tried) == (result.passes, result.tried)
        assert results[slot].tokens.num_kept == np.ceil(frames[0, 0, 0, 0] / threshold)
        assert results[slot].reconstruction.shape == frames.shape
        assert together.cache.counts[slot] == alone.cache.counts[0]


def test_an_encoder_that_sees_no_count_runs_once_for_a_block():
    codec = ModelCodec(once=True)
    scheduler, usual = BatchScheduler(codec, {}), BatchScheduler(ModelCodec(), {})
    for pixel in (5, 200, 90):
        for either in (scheduler, usual):
            either.assign(0, block(pixel), search(10.0))
        assert scheduler.losses_of(0, [3, 4]) == {3: pixel / 3, 4: pixel / 4}
        same(finish(scheduler)[0], finish(usual)[0])
    assert codec.num_encoded == 3 < len(codec.calls) / 3
    # Beside others too: whatever the slots have, it is theirs.
    codec = ModelCodec(once=True)
    scheduler = BatchScheduler(codec, {}, batch=2)
    scheduler.assign(0, block(100), search(10.0))
    while 0 not in scheduler.free_slots:
        if 1 in scheduler.free_slots:
            scheduler.assign(1, block(50), search(num_tokens=7))
        for slot, result in scheduler.step():
            assert result.tokens.loss == (10.0 if slot == 0 else 50 / 7)


def test_drafts_come_before_the_passes_and_are_counted_apart():
    codec = ModelCodec(once=True)
    scheduler = BatchScheduler(codec, {}, batch=3)
    for slot, pixel in enumerate((50, 120, 30)):
        options: dict[str, Any] = dict(min_kept=1, max_kept=16, threshold=10.0)
        drafting = make_search("predict", can_draft=True, tolerance=0.0, **options)
        scheduler.assign(slot, block(pixel), drafting if slot < 2 else search(10.0))
    results = finish(scheduler)
    assert [results[slot].tokens.num_kept for slot in range(3)] == [5, 12, 3]
    assert [results[slot].passes for slot in range(2)] == [2, 2]  # one proves that fewer fail
    assert results[2].drafts == 0 < results[0].drafts
    assert codec.num_drafts == results[0].drafts + results[1].drafts
    assert len(codec.calls) == results[2].passes == 4
    assert codec.num_encoded == 1


def test_a_slot_goes_on_with_its_clip_while_another_searches():
    codec = ModelCodec()
    scheduler = BatchScheduler(codec, {}, batch=2)
    scheduler.assign(0, block(100), search(10.0))
    finished = {0: 0, 1: 0}
    while 0 not in scheduler.free_slots:
        if 1 in scheduler.free_slots:
            scheduler.assign(1, block(50), search(num_tokens=7))
        for slot, _ in scheduler.step():
            finished[slot] += 1
    assert finished == {0: 1, 1: len(codec.calls)} and len(codec.calls) > 2
    assert scheduler.cache.counts == [[10], [7] * len(codec.calls)]
    scheduler.forget(1)
    assert scheduler.cache.counts == [[10], []]


def test_trials_too_large_to_keep_cost_a_pass_and_change_no_token():
    kept, dropped = (BatchScheduler(ModelCodec(size), {}, batch=2) for size in (0, 1 << 40))
    for scheduler in (kept, dropped):
        scheduler.assign(0, block(100), search(10.0))
        scheduler.assign(1, block(30), search(10.0))
    for a, b in zip(*(sorted(finish(s).items()) for s in (kept, dropped)), strict=True):
        same(a[1], b[1])
        assert a[1].passes < b[1].passes
    assert kept.cache == dropped.cache


def test_losses_of_other_counts_are_not_the_searchs():
    scheduler = BatchScheduler(ModelCodec(), {}, batch=2, width=2)
    scheduler.assign(1, block(12), search(num_tokens=6))
    assert scheduler.losses_of(1, [1, 3, 12]) == {1: 12.0, 3: 4.0, 12: 1.0}
    (result,) = finish(scheduler).values()
    assert result.tried == {6: 2.0} and result.tokens.num_kept == 6


def test_a_metric_below_zero_is_refused():
    scheduler = BatchScheduler(ModelCodec(), {})
    scheduler.assign(0, block(12), search(num_tokens=6), metric=lambda *_: -1.0)
    with pytest.raises(ValueError, match=r"gave -1\.0; a loss must be 0 or above"):
        scheduler.step()

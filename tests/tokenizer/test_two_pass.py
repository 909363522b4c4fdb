"""A clip under a budget: never worse than the same count for every block, and never above the mean."""

import json
import math

import jax
import numpy as np
import pytest

from elastic import checkpoints, media
from elastic.config import ElasticTokConfig
from elastic.distributed.mesh import make_mesh
from elastic.metrics import psnr_of_mse
from elastic.search import geometric_counts
from elastic.tokenizer import ElasticTokenizer
from elastic.tokenizer.targets import threshold_of_psnr, tokens_of_bitrate
from elastic.tokenizer.two_pass import Budget
from elastic.tokens import TokenizedClip


@pytest.fixture(scope="module", params=["fsq", "vae"])
def tokenizer(request, golden):
    folder = golden / request.param
    released = json.loads((folder / "meta.json").read_text())["config"]
    config = ElasticTokConfig.from_json_dict(released | {"bottleneck_type": request.param})
    params = checkpoints.load_params(f"params::{folder}/ckpt/params_scan_fp32", config)
    return ElasticTokenizer(config, params, mesh=make_mesh("1,1,1,1", jax.devices()[:1]))


@pytest.fixture(scope="module")
def clip(golden):
    """11 frames, so that the last block is short, of which the first ones show nothing."""
    with media.open_clip(golden / "media" / "clip_160x120_30fps_97f.mp4", resolution=32) as reader:
        frames = reader.read()[:11].copy()
    frames[:4] = 90
    return frames


def squared_error(tokens, clip, decoded):
    return np.mean(np.square((clip.astype(np.float64) - decoded) / 127.5))


@pytest.mark.parametrize("delay_blocks", [2, 64])
def test_the_error_is_at_most_that_of_equal_counts(tokenizer, clip, delay_blocks):
    """With the whole clip foreseen; with two blocks the mean alone is promised. The token file decodes to what was measured."""
    for avg_tokens in (8, 16.5):
        equal = tokenizer.reconstruct(clip, num_tokens=int(avg_tokens))
        made = tokenizer.reconstruct(clip, avg_tokens=avg_tokens, delay_blocks=delay_blocks)
        tokens = made.tokens
        assert tokens.mean_tokens <= avg_tokens and tokens.search == "budget"
        decoded = tokenizer.decode(TokenizedClip.from_bytes(tokens.to_bytes()))
        np.testing.assert_array_equal(decoded, made.frames)
        if delay_blocks == 64:
            error = squared_error(tokens, clip, decoded)
            assert error <= squared_error(equal.tokens, clip, equal.frames) * (1 + 1e-4)


def test_passes_are_those_of_both_walks(tokenizer, clip):
    results = list(tokenizer.stream(clip, avg_tokens=16, budget_counts=5))
    config = tokenizer.config
    measured = {*geometric_counts(config.min_toks, config.max_toks, 5), 16}
    assert [result.passes for result in results] == [len(measured) + 1] * len(results)


def test_a_bitrate_is_a_mean_of_tokens(tokenizer, clip):
    config = tokenizer.config
    bits = tokenizer.encode(clip[:4], num_tokens=8).bits_per_token
    blocks_per_second = 24 / config.frames_per_block
    kbit = 12 * bits * blocks_per_second / 1000
    assert tokens_of_bitrate(kbit, 24.0, config) == pytest.approx(12)
    tokens = tokenizer.encode(clip, bitrate=kbit * (1 + 1e-9))
    assert tokens.mean_tokens <= 12
    with pytest.raises(ValueError, match="needs a video"):
        tokenizer.encode(clip[0], bitrate=kbit)


def test_a_psnr_is_a_threshold(tokenizer, clip):
    assert psnr_of_mse(threshold_of_psnr(28.0)) == pytest.approx(28)
    tokens = tokenizer.encode(clip[4:8], psnr=3.0)
    assert tokens.threshold == pytest.approx(4 / 10**0.3)
    assert all(psnr_of_mse(block.loss) >= 3 for block in tokens.blocks if block.met_threshold)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(), "Give threshold="),
        (dict(threshold=0.1, psnr=20.0), "threshold= and psnr= are 2 targets"),
        (dict(num_tokens=8, avg_tokens=8), "num_tokens= and avg_tokens= are 2"),
        (dict(avg_tokens=8, search="binary"), "does not search for a threshold"),
        (dict(avg_tokens=33), "avg_tokens=33 must lie between"),
        (dict(avg_tokens=8, delay_blocks=0), "delay_blocks=0 must be"),
        (dict(avg_tokens=8, budget_counts=1), "budget_counts=1 must be"),
        (dict(psnr=-1.0), "psnr=-1.0 must be"),
        (dict(bitrate=float("inf")), "bitrate=inf must be"),
    ],
)
def test_targets_that_contradict_each_other_are_refused(tokenizer, clip, options, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.encode(clip, **options)


def test_the_equal_count_is_a_whole_number():
    assert Budget(avg_tokens=16.7, smallest=5, largest=32).equal == 16


@pytest.mark.parametrize("search", ["binary", "predict"])
def test_a_metric_is_held_against_the_threshold_as_the_decoded_file_shows_it(
    tokenizer, clip, search
):
    """A function: the largest difference of a pixel. Short blocks are measured over their real frames."""

    def largest(original, reconstruction):
        assert original.shape == reconstruction.shape and original.dtype == np.uint8
        return np.abs(original.astype(int) - reconstruction).max()

    frames = tokenizer.config.frames_per_block
    full = tokenizer.encode(clip, num_tokens=32, metric=largest)
    threshold = float(np.median([block.loss for block in full.blocks]))
    tokens = tokenizer.encode(clip, threshold=threshold, metric=largest, search=search)
    decoded = tokenizer.decode(tokens)
    assert tokens.search == f"{search}:largest"
    assert any(block.met_threshold for block in tokens.blocks)
    for i, block in enumerate(tokens.blocks):
        part = slice(i * frames, (i + 1) * frames)
        assert block.loss == largest(clip[part], decoded[part])
        assert block.met_threshold == (block.loss <= threshold)


def test_a_budget_is_split_by_the_metric(tokenizer, clip):
    def first_half(original, reconstruction):
        half = original.shape[1] // 2
        return np.mean(np.square(original[:, :half].astype(float) - reconstruction[:, :half]))

    made = tokenizer.reconstruct(clip, avg_tokens=12, metric=first_half, budget_counts=4)
    equal = tokenizer.reconstruct(clip, num_tokens=12, metric=first_half)
    assert first_half(clip, made.frames) <= first_half(clip, equal.frames) * (1 + 1e-6)


def test_metrics_that_are_none_are_refused(tokenizer, clip):
    with pytest.raises(ValueError, match="metric='ssim' must be"):
        tokenizer.encode(clip, num_tokens=12, metric="ssim")
    with pytest.raises(ValueError, match="is of squared errors"):
        tokenizer.encode(clip, psnr=20.0, metric="lpips")
    with pytest.raises(ValueError, match="The metric gave -1"):
        tokenizer.encode(clip, num_tokens=12, metric=lambda a, b: -1)


def test_a_budget_is_split_by_what_is_finite_of_a_metric(tokenizer, clip):
    """A block of which no count can be measured is refused by number, not searched for ever."""

    def unknown(original, reconstruction):
        return math.inf

    def often_unknown(original, reconstruction):
        error = np.mean(np.abs(original.astype(float) - reconstruction))
        return math.inf if error % 2 < 0.5 else error

    tokens = tokenizer.encode(clip, avg_tokens=16, metric=often_unknown, budget_counts=6)
    assert tokens.mean_tokens <= 16
    with pytest.raises(ValueError, match="Block 0 has no finite loss"):
        tokenizer.encode(clip, avg_tokens=16, metric=unknown, budget_counts=6)

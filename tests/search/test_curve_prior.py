"""The prior of curves: a poor guess costs passes only, a good one saves them; its file is checked."""

import dataclasses
import json
import math
import pathlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.config import load_config
from elastic.search import CurvePrior, geometric_counts, load_prior, make_search, run_search
from elastic.search.curve_prior import FILE_NAME, features, fit
from elastic.search.predict import GUESSES
from elastic.search.rate_curve import Curve, SearchHistory, points_of

COUNTS = geometric_counts(4, 64, 16)
PATCH = (1, 4, 4)  # of blocks of 4 frames with 16 x 16 pixels
SLOPE = 0.8


def block(seed):
    """Noise of some strength on a grey ground."""
    random = np.random.default_rng(seed)
    strength = math.exp(random.uniform(1.5, 4.5))
    return np.clip(random.normal(128, strength, (4, 16, 16, 3)), 0, 255).astype(np.uint8)


def law(frames, count):
    """A loss that falls as a power of the count, and rises with the strength of the noise."""
    return float(np.std(frames / 127.5)) * count**-SLOPE


@pytest.fixture(scope="module")
def prior():
    blocks = [block(seed) for seed in range(100)]
    losses = np.array([[law(frames, count) for count in COUNTS] for frames in blocks])
    return fit(blocks, losses, counts=COUNTS, patch_size=PATCH)


def search(frames, history, threshold):
    def evaluate(counts):
        return [law(frames, count) for count in counts]

    plan = make_search("predict", min_kept=4, max_kept=64, threshold=threshold, history=history)
    return run_search(plan, evaluate)


def test_a_fitted_prior_knows_the_curves_of_other_blocks_and_saves_passes(prior):
    passes = {"prior": 0, "none": 0}
    for seed in range(200, 220):
        frames = block(seed)
        curve = prior.curve_of(frames)
        for count in COUNTS:
            assert curve.at(math.log(count)) == pytest.approx(math.log(law(frames, count)), abs=0.2)
        threshold = law(frames, 20)
        passes["prior"] += len(
            search(frames, prior.history(prior.curve_of(frames)), threshold).tried
        )
        passes["none"] += len(search(frames, SearchHistory(), threshold).tried)
    assert passes["prior"] <= 0.6 * passes["none"]


def test_after_a_cut_the_remembered_curve_moves_to_the_new_block(prior):
    quiet, loud = sorted((block(seed) for seed in range(200, 220)), key=np.std)[::19]
    history = prior.history(prior.curve_of(quiet))
    search(quiet, history, law(quiet, 20))
    moved = prior.history(prior.curve_of(loud), history)
    truth = math.log(law(loud, 20))
    assert history.curve is not None and moved.curve is not None
    assert abs(moved.curve.at(math.log(20)) - truth) < 0.4 * abs(
        history.curve.at(math.log(20)) - truth
    )
    assert moved.tokens == history.tokens > 0
    same = prior.history(prior.curve_of(quiet), history).curve  # nothing differs, nothing moves
    assert same is not None and np.allclose(same.points, history.curve.points)


@given(
    guess=st.dictionaries(st.integers(1, 5000), st.floats(1e-9, 1e9), min_size=1),
    spread=st.floats(0, 10),
    losses=st.lists(
        st.floats(0, 1, width=32) | st.sampled_from([0.0, math.inf, math.nan]), min_size=1
    ),
    threshold=st.floats(0, 1, width=32),
    width=st.integers(1, 5),
)
def test_whatever_a_prior_says_the_answer_is_measured_and_the_calls_are_bounded(
    guess, spread, losses, threshold, width
):
    history = SearchHistory(curve=Curve(points_of(guess)), spread=spread)
    found = run_search(
        make_search(
            "predict",
            history=history,
            min_kept=3,
            max_kept=2 + len(losses),
            threshold=threshold,
            width=width,
        ),
        lambda counts: [losses[count - 3] for count in counts],
    )
    meeting = [count for count in found.tried if losses[count - 3] <= threshold]
    assert found.met == bool(meeting)
    assert found.num_kept == (min(meeting) if meeting else 2 + len(losses))
    assert found.calls <= GUESSES + 2 + math.ceil(math.log2(len(losses) + 1))


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 16, 16), (4, 12, 20), (4, 6, 5)])
@pytest.mark.parametrize("patch_size", [(1, 4, 4), (2, 2, 5)])
@pytest.mark.parametrize("value", [0, 128, 255])
def test_features_are_finite_for_any_block(shape, patch_size, value):
    """Flat ones, images, short last blocks, and sizes that boxes do not divide."""
    found = features(np.full((*shape, 3), value, np.uint8), patch_size, [1, 5, 4000])
    assert found.shape == (27,) and np.isfinite(found).all()


@pytest.mark.parametrize("token_order", ["raster", "coarse_to_fine"])
def test_a_decoder_that_copies_the_frame_before_loses_nothing_of_a_still_block(token_order):
    still = np.repeat(block(1)[:1], 4, axis=0)
    grey, before = features(still, PATCH, [16], token_order)[7:9]  # its first frame
    assert before == pytest.approx(math.log(1e-3)) and grey > before + 1


def test_the_tokens_that_are_kept_first_are_those_of_the_order():
    """A picture that is grey but for the patches of its upper half: the first half of the tokens shows all or half of it."""
    half = np.full((1, 16, 16, 3), 128, np.uint8)
    half[:, :8] = np.random.default_rng(0).integers(0, 256, (1, 8, 16, 3))
    count = 16 // PATCH[1] * (16 // PATCH[2]) // 2
    lost = {
        order: np.exp(features(half, (1, *PATCH[1:]), [count], order)[7])
        for order in ("raster", "coarse_to_fine")
    }
    assert (
        lost["raster"] < 0.02 * lost["coarse_to_fine"]
    )  # what is added to an error is more than its hundredth


def test_the_transform_codec_tells_smooth_blocks_from_rough_ones_of_the_same_strength():
    """With all but the highest frequencies it loses nothing of a soft wave, and most of noise."""
    wave = np.sin(np.arange(32) / 32 * np.pi)
    noise = np.random.default_rng(0).normal(size=(4, 32, 32, 3))
    smooth = np.broadcast_to(wave[:, None, None], (4, 32, 32, 3))
    left = [
        np.exp(
            features(np.clip(128 + 60 * x / x.std(), 0, 255).astype(np.uint8), PATCH, [16])[9:18]
        )
        for x in (smooth - smooth.mean(), noise)
    ]
    assert left[0][0] < 0.01 * left[1][0]
    assert all((np.diff(losses) >= 0).all() for losses in left)  # the fewer are kept


def test_features_tell_unlike_tiles_from_like_ones():
    """The mean error of a transform codec is that of both; the mean of its logarithms is not."""
    rng = np.random.default_rng(0)
    like = 128 + rng.normal(size=(4, 32, 32, 3)) * 20
    unlike = np.where(np.arange(32)[:, None, None] < 16, 128, 128 + (like - 128) * np.sqrt(2))
    even, uneven = (features(x.round().astype(np.uint8), PATCH, [16])[9:] for x in (like, unlike))
    np.testing.assert_allclose(even[:9], uneven[:9], atol=0.1)
    assert (even[9:] > uneven[9:] + 2).all()


@pytest.mark.parametrize("num_features", [None, -5, -14], ids=["linear", "mean", "none"])
def test_a_prior_of_an_earlier_version_is_read(prior, tmp_path, num_features):
    """It knows no squares, and of the transform codec the mean error, or nothing."""
    values = json.loads(prior.to_json())
    of_means = 1 + len(values["means"][:num_features])
    del values["scales"]
    values["means"] = values["means"][:num_features]
    values["weights"] = [row[:of_means] for row in values["weights"]]
    (tmp_path / FILE_NAME).write_text(json.dumps(values))
    loaded = load_prior(tmp_path)
    assert loaded is not None and len(loaded.curve_of(block(1)).points) == len(COUNTS)


def test_a_block_unlike_all_others_has_no_wild_estimate(prior):
    """Squares grow fast; a black block lies far from the blocks that a prior was fitted on."""
    black = np.zeros_like(block(0))
    usual = [prior.curve_of(block(seed)).points[0].y for seed in range(50)]
    assert prior.curve_of(black).points[0].y < max(usual)


def test_a_prior_survives_its_file(prior, tmp_path):
    assert load_prior(tmp_path) is None and load_prior(tmp_path / "none") is None
    (tmp_path / FILE_NAME).write_text(prior.to_json())
    loaded = load_prior(tmp_path)
    assert loaded is not None and loaded.counts == prior.counts
    old, new = (p.curve_of(block(300)).points for p in (prior, loaded))
    assert np.allclose(old, new, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda v: v | {"version": 2}, "another"),
        (lambda v: v | {"counts": v["counts"][::-1]}, "ascending"),
        (lambda v: v | {"weights": v["weights"][1:]}, "shape"),
        (lambda v: v | {"spread": float("nan")}, "finite"),
        (lambda v: v | {"scales": [0.0 for _ in v["scales"]]}, "scales"),
        (lambda v: v | {"scales": v["scales"][1:]}, "shape"),
        (lambda v: {k: v[k] for k in v if k != "means"}, "means"),
        (lambda v: [v], "list"),
    ],
)
def test_a_foreign_file_is_refused_by_name(prior, tmp_path, change, reason):
    path = tmp_path / FILE_NAME
    path.write_text(json.dumps(change(json.loads(prior.to_json()))))
    with pytest.raises(ValueError, match=rf"curves\.json' is no prior of curves .*{reason}"):
        CurvePrior.load(path)


def test_blocks_without_a_usable_loss_are_not_fitted(prior):
    with pytest.raises(ValueError, match="above 0"):
        fit([block(0)], np.zeros((1, 16)), counts=COUNTS, patch_size=PATCH)
    with pytest.raises(ValueError, match="ascending"):
        dataclasses.replace(prior, counts=(3, 2))


@pytest.mark.parametrize("model", ["fsq", "vae"])
def test_the_shipped_priors_are_of_the_shipped_models(model):
    folder = pathlib.Path(__file__).resolve().parents[2] / "example" / model
    config, prior = load_config(str(folder)), load_prior(folder)
    assert prior is not None and prior.patch_size == config.patch_size
    assert (prior.counts[0], prior.counts[-1]) == (config.min_toks, config.max_toks)
    size = (config.frames_per_block, config.resolution, config.resolution, 3)
    noise = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    flat, noisy = (prior.curve_of(frames) for frames in (np.full_like(noise, 128), noise))
    assert all(a.y < b.y for a, b in zip(flat.points, noisy.points, strict=True))

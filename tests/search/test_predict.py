"""The search that predicts: cheap where blocks resemble each other, and right where they do not."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.search import TOLERANCE, make_search, run_search
from elastic.search.predict import GUESSES
from elastic.search.rate_curve import (
    Curve,
    Point,
    SearchHistory,
    history_from_json,
    history_to_json,
    points_of,
)

# Losses that a sick model may give, too: zero, infinite, no number.
LOSSES = st.floats(0, 1, width=32) | st.sampled_from([0.0, 1e-38, math.inf, math.nan])


def search_clip(blocks, history=None, drafts=None, **options):
    """Searches a clip's blocks ({count: loss} each) with one history; fails where a count is tried or drafted twice or is none."""
    history, results = history or SearchHistory(), []
    for losses, drafted in zip(blocks, drafts or [None] * len(blocks), strict=True):
        seen: list[int] = []
        seen_drafts: list[int] = []

        def draft(counts, drafted=drafted, seen_drafts=seen_drafts):
            assert len(counts) == 1 and counts[0] not in seen_drafts
            seen_drafts += counts
            return [drafted[counts[0]]]

        def evaluate(counts, losses=losses, seen=seen):
            assert 1 <= len(counts) <= options.get("width", 1)
            assert counts == sorted(set(counts)) and not set(counts) & set(seen)
            seen += counts
            return [losses[count] for count in counts]

        search = make_search("predict", history=history, can_draft=drafted is not None, **options)
        results.append(run_search(search, evaluate, draft))
        assert results[-1].drafts == len(seen_drafts) <= 6
    return results


def power_law(scale, slope, counts, noise=0.0):
    """A loss that falls as a power of the count, with ripples."""
    return {n: scale * n**-slope * (1 + noise * math.sin(7 * n)) for n in counts}


@st.composite
def clips(draw):
    """Blocks of any losses: random, flat or falling, which have nothing to do with each other; and options."""
    min_kept, size = draw(st.integers(1, 20)), draw(st.integers(1, 60))
    blocks = draw(st.lists(st.lists(LOSSES, min_size=size, max_size=size), min_size=1, max_size=4))
    shapes = [list, lambda b: [round(v, 1) if math.isfinite(v) else v for v in b]]
    shapes.append(
        lambda b: sorted((v for v in b if v == v), reverse=True) + [0.0] * sum(v != v for v in b)
    )
    blocks = [draw(st.sampled_from(shapes))(block) for block in blocks]
    options = {
        "min_kept": min_kept,
        "max_kept": min_kept + size - 1,
        "threshold": draw(st.floats(0, 1, width=32)),
        "fallback_fraction": draw(st.floats(0.01, 1)),
        "width": draw(st.integers(1, 5)),
        "tolerance": draw(st.sampled_from([0.0, 0.01, 0.5])),
    }
    if draw(st.booleans()):  # drafts that have nothing to do with the losses either
        drafts = [draw(st.permutations(block)) for block in blocks]
        options["drafts"] = [dict(enumerate(block, min_kept)) for block in drafts]
    return [dict(enumerate(block, min_kept)) for block in blocks], options


@given(clip=clips())
def test_the_promise_of_binary_holds_whatever_the_history_expects(clip):
    blocks, options = clip
    for found, losses in zip(search_clip(blocks, **options), blocks, strict=True):
        passing = [n for n in found.tried if losses[n] <= options["threshold"]]
        assert found.met == bool(passing)
        if found.met:
            assert found.num_kept == min(passing) and found.loss == losses[found.num_kept]
        else:  # said only where the largest count was tried
            assert options["max_kept"] in found.tried


@given(clip=clips())
def test_the_calls_of_a_block_are_bounded(clip):
    blocks, options = clip
    for found in search_clip(blocks, **options):
        assert found.calls <= GUESSES + 2 + math.ceil(math.log2(len(blocks[0]) + 1))


@pytest.mark.parametrize("scale", [0.1, 3.0, 1e9, 0.0])
def test_a_clip_that_stands_still_soon_costs_one_pass_a_block(scale):
    """In the middle of the range, at its least count, and where nothing meets the threshold."""
    counts = range(256, 4097)
    results = search_clip(
        [power_law(scale, 0.8, counts)] * 10, min_kept=256, max_kept=4096, threshold=0.01
    )
    assert all(len(found.tried) == 1 for found in results[5:])
    kept = [found.num_kept for found in results[5:]]
    assert max(kept) <= 1.02 * min(kept)


@pytest.mark.parametrize(
    ("tolerance", "tokens", "passes"), [(0.012, 1.02, 2.5), (TOLERANCE, 1.03, 2.2)]
)
@pytest.mark.parametrize("noise", [0.0, 0.003])
@pytest.mark.parametrize("slope", [0.5, 0.8, 1.5])
def test_smooth_curves_that_drift_cost_few_passes_and_few_tokens(
    slope, noise, tolerance, tokens, passes
):
    """Bounds of the passes a block, and of the tokens: a multiple of what trying every count would keep."""
    random, counts = np.random.default_rng(0), range(32, 4097)
    blocks, least = [], 700.0  # tokens that meet the threshold
    for change in random.normal(0, 0.12, 100):
        least = min(max(least * math.exp(change), 60), 3000)
        blocks.append(power_law(0.01 * least**slope, slope, counts, noise))
    results = search_clip(blocks, min_kept=32, max_kept=4096, threshold=0.01, tolerance=tolerance)
    best = [next(n for n in counts if losses[n] <= 0.01) for losses in blocks]
    assert all(found.met for found in results)
    assert sum(found.num_kept for found in results) <= tokens * sum(best)
    assert sum(len(found.tried) for found in results) <= passes * len(results)


def drifting(blocks=100, slope=0.8, spread=0.3):
    """Blocks that meet 0.01 with very different counts, and these counts."""
    random, counts = np.random.default_rng(0), range(32, 4097)
    least = np.exp(
        np.clip(np.log(500) + random.normal(0, spread, blocks), np.log(60), np.log(3000))
    )
    found = [power_law(0.01 * n**slope, slope, counts, noise=0.003) for n in least]
    return found, [next(n for n in counts if losses[n] <= 0.01) for losses in found]


@pytest.mark.parametrize("offset", [0.7, 1.0, 1.4])
def test_after_good_drafts_a_block_takes_hardly_more_than_one_pass(offset):
    """Where drafts are off by a factor, the search learns it in the first block; small errors of drafts cost nothing."""
    blocks, best = drifting()
    random = np.random.default_rng(1)
    drafts = [
        {n: loss * offset * error for n, loss in losses.items()}
        for losses, error in zip(blocks, np.exp(random.normal(0, 0.002, len(blocks))), strict=True)
    ]
    bounds = dict(min_kept=32, max_kept=4096, threshold=0.01)
    results = search_clip(blocks, drafts=drafts, **bounds)
    assert all(found.met for found in results)
    assert sum(found.num_kept for found in results) <= 1.012 * sum(best)
    assert sum(len(found.tried) for found in results) <= 1.15 * len(results)
    assert sum(found.drafts for found in results) <= 3 * len(results)
    without = search_clip(blocks, **bounds)
    assert sum(len(found.tried) for found in without) > 1.5 * len(results)
    # A history from a file says the same.
    history = SearchHistory()
    search_clip(blocks[:3], history, drafts[:3], **bounds)
    again = history_from_json(history_to_json(history))
    found, expected = (search_clip(blocks[3:5], h, drafts[3:5], **bounds) for h in (again, history))
    assert found == expected


def test_drafts_that_mislead_are_given_up_for_a_while():
    blocks, best = drifting(40, spread=0.02)
    errors = np.exp(np.random.default_rng(1).normal(0, 0.5, len(blocks)))
    drafts = [
        {n: loss * error for n, loss in losses.items()}
        for losses, error in zip(blocks, errors, strict=True)
    ]
    results = search_clip(blocks, drafts=drafts, min_kept=32, max_kept=4096, threshold=0.01)
    assert results[0].drafts
    assert 1 <= sum(found.drafts > 0 for found in results[5:]) <= 0.2 * len(results)
    assert sum(found.num_kept for found in results) <= 1.03 * sum(best)
    # After a single block whose drafts are off they soon help again.
    drafts = [dict(losses) for losses in blocks]
    drafts[5] = {n: 1.15 * loss for n, loss in drafts[5].items()}
    results = search_clip(blocks, drafts=drafts, min_kept=32, max_kept=4096, threshold=0.01)
    assert not results[6].drafts and all(found.drafts for found in results[20:])
    # A single count leaves nothing to guess.
    alone = search_clip(blocks, drafts=drafts, min_kept=400, max_kept=400, threshold=0.01)
    assert not any(found.drafts for found in alone)


@pytest.mark.parametrize(("tolerance", "width"), [(0.0, 3), (TOLERANCE, 5)])
def test_several_counts_a_call_cost_fewer_calls(tolerance, width):
    random, counts = np.random.default_rng(0), range(32, 513)
    blocks = [power_law(3 * math.exp(x), 0.9, counts) for x in random.normal(0, 0.2, 50)]
    options = dict(min_kept=32, max_kept=512, threshold=0.03, tolerance=tolerance)
    calls = [sum(r.calls for r in search_clip(blocks, width=w, **options)) for w in (1, width)]
    assert calls[1] <= 0.8 * calls[0]


def test_one_clip_teaches_another_nothing():
    """A search that is given no history has none, so that tokens do not depend on what ran before."""
    block = power_law(3.0, 0.9, range(32, 513))
    options = dict(min_kept=32, max_kept=512, threshold=0.03)
    first, second = (search_clip([block], **options)[0] for _ in range(2))
    assert first == second


def test_a_history_is_read_as_it_was_written_also_by_an_earlier_version():
    history = SearchHistory(tokens=700, excess=3, spread=0.1)
    written = history_to_json(history)
    assert history_from_json(written) == history
    assert history_from_json(written | {"blocks": 2, "passes": 5}) == history


@given(
    points=st.dictionaries(st.integers(1, 5000), st.floats(1e-6, 10), min_size=1),
    measured=st.dictionaries(st.integers(1, 5000), st.floats(1e-6, 10), min_size=1),
)
def test_a_moved_curve_runs_through_what_was_measured(points, measured):
    curve = Curve(points_of(points)).shifted_through(points_of(measured))
    for x, y in points_of(measured):
        assert curve.at(x) == pytest.approx(y, abs=1e-9)


def test_a_crossing_is_where_the_curve_first_reaches_the_level():
    curve = Curve([Point(0.0, 3.0), Point(1.0, 1.0), Point(2.0, 2.0), Point(3.0, 0.0)])
    assert curve.crossing(1.5, 0.0, 3.0) == pytest.approx(0.75)
    assert curve.crossing(1.5, 1.5, 3.0) == 1.5
    assert curve.crossing(0.5, 1.0, 3.0) == pytest.approx(2.75)
    assert curve.crossing(0.5, 0.0, 2.0) is None


def test_a_tolerance_is_a_share():
    with pytest.raises(ValueError, match=r"tolerance=1.0 must be a share"):
        make_search("predict", min_kept=1, max_kept=8, threshold=0.1, tolerance=1.0)
    with pytest.raises(ValueError, match="at least one point"):
        Curve([])

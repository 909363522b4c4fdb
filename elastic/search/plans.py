"""The searches by name: predict, binary, linear and fixed, one function each. A new search is added here."""

from collections.abc import Iterator

from elastic.search.base import SearchOptions, Seen, plan
from elastic.search.predict import predict


@plan("predict")
def _predict(options: SearchOptions, seen: Seen) -> Iterator[list[int]]:
    """Guesses from the curves of earlier blocks, corrected by every measurement: see `predict.py`."""
    if options.threshold is None:  # make_search refuses this earlier
        raise ValueError("A predict search needs a threshold.")
    yield from predict(
        smallest=options.min_kept,
        largest=options.largest,
        threshold=options.threshold,
        width=options.width,
        tolerance=options.tolerance,
        history=seen.history,
        losses=seen.losses,
        meets=seen.meets,
        drafts=seen.drafts if seen.can_draft else None,
    )


@plan("binary")
def _binary(options: SearchOptions, seen: Seen) -> Iterator[list[int]]:
    """Halves the range; `width` counts at once split it in `width + 1` parts.

    Assumes that the loss falls with the count. It then finds the smallest of n candidates that
    meets the threshold in at most ceil(log2(n + 1)) calls of one count each.
    """
    # Counts up to `fails` fail, those from `meets` on meet the threshold. Both start just outside the
    # candidates: the smallest and the largest count are tried only if the result depends on them.
    fails, meets = options.min_kept - 1, options.largest + 1
    while meets - fails > 1:
        parts = min(options.width, meets - fails - 1) + 1
        group = [fails + (meets - fails) * i // parts for i in range(1, parts)]
        yield group
        # Where the loss is not monotone, the smallest count that meets the threshold counts.
        meets = next((count for count in group if seen.meets(count)), meets)
        fails = max((count for count in group if count < meets), default=fails)


@plan("linear")
def _linear(options: SearchOptions, seen: Seen) -> Iterator[list[int]]:
    """From the smallest count up, geometrically spaced, to the first that meets the threshold."""
    counts = geometric_counts(options.min_kept, options.largest, options.num_counts)
    for start in range(0, len(counts), options.width):
        group = counts[start : start + options.width]
        yield group
        if not options.full_curve and any(seen.meets(count) for count in group):
            return


@plan("fixed")
def _fixed(options: SearchOptions, seen: Seen) -> Iterator[list[int]]:
    """One count, whatever its loss."""
    del seen
    yield [options.fallback]


def geometric_counts(smallest: int, largest: int, num_counts: int) -> list[int]:
    """At most `num_counts` distinct counts, geometrically spaced, both ends included exactly."""
    ratio = largest / smallest
    inner = (round(smallest * ratio ** (i / (num_counts - 1))) for i in range(1, num_counts - 1))
    return sorted({smallest, largest, *(min(max(count, smallest), largest) for count in inner)})

"""Decides how many tokens a block keeps."""

from elastic.search.base import (
    Search,
    SearchOptions,
    SearchResult,
    make_search,
    run_search,
    search_names,
)
from elastic.search.curve_prior import CurvePrior, load_prior
from elastic.search.plans import geometric_counts

__all__ = [
    "CurvePrior",
    "Search",
    "SearchOptions",
    "SearchResult",
    "geometric_counts",
    "load_prior",
    "make_search",
    "run_search",
    "search_names",
]

"""Decides how many tokens a block keeps.

The names of `curve_prior.py` are imported when they are first used, so that the flags are made from the registry without loading numpy.
"""

from typing import TYPE_CHECKING

from elastic.io.lazy import lazy_names
from elastic.search.base import (
    TOLERANCE,
    Search,
    SearchOptions,
    SearchResult,
    make_search,
    run_search,
    search_names,
)
from elastic.search.plans import geometric_counts

if TYPE_CHECKING:
    from elastic.search.curve_prior import CurvePrior, load_prior

__all__ = [
    "TOLERANCE",
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

__getattr__ = lazy_names(__name__, {"CurvePrior": ".curve_prior", "load_prior": ".curve_prior"})

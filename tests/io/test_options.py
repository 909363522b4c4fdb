"""Options: a field carries its default, help text, choices and check."""

import dataclasses
import math
import re

import pytest

from elastic.io import options
from elastic.io.options import option


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """For tests."""

    path: str = option(options.REQUIRED, "a file")
    width: int = option(8, "columns", check=options.at_least(1), flag="model.width")
    rate: float | None = option(None, "frames per second", check=options.finite_above(0))
    kind: str = option("a", "which", choices=("a", "b"))
    shares: tuple[float, ...] = option(
        (0.5,), "shares", check=options.Check(all, "must all be above 0")
    )
    place: str = "no option"

    def __post_init__(self):
        options.check_options(self)


def test_a_record_with_options_is_a_plain_dataclass():
    assert Sizes(path="p") == Sizes(path="p", width=8, rate=None, kind="a", shares=(0.5,))
    with pytest.raises(TypeError, match="path"):
        Sizes()


def test_options_are_listed_in_their_order_with_what_they_say():
    found = options.options_of(Sizes)
    assert list(found) == ["path", "width", "rate", "kind", "shares"]
    assert (found["width"].help, found["width"].flag) == ("columns", "model.width")
    assert found["kind"].choices == ("a", "b")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"width": 0}, "width=0 must be 1 or more."),
        ({"rate": math.inf}, "rate=inf must be above 0 and finite."),
        ({"rate": math.nan}, "rate=nan must be above 0 and finite."),
        ({"kind": "c"}, "kind='c' must be one of a, b."),
        ({"shares": (0.5, 0.0)}, "shares=0.5,0.0 must all be above 0."),
    ],
)
def test_a_value_that_breaks_its_rule_is_refused_by_name(wrong, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Sizes(path="p", **wrong)


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (options.at_least(2), (2, math.inf), (1.9, math.nan)),
        (options.at_least_below(0, 1), (0, 0.9), (-0.1, 1, math.nan)),
        (options.in_range(0, 1), (0, 1), (-0.1, 1.1, math.nan)),
        (options.finite_at_least(0, 10), (0, 10), (-1, 11, math.inf, math.nan)),
        (options.finite_above(0, 10), (0.1, 10), (0, 11, math.inf, math.nan)),
    ],
)
def test_a_rule_accepts_its_ends_and_refuses_nan(check, good, bad):
    assert all(check.accepts(value) for value in good)
    assert not any(check.accepts(value) for value in bad)

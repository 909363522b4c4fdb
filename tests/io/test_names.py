"""A misspelled argument gets a suggestion."""

import inspect
from typing import TypedDict, Unpack

import pytest

from elastic.io.names import did_you_mean, suggest_arguments


class Sizes(TypedDict, total=False):
    """For tests."""

    width: int
    height: int


@suggest_arguments
def area(scale: float, *, unit: str = "m", **sizes: Unpack[Sizes]) -> float:
    """For tests."""
    del unit
    return scale * sizes.get("width", 1) * sizes.get("height", 1)


def test_the_nearest_name_is_suggested_and_nothing_where_none_is_near():
    assert did_you_mean("treshold", ["threshold", "psnr"]) == " Did you mean 'threshold'?"
    assert did_you_mean("colour", ["threshold", "psnr"]) == ""


def test_an_unknown_argument_is_refused_with_a_suggestion():
    assert area(2.0, width=3, unit="cm") == 6
    with pytest.raises(
        TypeError, match=r"area\(\) has no argument 'widht'\. Did you mean 'width'\?"
    ):
        area(2.0, widht=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"no argument 'units'\. Did you mean 'unit'\?"):
        area(2.0, units="cm")  # type: ignore[call-arg]


def test_the_signature_stays_that_of_the_function():
    assert list(inspect.signature(area).parameters) == ["scale", "unit", "sizes"]
    assert area.__doc__ == "For tests."

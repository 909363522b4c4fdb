"""A misspelled argument gets a suggestion; a model's name has no absolute path."""

import inspect
from typing import TypedDict, Unpack

import pytest

from elastic.io.names import did_you_mean, model_name, suggest_arguments


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


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("example/fsq/", "example/fsq"),
        ("params::../models/params", "../models/params"),
        ("hf::owner/model", "owner/model"),
        ("/data/big model/params", "big model/params"),
        ("params::trainstate_params::/data/run/streaming_train_state", "run/streaming_train_state"),
        ("/data/run/model.safetensors", "run/model.safetensors"),
        ("/data/run/pretrained/", "pretrained"),
        ("/params", "params"),
        ("/home/a/.cache/huggingface/hub/models--Owner--A-Model/snapshots/0f3/params", "Owner/A-Model"),
        ("HERE/models/fsq", "models/fsq"),
        ("unnamed", "unnamed"),
    ],
)  # fmt: skip
def test_a_model_is_called_by_what_names_it_and_never_by_an_absolute_path(
    tmp_path, monkeypatch, spec, name
):
    monkeypatch.chdir(tmp_path)
    assert model_name(spec.replace("HERE", str(tmp_path))) == name
    assert model_name(name) == name  # a name stays


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

"""`EncodeOptions`: one record, the same in Python, in keyword arguments and in a plan."""

import dataclasses
import inspect
import json
import math
import subprocess
import sys
import typing

import pytest

from elastic.config import ElasticTokConfig
from elastic.io.options import options_of
from elastic.search import search_names
from elastic.tokenizer import ElasticTokenizer, EncodeOptions
from elastic.tokenizer.session import check_options
from elastic.tokenizer.targets import EncodeArguments

FIELDS = {field.name: field for field in dataclasses.fields(EncodeOptions)}
MODEL = ElasticTokConfig(min_toks=4, max_toks=32, frames_per_block=2)


@pytest.mark.parametrize("method", ["encode", "stream"])
def test_keyword_arguments_are_the_fields_spelled_out(method):
    parameters = dict(inspect.signature(getattr(ElasticTokenizer, method)).parameters)
    for other in ("self", "source", "record", "value_range", "layout", "progress", "batch"):
        parameters.pop(other, None)
    assert parameters.keys() == FIELDS.keys()
    for name, parameter in parameters.items():
        assert parameter.kind is parameter.KEYWORD_ONLY
        assert parameter.default == FIELDS[name].default
        given, own = parameter.annotation, FIELDS[name].type
        assert name == "metric" or given == own, name  # a function of two clips has two names


def test_arguments_that_are_passed_on_are_typed_like_the_fields():
    assert typing.get_type_hints(EncodeArguments) == typing.get_type_hints(EncodeOptions)


@pytest.mark.parametrize(
    "call",
    [
        lambda **options: EncodeOptions(**options),
        lambda **options: ElasticTokenizer.encode(None, "clip.mp4", **options),  # type: ignore[arg-type]
        lambda **options: ElasticTokenizer.stream(None, "clip.mp4", **options),  # type: ignore[arg-type]
        lambda **options: ElasticTokenizer.reconstruct(None, "clip.mp4", **options),  # type: ignore[arg-type]
        lambda **options: ElasticTokenizer.encode_many(None, [], **options),  # type: ignore[arg-type]
    ],
    ids=["EncodeOptions", "encode", "stream", "reconstruct", "encode_many"],
)
def test_a_misspelled_option_gets_a_suggestion(call):
    with pytest.raises(TypeError, match=r"no argument 'treshold'\. Did you mean 'threshold'\?"):
        call(treshold=0.1)


def test_a_count_below_those_of_training_is_told_and_one_beyond_the_model_is_refused():
    with pytest.warns(UserWarning, match="num_tokens=3 is below 4, the fewest tokens of a block"):
        check_options(EncodeOptions(num_tokens=3), MODEL, width=1)
    with pytest.raises(ValueError, match="num_tokens=33 must lie between 1 and 32"):
        check_options(EncodeOptions(num_tokens=33), MODEL, width=1)
    check_options(
        EncodeOptions(num_tokens=4), MODEL, width=1
    )  # without a word: a warning would fail


def test_every_option_has_a_help_text():
    about = options_of(EncodeOptions)
    assert about.keys() == FIELDS.keys() and all(option.help for option in about.values())
    assert set(about["search"].choices) <= set(search_names())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(threshold=-1.0), "threshold=-1.0 must be a finite number, 0 or above"),
        (dict(threshold=math.nan), "threshold=nan must be"),
        (dict(threshold=True), "threshold=True must be a number"),
        (dict(num_tokens=8.0), "num_tokens=8.0 must be a whole number of tokens"),
        (dict(psnr=20.0, metric="lpips"), "psnr=20.0 is of squared errors"),
        (dict(num_tokens=8, rate=math.inf), "rate=inf must be a positive number of frames/s"),
        (dict(num_tokens=8, max_frames=0), "max_frames=0 must be at least 1"),
        (dict(num_tokens=8, max_fraction=1.5), "max_fraction=1.5 must be above 0 and at most 1"),
        (dict(threshold=0.1, fallback_fraction=0.0), "fallback_fraction=0.0 must be above 0"),
        (dict(threshold=0.1, num_counts=1), "num_counts=1 must be at least 2"),
        (dict(threshold=0.1, search_tolerance=1.0), "search_tolerance=1.0 must be a share"),
    ],
)
def test_a_value_out_of_its_range_is_refused_before_there_is_a_model(options, message):
    with pytest.raises(ValueError, match=message):
        EncodeOptions(**options)


def test_what_a_search_may_try_follows_from_the_options_and_the_model():
    searched = EncodeOptions(threshold=0.1, max_fraction=0.5, search_tolerance=0.3)
    assert searched.search_name == "predict"
    options = searched.search_options(MODEL, width=3)
    assert (options.min_kept, options.largest, options.threshold) == (4, 16, 0.1)
    assert (options.width, options.tolerance) == (3, 0.3)
    fixed = EncodeOptions(num_tokens=2)
    assert fixed.search_name == "fixed"
    options = fixed.search_options(MODEL, width=3)
    assert (options.min_kept, options.num_tokens, options.width) == (1, 2, 1)
    assert EncodeOptions(psnr=20.0).largest_error == pytest.approx(0.04)


def test_a_plan_holds_every_option_and_a_function_by_its_name():
    def largest(original, reconstruction):
        raise NotImplementedError

    about = EncodeOptions(threshold=0.1, metric=largest).to_json()
    assert about.keys() == FIELDS.keys() and about["metric"] == "largest"
    assert json.loads(json.dumps(about)) == about


def test_the_options_are_read_without_loading_jax():
    code = "import elastic.tokenizer.targets, sys; assert 'jax' not in sys.modules, 'jax'"
    subprocess.run([sys.executable, "-c", code], check=True)

"""The options of training: what is out of range is refused, in the words of the command line."""

import json
import math
import re

import pytest

from elastic.cli import app
from elastic.cli.flags_train import TRAIN
from elastic.cli.train_config import model_of, run_of
from elastic.training.config import OptimizerConfig

ADAMW = "--optimizer.adamw_optimizer"
VISION = "--train_dataset.vision_dataset"


def described(*arguments):
    """The run of a command line."""
    values = app.parse(TRAIN, [f"{VISION}.path=in", "--logger.output_dir=out", *arguments])
    return run_of(values, model_of(values))


@pytest.mark.parametrize(
    ("typed", "rule"),
    [
        (f"{ADAMW}.lr=nan", "must be above 0 and finite"),
        (f"{ADAMW}.lr=0.0", "must be above 0"),
        (f"{ADAMW}.lr=1e+39", "must be above 0 and finite"),  # infinite in float32
        (f"{ADAMW}.init_lr=-1.0", "must be 0 or more"),
        (f"{ADAMW}.end_lr=inf", "must be 0 or more, and finite"),
        (f"{ADAMW}.weight_decay=nan", "must be 0 or more"),
        (f"{ADAMW}.b1=1.0", "must be 0 or more, and below 1"),
        (f"{ADAMW}.b2=nan", "must be 0 or more, and below 1"),
        (f"{ADAMW}.clip_gradient=0.0", "must be above 0"),
        (f"{ADAMW}.lr_warmup_steps=-1", f"and below {ADAMW}.lr_decay_steps=2000000"),
        ("--optimizer.accumulate_gradient_steps=0", "must be 1 or more"),
        (f"{VISION}.cache_gigabytes=nan", "must be 0 or more"),
        (f"{VISION}.fps=inf", "must be above 0 and finite"),
        (f"{VISION}.seq_length=100", "is not a whole number of blocks"),
        (f"{VISION}.seq_length={2**50}", "GB of memory; take fewer or shorter ones"),
        (f"{VISION}.resolution=64", "the frames of this model have 256 rows"),
        ("--seed=99999999999999999999", "must lie in 0 to 4294967295"),
        ("--seed=-1", "must lie in 0 to 4294967295"),
        ("--total_steps=0", "must be 1 or more"),
        ("--save_model_freq=-1", "must be 0 or more"),
        ("--save_milestone_freq=-1", "must be 0 or more"),
        ("--checkpointer.keep=0", "must be 1 or more"),
        ("--log_freq=0", "must be 1 or more"),
        ("--eval_freq=-1", "must be 0 or more"),
        ("--eval_freq=5", "needs --eval_dataset.path"),
        ("--eval_dataset.max_files=0", "must be 1 or more"),
        ("--eval_num_tokens=0", "must all be 1 or more"),
        ("--eval_num_tokens=2.5", "must be whole numbers such as 256,512"),
        ("--eval_thresholds=0.1,inf", "must all be above 0 and finite"),
        ("--eval_thresholds=low", "must be numbers such as 0.1,0.05"),
        ("--profile_steps=a,b", "must be 2 whole numbers such as 10,15"),
        ("--profile_steps=3,2", "must be the first and the last step to trace"),
    ],
)
def test_an_option_out_of_range_is_refused_as_it_was_typed(typed, rule):
    with pytest.raises(ValueError, match=re.escape(rule)) as refused:
        described(typed)
    assert typed in str(refused.value)


def test_a_count_above_the_models_is_refused_before_training():
    wanted = ("--eval_freq=5", "--eval_dataset.path=held", "--eval_num_tokens=8,9999")
    with pytest.raises(ValueError, match="--eval_num_tokens=9999 must be at most 4096"):
        described(*wanted)


def test_what_is_no_position_in_the_data_is_named_by_its_flag_alone(tmp_path):
    wrong = tmp_path / "config.json"
    wrong.write_text(json.dumps({"hidden_size": 4}))
    with pytest.raises(ValueError, match="is no saved position in the data") as refused:
        described(f"--load_dataset_state={wrong}")
    assert f"--load_dataset_state={wrong}" in str(refused.value)
    assert "hidden_size" not in str(refused.value)
    # A run that goes on from its own checkpoint needs the file no more.
    assert described(f"--load_dataset_state={tmp_path / 'gone.json'}").load_dataset_state


def test_the_ends_of_the_ranges_are_allowed():
    OptimizerConfig(init_lr=0.0, end_lr=0.0, b1=0.0, weight_decay=0.0, clip_gradient=math.inf)
    assert described("--seed=4294967295").seed == 2**32 - 1

"""The command line: names and values of flags, --help, and how errors end."""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import warnings

import pytest

from elastic.cli import app
from elastic.cli.flags import DATASET, DECODE, ENCODING, EVALUATE, INFERENCE, OTHER, RUN
from elastic.cli.flags_train import DATA, EVALUATION, LOG, OPTIMIZER, SAVE, TRAIN
from elastic.cli.script import Flag, Script

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPTS = pytest.mark.parametrize(
    "script", [INFERENCE, DECODE, TRAIN, DATASET, EVALUATE], ids=lambda s: s.name
)
SMALL = Script(
    name="scripts/small.py",
    usage="",
    description="For tests.",
    groups={
        "All": (
            Flag("path", "", "a file", required=True),
            Flag("model.hidden_size", 8, "a width"),
            Flag("old", 0, "gone", unbuilt="that is not part of this version."),
            Flag("chunk", 0, "of old", idle="there are no chunks."),
            Flag("debug", False, "show the traceback"),
        )
    },
)
# Those of the released scripts, as the README documents them.
OLD_INFERENCE = """input_path output_folder max_blocks_per_chunk threshold mesh_dim dtype load_elastic_config
    update_elastic_config load_checkpoint search_alg max_prop_codes default_prop_codes resolution fps seed n_codes"""
OLD_TRAINING = """mesh_dim dtype total_steps log_freq eval_freq eval_thresholds save_model_freq save_milestone_freq
    load_elastic_config update_elastic_config load_checkpoint load_dataset_state autoresume optimizer.type
    optimizer.accumulate_gradient_steps optimizer.adamw_optimizer.{init_lr,lr,end_lr,lr_warmup_steps,lr_decay_steps,b1,b2,
    clip_gradient,weight_decay,bf16_momentum} train_dataset.type train_dataset.vision_dataset.{path,ext,batch_size,
    seq_length,resolution,fps,workers,chunk_size,max_prefetch,seed} checkpointer.{save_optimizer_state,float_dtype}
    logger.{online,project_id,experiment_id,output_dir,wandb_dir,append_uuid} jax_distributed.{initialize_jax_distributed,
    coordinator_address,num_processes,process_id,local_device_ids}"""


def expand(names):
    """`a b.{c,d}` -> {'a', 'b.c', 'b.d'}."""
    found = set()
    for name in re.sub(r",\s+", ",", names).split():
        stem, _, inner = name.partition("{")
        found |= {stem + part for part in inner.rstrip("}").split(",")}
    return found


@pytest.mark.parametrize(("script", "names"), [(INFERENCE, OLD_INFERENCE), (TRAIN, OLD_TRAINING)])
def test_every_released_flag_is_known(script, names):
    assert expand(names) <= {flag.name for flag in script.flags}


@SCRIPTS
def test_no_flag_is_lost_and_none_changes_its_type_default_or_choices(script):
    """Held against flags.json, which was recorded before flags were made from records."""
    recorded = json.loads((pathlib.Path(__file__).parent / "flags.json").read_text())[script.name]
    found = {
        flag.name: [flag.type.__name__, flag.default, flag.required, list(flag.choices)]
        for flag in script.flags
    }
    assert {name: found.get(name) for name in recorded} == recorded


@pytest.mark.parametrize("script", [INFERENCE, DATASET, TRAIN], ids=lambda s: s.name)
def test_every_option_of_a_record_has_its_flag(script):
    training = (RUN, DATA, OPTIMIZER, LOG, SAVE, EVALUATION)
    wanted = {
        name
        for record in (training if script is TRAIN else (ENCODING,))
        for name in record.names.values()
    }
    assert wanted <= {flag.name for flag in script.flags}


@SCRIPTS
def test_help_names_every_flag_once_and_fits_the_screen(script):
    text = app.help_text(script)
    for flag in script.flags:
        assert len(re.findall(rf"^  --{re.escape(flag.name)}=", text, re.MULTILINE)) == 1
    assert all(len(line) <= 140 for line in text.splitlines())


@pytest.mark.parametrize("script", ["inference", "decode", "tokenize_dataset", "evaluate", "train"])
def test_help_needs_neither_jax_nor_a_model(script):
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['{script}', '--help']\n"
        f"try: runpy.run_path('scripts/{script}.py', run_name='__main__')\n"
        "finally: print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    *_, modules = done.stdout.splitlines()
    heavy = {"jax", "flax", "transformers", "tensorstore", "matplotlib"}
    assert not heavy & set(modules.split())
    assert f"usage: python3 scripts/{script}.py" in done.stdout


def test_a_search_that_is_registered_is_one_that_the_flags_accept():
    """In a process of its own: a plan stays registered."""
    code = """
from elastic.search.base import plan

@plan("descending")
def _descending(options, seen):
    for count in range(options.largest, options.min_kept - 1, -1):
        yield [count]
        if not seen.meets(count):
            return

from elastic.cli import app
from elastic.cli.flags import DATASET, INFERENCE
from elastic.evaluation.records import EvaluationConfig
from elastic.search import make_search, run_search

for script in (INFERENCE, DATASET):
    required = [f"--{flag.name}=a" for flag in script.flags if flag.required]
    values = app.parse(script, [*required, "--search_alg=descending", "--threshold=0.05"])
    assert "descending" in app.help_text(script)
options = app.encode_options(values)
search = make_search(options.search_name, min_kept=8, max_kept=64, threshold=options.threshold)
print(run_search(search, lambda counts: [1 / count for count in counts]).num_kept)
print(*EvaluationConfig(searches=tuple(app.words("descending,binary"))).searches)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["20", "descending", "binary"], done.stderr


def test_an_unknown_search_is_refused_by_the_flag():
    with pytest.raises(ValueError, match=re.escape("predict|binary|linear|fixed")):
        app.parse(INFERENCE, ["--search_alg=binery"])


def test_an_option_of_the_model_is_sent_to_the_flag_that_takes_it():
    way = re.escape('option of the model: --update_elastic_config="dict(lpips_loss_ratio=...)".')
    with pytest.raises(ValueError, match=f"no flag --lpips_loss_ratio.*{way}"):
        app.parse(TRAIN, ["--lpips_loss_ratio=0.0"])


def test_the_last_value_of_a_flag_counts():
    values = app.parse(SMALL, ["--path=a", "--model.hidden_size=16", "--path", "b"])
    assert values["path"] == "b"
    assert values.under("model") == {"hidden_size": 16}
    assert values.given("path") and not values.given("debug")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--path=a", "--model.hiden_size=4"], "Did you mean --model.hidden_size?"),
        (["--path=a", "--hidden_size=4"], "Did you mean --model.hidden_size?"),
        (["--path=a", "--model.hidden_size=wide"], "model.hidden_size=wide"),
        (["--path=a", "stray"], "'stray' belongs to no flag"),
        (["--path=a", "--old=3"], "--old=3: that is not part of this version."),
        ([], "Give --path: a file"),
    ],
)
def test_a_flag_that_is_of_no_use_is_refused_with_the_way_out(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        app.parse(SMALL, arguments)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--threshold=abc", "--threshold=abc must be a number, such as 0.003."),
        ("--threshold=", "--threshold= must be a number, such as 0.003."),
        ("--psnr=a: b", "--psnr=a: b must be a number, such as 0.003."),
        ("--max_frames=4x", "--max_frames=4x must be a whole number, in digits."),
        ("--n_codes=1e3", "--n_codes=1e3 must be a whole number, in digits."),
        ("--viz=maybe", "--viz=maybe must be True or False."),
        ("--metric=l3", "--metric=l3 must be one of mse|lpips."),
        ("--fps", "Missing value for flag --fps; write --name=value."),
    ],
)
def test_a_value_of_another_kind_is_refused_by_its_flag_in_plain_words(flag, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        app.parse(INFERENCE, [flag])


def test_without_a_target_the_model_recommends_one_and_the_log_says_so(caplog):
    required = [f"--{flag.name}=a" for flag in INFERENCE.flags if flag.required]
    values = app.parse(INFERENCE, required)
    with caplog.at_level("INFO", logger="elastic"):
        assert app.encode_options(values, (0.02, 0.01)).threshold == 0.02
    assert "--threshold=0.02: the model recommends it" in caplog.text
    with pytest.raises(ValueError, match=r"recommends no threshold\. Give --threshold=ERROR"):
        app.encode_options(values)
    other = app.parse(INFERENCE, [*required, "--n_codes=300"])
    options = app.encode_options(other, (0.02,))
    assert (options.threshold, options.num_tokens) == (None, 300)


@pytest.mark.parametrize("script", [INFERENCE, DATASET], ids=lambda s: s.name)
@pytest.mark.parametrize("other", ["--n_codes=300", "--psnr=28"])
def test_two_targets_are_refused_by_their_flags(script, other):
    required = [f"--{flag.name}=a" for flag in script.flags if flag.required]
    values = app.parse(script, [*required, "--threshold=0", other])

    def check():
        app.check_target(values)
        app.encode_options(values)

    name = other.split("=")[0].lstrip("-")
    with pytest.raises(ValueError, match=rf"threshold= and -*{name}= are 2 targets; give one\."):
        check()


def test_a_flag_without_effect_says_so(capsys):
    assert app.run(SMALL, lambda values: None, ["--path=a", "--chunk=8"]) == 0
    assert "--chunk has no effect: there are no chunks." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (ValueError("size=3\n  must be even."), "size=3 must be even."),
        (PermissionError(13, "Permission denied", "a/b"), "a/b: Permission denied."),
        (MemoryError(), "Out of memory"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating"), "Out of memory"),
    ],
)
def test_an_expected_error_is_one_line_and_exit_code_1(error, shown, capsys):
    def body(values):
        raise error

    assert app.run(SMALL, body, ["--path=a"]) == 1
    out, err = capsys.readouterr()
    assert not out and err.startswith(f"scripts/small.py: error: {shown}")
    assert err.count("\n") == 1 and "Traceback" not in err


def test_a_warning_names_the_flag_too(capsys):
    def body(values):
        warnings.warn("num_tokens=3 is few.", stacklevel=1)

    flag = Flag("n_codes", 0, "tokens", option="num_tokens")
    assert app.run(dataclasses.replace(SMALL, groups={"": (flag, *OTHER)}), body, []) == 0
    assert capsys.readouterr().err == "--n_codes=3 is few.\n"


@pytest.mark.parametrize(
    ("flag", "option", "shown"),
    [("n_codes", "num_tokens", "--n_codes=3 "), ("other", "", "num_tokens=3 ")],
)
def test_an_error_names_the_flag_and_not_the_argument_behind_it(flag, option, shown, capsys):
    script = dataclasses.replace(
        SMALL, groups={"": (Flag(flag, 0, "tokens", option=option), *OTHER)}
    )

    def body(values):
        raise ValueError("num_tokens=3 must be more.")

    assert app.run(script, body, []) == 1
    assert f"error: {shown}must be more." in capsys.readouterr().err


def test_debug_shows_where_an_error_came_from(capsys):
    def body(values):
        raise ValueError("no")

    assert app.run(SMALL, body, ["--path=a", "--debug"]) == 1
    assert "in body" in capsys.readouterr().err


def test_parts_of_a_checkpoint_that_were_given_up_say_nothing():
    """As orbax leaves them when a disk is full, before the process ends and as it ends."""
    assert printed_to(None, [], _ECHOES) == (1, "small.py: error: The disk is full.\n")
    _, shown = printed_to(None, [], _ECHOES, "--debug")
    assert "'part_of_a_checkpoint' was never awaited" in shown
    assert "Task exception was never retrieved" in shown


def test_a_bug_keeps_its_traceback():
    def body(values):
        raise KeyError("typo")

    with pytest.raises(KeyError):
        app.run(SMALL, body, ["--path=a"])


# Printed by a script that writes to standard output; each ends by itself, in Python's buffer or beyond it.
_HELP = "from elastic.cli import app, flags; sys.exit(app.run(flags.INFERENCE, print, ['--help']))"
_BODY = """
from elastic.cli import app
from elastic.cli.script import Flag, Script

def body(values):
    for _ in range({lines}):
        print("a line of output")

script = Script("small.py", "", "", {{"": (Flag("debug", False, "traceback"),)}})
sys.exit(app.run(script, body, []))
"""
PRINTS = pytest.mark.parametrize(
    "code", [_HELP, _BODY.format(lines=1), _BODY.format(lines=10**5)], ids=["help", "line", "lines"]
)
BUFFERING = pytest.mark.parametrize("options", [[], ["-u"]], ids=["buffered", "unbuffered"])


_ECHOES = """
from elastic.cli import app
from elastic.cli.script import Flag, Script

async def part_of_a_checkpoint():
    pass

async def unread_error():
    raise OSError("of a part")

def body(values):
    import asyncio

    part_of_a_checkpoint()  # given up during the run
    global given_up_at_the_end
    given_up_at_the_end = part_of_a_checkpoint()
    loop = asyncio.new_event_loop()
    loop.run_until_complete(asyncio.wait([loop.create_task(unread_error())]))
    loop.close()
    raise OSError("The disk is full.")

script = Script("small.py", "", "", {"": (Flag("debug", False, "traceback"),)})
sys.exit(app.run(script, body, sys.argv[1:]))
"""


def printed_to(output, options, code, *arguments):
    command = [sys.executable, *options, "-c", f"import sys\n{code}", *arguments]
    done = subprocess.run(command, cwd=ROOT, stdout=output, stderr=subprocess.PIPE, text=True)
    return done.returncode, done.stderr


@PRINTS
@BUFFERING
def test_a_reader_that_leaves_ends_the_script_without_a_message(code, options):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        assert printed_to(writer, options, code) == (128 + signal.SIGPIPE, "")
    finally:
        os.close(writer)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@PRINTS
@BUFFERING
def test_a_full_disk_behind_the_output_is_one_line_and_exit_code_1(code, options):
    with open("/dev/full", "w") as full:
        returned, message = printed_to(full, options, code)
    assert returned == 1 and message.count("\n") == 1
    assert "error: " in message and "No space left on device" in message


def test_a_broken_pipe_that_is_not_the_output_is_an_error_like_others(capsys):
    def body(values):
        raise BrokenPipeError(32, "Broken pipe")

    assert app.run(SMALL, body, ["--path=a"]) == 1
    assert "Broken pipe" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_unwinds_the_stack(number, code):
    # A shell starts what it puts in the background with Ctrl-C ignored; the test would wait for ever.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    left = []

    def body(values):
        try:
            os.kill(os.getpid(), number)
            signal.pause()
        finally:
            left.append(True)

    try:
        assert app.run(SMALL, body, ["--path=a"]) == code
    except SystemExit as ended:
        assert ended.code == code
    finally:
        signal.signal(signal.SIGINT, before)
    assert left == [True]


def come(number):
    os.kill(os.getpid(), number)
    for _ in range(1000):  # the handler runs in here
        pass


def drop_in_a_callback(number):
    class Dying:
        def __del__(self):
            come(number)

    Dying()


def drop_as_an_except_that_names_nothing_does(number):
    with contextlib.suppress(BaseException):
        come(number)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("drop", [drop_in_a_callback, drop_as_an_except_that_names_nothing_does])
def test_a_signal_that_is_dropped_comes_again(drop, number, code):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    reached = []

    def body(values):
        drop(number)
        reached.append(True)
        time.sleep(20)

    try:
        ended = app.run(SMALL, body, ["--path=a"])
    except SystemExit as left:
        ended = left.code
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended == code and reached == [True]


def test_a_signal_that_arrives_is_sent_once():
    """The handlers of before are back by then; another signal would end this process."""

    def body(values):
        come(signal.SIGTERM)

    with pytest.raises(SystemExit):
        app.run(SMALL, body, ["--path=a"])
    time.sleep(0.2)


def test_defaults_of_training_are_those_of_the_rooms():
    """A command line with the two required flags describes the run that the records describe."""
    from elastic.cli.train_config import model_of, run_of
    from elastic.data.config import DataConfig
    from elastic.training.config import EvalConfig, LogConfig, SaveConfig, TrainConfig

    values = app.parse(TRAIN, ["--train_dataset.vision_dataset.path=in", "--logger.output_dir=out"])
    found = run_of(values, model_of(values))
    assert found == TrainConfig(data=DataConfig(path="in"), output_dir="out")
    assert (found.log, found.save, found.evaluation) == (LogConfig(), SaveConfig(), EvalConfig())


def test_every_flag_of_training_reaches_the_run():
    from elastic.cli.train_config import model_of, run_of

    values = app.parse(
        TRAIN,
        [
            "--train_dataset.vision_dataset.path=in", "--logger.output_dir=out", "--logger.experiment_id=one",
            "--eval_freq=5", "--eval_dataset.path=held", "--eval_thresholds=[0.1, 0.02]", "--eval_num_tokens=256,512",
            "--save_milestone_freq=7", "--checkpointer.keep=3", "--profile_steps=10,15", "--logger.online=True",
            "--optimizer.accumulate_gradient_steps=2", "--ema_decay=0.9", "--log_freq=3",
        ],
    )  # fmt: skip
    run = run_of(values, model_of(values))
    assert run.output_dir == "out/one" and run.optimizer.accumulate_gradient_steps == 2
    assert run.evaluation.thresholds == (0.1, 0.02) and run.evaluation.num_tokens == (256, 512)
    assert (
        run.save.due(7) and run.save.is_milestone(7) and not run.save.due(8) and run.save.keep == 3
    )
    assert run.log.profile_steps == (10, 15) and run.log.wandb and run.log.freq == 3
    for wrong in ("--eval_thresholds=low", "--profile_steps=1", "--eval_num_tokens=1.5"):
        values = app.parse(
            TRAIN,
            ["--train_dataset.vision_dataset.path=in", "--logger.output_dir=out", wrong],
        )
        with pytest.raises(ValueError, match=wrong[2:].split("=")[0]):
            run_of(values, model_of(values))

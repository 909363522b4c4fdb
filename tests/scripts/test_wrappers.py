"""The shell wrappers: the command lines they make, and the environment they prepare. No network."""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import zipfile

import pytest

from elastic.config import load_config, update_config
from scripts import prepare_env

ROOT = pathlib.Path(__file__).resolve().parents[2]
SETTINGS = (
    "checkpoint_path",
    "input_path",
    "output_folder",
    "bottleneck",
    "n_codes",
    "tokens_path",
    "output_path",
    "ELASTIC_HERE",
    "dataset_path",
    "total_steps",
    "eval_path",
    "distributed",
    "coordinator_address",
    "SMOKE",
    "threshold",
    "num_processes",
    "process_id",
)

# Stands for Python: says yes to the probes, and writes down what it is asked to run.
STUB = """#!/usr/bin/env bash
case "$*" in
    *version_info*) exit 0 ;;
    *prepare_env.py*) echo "$0" ;;
    *) printf '%s\\n' "$@" >"$0.called" ;;
esac
"""


def stubbed(folder):
    """A stub for Python in `folder`, and an environment for wrappers that has it and none of their settings."""
    stub = folder / "python-stub"
    stub.write_text(STUB)
    stub.chmod(0o755)
    clean = {key: value for key, value in os.environ.items() if key not in SETTINGS}
    return stub, clean | {"ELASTIC_PYTHON": str(stub)}


@pytest.fixture
def run(tmp_path):
    """Runs a wrapper with a stub for Python; gives the arguments that Python would have got."""

    def run_wrapper(wrapper, *flags, expect=0, **variables):
        stub, environment = stubbed(tmp_path)
        done = subprocess.run(
            ["bash", ROOT / "scripts" / wrapper, *flags],
            env=environment | variables,
            cwd=tmp_path,  # a wrapper works from any folder
            capture_output=True,
            text=True,
        )
        assert done.returncode == expect, done.stderr
        called = stub.with_name("python-stub.called")
        return called.read_text().splitlines() if called.exists() else done.stderr

    return run_wrapper


def flags_of(arguments):
    """{'--name': value} of a command line; what is given twice counts as given last."""
    return dict(argument.split("=", 1) for argument in arguments if argument.startswith("--"))


@pytest.mark.parametrize("kind", ["fsq", "vae"])
def test_without_a_checkpoint_the_small_model_runs(run, kind):
    arguments = run(f"run_inference_{kind}.sh")
    assert arguments[:2] == ["-u", "scripts/inference.py"]
    flags = flags_of(arguments)
    assert flags["--load_checkpoint"] == f"example/{kind}"
    assert flags["--input_path"] == "example/video.mp4"
    assert flags["--output_folder"] == f"outputs/{kind}"
    assert "--update_elastic_config" not in flags


def test_with_a_checkpoint_the_documented_command_runs(run, tmp_path):
    readme = "".join(path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("**/README.md")))
    command = re.search(r"^python3 -u scripts/inference\.py(?:.*\\\n)+.*$", readme, re.MULTILINE)
    assert command is not None
    documented = flags_of(shlex.split(command[0].replace("\\\n", " ")))
    (tmp_path / "params").touch()
    threshold = documented.pop("--threshold")  # the model recommends it
    recommended = load_config(documented["--load_elastic_config"]).recommended_thresholds
    assert recommended[0] == float(threshold)
    documented["--load_checkpoint"] = f"params::{tmp_path}/params"
    changes = documented["--update_elastic_config"]  # in the spelling of the release
    documented["--update_elastic_config"] = changes.replace("mask_mode=", "mask_type=")
    assert flags_of(run("run_inference_fsq.sh", checkpoint_path=f"{tmp_path}/params")) == documented


@pytest.mark.parametrize(
    ("written", "passed"),
    [
        ("HERE/some folder/params", "params::HERE/some folder/params"),
        ("params::params",) * 2,
        ("trainstate_params::out/streaming_train_state",) * 2,
        ("hf::owner/model",) * 2,
        ("owner/model",) * 2,
        ("HERE/some folder",) * 2,  # which holds no config.json
        ("HERE/some folder/prams",) * 2,  # not there: inference says so, and what is
        ("HERE/some folder/streaming_train_state",) * 2,  # recognised by its content
        ("HERE/some folder/model.safetensors",) * 2,
    ],
)
@pytest.mark.parametrize("kind", ["fsq", "vae"])
def test_a_checkpoint_is_named_as_for_inference_or_by_a_bare_file(
    run, tmp_path, kind, written, passed
):
    (tmp_path / "some folder").mkdir()
    for name in ("params", "streaming_train_state", "model.safetensors"):
        (tmp_path / "some folder" / name).touch()
    written, passed = (text.replace("HERE", str(tmp_path)) for text in (written, passed))
    flags = flags_of(run(f"run_inference_{kind}.sh", checkpoint_path=written))
    assert flags["--load_checkpoint"] == passed
    assert flags["--load_elastic_config"] == "200m" and "--update_elastic_config" in flags


@pytest.mark.parametrize("kind", ["fsq", "vae"])
def test_a_folder_that_says_how_its_model_is_built_gets_no_settings(run, tmp_path, kind):
    (tmp_path / "config.json").touch()
    flags = flags_of(run(f"run_inference_{kind}.sh", checkpoint_path=str(tmp_path)))
    assert flags["--load_checkpoint"] == str(tmp_path)
    assert not flags.keys() & {"--threshold", "--load_elastic_config", "--update_elastic_config"}
    for file in ("params", "streaming_train_state", "best.safetensors"):
        (tmp_path / file).touch()
        for prefix in ("", "params::"):
            flags = flags_of(
                run(f"run_inference_{kind}.sh", checkpoint_path=f"{prefix}{tmp_path}/{file}")
            )
            assert flags["--load_checkpoint"].endswith(f"{tmp_path}/{file}")
            assert not flags.keys() & {"--load_elastic_config", "--update_elastic_config"}
    # The small model by its name is the small model that runs without one.
    named = run(f"run_inference_{kind}.sh", checkpoint_path=f"example/{kind}")
    assert named == run(f"run_inference_{kind}.sh", checkpoint_path="")


WRAPPERS = sorted(path.name for path in (ROOT / "scripts").glob("run_*.sh"))


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_help_needs_nothing_filled_in_and_does_nothing_else(tmp_path, wrapper):
    """In a folder with the scripts alone, with a stub for Python; what SMOKE=1 would remove stays."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    (tmp_path / "outputs" / "smoke").mkdir(parents=True)
    stub, environment = stubbed(tmp_path)
    done = subprocess.run(
        ["bash", tmp_path / "scripts" / wrapper, "--help"],
        env=environment | {"SMOKE": "1"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    called = stub.with_name("python-stub.called")
    arguments = called.read_text().splitlines() if called.exists() else []
    assert "--help" in arguments or done.stdout.count("\n") > 2
    assert (tmp_path / "outputs" / "smoke").exists()


@pytest.mark.parametrize(
    ("kind", "tokens", "fewest", "patch_size", "theta", "code_dim"),
    [("fsq", 4096, 256, (1, 8, 8), 5e7, 6), ("vae", 2048, 128, (2, 8, 8), 5e6, 8)],
)
def test_with_a_checkpoint_the_settings_are_the_released_ones(
    run, kind, tokens, fewest, patch_size, theta, code_dim
):
    flags = flags_of(run(f"run_inference_{kind}.sh", checkpoint_path="params"))
    config = update_config(
        load_config(flags["--load_elastic_config"]), flags["--update_elastic_config"]
    )
    assert (config.bottleneck_type, config.code_dim) == (kind, code_dim)
    assert (config.max_toks, config.min_toks) == (tokens, fewest)
    assert (config.patch_size, config.frames_per_block, config.resolution) == (patch_size, 4, 256)
    assert config.theta == theta
    assert config.max_sequence_length == 4 * tokens


def test_further_flags_come_last_and_whole(run):
    arguments = run("run_inference_fsq.sh", "--threshold=0.006", "--input_path=a clip.mp4")
    assert arguments[-2:] == ["--threshold=0.006", "--input_path=a clip.mp4"]


@pytest.mark.parametrize("wrapper", ["run_inference_fsq.sh", "run_tokenize_dataset.sh"])
@pytest.mark.parametrize("target", ["psnr=28", "n_codes=300", "avg_tokens=400", "bitrate=200"])
def test_a_target_among_the_flags_takes_the_place_of_the_wrapper_s_threshold(run, wrapper, target):
    assert flags_of(run(wrapper, threshold="0.7"))["--threshold"] == "0.7"
    for flag in ([f"--{target}"], [f"--{target.split('=')[0]}", target.split("=")[1]]):
        arguments = run(wrapper, *flag, threshold="0.7")
        assert not any(argument.startswith("--threshold") for argument in arguments)
        assert arguments[-len(flag) :] == flag


def test_results_are_written_where_no_default_command_reads(run):
    """What one wrapper writes by default lies in `outputs`, and no wrapper reads media there."""
    for wrapper in WRAPPERS:
        if wrapper in ("run_tests.sh", "run_train_pod.sh", "run_inference.sh"):
            continue
        smoke = {"SMOKE": "1"} if wrapper == "run_train.sh" else {}
        flags = flags_of(run(wrapper, **smoke))
        written = [
            flags[name]
            for name in ("--output_folder", "--output_path", "--logger.output_dir")
            if name in flags
        ]
        if wrapper == "run_decode.sh":  # it writes beside what it reads
            written = [flags["--input_path"]]
        assert written and all(path.startswith("outputs/") for path in written), wrapper
        read = flags.get("--input_path", flags.get("--train_dataset.vision_dataset.path"))
        assert read.startswith("example") or wrapper == "run_decode.sh"


@pytest.mark.parametrize("kind", ["fsq", "vae"])
def test_the_fixed_length_has_a_folder_of_its_own(run, kind):
    fixed = flags_of(run("run_inference_fixed.sh", bottleneck=kind, n_codes="96"))
    model_config = flags_of(run(f"run_inference_{kind}.sh"))
    assert (fixed["--search_alg"], fixed["--n_codes"]) == ("fixed", "96")
    assert fixed["--load_checkpoint"] == model_config["--load_checkpoint"]
    assert fixed["--output_folder"] != model_config["--output_folder"]


def test_an_unknown_bottleneck_is_refused(run):
    message = run("run_inference_fixed.sh", bottleneck="gan", expect=1)
    assert "bottleneck='gan' must be fsq or vae" in message


@pytest.mark.parametrize("kind", ["fsq", "vae"])
def test_the_model_by_its_name_is_what_its_wrapper_runs(run, kind):
    flags = ["--threshold=0.006", "--fps=12"]
    assert run("run_inference.sh", kind, *flags) == run(f"run_inference_{kind}.sh", *flags)


@pytest.mark.parametrize("arguments", [[], ["gan"], ["--threshold=0.1"]])
def test_a_model_that_is_not_named_is_asked_for(run, arguments):
    message = run("run_inference.sh", *arguments, expect=1)
    given = arguments[0] if arguments else ""
    assert f"the model '{given}' must be fsq or vae" in message and message.count("\n") == 1


def test_decoding_needs_only_the_tokens_and_the_model(run):
    for name in ("input_path", "tokens_path"):  # the second is its older name
        named = {"checkpoint_path": "example/fsq", "output_path": "gs://b/v.mp4"}
        arguments = run("run_decode.sh", **named, **{name: "t.npz"})
        assert arguments[1:] == [
            "scripts/decode.py",
            "--input_path=t.npz",
            "--output_path=gs://b/v.mp4",
            "--load_checkpoint=example/fsq",
        ]
        # The token file names its model, and the output lies beside it.
        assert run("run_decode.sh", **{name: "t.npz"})[1:] == arguments[1:3]
    assert "outputs/fsq/tokens.npz" in flags_of(run("run_decode.sh"))["--input_path"]


@pytest.mark.parametrize(
    ("wrapper", "read", "written"),
    [
        ("run_inference_fsq.sh", ("input_path", "--input_path"), ("output_folder", "--output_folder")),
        ("run_inference_fixed.sh", ("input_path", "--input_path"), ("output_folder", "--output_folder")),
        ("run_tokenize_dataset.sh", ("input_path", "--input_path"), ("output_folder", "--output_folder")),
        ("run_evaluate.sh", ("input_path", "--input_path"), ("output_folder", "--output_folder")),
        ("run_decode.sh", ("input_path", "--input_path"), ("output_path", "--output_path")),
        ("run_train.sh", ("dataset_path", "--train_dataset.vision_dataset.path"), ("output_dir", "--logger.output_dir")),
    ],
)  # fmt: skip
def test_paths_are_relative_to_where_one_stands(run, tmp_path, wrapper, read, written):
    """What is read may also lie in the project's folder, as the example does; flags and variables alike."""
    (tmp_path / "my clip").touch()
    (tmp_path / "outputs").mkdir()
    needed = {"dataset_path": "my clip"} if wrapper == "run_train.sh" else {}
    found = flags_of(run(wrapper, **{read[0]: "my clip", written[0]: "out/x"}))
    assert found[read[1]] == f"{tmp_path}/my clip" and found[written[1]] == f"{tmp_path}/out/x"
    for flags in (
        [f"{read[1]}=my clip", f"{written[1]}=out/x"],
        [read[1], "my clip", written[1], "out/x"],
    ):
        arguments = run(wrapper, *flags, **needed)
        text = " ".join(arguments[-4:])
        assert f"{tmp_path}/my clip" in text and f"{tmp_path}/out/x" in text
    found = flags_of(run(wrapper, **{read[0]: "example"}))
    assert found[read[1]] == "example"
    assert flags_of(run(wrapper, **{read[0]: "/a/b"}))[read[1]] == "/a/b"


@pytest.mark.parametrize(
    ("wrapper", "name", "meant"),
    [
        ("run_inference_fsq.sh", "inputpath", "input_path"),
        ("run_inference_vae.sh", "INPUT_PATH", "input_path"),
        ("run_inference_fsq.sh", "output_dir", "output_folder"),
        ("run_inference_fsq.sh", "treshold", "threshold"),
        ("run_tokenize_dataset.sh", "checkpoint", "checkpoint_path"),
        ("run_train.sh", "total_step", "total_steps"),
    ],
)
def test_a_variable_that_is_nearly_one_of_the_wrapper_s_is_told(tmp_path, wrapper, name, meant):
    _, environment = stubbed(tmp_path)
    done = subprocess.run(
        ["bash", ROOT / "scripts" / wrapper],
        env=environment | {name: "a", "dataset_path": "in", "http_proxy": "p"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stderr.splitlines() if f"variable {name} " in line]
    assert len(told) == 1 and told[0].endswith(f"has no effect here. Did you mean {meant}?")
    assert "http_proxy" not in done.stderr


def test_the_threshold_is_a_variable_too(run):
    assert flags_of(run("run_inference_fsq.sh", threshold="0.7"))["--threshold"] == "0.7"
    for model in ("example/fsq", "small-fsq"):
        found = flags_of(run("run_inference_fsq.sh", checkpoint_path=model))
        assert not {"--threshold", "--update_elastic_config"} & {*found}  # both are the model's


def test_a_data_set_takes_its_share_and_another_target(run):
    flags = flags_of(run("run_tokenize_dataset.sh", num_processes="8", process_id="3"))
    assert flags["--jax_distributed.num_processes"] == "8"
    assert flags["--jax_distributed.process_id"] == "3"
    assert flags["--load_checkpoint"] == "example/fsq" and "--threshold" not in flags
    given = flags_of(run("run_tokenize_dataset.sh", threshold="0.7"))
    assert given["--threshold"] == "0.7"
    assert "--threshold" not in flags_of(
        run("run_tokenize_dataset.sh", "--n_codes=9", threshold="0.7")
    )


def test_training_without_data_is_refused_at_once(run):
    assert "dataset_path" in run("run_train.sh", expect=1)


def test_the_smoke_run_trains_on_the_example(run):
    arguments = run("run_train.sh", SMOKE="1")
    assert arguments[1] == "scripts/train.py"
    assert flags_of(arguments)["--train_dataset.vision_dataset.path"] == "example"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(total_steps="1e5"), "total_steps='1e5' must be a whole number above 0"),
        (dict(total_steps="08"), "total_steps='08' must be"),
        (dict(total_steps="-40"), "total_steps='-40' must be"),
        (dict(SMOKE="yes"), "SMOKE='yes' must be 1 or True for yes"),
        (dict(distributed="2"), "distributed='2' must be 1 or True"),
        (dict(process_id="1"), "need distributed=True"),
        (dict(coordinator_address="a:1"), "need distributed=True"),
        (dict(distributed="1", num_processes="2"), "need coordinator_address=HOST:PORT"),
    ],
)
def test_a_setting_of_training_that_is_of_no_use_is_refused_in_one_line(run, settings, message):
    said = run("run_train.sh", dataset_path="in", expect=1, **settings)
    assert said.startswith("run_train.sh: ") and message in said and said.count("\n") == 1


def test_a_zero_is_no_wish_for_the_smoke_run(run):
    flags = flags_of(run("run_train.sh", dataset_path="in", SMOKE="0", distributed="false"))
    assert flags["--train_dataset.vision_dataset.path"] == "in"
    assert "--jax_distributed.initialize_jax_distributed" not in flags
    message = run("run_train_pod.sh", SMOKE="0", DRY_RUN="False", expect=1)
    assert isinstance(message, list) or "tpu_name is empty" in message


def test_a_short_run_warms_up_for_a_part_of_it_and_other_hosts_are_joined_when_asked(run):
    flags = flags_of(run("run_train.sh", dataset_path="in", total_steps="1000", distributed="True"))
    assert flags["--optimizer.adamw_optimizer.lr_warmup_steps"] == "50"
    assert flags["--jax_distributed.initialize_jax_distributed"] == "True"
    assert "--jax_distributed.coordinator_address" not in flags and "--eval_freq" not in flags
    flags = flags_of(run("run_train.sh", dataset_path="in", eval_path="held out"))
    assert flags["--optimizer.adamw_optimizer.lr_warmup_steps"] == "2000"
    assert flags["--eval_dataset.path"] == "held out"


def test_a_pod_gets_the_settings_of_this_machine_quoted(tmp_path):
    settings = dict(
        DRY_RUN="1", tpu_name="slice", zone="z", dataset_path="gs://b/my videos", output_dir="out"
    )
    done = subprocess.run(
        ["bash", ROOT / "scripts" / "run_train_pod.sh", "--log_freq=5"],
        env=os.environ | settings,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    last = done.stdout.strip().splitlines()[-1]
    assert r"dataset_path=gs://b/my\ videos" in last and "distributed=True" in last
    assert last.endswith("bash scripts/run_train.sh --log_freq=5")
    missing = subprocess.run(
        ["bash", ROOT / "scripts" / "run_train_pod.sh"],
        env=os.environ,
        capture_output=True,
        text=True,
    )
    assert missing.returncode == 1 and "tpu_name is empty" in missing.stderr


# --- The environment -------------------------------------------------------------------------


def write_wheel(folder):
    """A distribution with nothing in it, which no Python has and which installs without network."""
    folder.mkdir()
    info = "elastic_probe-1.0.dist-info"
    with zipfile.ZipFile(folder / "elastic_probe-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: elastic-probe\nVersion: 1.0\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project like this one, that needs one small distribution and has a useless .venv."""
    root = tmp_path_factory.mktemp("project")
    (root / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "prepare_env.py", root / "scripts")
    shutil.copy(ROOT / "scripts" / "setup_env.sh", root / "scripts")
    write_wheel(root / "wheels")
    (root / "pyproject.toml").write_text('[project]\ndependencies = ["elastic-probe>=1"]\n')
    (root / "requirements.txt").write_text(f"--no-index\n-f {root}/wheels\nelastic-probe==1.0\n")
    (root / ".venv" / "bin").mkdir(parents=True)
    (root / ".venv" / "bin" / "python").touch()
    return root


def start(project):
    return subprocess.Popen(
        ["bash", "-c", 'set -eu; source scripts/setup_env.sh run; echo "$PYTHON"'],
        cwd=project,
        env=os.environ | {"ELASTIC_PYTHON": sys.executable, "PIP_USER": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out.strip(), err


@pytest.fixture(scope="module")
def first_two(project):
    """What two runs gave that were started at the same moment."""
    return [finish(process) for process in [start(project), start(project)]]


def test_two_runs_at_once_make_one_environment(project, first_two):
    assert [out for out, _ in first_two] == [str(project / ".venv/bin/python")] * 2
    assert sum("making .venv" in err for _, err in first_two) == 1


def test_a_useless_environment_of_somebody_else_is_kept_aside(project, first_two):
    assert (project / ".venv.old1" / "bin" / "python").exists()


def test_a_ready_environment_is_taken_without_a_word(project, first_two):
    assert finish(start(project)) == (str(project / ".venv/bin/python"), "")


@pytest.mark.slow
def test_an_unfinished_environment_is_made_anew(project, first_two):
    (project / ".venv" / ".elastic-unfinished").touch()
    half = project / ".venv" / "half-installed"
    half.touch()
    assert "making .venv" in finish(start(project))[1]
    assert not half.exists()
    assert finish(start(project))[1] == ""


def test_a_python_that_has_everything_is_used_as_it_is(project, monkeypatch, capsys):
    (project / "enough").mkdir()
    (project / "enough" / "pyproject.toml").write_text('[project]\ndependencies = ["pytest>=7"]\n')
    monkeypatch.setattr(prepare_env, "ROOT", project / "enough")
    assert prepare_env.main(["run"]) == 0
    assert capsys.readouterr().out.strip() == sys.executable


def test_the_environment_script_says_what_it_is_for(capsys):
    with pytest.raises(SystemExit) as ended:
        prepare_env.main(["--help"])
    assert ended.value.code == 0 and "wrappers call this" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        prepare_env.main(["walk"])
    assert ended.value.code == 2 and "'walk'" in capsys.readouterr().err


def test_no_usable_python_is_a_clear_error(tmp_path):
    done = subprocess.run(
        ["bash", ROOT / "scripts" / "run_inference_fsq.sh"],
        env=os.environ | {"ELASTIC_PYTHON": str(tmp_path / "python9")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "python9 (not found)" in done.stderr
    assert "ELASTIC_PYTHON=" in done.stderr


def test_the_pins_lie_in_the_stated_ranges(monkeypatch):
    pins = {}
    for file in prepare_env.REQUIREMENTS.values():
        lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
        pins |= dict(line.partition(";")[0].split("==") for line in lines if "==" in line)
    monkeypatch.setattr(prepare_env.importlib.metadata, "version", pins.__getitem__)
    monkeypatch.setattr(prepare_env.importlib.metadata, "requires", lambda name: [])
    assert prepare_env.lacking("test") == []


@pytest.mark.parametrize(
    ("installed", "lacks"),
    [
        ({"jax": "0.12.0.1", "jaxlib": "0.12.0.1"}, []),
        ({"jax": "0.10.1", "jaxlib": "0.10.1"}, ["jax>=0.10.2,<0.13"]),
        ({"jax": "0.13.0", "jaxlib": "0.13.0"}, ["jax>=0.10.2,<0.13"]),
        # pip replaced one of the two: jax refuses to load beside such a jaxlib.
        ({"jax": "0.11.2", "jaxlib": "0.10.2"}, ["jaxlib<=0.11.2,>=0.11.2"]),
        ({}, ["jax>=0.10.2,<0.13"]),
    ],
)
def test_an_environment_is_asked_for_versions_in_the_ranges(
    project, monkeypatch, capsys, installed, lacks
):
    def found(name):
        if name not in installed:
            raise prepare_env.importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    def needs(name):
        version = found(name)
        return [f"jaxlib<={version},>={version}", 'kubernetes; extra == "k8s"', "opt_einsum!=1.1"]

    (project / "versions").mkdir(exist_ok=True)
    pyproject = '[project]\ndependencies = ["jax>=0.10.2,<0.13"]\n'
    (project / "versions" / "pyproject.toml").write_text(pyproject)
    monkeypatch.setattr(prepare_env, "ROOT", project / "versions")
    monkeypatch.setattr(prepare_env.importlib.metadata, "version", found)
    monkeypatch.setattr(prepare_env.importlib.metadata, "requires", needs)
    assert prepare_env.lacking("run") == lacks
    assert prepare_env.main(["run", "--probe"]) == (10 if lacks else 0)
    monkeypatch.setattr(prepare_env, "_venv_state", lambda purpose: "incomplete")
    monkeypatch.setattr(prepare_env, "_run", lambda *_: False)
    if (
        lacks and installed
    ):  # what is there and what is wanted, in the line that says why an environment is made
        monkeypatch.setattr(prepare_env, "VENV", project / "versions")
        monkeypatch.setattr(prepare_env, "_UNFINISHED", project / "versions" / "unfinished")
        prepare_env._make("run", lacks, 0)
        version = installed[lacks[0].partition(">")[0].partition("<")[0]]
        assert f"lacks {lacks[0]} (it has {version})" in capsys.readouterr().err

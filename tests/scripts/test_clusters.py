"""Job files for clusters: their shells parse, their commands have our flags, and what they set is what we read."""

import os
import pathlib
import re
import subprocess

import pytest
import yaml

from elastic.cli import app, main
from elastic.cli.commands import tokenize_dataset as body
from elastic.distributed.hosts import Hosts

ROOT = pathlib.Path(__file__).resolve().parents[2]
BATCH_FILES = sorted((ROOT / "scripts" / "slurm").glob("*.sbatch"))
JOB_FILES = sorted((ROOT / "example" / "clusters").glob("*.yaml"))
by_name = pytest.mark.parametrize("path", BATCH_FILES, ids=lambda path: path.name)
# Options of sbatch that take a value, and those that take none.
OPTIONS = set(
    "job-name array nodes ntasks ntasks-per-node cpus-per-task gres mem time signal output".split()
)
SWITCHES = {"requeue"}


@by_name
def test_a_batch_file_is_a_shell_script_with_options_that_slurm_knows(path):
    subprocess.run(["bash", "-n", path], check=True)
    options = re.findall(r"^#SBATCH --(.*)$", path.read_text(), re.MULTILINE)
    assert options
    for option in options:
        name, _, value = option.partition("=")
        assert name in (OPTIONS if value else SWITCHES), option


@by_name
def test_a_batch_file_starts_its_wrapper_in_the_folder_it_was_submitted_from(path, tmp_path):
    (tmp_path / "scripts").mkdir()
    for name in ("run_tokenize_dataset.sh", "run_train.sh"):
        (tmp_path / "scripts" / name).write_text('echo "$0" "${distributed:-}" "$@"\n')
    (tmp_path / "srun").write_text('#!/usr/bin/env bash\necho srun\nshift\nexec "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    environment = os.environ | {
        "SLURM_SUBMIT_DIR": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", path, "--flag=a b"], env=environment, capture_output=True, text=True, check=True
    )
    kind = "tokenize_dataset" if "tokenize" in path.name else "train"
    expected = ["srun"] * (kind == "train")
    expected.append(f"scripts/run_{kind}.sh {'True' * (kind == 'train')} --flag=a b")
    assert done.stdout.splitlines() == expected


def pods(found):
    """All pod templates in a Kubernetes object."""
    if isinstance(found, dict):
        if "containers" in found:
            yield found
        for value in found.values():
            yield from pods(value)
    elif isinstance(found, list):
        for value in found:
            yield from pods(value)


@pytest.mark.parametrize("path", JOB_FILES, ids=lambda path: path.name)
def test_a_job_file_runs_a_command_of_ours_and_mounts_what_it_names(path):
    job = yaml.safe_load(path.read_text())
    assert job["kind"] in ("Job", "JobSet")
    (pod,) = pods(job)
    (container,) = pod["containers"]
    program, command, *flags = container["command"]
    assert program == "elastictok"
    app.parse(main._load(main.COMMANDS[command].flags), flags)
    mounts = {mount["name"] for mount in container.get("volumeMounts", [])}
    assert mounts == {volume["name"] for volume in pod.get("volumes", [])}


def test_an_indexed_job_tells_the_number_of_its_pods():
    job = yaml.safe_load((ROOT / "example" / "clusters" / "tokenize-job.yaml").read_text())
    (pod,) = pods(job)
    variables = {entry["name"]: entry["value"] for entry in pod["containers"][0]["env"]}
    assert variables["JOB_COMPLETIONS"] == str(job["spec"]["completions"])


def test_flags_win_over_the_job_and_the_job_is_told(monkeypatch, caplog):
    monkeypatch.setenv("SLURM_PROCID", "2")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    caplog.set_level("INFO")
    found = body._with_share_of_job(Hosts(independent=True))
    assert (found.process_id, found.num_processes) == (2, 4)
    assert "Process 2 of 4, as SLURM_PROCID=2, SLURM_NTASKS=4 say" in caplog.text
    given = Hosts(independent=True, num_processes=3, process_id=1)
    assert body._with_share_of_job(given) == given

"""The command that checks a GPU: at toy sizes on the CPU, and what it says of results that are wrong."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from scripts.bench import gpu_check

ROOT = pathlib.Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """What the command writes at toy sizes: {name of a file: its text}."""
    folder = tmp_path_factory.mktemp("gpu_check")
    done = subprocess.run(
        ["bash", ROOT / "scripts" / "bench" / "gpu_check.sh", "--toy"],
        env=os.environ
        | dict(ELASTIC_PYTHON=sys.executable, output_folder=str(folder), JAX_PLATFORMS="cpu"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {path.name: path.read_text() for path in folder.iterdir()} | {"printed": done.stdout}


def test_every_part_runs_at_toy_sizes(toy):
    assert toy.keys() == {"gpu_check.json", "gpu_check.md", "printed"}
    results = json.loads(toy["gpu_check.json"])
    assert gpu_check.failures(results) == []
    assert results["toy"] and results["date"] and results["hardware"]["jax"]
    assert results["seconds"].keys() == gpu_check.SECTIONS.keys()
    cases = [(row["implementation"], row["case"]) for row in results["kernels"]["rows"]]
    assert cases == [("pallas_gpu_interpret", case) for case in gpu_check.TOY.cases]
    for model in ("FSQ", "VAE"):
        clips = results["tokenizing"][model]["clips"]
        assert clips.keys() == {"2"} and clips["2"].keys() == {"fixed", "predict", "binary"}
        assert all(figures["blocks"] == 3 or model == "VAE" for figures in clips["2"].values())
    assert results["training"]["seconds_per_step"] > 0
    rows = results["attention"]["rows"]
    assert rows.keys() == {"pallas_gpu_interpret", *gpu_check.OTHERS}
    assert all("forward" in rows[n]["cases"][0] for n in ("pallas_gpu_interpret", "jax.nn-xla"))


def test_the_table_is_what_is_printed_and_has_a_line_for_everything(toy):
    assert toy["printed"] == toy["gpu_check.md"] + "\n"
    for name in ("pallas_gpu_interpret", *gpu_check.OTHERS, "FSQ", "VAE", "## Training"):
        assert name in toy["gpu_check.md"]


def test_a_kernel_beyond_its_limit_and_a_section_that_failed_are_told():
    row = dict(implementation="gpu", dtype="fp32", case="plain", errors=[1e-3, 1e-6])
    row |= dict(limits=[2e-6, 2e-5], within=False)
    results = {
        "kernels": {"length": 8, "block": 4, "rows": [row, row | {"within": True}]},
        "training": {"error": "out of memory"},
        "tokenizing": {"FSQ": {"error": "no clip"}},
        "attention": {
            "rows": {
                "gpu": {"cases": [{"length": 8, "error": "no kernel"}]},
                "tokamax-mosaic_gpu": {"cases": [{"length": 8, "error": "of others, no failure"}]},
            }
        },
    }
    lines = gpu_check.failures(results)
    assert [line.split(" ")[0] for line in lines] == ["gpu", "training", "tokenizing", "attention"]
    assert "differs from the reference by [0.001, 1e-06]" in lines[0]
    assert "attention gpu failed: no kernel" in lines[3]


def test_without_a_gpu_the_way_out_is_named(monkeypatch, tmp_path, capsys):
    machine = {"platform": "cpu", "device": "cpu"}
    monkeypatch.setattr(gpu_check, "in_new_process", lambda *_: machine)
    assert gpu_check.main([f"--output_folder={tmp_path}"]) == 1
    said = capsys.readouterr().err
    assert "JAX sees no GPU, only 'cpu'" in said and "--toy" in said
    assert not list(tmp_path.iterdir())

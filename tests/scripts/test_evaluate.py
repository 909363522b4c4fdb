"""The command line of scripts/evaluate.py, before anything is measured: what it means, and what its wrapper passes on."""

import os
import pathlib
import subprocess

import pytest

from elastic import metrics
from elastic.cli import app
from elastic.cli.commands import evaluate as body
from elastic.evaluation.evaluate import EvaluationConfig
from scripts import evaluate as script

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_a_frechet_distance_without_its_network_is_refused_by_name():
    command = ["--input_path=a", "--output_folder=b", "--models=c", "--metrics=psnr,fvd"]
    config = EvaluationConfig(metrics=("psnr", "fvd"))
    with pytest.raises(ValueError, match=r"--metrics names fvd, which needs --fvd_weights=FILE"):
        body.with_weights(app.parse(script.EVALUATE, command), config)


def test_lpips_without_weights_is_left_out_unless_it_was_asked_for(monkeypatch, caplog):
    def missing(path):
        raise ValueError("there are no weights")

    monkeypatch.setattr(metrics, "load_lpips_weights", missing)
    command = ["--input_path=a", "--output_folder=b", "--models=c"]
    config = EvaluationConfig(metrics=("psnr", "ssim", "lpips"))
    found, weights = body.with_weights(app.parse(script.EVALUATE, command), config)
    assert found.metrics == ("psnr", "ssim") and not any(weights.values())
    assert "there are no weights" in caplog.text
    for flag in ("--metrics=psnr,ssim,lpips", "--lpips_weights=file"):
        with pytest.raises(ValueError, match="there are no weights"):
            body.with_weights(app.parse(script.EVALUATE, [*command, flag]), config)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("example/fsq", {"fsq": "example/fsq"}),
        ("a=example/fsq, b = x/y", {"a": "example/fsq", "b ": " x/y"}),
        ("trainstate_params::out/lr=1/state", {"state": "trainstate_params::out/lr=1/state"}),
        ("m=params::out/lr=1/params", {"m": "params::out/lr=1/params"}),
    ],
)
def test_a_model_is_named_before_the_sign_or_by_the_end_of_its_path(text, expected):
    expected = {name.strip(): spec.strip() for name, spec in expected.items()}
    assert body.parse_models(text) == expected


def test_the_wrapper_measures_the_shipped_model_and_passes_flags_on(tmp_path):
    stub = tmp_path / "python-stub"
    stub.write_text(
        '#!/usr/bin/env bash\ncase "$*" in\n *version_info*) ;;\n *prepare_env.py*) echo "$0" ;;\n'
        ' *) printf "%s\\n" "$@" >"$0.called" ;;\nesac\n'
    )
    stub.chmod(0o755)
    settings = "models input_path output_folder thresholds max_frames".split()
    clean = {key: value for key, value in os.environ.items() if key not in settings}
    wrapper = ROOT / "scripts" / "run_evaluate.sh"
    subprocess.run(
        ["bash", wrapper, "--searches=linear"],
        check=True, cwd=tmp_path, env=clean | {"ELASTIC_PYTHON": str(stub), "max_frames": "0"},
    )  # fmt: skip
    called = stub.with_name("python-stub.called").read_text().splitlines()
    assert called[:2] == ["-u", "scripts/evaluate.py"] and called[-1] == "--searches=linear"
    values = app.parse(script.EVALUATE, called[2:])
    assert (ROOT / values["models"] / "config.json").exists()
    assert (ROOT / values["input_path"]).exists() and values["max_frames"] == 0

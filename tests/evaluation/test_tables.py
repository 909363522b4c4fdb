"""Where evaluations and curves are written: nothing of the user's is replaced, and what cannot work is said at once."""

import json
import os

import jax
import numpy as np
import pytest

from elastic import checkpoints
from elastic.cli import app
from elastic.config import ElasticTokConfig
from elastic.evaluation import tables
from elastic.evaluation.records import (
    Block,
    Condition,
    ConditionResult,
    Evaluation,
    EvaluationConfig,
    Ladder,
    Rung,
)
from elastic.evaluation.tables import RESULTS, check_folder
from elastic.media import write_image
from elastic.model import init_params
from scripts import evaluate, fit_curves

CONFIG = ElasticTokConfig(
    hidden_size=32, intermediate_size=32, num_encoder_layers=1, num_decoder_layers=1, num_attention_heads=2,
    frames_per_block=1, patch_size=(1, 8, 8), min_toks=2, max_toks=16, max_sequence_length=16, theta=1e4,
)  # fmt: skip

PICTURE = np.zeros((32, 32, 3), np.uint8)


def made_up(searches=("binary",)):
    """An evaluation of one block, as if it had been measured."""
    block = Block("a.png", 0, num_kept=4, loss=0.1, met=True, passes=1, seconds=0.5, tried={4: 0.1})
    results = [
        ConditionResult(
            condition=condition, blocks=(block,), mse=0.1, psnr_of_clips=16.0, bits_per_pixel=1.0
        )
        for condition in [
            Condition("fixed", num_tokens=4),
            *(Condition(search, 0.1) for search in searches),
        ]
    ]
    return Evaluation(
        config=EvaluationConfig(thresholds=(0.1,), num_tokens=(4,), searches=searches), model=CONFIG,
        model_id="made up", clips={"a.png": 1}, skipped={}, results=tuple(results), shown=(),
        ladders=(Ladder("a.png", 0, PICTURE, (Rung(4, PICTURE, 30.0, 0.1),)),),
    )  # fmt: skip


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small model's folder."""
    folder = tmp_path_factory.mktemp("model")
    shapes = jax.eval_shape(lambda: init_params(CONFIG, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.02, np.float32), shapes)
    checkpoints.save_pretrained(folder, CONFIG, params)
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A picture and a file that is none."""
    folder = tmp_path_factory.mktemp("clips")
    draw = np.random.default_rng(0)
    write_image(folder / "good.png", draw.integers(0, 256, (32, 32, 3), dtype=np.uint8))
    (folder / "bad.png").write_text("no picture")
    return folder


# --- Results -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mine", [RESULTS, *((name,) for name in RESULTS)], ids=str)
def test_files_that_no_evaluation_wrote_are_refused_and_stay(tmp_path, mine):
    for name in mine:
        (tmp_path / name).write_text(json.dumps({"models": f"my own {name}"}))
    before = contents(tmp_path)
    for refused in (check_folder, lambda folder: tables.write(folder, {"m": made_up()})):
        with pytest.raises(ValueError, match=f"{', '.join(mine)}, but not as .*; name another"):
            refused(tmp_path)
    assert contents(tmp_path) == before


def test_an_earlier_evaluation_is_replaced_and_what_it_did_not_write_is_not(tmp_path):
    several = {"m": made_up(("binary", "linear"))}
    tables.write(tmp_path, several)
    assert sorted(contents(tmp_path)) == sorted(RESULTS)
    (tmp_path / "notes.txt").write_text("mine")
    tables.write(tmp_path, {"m": made_up()})
    assert sorted(contents(tmp_path)) == sorted({*RESULTS, "notes.txt"} - {"searches.csv"})
    # Of one search there is no such table.
    (tmp_path / "searches.csv").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"holds searches\.csv, but not as an earlier evaluation"):
        tables.write(tmp_path, several)
    assert contents(tmp_path) == before


def test_what_is_no_file_is_no_result_of_an_evaluation(tmp_path):
    os.mkfifo(tmp_path / "evaluation.json")
    with pytest.raises(ValueError, match=r"holds evaluation\.json, but not"):
        check_folder(tmp_path)
    (tmp_path / "evaluation.json").unlink()
    tables.write(tmp_path, {"m": made_up()})
    (tmp_path / "blocks.csv").unlink()
    (tmp_path / "blocks.csv").mkdir()
    with pytest.raises(ValueError, match=r"holds blocks\.csv, but not"):
        check_folder(tmp_path)


def test_a_folder_that_cannot_be_written_is_refused_by_the_name_that_was_typed(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    check_folder("not/there/yet")
    check_folder(".")
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for typed, message in {
        "file": "'file' is a file; name a folder",
        "file/x": "'file/x' lies below .*file, which is a file",
        "link": "'link' is a file; name a folder",
        "/proc/x": r"the folder '/proc/x' \(No such file or directory\); name another",
        f"new/{'n' * 300}": r"n' \(File name too long\); name another",
    }.items():
        with pytest.raises((ValueError, OSError), match=message):
            check_folder(typed)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def test_the_script_refuses_a_folder_before_a_model_is_loaded(clips, tmp_path, capsys):
    (tmp_path / "curves.csv").write_text("mine")
    for folder, message in {tmp_path: "holds curves.csv, but not", "/proc/x": "'/proc/x'"}.items():
        command = [f"--input_path={clips}", f"--output_folder={folder}", "--models=no/such/model"]
        assert app.run(evaluate.EVALUATE, evaluate.evaluate, command) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert (tmp_path / "curves.csv").read_text() == "mine"


# --- Curves ------------------------------------------------------------------------------------


def fit(model, clips, *flags):
    command = [f"--load_checkpoint={model}", f"--input_path={clips}", "--mesh_dim=1,1,1,-1", *flags]
    return app.run(fit_curves.FIT_CURVES, fit_curves.fit_curves, command)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_counts=1"], "--num_counts=1 must be at least 2"),
        (["--num_counts=0"], "--num_counts=0 must be at least 2"),
        (["--blocks_per_clip=0"], "--blocks_per_clip=0 must be at least 1"),
    ],
)
def test_flags_that_fit_no_curve_are_refused(model, clips, capsys, flags, message):
    assert fit(model, clips, *flags) == 1
    assert message in capsys.readouterr().err and not (model / "curves.json").exists()


def test_files_that_cannot_be_read_are_told_and_are_not_counted(model, clips, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.mp4")
    assert fit(model, tmp_path) == 1
    assert "none of 1 files could be read, the first is" in capsys.readouterr().err
    assert not (model / "curves.json").exists()
    assert fit(model, clips, "--num_counts=3") == 0
    assert "1 blocks of 1 clips" in capsys.readouterr().out
    (model / "curves.json").unlink()

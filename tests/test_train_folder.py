"""The folder of a run: what it may replace there, and what it does where something is missing or damaged."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from tiny_run import MODELS, make_clips, settings

from elastic import checkpoint
from elastic import train as training
from elastic.train import train
from elastic.train_config import EvalConfig, SaveConfig

pytestmark = pytest.mark.usefixtures("programs_kept", "one_device")
MODEL = MODELS["vae"]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return make_clips(tmp_path_factory.mktemp("clips"))


def content(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_milestone_that_was_not_written_is_written_when_the_run_goes_on(clips, tmp_path):
    """A run may end between a checkpoint and the released files beside it."""
    run = settings(clips, tmp_path, total_steps=2)
    state = jax.device_get(train(run, MODEL).state)
    assert not (tmp_path / "milestones").exists()
    train(dataclasses.replace(run, save=SaveConfig(milestone_freq=2)), MODEL)
    milestone = tmp_path / "milestones" / "00000002"
    written = checkpoint.load_train_state(milestone, MODEL)
    assert int(written["step"]) == 2 and (milestone / "data_position.json").exists()
    jax.tree.map(np.testing.assert_array_equal, written["params"]["params"], state.params)


def test_a_run_does_not_train_on_what_it_writes(clips, tmp_path):
    """The pictures of an evaluation show the files that are held out."""
    shutil.copytree(clips, tmp_path, dirs_exist_ok=True)
    inside, same = tmp_path / "out", tmp_path
    evaluation = EvalConfig(freq=1, path=str(clips), thresholds=(0.5,), num_tokens=(4,))
    train(settings(tmp_path, inside, evaluation=evaluation, total_steps=1), MODEL)
    (picture,) = (inside / "eval").rglob("*.png")
    for out in (inside, same):
        training._open_data(settings(tmp_path, out), MODEL, out)
        names = [name for name, *_ in json.loads((out / "data_index.json").read_text())["files"]]
        assert names == ["dot.mp4", "pan.mp4"]
        (same / "eval").mkdir(exist_ok=True)
        shutil.move(picture, picture := same / "eval" / "seen.png")
        shutil.rmtree(inside, ignore_errors=True)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("params", "a diary"),
        ("metrics.jsonl", "a diary\n"),
        ("metrics.jsonl", '{"mine": 1}\n'),
        ("config.json", '{"mine": 1}'),
    ],
)
def test_no_file_of_the_user_is_replaced(clips, tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{name}.* choose another output_dir"):
        train(settings(clips, tmp_path), MODEL)
    assert (tmp_path / name).read_text() == text


def test_checkpoints_in_a_place_of_their_own_belong_to_one_run(clips, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save = dict(path="kept")  # relative
    train(settings(clips, tmp_path / "a", save=save, total_steps=1), MODEL)
    before = content(tmp_path)
    with pytest.raises(ValueError, match=r"kept holds the checkpoints of the run in .*a; give"):
        train(settings(clips, tmp_path / "b", save=save, total_steps=2), MODEL)
    with pytest.raises(ValueError, match=r"but .*other no checkpoint of a run that wrote this"):
        train(settings(clips, tmp_path / "a", save=dict(path="other"), total_steps=2), MODEL)
    assert before.items() <= content(tmp_path).items()
    assert (
        int(train(settings(clips, tmp_path / "a", save=save, total_steps=2), MODEL).state.step) == 2
    )


def test_a_damaged_checkpoint_names_the_older_one_to_go_on_from(clips, tmp_path):
    state = train(settings(clips, tmp_path), MODEL).state
    newest = tmp_path / "checkpoints" / "00000006"
    for file in (newest / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises((OSError, ValueError), match=r"00000006, .* go on from step 3"):
        train(settings(clips, tmp_path, total_steps=7), MODEL)
    shutil.rmtree(newest)
    again = train(settings(clips, tmp_path), MODEL).state
    jax.tree.map(np.testing.assert_array_equal, *jax.device_get((state, again)))


def test_held_out_files_that_cannot_be_read_are_an_error_before_the_first_step(clips, tmp_path):
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "broken.mp4").write_text("not a film")
    evaluation = EvalConfig(freq=2, path=str(tmp_path / "held"))
    with pytest.raises(ValueError, match="None of the 1 files to evaluate on can be read"):
        train(settings(clips, tmp_path / "run", evaluation=evaluation), MODEL)

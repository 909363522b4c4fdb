"""The folder of a run: what it may replace there, and what it does where something is missing or damaged."""

import contextlib
import dataclasses
import errno
import gc
import json
import os
import pathlib
import re
import shutil
from functools import partial

import jax
import numpy as np
import pytest
from tiny_run import MODELS, make_clips, settings

from elastic import checkpoints
from elastic.training import loop
from elastic.training.checkpoints import Checkpoints
from elastic.training.config import EvalConfig, SaveConfig
from elastic.training.loop import train
from elastic.training.optimizer import make_optimizer
from elastic.training.run import open_data
from elastic.training.state import state_layout
from elastic.training.writers import TensorBoard

pytestmark = pytest.mark.usefixtures("one_device")
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
    written = checkpoints.load_train_state(milestone, MODEL)
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
        open_data(settings(tmp_path, out), MODEL, out)
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


@pytest.fixture(scope="module")
def finished(clips, tmp_path_factory):
    """A run of six steps with checkpoints of step 3 and 6."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, train(settings(clips, folder), MODEL).state


def flip(file, place):
    """One bit, in the middle of what a disk holds."""
    content = bytearray(file.read_bytes())
    content[int(place * len(content))] ^= 4
    file.write_bytes(content)


@pytest.fixture
def unread_dropped():
    """What orbax was reading beside the part that cannot be read is dropped in this test, not during a later one."""
    yield
    gc.collect()


def damaging(test):
    ignored = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    return ignored(pytest.mark.usefixtures("unread_dropped")(test))


@damaging
def test_a_run_passes_over_a_damaged_checkpoint_and_ends_the_same(
    clips, finished, tmp_path, caplog
):
    """The newest whole one is taken, the other set aside. Without a whole one nothing is touched."""
    folder = shutil.copytree(finished[0], tmp_path / "run")
    older, newest = (folder / "checkpoints" / step for step in ("00000003", "00000006"))
    flip(newest / "notes" / "metadata", 0.5)
    before = content(newest)
    alone = shutil.copytree(folder, tmp_path / "alone")
    flip(alone / "checkpoints" / older.name / "notes" / "metadata", 0.5)
    with pytest.raises(ValueError, match=r"The checkpoint of step 6, .*00000006, cannot be read: "):
        restored(alone)
    assert content(alone / "checkpoints" / newest.name) == before

    earlier = older.parent / "damaged" / newest.name  # it was damaged before
    earlier.mkdir(parents=True)
    again = train(settings(clips, folder), MODEL).state
    jax.tree.map(np.testing.assert_array_equal, *jax.device_get((finished[1], again)))
    assert re.search(r"6, cannot be read.* the run goes on from step 3\.", caplog.text)
    assert content(earlier.with_name("00000006-1")) == before and not content(earlier)
    assert newest.exists()


def restored(folder):
    """What a run in the folder would go on from."""
    config = settings(folder, folder)
    layout = state_layout(
        config, MODEL, make_optimizer(config.optimizer), loop.make_mesh("1,1,1,1")
    )
    checkpoints = Checkpoints(folder, config.save)
    try:
        return checkpoints.restore_newest(*layout)
    finally:
        checkpoints.close()


@damaging
def test_no_damage_is_read_as_if_it_were_a_state(finished, tmp_path, caplog):
    """A flipped bit, a file that is cut or missing: the state as it was, or the older one, never another."""
    newest = pathlib.Path("checkpoints", "00000006")
    files = [path for path in (finished[0] / newest).rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size).relative_to(finished[0])
    damages = [
        partial(shutil.rmtree, newest),  # the older one, to compare with
        *(partial(flip, largest, k / 7) for k in range(1, 7)),
        partial(os.truncate, largest, 1000),
        partial(os.remove, newest / "state" / "manifest.ocdbt"),
        partial(shutil.rmtree, newest / "notes"),
    ]
    whole = {6: finished[1]}
    passed_over = 0
    for number, damage in enumerate(damages):
        folder = shutil.copytree(finished[0], tmp_path / f"copy{number}")
        with contextlib.chdir(folder):
            damage()
        step, _, state = restored(folder)
        same = whole.setdefault(step, state)
        jax.tree.map(np.testing.assert_array_equal, *jax.device_get((state, same)))
        passed_over += "now, and the run goes on from step 3" in caplog.text
        caplog.clear()
    assert passed_over >= 6


def test_held_out_files_that_cannot_be_read_are_an_error_before_the_first_step(clips, tmp_path):
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "broken.mp4").write_text("not a film")
    evaluation = EvalConfig(freq=2, path=str(tmp_path / "held"))
    with pytest.raises(ValueError, match="None of the 1 files to evaluate on can be read"):
        train(settings(clips, tmp_path / "run", evaluation=evaluation), MODEL)


def test_a_log_that_cannot_be_written_ends_the_run_with_its_name_and_closing_it_hides_no_error(
    tmp_path, monkeypatch, caplog
):
    """A writer in a thread would die there, and the run wait for it for ever."""
    board = TensorBoard(tmp_path / "tensorboard", first_step=0)
    board.write({"step": 1, "loss": 0.5})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(board._file, "flush", full)
    with pytest.raises(OSError, match=r"No space left on device: .*tensorboard"):
        board.write({"step": 2, "loss": 0.5})
    board.close()
    monkeypatch.undo()
    board.close()
    assert "tensorboard is not whole: No space left on device." in caplog.text

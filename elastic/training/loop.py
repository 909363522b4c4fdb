"""The training loop: a step, a record, an evaluation, a checkpoint, in that order.

How a run goes on, whatever ended it: (1) the newest whole checkpoint gives state, position in the data and
configuration; (2) records of later steps are dropped; (3) the next batch is the one that would have come.
All that a step draws comes from the seed and its number, so the same numbers follow, to the last bit on the
same devices.
"""

import contextlib
import dataclasses
import logging
import pathlib
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from elastic.config import ElasticTokConfig
from elastic.data.dataset import DataPosition, FileIndex, TrainingData, load_index
from elastic.distributed.hosts import is_first_host, wait_for_hosts
from elastic.distributed.mesh import make_mesh
from elastic.io.atomic import locked
from elastic.metrics import load_lpips_weights
from elastic.model import ElasticTok
from elastic.training.checkpoints import Checkpoints
from elastic.training.config import TrainConfig
from elastic.training.evaluator import FOLDER as EVALUATION
from elastic.training.evaluator import Evaluator
from elastic.training.feed import DeviceBatches
from elastic.training.optimizer import make_optimizer
from elastic.training.profiler import Profile
from elastic.training.signals import stop_request
from elastic.training.state import (
    MILESTONES,
    PRETRAINED,
    check_new,
    check_resumable,
    check_same_model,
    check_same_run,
    export,
    first_state,
    state_layout,
    write_config,
)
from elastic.training.step import TrainState, step_program
from elastic.training.throughput import StepRecorder
from elastic.training.writers import Logs, progress_line

log = logging.getLogger(__name__)

INDEX_FILE = "data_index.json"


class Finished(NamedTuple):
    """How a run ended."""

    state: TrainState
    signal: int | None  # what asked it to stop before its last step


def train(config: TrainConfig, model_config: ElasticTokConfig) -> Finished:
    """Trains until `total_steps`; a run that was stopped goes on at its newest checkpoint.

    Ctrl-C and SIGTERM save a checkpoint and end the run early. On many hosts, every one calls this
    with the same arguments.

    Raises:
      ValueError: an option cannot be served, `output_dir` holds the run of another model, or the
        loss is no longer a number.
      OSError: a checkpoint cannot be written.
    """
    folder = pathlib.Path(config.output_dir)
    check_same_model(config, model_config)
    with _alone_in(folder):
        return _train(config, model_config, folder)


@contextlib.contextmanager
def _alone_in(folder: pathlib.Path) -> Iterator[None]:
    """Keeps a second run out of the folder, which would clear away what the first is just writing.

    Raises:
      ValueError: another process trains there.
      OSError: the folder cannot be made or written to.
    """
    if not is_first_host():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".lock") as alone:
        if not alone:
            raise ValueError(
                f"Another process trains in {folder}, or is still saving; wait for it, or choose another output_dir."
            )
        yield


def _train(config: TrainConfig, model_config: ElasticTokConfig, folder: pathlib.Path) -> Finished:
    mesh = make_mesh(config.mesh_dim)
    model = ElasticTok(model_config, dtype=config.compute_dtype, mesh=mesh)
    optimizer = make_optimizer(config.optimizer)
    lpips_weights = (
        load_lpips_weights(config.lpips_weights or None) if model_config.lpips_loss_ratio else None
    )
    evaluator = Evaluator(config, model_config) if config.evaluation.freq else None
    data = _open_data(config, model_config, folder)

    with contextlib.ExitStack() as stack:
        checkpoints = Checkpoints(folder, config.save)
        stack.callback(checkpoints.close)
        newest = checkpoints.newest()
        if newest is not None and not config.autoresume:
            raise ValueError(
                f"{checkpoints.path} holds a run up to step {newest}, and --autoresume=False starts anew: choose "
                "another output_dir, or remove that one first."
            )
        layout = state_layout(config, model_config, optimizer, mesh)

        def check(notes: dict[str, Any]) -> None:
            check_resumable(config, notes)
            check_same_run(config, notes)

        restored = checkpoints.restore_newest(*layout, check)
        if restored is None:
            check_new(config, checkpoints)
            state = first_state(config, model_config, optimizer, layout, data.sample_patches)
            first = int(state.step)
            position = _first_position(config, data, first)
        else:
            state, first = restored.state, restored.step
            position = DataPosition.from_json(restored.notes["position"]).for_data(data)
        if is_first_host():
            write_config(folder, model_config)
        if restored is not None and config.save.is_milestone(first):
            _write_milestone(config, model_config, folder, first, state, position)  # if it was not
        if first > config.total_steps:
            log.warning("total_steps=%d is cache: there is nothing to train.", config.total_steps)
        log.info("Training in %s from step %d to %d.", folder, first, config.total_steps)

        step_fn = step_program(config, model, optimizer, layout[1])
        # It may measure the device's peak, which decoders beside it would lower.
        record = StepRecorder(config, model_config, data, first_step=first, devices=mesh.size)
        feed = DeviceBatches(mesh, config.data, model_config)
        batches = stack.enter_context(
            feed.batches(data, position.batches, config.total_steps - first)
        )
        logs = None
        if is_first_host():
            settings = {
                "model": model_config.to_json_dict(),
                "training": dataclasses.asdict(config),
            }
            logs = stack.enter_context(
                Logs(config.log, folder, first_step=first if restored else 0, settings=settings)
            )
        stop = stack.enter_context(stop_request())
        profile = stack.enter_context(Profile(config, folder))
        record.restart(first)

        step, saved, terms = first, None if restored is None else first, None
        while step < config.total_steps and not stop.asked(step):
            started = time.perf_counter()
            batch = next(batches)
            record.waited(time.perf_counter() - started, terms)
            profile.before(step + 1)
            state, terms = step_fn(state, batch, lpips_weights)
            step, position = step + 1, position.after(1)
            profile.after(step, terms)
            if step % config.log.freq == 0 or step == config.total_steps:
                entry = record(step, terms)
                if logs is not None:
                    logs.write(entry)
                    log.info("%s", progress_line(entry, config.total_steps))
            if evaluator is not None and step % config.evaluation.freq == 0:
                evaluator(step, state, logs)
                record.restart(step)
            if config.save.due(step):
                _save(checkpoints, config, model_config, folder, step, state, position)
                saved = step
                record.restart(step)
        if saved != step:
            _save(checkpoints, config, model_config, folder, step, state, position)
        checkpoints.wait()
    if step < config.total_steps:
        log.warning("Stopped and saved at step %d; the same command goes on from there.", step)
        return Finished(state, stop.signal)
    export(folder, config, model_config, state, pretrained=folder / PRETRAINED)
    wait_for_hosts("finished")
    log.info("Finished; %s is ready for inference.", folder / PRETRAINED)
    return Finished(state, None)


def _open_data(
    config: TrainConfig, model_config: ElasticTokConfig, folder: pathlib.Path
) -> TrainingData:
    """The files: the first host looks through them, the others take what it found."""
    path = folder / INDEX_FILE
    if is_first_host():
        # What the run writes is not trained on: its pictures show the held-out files.
        own = folder.resolve()
        own = own / EVALUATION if own == pathlib.Path(config.data.path).resolve() else own
        index = load_index(config.data, model_config, path=path, without=own)
        wait_for_hosts("index")
    else:
        wait_for_hosts("index")
        if not path.exists():
            raise ValueError(
                f"{path} is not there on host {jax.process_index()}: output_dir must be a folder that all hosts share."
            )
        index = FileIndex.load(path)
    return TrainingData(config.data, model_config, index=index)


def _first_position(config: TrainConfig, data: TrainingData, step: int) -> DataPosition:
    if not config.load_dataset_state:
        return data.position(step)
    return DataPosition.load(config.load_dataset_state).for_data(data)


def _save(
    checkpoints: Checkpoints,
    config: TrainConfig,
    model_config: ElasticTokConfig,
    folder: pathlib.Path,
    step: int,
    state: TrainState,
    position: DataPosition,
) -> None:
    """A checkpoint, and at a milestone also the released files."""
    notes = {
        "step": step,
        "position": position.to_json(),
        "model": model_config.to_json_dict(),
        "training": dataclasses.asdict(config),  # the seed too: all that is drawn comes from it
    }
    checkpoints.save(step, state, notes)
    if config.save.is_milestone(step):
        _write_milestone(config, model_config, folder, step, state, position)


def _write_milestone(
    config: TrainConfig,
    model_config: ElasticTokConfig,
    folder: pathlib.Path,
    step: int,
    state: TrainState,
    position: DataPosition,
) -> None:
    """The released files of a step, unless they are there: a run may end between its checkpoint and them."""
    place = folder / MILESTONES / f"{step:08d}"
    last = place / "data_position.json"
    there = last.exists()
    wait_for_hosts(f"milestone {step}")  # all look before one writes
    if there:
        return
    export(place, config, model_config, state)
    if is_first_host():
        position.save(last)

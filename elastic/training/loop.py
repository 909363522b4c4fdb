"""The training loop: a step, a record, an evaluation, a checkpoint, in that order. A run that is asked to stop saves first.

How a run goes on, whatever ended it: (1) the newest whole checkpoint gives state, position in the data and
configuration; (2) records of later steps are dropped; (3) the next batch is the one that would have come.
All that a step draws comes from the seed and its number, so the same numbers follow, to the last bit on the
same devices. `run.py` puts a run together and resumes it; `checkpoints.py` writes and reads its checkpoints.
"""

import contextlib
import logging
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from elastic.config import ElasticTokConfig
from elastic.distributed.hosts import is_first_host, wait_for_hosts
from elastic.distributed.mesh import make_mesh
from elastic.io.atomic import locked
from elastic.training.config import TrainConfig
from elastic.training.profiler import Profile
from elastic.training.run import Run, Start
from elastic.training.signals import Interrupted, StopFlag, stop_request
from elastic.training.state import PRETRAINED, check_same_model, export
from elastic.training.step import TrainState
from elastic.training.throughput import StepRecorder
from elastic.training.writers import progress_line

log = logging.getLogger(__name__)


class Finished(NamedTuple):
    """How a run ended."""

    state: TrainState
    signal: int | None  # what asked it to stop before its last step


def train(
    config: TrainConfig,
    model_config: ElasticTokConfig,
    *,
    leave: Callable[[int], Any] | None = None,
) -> Finished:
    """Trains until `total_steps`; a run that was stopped goes on at its newest checkpoint.

    Ctrl-C and SIGTERM save a checkpoint and end the run early: after the step under way, at once while it waits for data,
    compiles, evaluates or exports. On many hosts, every one calls this with the same arguments, and an evaluation is waited for.

    Args:
      config: the options of the run.
      model_config: the model's.
      leave: ends the process with an exit code. It is called after saving where the run was asked to stop while XLA compiles or computes
        for an evaluation, from which no program comes back early. None: that is waited for.

    Raises:
      ValueError: an option cannot be served, `output_dir` holds the run of another model, or the
        loss is no longer a number.
      OSError: a checkpoint cannot be written.
    """
    folder = pathlib.Path(config.output_dir)
    check_same_model(config, model_config)
    with _alone_in(folder):
        return _train(config, model_config, folder, leave)


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


def _train(
    config: TrainConfig,
    model_config: ElasticTokConfig,
    folder: pathlib.Path,
    leave: Callable[[int], Any] | None,
) -> Finished:
    with contextlib.closing(Run(config, model_config, folder, make_mesh(config.mesh_dim))) as run:
        start = run.start()
        with stop_request(leave) as stop:
            step, state = _run_steps(run, start, stop)
            if step < config.total_steps:
                log.warning(
                    "Stopped and saved at step %d; the same command goes on from there.", step
                )
                return Finished(state, stop.signal)
            try:
                with stop.interruptible(run.checkpoints.wait):
                    export(folder, config, model_config, state, pretrained=folder / PRETRAINED)
            except Interrupted:
                log.warning("Stopped while the model is written; the same command writes it.")
                return Finished(state, stop.signal)
    wait_for_hosts("finished")
    log.info("Finished; %s is ready for inference.", folder / PRETRAINED)
    return Finished(state, None)


def _run_steps(run: Run, start: Start, stop: StopFlag) -> tuple[int, TrainState]:
    """Trains until the last step or a signal, and saves: the step and its state."""
    config, train_step = run.config, run.train_step()
    record = StepRecorder(
        config, run.model_config, run.data, first_step=start.step, devices=run.mesh.size
    )
    with (
        run.batches(start) as batches,
        run.open_logs(start) as logs,
        Profile(config, run.folder) as profile,
    ):
        record.restart(start.step)
        step, state, position = start.step, start.state, start.position
        saved = step if start.resumed else None
        terms = None

        def save() -> None:
            if saved != step and not stop.saved:
                run.save(step, state, position)
            run.checkpoints.wait()

        try:
            while step < config.total_steps:
                started = time.perf_counter()
                with stop.interruptible(save):
                    batch = next(batches)
                record.waited(time.perf_counter() - started, terms)
                profile.before(step + 1)
                if terms is None:
                    with stop.interruptible(save):
                        train_step.lower(state, batch, run.lpips_weights).compile()
                state, terms = train_step(state, batch, run.lpips_weights)
                step, position = step + 1, position.after(1)
                profile.after(step, terms)
                if step % config.log.freq == 0 or step == config.total_steps:
                    entry = record(step, terms)
                    if logs is not None:
                        logs.write(entry)
                        log.info("%s", progress_line(entry, config.total_steps))
                if stop.asked(step):
                    break
                if run.evaluator is not None and step % config.evaluation.freq == 0:
                    with stop.interruptible(save):
                        run.evaluator(step, state, logs)
                    record.restart(step)
                if config.save.due(step):
                    run.save(step, state, position)
                    saved = step
                    with stop.interruptible(save):
                        run.write_milestone(step, state, position)
                    record.restart(step)
        except Interrupted:
            pass  # `step`, `state` and `position` belong together: what can be interrupted changes none of them
        save()
        if stop.signal is None:
            run.write_milestone(step, state, position)
    return step, state

"""What a run works with from its first step to its last: model, data, checkpoints, logs."""

import contextlib
import dataclasses
import functools
import logging
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from elastic.config import ElasticTokConfig
from elastic.data.dataset import DataPosition, FileIndex, HostBatch, TrainingData, load_index
from elastic.distributed.hosts import is_first_host, wait_for_hosts
from elastic.metrics import load_lpips_weights
from elastic.model import ElasticTok
from elastic.training.checkpoints import Checkpoints
from elastic.training.config import TrainConfig
from elastic.training.evaluator import FOLDER as EVALUATION
from elastic.training.evaluator import Evaluator
from elastic.training.feed import DeviceBatches
from elastic.training.optimizer import make_optimizer
from elastic.training.state import (
    MILESTONES,
    check_new,
    check_resumable,
    check_same_run,
    export,
    first_state,
    state_layout,
    write_config,
)
from elastic.training.step import TrainState, step_program
from elastic.training.writers import Logs

log = logging.getLogger(__name__)

INDEX_FILE = "data_index.json"


class Start(NamedTuple):
    """Where a run begins or goes on."""

    step: int
    state: TrainState
    position: DataPosition
    resumed: bool  # from a checkpoint of this run


class Run:
    """One run in its folder.

    Args:
      config: the options of the run.
      model_config: the model's.
      folder: of the run, shared by all hosts.
      mesh: the devices.

    Raises:
      ValueError: an option cannot be served.
      OSError: a file cannot be read or written.
    """

    def __init__(
        self,
        config: TrainConfig,
        model_config: ElasticTokConfig,
        folder: pathlib.Path,
        mesh: Mesh,
    ):
        self.config, self.model_config, self.folder, self.mesh = config, model_config, folder, mesh
        self._model = ElasticTok(model_config, dtype=config.compute_dtype, mesh=mesh)
        self._optimizer = make_optimizer(config.optimizer)
        self.lpips_weights = (
            load_lpips_weights(config.lpips_weights or None)
            if model_config.lpips_loss_ratio
            else None
        )
        self.evaluator = Evaluator(config, model_config) if config.evaluation.freq else None
        self.data = open_data(config, model_config, folder)
        self.checkpoints = Checkpoints(folder, config.save)

    def close(self) -> None:
        """Ends the writing of checkpoints."""
        self.checkpoints.close()

    def start(self) -> Start:
        """The state to start from: the newest complete checkpoint, or a new state.

        Raises:
          ValueError: the folder or the checkpoint belongs to another run, or does not fit the options.
        """
        config, newest = self.config, self.checkpoints.newest()
        if newest is not None and not config.autoresume:
            raise ValueError(
                f"{self.checkpoints.path} holds a run up to step {newest}, and --autoresume=False starts anew: choose "
                "another output_dir, or remove that one first."
            )
        start = self._resumed() or self._new()
        if is_first_host():
            write_config(self.folder, self.model_config)
        if start.resumed:
            # The run may have ended between the checkpoint and its milestone.
            self.write_milestone(start.step, start.state, start.position)
        if start.step > config.total_steps:
            log.warning(
                "total_steps=%d lies before this step: there is nothing to train.",
                config.total_steps,
            )
        log.info("Training in %s from step %d to %d.", self.folder, start.step, config.total_steps)
        return start

    def train_step(self) -> Any:
        """The step as jax.jit gives it: state, batch and LPIPS weights -> the next state and the terms of the loss."""
        _, shardings = self._layout
        return step_program(self.config, self._model, self._optimizer, shardings)

    def batches(self, start: Start) -> contextlib.AbstractContextManager[Iterator[HostBatch]]:
        """The batches of all steps that are left, on the devices."""
        device_batches = DeviceBatches(self.mesh, self.config.data, self.model_config)
        count = self.config.total_steps - start.step
        return device_batches.batches(self.data, start.position.batches, count)

    def open_logs(self, start: Start) -> contextlib.AbstractContextManager[Logs | None]:
        """Where records go; None on all hosts but the first."""
        if not is_first_host():
            return contextlib.nullcontext()
        settings = {
            "model": self.model_config.to_json_dict(),
            "training": dataclasses.asdict(self.config),
        }
        first = start.step if start.resumed else 0
        return Logs(self.config.log, self.folder, first_step=first, settings=settings)

    def save(self, step: int, state: TrainState, position: DataPosition) -> None:
        """Begins to write a checkpoint."""
        notes = {
            "step": step,
            "position": position.to_json(),
            "model": self.model_config.to_json_dict(),
            "training": dataclasses.asdict(self.config),  # including the seed of all random draws
        }
        self.checkpoints.save(step, state, notes)

    def _resumed(self) -> Start | None:
        def check(notes: dict[str, Any]) -> None:
            check_resumable(self.config, notes)
            check_same_run(self.config, notes)

        restored = self.checkpoints.restore_newest(*self._layout, check)
        if restored is None:
            return None
        position = DataPosition.from_json(restored.notes["position"]).for_data(self.data)
        return Start(restored.step, restored.state, position, resumed=True)

    def _new(self) -> Start:
        config = self.config
        check_new(config, self.checkpoints)
        state = first_state(
            config, self.model_config, self._optimizer, self._layout, self.data.sample_patches
        )
        step = int(state.step)
        if config.load_dataset_state:
            position = DataPosition.load(config.load_dataset_state).for_data(self.data)
        else:
            position = self.data.position(step)
        return Start(step, state, position, resumed=False)

    @functools.cached_property
    def _layout(self) -> tuple[TrainState, TrainState]:
        return state_layout(self.config, self.model_config, self._optimizer, self.mesh)

    def write_milestone(self, step: int, state: TrainState, position: DataPosition) -> None:
        """Writes the released files of a step that is a milestone, unless they are there."""
        if not self.config.save.is_milestone(step):
            return
        folder = self.folder / MILESTONES / f"{step:08d}"
        last = folder / "data_position.json"
        complete = last.exists()
        wait_for_hosts(f"milestone {step}")  # all look before one writes
        if complete:
            return
        export(folder, self.config, self.model_config, state)
        if is_first_host():
            position.save(last)
        wait_for_hosts(f"milestone {step} is written")  # who asks again finds it, on all hosts


def open_data(
    config: TrainConfig, model_config: ElasticTokConfig, folder: pathlib.Path
) -> TrainingData:
    """The files of a run: the first host measures them, the others read the index that it wrote.

    Raises:
      ValueError: a host does not see the folder of the run, or no file can be used.
    """
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

"""The record of a step: what it computed, how fast, how full the memory is, and how long data was waited for."""

import resource
import time
from typing import Any

import jax
import numpy as np

from elastic import metrics
from elastic.config import ElasticTokConfig
from elastic.data.dataset import TrainingData
from elastic.data.packing import sequence_length
from elastic.model import flops
from elastic.training.config import TrainConfig


class StepRecorder:
    """Makes the records of a run out of the terms of its steps and the clock.

    Args:
      data: tells of the files that could not be read.
      first_step: the step before the first one recorded.
      devices: how many compute.
    """

    def __init__(
        self,
        config: TrainConfig,
        model_config: ElasticTokConfig,
        data: TrainingData,
        *,
        first_step: int,
        devices: int,
    ):
        self._config, self._data = config, data
        self._step, self._time = first_step, time.perf_counter()
        self._waited = 0.0
        self._model_config, self._length = model_config, sequence_length(config.data, model_config)
        self._rows = config.data.batch_size
        # None for a device without a data sheet here, such as a CPU: a measured product is no bound of what it can reach.
        peak = flops.peak_flops(jax.local_devices()[0].device_kind)
        self._peak = None if peak is None else peak * devices

    def waited(self, seconds: float, terms: dict[str, Any] | None) -> None:
        """Notes that a batch took `seconds` to come while the step of `terms` was under way.

        Time in which the devices were still at work is no wait; where they had finished meanwhile,
        all of it counts, so that the share is a bound from above.
        """
        if terms is None or terms["loss"].is_ready():
            self._waited += seconds

    def __call__(self, step: int, terms: dict[str, Any]) -> dict[str, Any]:
        """The record after `step` steps. Waits for the last of them.

        Raises:
          ValueError: the loss has not been finite for too many steps.
        """
        record: dict[str, Any] = {"step": step}
        record |= {name: float(value) for name, value in jax.device_get(terms).items()}
        in_a_row = int(record.pop("skipped_in_a_row"))
        if in_a_row >= self._config.max_skipped_steps:
            raise ValueError(
                f"The loss or its gradient has not been finite for {in_a_row} steps in a row, up to step "
                f"{step}; lower --optimizer.adamw_optimizer.lr and go on from the last checkpoint."
            )
        now = time.perf_counter()
        steps, seconds = step - self._step, now - self._time
        # Of this step's files: short ones see less, and cost less.
        visible = record["visible_blocks"]
        work = flops.training_flops(self._model_config, self._length, visible_blocks=visible)
        rate = steps * self._rows * work / seconds
        record["psnr"] = metrics.psnr_of_mse(record["recon_loss"])
        record |= {
            "seconds_per_step": seconds / steps,
            "tokens_per_second": steps * self._rows * self._length / seconds,
            "model_flops_per_second": rate,
            "model_flops_utilization": None if self._peak is None else rate / self._peak,
            "memory_gigabytes": memory_in_use() / 1e9,
            "data_wait": min(1.0, self._waited / seconds),
            "epoch": self._data.epoch_of(step),
            "bad_files": len(self._data.bad_files),
        }
        self.restart(step)
        # JSON knows no NaN: a skipped step has no loss. None: unknown.
        return {
            name: value if value is not None and np.isfinite(value) else None
            for name, value in record.items()
        }

    def restart(self, step: int) -> None:
        """Begins a new stretch of time after `step`: what was done since (a save, an evaluation) is no step."""
        self._step, self._time, self._waited = step, time.perf_counter(), 0.0


CLOCK = (
    "seconds_per_step",
    "tokens_per_second",
    "model_flops_per_second",
    "model_flops_utilization",
    "memory_gigabytes",
    "data_wait",
)  # what differs between two equal runs


def memory_in_use() -> int:
    """Peak memory in bytes: of the fullest local device, or of this process if the devices share its memory."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [
        found["peak_bytes_in_use"] for found in stats if found and "peak_bytes_in_use" in found
    ]
    return max(peaks, default=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)

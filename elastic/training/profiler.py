"""A profiler trace of some steps."""

import logging
import pathlib
from typing import Any

import jax

from elastic.training.config import TrainConfig

log = logging.getLogger(__name__)


PROFILE = "profile"


class Profile:
    """A trace of some steps, for TensorBoard's or Perfetto's viewer."""

    def __init__(self, config: TrainConfig, folder: pathlib.Path):
        self._steps, self._folder = config.log.profile_steps, folder / PROFILE
        self._running = False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_) -> None:
        if self._running:
            jax.profiler.stop_trace()

    def before(self, step: int) -> None:
        """Begins the trace before its first step."""
        if self._steps is not None and step == self._steps[0]:
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def after(self, step: int, terms: Any) -> None:
        """Ends it after its last."""
        if self._running and self._steps is not None and step == self._steps[1]:
            jax.block_until_ready(terms)
            jax.profiler.stop_trace()
            self._running = False
            log.info("The trace of steps %d to %d is in %s.", *self._steps, self._folder)

"""Ctrl-C, SIGTERM and preemption: a run stops after its step."""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

log = logging.getLogger(__name__)


class StopFlag:
    """Whether the run has been asked to stop, and by which signal."""

    def __init__(self):
        self.signal: int | None = None

    def asked(self, step: int) -> bool:
        """On many hosts all get the same answer at the same step, whichever of them was asked."""
        if jax.process_count() == 1:
            return self.signal is not None
        if multihost_utils.reached_preemption_sync_point(step):
            self.signal = signal.SIGTERM
        return self.signal is not None


@contextlib.contextmanager
def stop_request() -> Iterator[StopFlag]:
    """Takes Ctrl-C and SIGTERM as a wish to save and leave. A second Ctrl-C acts at once, as ever.

    Signals reach the main thread alone; in any other nothing is taken. On many hosts SIGTERM is left to
    jax, which tells the others, and Ctrl-C becomes one: a host that left alone would be waited for.
    """
    stop, asked = StopFlag(), False
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    many = jax.process_count() > 1

    def ask(number: int, _: Any) -> None:
        nonlocal asked
        if number == signal.SIGINT and asked:
            raise KeyboardInterrupt
        asked = True
        log.warning("Asked to stop: this step is finished and saved first.")
        if many:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            stop.signal = number

    taken = (signal.SIGINT,) if many else (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, ask) for number in taken}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

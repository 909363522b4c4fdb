"""Ctrl-C, SIGTERM and preemption: a run saves first, and then leaves.

After every step the loop asks whether to stop. What may take longer than a step (waiting for data, compiling, an evaluation, an
export) is interrupted: there the handler raises `Interrupted`. Python runs no handler while XLA compiles or computes, which may take
minutes. Then a thread saves in the loop's place, and ends the process if the caller lets it.
"""

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

log = logging.getLogger(__name__)

_GRACE_SECONDS = 1.0  # for the main thread to come back from XLA and save by itself


class Interrupted(BaseException):
    """The run was asked to stop during something that may be left unfinished."""


class StopFlag:
    """Whether the run has been asked to stop, and by which signal.

    Args:
      leave: ends the process with an exit code, when the main thread does not come back; None: it is waited for.

    Attributes:
      saved: whether the thread has saved because the main thread did not come back.
    """

    def __init__(self, leave: Callable[[int], Any] | None = None):
        self.signal: int | None = None
        self.saved = False
        self._leave = leave
        self._save: Callable[[], Any] | None = None
        self._lock = threading.Lock()  # held by the thread while it saves
        self._is_open = False

    def asked(self, step: int) -> bool:
        """On many hosts all get the same answer at the same step, whichever of them was asked."""
        if jax.process_count() == 1:
            return self.signal is not None
        if multihost_utils.reached_preemption_sync_point(step):
            self.signal = signal.SIGTERM
        return self.signal is not None

    @contextlib.contextmanager
    def interruptible(self, save: Callable[[], Any]) -> Iterator[None]:
        """A signal ends the body at once. Where nothing can end it, a thread saves instead. On many hosts it is not interrupted.

        Args:
          save: saves the run as it is now, unless that is saved, and waits until it is written. The body must not change what it saves.

        Raises:
          Interrupted: a signal came in the body or before it.
        """
        if jax.process_count() > 1:  # a host that left alone would be waited for
            yield
            return
        self._save, self._is_open = save, True
        try:
            if self.signal is not None:
                raise Interrupted
            yield
        finally:
            self._is_open = False
            with self._lock:
                self._save = None

    def take(self, number: int) -> None:
        """Notes a signal. Called by the handler, in the main thread.

        Raises:
          Interrupted: the main thread is in the body of `interruptible`.
        """
        self.signal = number
        if self._is_open:
            raise Interrupted

    def save_in_place(self, number: int) -> None:
        """Saves in the loop's place if the main thread still is in the body of `interruptible`, and ends the process."""
        with self._lock:
            if self._save is None:
                return
            self.signal = number
            self._save()
            self.saved = True
            if self._leave is not None:
                log.warning("Stopped and saved; the same command goes on from there.")
                self._leave(128 + number)


@contextlib.contextmanager
def stop_request(leave: Callable[[int], Any] | None = None) -> Iterator[StopFlag]:
    """Takes Ctrl-C and SIGTERM as a wish to save and leave. A second Ctrl-C acts at once, as ever.

    Signals reach the main thread alone; in any other nothing is taken. On many hosts SIGTERM is left to
    jax, which tells the others, and Ctrl-C becomes one: a host that left alone would be waited for.

    Args:
      leave: as for `StopFlag`.
    """
    stop, asked = StopFlag(leave), False
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    many = jax.process_count() > 1

    def ask(number: int, _: Any) -> None:
        nonlocal asked
        if number == signal.SIGINT and asked:
            raise KeyboardInterrupt
        asked = True
        log.warning("Asked to stop: the run is saved first.")
        if many:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            stop.take(number)

    taken = (signal.SIGINT,) if many else (signal.SIGINT, signal.SIGTERM)
    with contextlib.nullcontext() if many else _watched(stop):
        before = {number: signal.signal(number, ask) for number in taken}
        try:
            yield stop
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def _watched(stop: StopFlag) -> Iterator[None]:
    """A thread that learns of signals also while the main thread is in XLA, where Python runs no handler."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    ended = threading.Event()

    def watch() -> None:
        while number := reader.recv(1):
            if number[0] in (signal.SIGINT, signal.SIGTERM) and not ended.wait(_GRACE_SECONDS):
                try:
                    stop.save_in_place(number[0])
                except (
                    Exception
                ):  # whatever it is, the thread's owner cannot catch it: the log has it
                    log.exception("The run could not be saved.")

    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=watch, name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        ended.set()
        writer.close()
        thread.join()
        reader.close()

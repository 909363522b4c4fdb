"""Batches from grain's worker processes: how workers are started, cancelled and ended.

A worker ends with its parent, also if the parent is killed. A worker that dies is an error in the
parent. This module imports neither jax nor the model, so that a worker starts fast.
"""

import contextlib
import json
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import shared_memory
from typing import Any, Self, cast

import numpy as np

from elastic.data.packing import num_streams
from elastic.data.reader import HostBatch, SequenceReader
from elastic.io.grain_flags import mark_grain_flags_parsed
from elastic.media import video

log = logging.getLogger(__name__)

_GRACE_SECONDS = 30  # a worker ends so long after a SIGTERM, if its parent does not end it
_SHARED_MEMORY = "/dev/shm"
_SHARED_MEMORY_SHARE = 0.8  # of the free shared memory, for batches in transit from the workers


class WorkerSource:
    """The data source that grain reads: an element holds a worker's rows of one batch."""

    def __init__(
        self,
        reader: SequenceReader,
        *,
        batch_size: int,
        rows: Sequence[int],
        batches: range,
        cancel_flag: str = "",
    ):
        """Reads rows of batches.

        Args:
          reader: decodes the sequences.
          batch_size: rows of a global batch.
          rows: which of them this worker reads.
          batches: numbers of the batches.
          cancel_flag: name of a `_CancelFlag`; '' is none.
        """
        self._reader, self._batch_size = reader, batch_size
        self._rows, self._batches = tuple(rows), batches
        self._cancel_flag = cancel_flag
        self._watching = False

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        if self._cancel_flag and not self._watching:
            self._reader.cancelled, self._watching = _CancelFlag.watch(self._cancel_flag), True
        start = self._batches[i] * self._batch_size
        read = [self._reader.read(start + row, self._batch_size) for row in self._rows]
        parts = map(np.concatenate, zip(*read, strict=True))
        # Names of bad files travel with the batch, because the parent writes the log.
        bad = np.frombuffer(json.dumps(self._reader.take_bad_files()).encode(), np.uint8)
        return HostBatch(*parts)._asdict() | {"bad": bad}


class _CancelFlag:
    """A byte in shared memory: when the parent sets it, workers cancel a decoding that is under way.

    (Grain checks its own flag between two elements only.)
    """

    def __init__(self):
        self._memory = shared_memory.SharedMemory(create=True, size=1)
        self._buffer = cast(memoryview, self._memory.buf)
        self._buffer[0] = 0
        self.name = self._memory.name

    @staticmethod
    def watch(name: str) -> Callable[[], bool]:
        """A function that tells a worker whether the flag is set."""
        memory = shared_memory.SharedMemory(name)
        return lambda: cast(memoryview, memory.buf)[0] != 0

    def set(self) -> None:
        """Cancels the decoding of all workers, for good."""
        self._buffer[0] = 1

    def close(self) -> None:
        """Frees the shared memory; call it after the workers have ended."""
        self._buffer.release()
        self._memory.close()
        self._memory.unlink()


class BatchIterator(Iterator[HostBatch]):
    """A running iteration over batches, made by `TrainingData.batches`. Close it when done.

    The same worker decodes a row of successive batches, because these share files. With more workers
    than rows, several workers take turns with a row.

    Attributes:
      wait_seconds: seconds spent in `next` so far.
    """

    def __init__(
        self,
        reader: SequenceReader,
        *,
        batch_size: int,
        rows: Sequence[int],
        numbers: range,
        workers: int,
        ahead: int,
        report: Callable[[Mapping[str, str]], None],
    ):
        """Starts the workers.

        Args:
          reader: decodes the sequences.
          batch_size: rows of a global batch.
          rows: which of them to read.
          numbers: numbers of the batches.
          workers: worker processes; 0 decodes in threads of this process.
          ahead: batches prepared in advance.
          report: is called with name -> reason of the files found bad.
        """
        self.wait_seconds = 0.0
        self._iterators: list[list[Any]] = []  # [turn][group of rows]
        self._report, self._numbers, self._given = report, numbers, 0
        # With few files, a host may by chance get only the bad ones for several epochs.
        self._num_empty, self._most_empty = 0, 20 + -(-reader.plan.num_sequences // batch_size)
        groups, turns = _share(len(rows), max(1, workers), batch_size)
        ahead = -(-min(ahead, max(1, len(numbers))) // turns)
        through_pipes = False
        self._cancel_flag = _CancelFlag() if workers else None
        if workers:
            row_bytes = sum(x.nbytes for x in reader.empty_row())
            ahead, through_pipes = _fit(ahead, turns * len(rows) * row_bytes)
        try:
            for turn in range(min(turns, len(numbers))):
                self._iterators.append([])
                for group in groups:
                    source = WorkerSource(
                        reader,
                        batch_size=batch_size,
                        rows=[rows[i] for i in group],
                        batches=numbers[turn::turns],
                        cancel_flag=self._cancel_flag.name if self._cancel_flag else "",
                    )
                    self._iterators[-1].append(_start(source, workers, ahead, through_pipes))
        except BaseException:
            self.close()
            raise

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> HostBatch:
        """The next batch.

        Raises:
          ChildProcessError: a worker process died.
          ValueError: nothing could be decoded for more than an epoch.
        """
        if self._given == len(self._numbers) or not self._iterators:
            self.close()
            raise StopIteration
        started = time.perf_counter()
        turn = self._iterators[self._given % len(self._iterators)]
        try:
            elements = [next(iterator) for iterator in turn]
        except RuntimeError as error:
            self.close()
            if "terminated unexpectedly" not in str(error):
                raise
            raise ChildProcessError(
                f"A process that decodes training data died: {error} Exit code -9 mostly means that memory ran "
                "out: take fewer workers or a smaller cache_gigabytes. Code 1 right at the start: the script "
                "that trains must do so under `if __name__ == '__main__':`."
            ) from error
        for element in elements:
            self._report(json.loads(element.pop("bad").tobytes()))
        batch = HostBatch(
            *(np.concatenate([element[name] for element in elements]) for name in HostBatch._fields)
        )
        for element in elements:
            element.clear()  # frees the shared memory, which grain's threads may still point to
        self._num_empty = 0 if batch.filled.any() else self._num_empty + 1
        if self._num_empty >= self._most_empty:
            self.close()
            raise ValueError(
                f"Not one block of the last {self._num_empty} batches could be decoded; the log says why."
            )
        self._given += 1
        self.wait_seconds += time.perf_counter() - started
        return batch

    def close(self) -> None:
        """Ends the workers."""
        iterators = [iterator for turn in self._iterators for iterator in turn]
        flag, self._iterators, self._cancel_flag = self._cancel_flag, [], None
        if flag:
            flag.set()
        # In parallel, because each takes a moment.
        threads = [threading.Thread(target=iterator.close) for iterator in iterators]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if flag:
            flag.close()


def _share(num_rows: int, num_workers: int, batch_size: int) -> tuple[list[list[int]], int]:
    """The rows in one group for each worker, and the number of workers that take turns with each group."""
    if num_workers <= num_rows:
        return [list(map(int, group)) for group in np.array_split(range(num_rows), num_workers)], 1
    # A worker keeps to its own streams, see `elastic.data.packing`.
    streams = num_streams(batch_size) // batch_size
    turns = max(n for n in range(1, num_workers // num_rows + 1) if streams % n == 0)
    used = num_rows * turns
    if used < num_workers:
        log.warning(
            "%d of %d workers are used: one for each of the %d rows of a batch, and more only in turns at all of them.",
            used,
            num_workers,
            num_rows,
        )
    return [[row] for row in range(num_rows)], turns


def _fit(ahead: int, batch_bytes: int) -> tuple[int, bool]:
    """How many batches to prepare so that shared memory holds them, and whether to use pipes in its place."""
    if not os.path.isdir(_SHARED_MEMORY):
        return ahead, False
    usable = _SHARED_MEMORY_SHARE * shutil.disk_usage(_SHARED_MEMORY).free
    most = int(usable // batch_bytes) - 4  # some are being written and read
    if most >= ahead:
        return ahead, False
    log.warning(
        "%s can hold only a few batches of %d bytes, so %s; a container gets more with --shm-size.",
        _SHARED_MEMORY,
        batch_bytes,
        f"only {most} are prepared ahead" if most > 0 else "they take a slower way",
    )
    return max(1, most), most < 1


def _start(source: WorkerSource, workers: int, ahead: int, through_pipes: bool) -> Any:
    import grain  # its import takes a second, and only training needs it

    mark_grain_flags_parsed()
    data = grain.MapDataset.source(source)  # type: ignore[arg-type]
    if workers == 0:
        options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=max(2, ahead))
        iterator = iter(data.to_iter_dataset(options))
        iterator.start_prefetch()
        return iterator
    # The worker process itself reads ahead; further threads in it would only wait for each other.
    dataset = data.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    # Grain buffers this many elements in the worker, and as many in the parent.
    options = grain.MultiprocessingOptions(num_workers=1, per_worker_buffer_size=-(-ahead // 2))
    dataset = dataset.mp_prefetch(options, start_worker)
    shared = grain.experimental.DatasetOptions(min_shm_size=2**62 if through_pipes else 1024)
    dataset = grain.experimental.WithOptionsIterDataset(dataset, shared)
    iterator = iter(dataset)
    # Threads and processes inherit blocked signals: a Ctrl-C must not reach them, even while they start.
    with _blocked(signal.SIGINT):
        iterator.get_state()  # makes the iterator that owns the process;
        iterator.start_prefetch()  # starts the process without waiting for an element
    return iterator


@contextlib.contextmanager
def _blocked(number: signal.Signals) -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_worker(worker: int, num_workers: int) -> None:
    """Prepares a worker process: it ends with its parent, and does not use the accelerator."""
    del worker, num_workers
    os.environ["JAX_PLATFORMS"] = "cpu"  # a worker must not take memory of the accelerator
    if "jax" in sys.modules:
        sys.modules["jax"].config.update("jax_platforms", "cpu")
    video.decoder_threads = 1  # the cores are shared with the other workers
    # Warnings about a file were logged when it was measured; bad files are reported to the parent.
    logging.getLogger("elastic").setLevel(logging.ERROR)
    # Ctrl-C and a scheduler's SIGTERM reach the whole group, but the parent decides: it may want
    # more batches before its last checkpoint. If the parent is gone or hangs, this process ends by itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: _exit_later(_GRACE_SECONDS))
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _exit_later(seconds: float) -> None:
    timer = threading.Timer(seconds, os._exit, (1,))
    timer.daemon = True
    timer.start()


def _end_with(parent: int) -> None:
    process = multiprocessing.parent_process()
    while os.getppid() == parent and (process is None or process.is_alive()):
        if process is None:
            time.sleep(1)
        else:
            process.join(timeout=1)  # returns when the parent ends, however it ends
    os._exit(1)

"""Metrics out: JSON lines, TensorBoard, Weights & Biases, and the line that a person reads."""

import contextlib
import json
import logging
import math
import os
import pathlib
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, Self

import numpy as np

from elastic.io.atomic import atomic_write
from elastic.training.config import LogConfig

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
TENSORBOARD = "tensorboard"
_FIRST = (
    "loss",
    "recon_loss",
    "lpips_loss",
    "aux_loss",
    "psnr",
)  # on the line, where they are there


class Writer(Protocol):
    """Where records and pictures go."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Takes one record; it has a `step`."""

    def show(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Takes pictures by name, uint8 [rows, columns, 3]."""

    def close(self) -> None:
        """Ends it."""


@contextlib.contextmanager
def _named(path: pathlib.Path) -> Iterator[None]:
    """Adds the path to an error of writing."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextlib.contextmanager
def _said(path: pathlib.Path) -> Iterator[None]:
    """Logs an error of closing, so that it does not replace the error that ends the run."""
    try:
        yield
    except OSError as error:
        log.warning("%s is not whole: %s.", path, error.strerror)


class MetricsFile:
    """Records of a run, one JSON object a line, appended as they come and flushed one by one.

    Args:
      path: the file; its folder must exist.
      first_step: where the run goes on. Records of later steps are dropped: a run that was killed
        repeats those steps, and each should stand in the file once. 0 begins an empty file.
    """

    def __init__(self, path: str | os.PathLike, *, first_step: int = 0):
        self.path = pathlib.Path(path)
        kept = []
        if first_step and self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if _step(line) <= first_step]
        atomic_write(self.path, "".join(kept).encode())
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one record; it has a `step`."""
        with _named(self.path):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def show(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Pictures are no lines of text: they go elsewhere."""

    def close(self) -> None:
        """Closes the file."""
        with _said(self.path):
            self._file.close()


def is_log(path: pathlib.Path) -> bool:
    """Whether a file may be begun anew: it is not there, empty, or begins like a run's records."""
    try:
        with open(path, encoding="utf-8") as file:
            first = file.readline(1 << 20)
    except FileNotFoundError:
        return True
    except ValueError:  # no text
        return False
    if not first.endswith("\n"):  # a run may be killed in its first line
        return not first or first.startswith("{")
    try:
        return "step" in json.loads(first)
    except (ValueError, TypeError):
        return False


class TensorBoard:
    """Event files; steps after `first_step` that an earlier try wrote are hidden.

    The library's own SummaryWriter writes in a thread: where that fails, on a full disk, the run would wait for it for ever.
    """

    def __init__(self, folder: pathlib.Path, *, first_step: int):
        # Not by `import elastic.train` for a run that wants none.
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        proto: Any = event_pb2  # its classes are made when it is imported
        self._summary, self._event, self._folder = summary, proto.Event, folder
        folder.mkdir(parents=True, exist_ok=True)
        self._file = EventsWriter(str(folder / "events"), f".{os.getpid()}")
        start = proto.SessionLog(status=proto.SessionLog.START)
        self._file.write_event(
            self._event(step=first_step + 1, wall_time=time.time(), session_log=start)
        )

    def write(self, record: Mapping[str, Any]) -> None:
        """One scalar for each number."""
        numbers = {
            _tag(name): value
            for name, value in record.items()
            if name != "step" and isinstance(value, int | float) and math.isfinite(value)
        }
        self._add(int(record["step"]), (self._summary.scalar(*item) for item in numbers.items()))

    def show(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """One image for each picture."""
        self._add(
            step,
            (self._summary.image(*item, dataformats="HWC") for item in pictures.items()),
        )

    def _add(self, step: int, summaries: Iterable[Any]) -> None:
        with _named(self._folder):
            for summary in summaries:
                self._file.write_event(
                    self._event(step=step, wall_time=time.time(), summary=summary)
                )
            self._file.flush()

    def close(self) -> None:
        """Closes the event file."""
        with _said(self._folder):
            self._file.close()


class WandB:
    """A run at Weights & Biases, resumed by its name.

    Raises:
      ValueError: wandb is not installed, or refuses.
    """

    def __init__(self, config: LogConfig, folder: pathlib.Path, settings: Mapping[str, Any]):
        try:
            import wandb  # pyright: ignore[reportMissingImports] - an option
        except ImportError as error:
            raise ValueError(
                "--logger.online=True reports to Weights & Biases, which is not installed; "
                "pip install wandb, or leave it out: metrics.jsonl and TensorBoard have the numbers."
            ) from error
        self._wandb = wandb
        name = config.wandb_name or None
        where = pathlib.Path(config.wandb_dir or folder)
        where.mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(
                project=config.wandb_project,
                name=name,
                id=name,
                resume="allow",
                dir=str(where),
                config=dict(settings),
            )
        except Exception as error:
            raise ValueError(
                f"Weights & Biases refuses: {error} Log in with `wandb login`."
            ) from error

    def write(self, record: Mapping[str, Any]) -> None:
        """One log entry."""
        self._run.log(
            {_tag(name): value for name, value in record.items()}, step=int(record["step"])
        )

    def show(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """One image for each picture."""
        images = {name: self._wandb.Image(picture) for name, picture in pictures.items()}
        self._run.log(images, step=step)

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()


class Logs(contextlib.ExitStack):
    """All writers that a run asks for.

    Args:
      folder: the run's folder.
      first_step: where it goes on; 0 begins anew.
      settings: what Weights & Biases notes down as the run's configuration.
    """

    def __init__(
        self,
        config: LogConfig,
        folder: pathlib.Path,
        *,
        first_step: int,
        settings: Mapping[str, Any],
    ):
        super().__init__()
        self._writers: list[Writer] = [MetricsFile(folder / METRICS_FILE, first_step=first_step)]
        if config.tensorboard:
            self._writers.append(TensorBoard(folder / TENSORBOARD, first_step=first_step))
        if config.wandb:
            self._writers.append(WandB(config, folder, settings))
        for writer in self._writers:
            self.callback(writer.close)

    def write(self, record: Mapping[str, Any]) -> None:
        """One record to every writer."""
        for writer in self._writers:
            writer.write(record)

    def show(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Pictures to every writer that takes them."""
        for writer in self._writers:
            writer.show(step, pictures)


def _tag(name: str) -> str:
    return name if "/" in name else f"train/{name}"


def progress_line(record: Mapping[str, Any], total_steps: int) -> str:
    """A record in one line: losses, speed, memory, the wait for data, and the time that is left at this pace."""
    step = int(record["step"])
    parts = [f"step {step}/{total_steps}"]
    parts += [f"{name} {record[name]:.4g}" for name in _FIRST if record.get(name) is not None]
    if record["gradient_norm"] is not None:
        parts.append(f"grad {record['gradient_norm']:.3g}")
    parts.append(f"lr {record['learning_rate']:.3g}")
    if "codebook_usage" in record:
        parts.append(f"codes {record['codebook_usage']:.1%}")
    parts.append(f"{record['seconds_per_step']:.3g} s/step")
    parts.append(f"{_short(record['tokens_per_second']).rstrip()} tokens/s")
    speed = f"{_short(record['model_flops_per_second'])}FLOP/s"
    share = record.get("model_flops_utilization")
    parts.append(speed if share is None else f"{speed} ({share:.0%} of the data sheet's peak)")
    parts.append(f"{record['memory_gigabytes']:.2f} GB")
    parts.append(f"data wait {record['data_wait']:.0%}")
    if record.get("skipped_steps"):
        parts.append(f"skipped {record['skipped_steps']:.0f}")
    left = (total_steps - step) * record["seconds_per_step"]
    return "  ".join([*parts, f"{_duration(left)} left"])


def _short(x: float) -> str:
    """A number and the prefix of its unit: '12.3 k', '4.5 G', '7 '."""
    for unit in ("", "k", "M", "G", "T"):
        if abs(x) < 1000:
            return f"{x:.3g} {unit}"
        x /= 1000
    return f"{x:.3g} P"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _step(line: str) -> float:
    """The step of a record; infinity for a line that was cut off by a kill."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")

"""Metrics out: one JSON object a line in `metrics.jsonl`, and the line that a person reads."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, Self

from elastic.token_file import write_atomically

SHOWN = ("loss", "psnr", "gradient_norm", "learning_rate", "seconds_per_step")


class MetricsFile:
    """Records of a run, appended as they come and flushed one by one.

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
        write_atomically(self.path, "".join(kept).encode())
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed by __exit__

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one record; it has a `step`."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()


def progress_line(record: Mapping[str, float], total_steps: int) -> str:
    """A record in one line, with the minutes that are left at this pace."""
    left = (total_steps - record["step"]) * record["seconds_per_step"] / 60
    numbers = "  ".join(f"{name} {record[name]:.4g}" for name in SHOWN)
    return f"step {record['step']:.0f}/{total_steps}  {numbers}  {left:.0f} min left"


def _step(line: str) -> float:
    """The step of a record; infinity for a line that was cut off by a kill."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")

"""The share of the work that a scheduler gives to this process: SLURM and Kubernetes tell it in the environment."""

import os
from collections.abc import Mapping
from typing import NamedTuple


class JobShare(NamedTuple):
    """This process's part of a job.

    Attributes:
      process_id: the number of this process, from 0.
      num_processes: the processes that share the work.
      source: the variables that say so, for a message.
    """

    process_id: int
    num_processes: int
    source: str


def share_of_job(environment: Mapping[str, str] = os.environ) -> JobShare | None:
    """The share that the scheduler's variables give; None: this process belongs to no job with several.

    An array of SLURM jobs (SLURM_ARRAY_TASK_ID of SLURM_ARRAY_TASK_COUNT) and the tasks of `srun` (SLURM_PROCID of
    SLURM_NTASKS) may go together: the tasks then share the part of their job. An indexed job of Kubernetes sets
    JOB_COMPLETION_INDEX alone; its file must set JOB_COMPLETIONS.

    Raises:
      ValueError: a number is there without its counterpart, or is no number in its range.
    """
    array = _part(
        environment, "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT",
        "the array's jobs share the files only with both",
        first="SLURM_ARRAY_TASK_MIN", step="SLURM_ARRAY_TASK_STEP",
    )  # fmt: skip
    tasks = _part(
        environment, "SLURM_PROCID", "SLURM_NTASKS",
        "start the command through srun",
    )  # fmt: skip
    pods = _part(
        environment, "JOB_COMPLETION_INDEX", "JOB_COMPLETIONS",
        "set it in the job's file to the number of completions",
    )  # fmt: skip
    found = [part for part in (array, tasks, pods) if part is not None]
    index, count = 0, 1
    for part in found:
        index, count = index * part.num_processes + part.process_id, count * part.num_processes
    return JobShare(index, count, ", ".join(part.source for part in found)) if count > 1 else None


def _part(
    environment: Mapping[str, str],
    index_name: str,
    count_name: str,
    way_out: str,
    *,
    first: str = "",
    step: str = "",
) -> JobShare | None:
    """The part that two variables state; None where they are not set, or where there is one process."""
    if environment.get(count_name) == "1" or not environment.keys() & {index_name, count_name}:
        return None
    for missing, other in ((index_name, count_name), (count_name, index_name)):
        if missing not in environment:
            raise ValueError(
                f"{other}={environment[other]} is set but {missing} is not: {way_out}, or give "
                "--jax_distributed.num_processes and process_id."
            )
    index, count, least, stride = (
        _number(environment, name, default)
        for name, default in ((index_name, 0), (count_name, 1), (first, 0), (step, 1))
    )
    index = (index - least) // max(stride, 1)
    if not 0 <= index < count:
        raise ValueError(
            f"{index_name}={environment[index_name]} does not lie below {count_name}={count}; give "
            "--jax_distributed.num_processes and process_id."
        )
    return JobShare(index, count, f"{index_name}={environment[index_name]}, {count_name}={count}")


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, "") if name else ""
    if not text:
        return default
    if not text.isdecimal():
        raise ValueError(f"{name}={text!r} must be a whole number.")
    return int(text)

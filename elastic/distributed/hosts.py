"""Runs on many processes: joining them, waiting for them, and the rows of a global array that each holds."""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hosts:
    """Flags `--jax_distributed.*`: how the processes of a run find each other.

    Attributes:
      initialize_jax_distributed: join the other processes before the first use of a device.
      coordinator_address: where the first process listens, as 'host:port'. '' reads the environment of a Cloud TPU,
        SLURM, Kubernetes or Open MPI job.
      num_processes: number of processes; needs coordinator_address or independent.
      process_id: the number of this process; needs coordinator_address or independent.
      local_device_ids: devices of this process, as '0,1'; '' takes all that it sees.
      independent: the processes share work but do not communicate. Without initialize_jax_distributed, num_processes
        and process_id are enough, and a process that dies stops no other. With it, only the first process stops the
        others when it dies.

    Raises:
      ValueError: the options contradict each other.
    """

    initialize_jax_distributed: bool = False
    coordinator_address: str = ""
    num_processes: int = 1
    process_id: int = 0
    local_device_ids: str = ""
    independent: bool = False

    def __post_init__(self):
        if self.independent and not self.initialize_jax_distributed:
            self._check_independent()
        elif not self.initialize_jax_distributed:
            if self.coordinator_address or self.num_processes != 1:
                raise ValueError(
                    "--jax_distributed options are given, but --jax_distributed.initialize_jax_distributed=True "
                    "is not; add it to join other processes."
                )
        else:
            self._check_joined()

    def _check_independent(self) -> None:
        if self.coordinator_address or self.local_device_ids:
            raise ValueError(
                "--jax_distributed.coordinator_address and local_device_ids need --jax_distributed.initialize_jax_distributed=True; "
                "processes that only share work need num_processes and process_id (CUDA_VISIBLE_DEVICES gives each its GPU)."
            )
        self._check_number()

    def _check_joined(self) -> None:
        if self.coordinator_address:
            self._check_number()
        elif self.num_processes != 1:
            raise ValueError(
                f"num_processes={self.num_processes} needs --jax_distributed.coordinator_address=HOST:PORT, the same for all."
            )
        if not all(part.strip().isdigit() for part in self.local_device_ids.split(",") if part):
            raise ValueError(
                f"local_device_ids={self.local_device_ids!r} must be numbers such as '0,1'."
            )

    def _check_number(self) -> None:
        if self.num_processes < 1:
            raise ValueError(f"num_processes={self.num_processes} must be 1 or more.")
        if not 0 <= self.process_id < self.num_processes:
            raise ValueError(
                f"process_id={self.process_id} must lie in 0 to {self.num_processes - 1}, below "
                f"num_processes={self.num_processes}."
            )


def join_hosts(hosts: Hosts) -> None:
    """Joins the other processes if `hosts` asks for it. Call it before jax starts its backends.

    Raises:
      ValueError: the environment does not name the processes, or they cannot be reached.
    """
    if not hosts.initialize_jax_distributed:
        return
    options: dict[str, Any] = {}
    if hosts.coordinator_address:
        options = dict(
            coordinator_address=hosts.coordinator_address,
            num_processes=hosts.num_processes,
            process_id=hosts.process_id,
        )
    if hosts.local_device_ids:
        options["local_device_ids"] = [int(part) for part in hosts.local_device_ids.split(",")]
    if hosts.independent:
        # A process that ends early leaves at once and the others continue, unless it is the first, which coordinates them.
        jax.config.update("jax_enable_recoverability", True)
        # The preemption service would intercept this process's SIGTERM.
        jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(**options)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"This process could not join the others: {' '.join(str(error).split())[:400]} Give "
            "--jax_distributed.coordinator_address, num_processes and process_id, or start it in a Cloud TPU, SLURM or "
            "Kubernetes job that sets them."
        ) from error
    log.info("Process %d of %d has joined.", jax.process_index(), jax.process_count())


def host_share(hosts: Hosts) -> tuple[int, int]:
    """The number of this process and the number of processes that share independent work. Call it after `join_hosts`."""
    if hosts.initialize_jax_distributed:
        return jax.process_index(), jax.process_count()
    return hosts.process_id, hosts.num_processes


def is_first_host() -> bool:
    """Whether this is the process that writes the files of a run."""
    return jax.process_index() == 0


def wait_for_hosts(name: str) -> None:
    """Waits until every process of the run has reached this point; with one process it returns at once."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def local_rows(sharding: NamedSharding, shape: tuple[int, ...]) -> list[int]:
    """The rows (first axis) of a global array that devices of this process hold, in ascending order."""
    parts = sharding.addressable_devices_indices_map(shape).values()
    spans = [range(*index[0].indices(shape[0])) for index in parts if index is not None]
    return sorted({row for span in spans for row in span})


def global_array(
    local: np.ndarray, rows: Sequence[int], sharding: NamedSharding, num_rows: int
) -> jax.Array:
    """The global array that the processes hold together.

    Args:
      local: this process's rows [rows, ...].
      rows: their numbers in the global array, ascending.
      sharding: how the global array is split over devices.
      num_rows: rows of the global array.
    """
    place = {row: number for number, row in enumerate(rows)}

    def part(index: Any) -> np.ndarray:  # a slice for each axis
        wanted = [place[row] for row in range(*index[0].indices(num_rows))]
        return local[wanted[0] : wanted[-1] + 1][(slice(None), *index[1:])]

    return jax.make_array_from_callback((num_rows, *local.shape[1:]), sharding, part)

"""The device mesh from `mesh_dim`, with the axes dp, fsdp, tp and sp; joining a run on many hosts; which host holds what."""

import contextlib
import dataclasses
import logging
import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding

from elastic.distributed.cpu_devices import return_after_compiling
from elastic.distributed.ring_topology import ring_grid

log = logging.getLogger(__name__)

AXES = ("dp", "fsdp", "tp", "sp")
_FLAT = ("TPU v5 lite", "TPU v5e")  # slices without links from edge to edge


def parse_mesh_dim(mesh_dim: str, num_devices: int) -> tuple[dict[str, int], bool]:
    """Axis sizes for `num_devices` devices, and whether the devices keep their order.

    Accepts '1,1,-1,1' (in the order dp, fsdp, tp, sp), 'dp:1,fsdp:-1', either with a leading '!' that
    keeps the devices in their given order. One size may be -1: what the others leave.

    Raises:
      ValueError: the string has another form, or does not multiply to `num_devices`.
    """
    keep_order = mesh_dim.startswith("!")
    parts = [part.strip() for part in mesh_dim.removeprefix("!").split(",")]
    form = f"mesh_dim={mesh_dim!r} must be four sizes such as '1,1,-1,1' ({', '.join(AXES)}) or names such as 'dp:1,tp:-1'"
    try:
        if all(":" in part for part in parts):
            named = [
                (name.strip(), int(size)) for name, size in (part.split(":", 1) for part in parts)
            ]
        else:
            named = list(zip(AXES, map(int, parts), strict=True))
    except ValueError as error:
        raise ValueError(f"{form}.") from error
    sizes = dict(named)
    if len(sizes) != len(named) or not set(sizes) <= set(AXES):
        raise ValueError(f"{form}; known axes are {', '.join(AXES)}, each once.")
    sizes = {axis: sizes.get(axis, 1) for axis in AXES}
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(f"{form}; sizes are 1 or more, and at most one is -1.")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free and num_devices % fixed == 0:
        sizes[free[0]] = num_devices // fixed
    if math.prod(sizes.values()) != num_devices:
        raise ValueError(
            f"mesh_dim={mesh_dim!r} asks for {fixed} devices{' times what is left' if free else ''}, but there are {num_devices}; "
            "make the sizes multiply to that number, or leave one of them -1."
        )
    return sizes, keep_order


def make_mesh(mesh_dim: str = "!1,1,-1,1", devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over `devices` (all devices when None).

    The one place that builds a mesh: axis types are Auto here, while jax's own `make_mesh` now defaults to explicit ones.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes, keep_order = parse_mesh_dim(mesh_dim, len(devices))
    shape = tuple(sizes[axis] for axis in AXES)
    grid = np.asarray(devices).reshape(shape) if keep_order else _placed(devices, shape)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _placed(devices: list[Any], shape: tuple[int, ...]) -> np.ndarray:
    """The devices where neighbours on an axis of the mesh are neighbours on the wire."""
    if shape[-1] > 1 and devices[0].device_kind in _FLAT:
        if (grid := ring_grid(devices, shape)) is not None:
            return grid
        log.warning(
            "No ring of sp=%d devices fits into this slice so that each sends to a neighbour; its sends may not run beside the arithmetic.",
            shape[-1],
        )
    # An axis may take part of a physical one: a ring of 32 on a torus of 4 x 4 x 4 is no rare wish.
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hosts:
    """Flags `--jax_distributed.*`: how the processes of a run find each other.

    Attributes:
      initialize_jax_distributed: join the others before the first use of a device.
      coordinator_address: where the first process listens, as 'host:port'; '' asks the environment: a
        Cloud TPU, SLURM, Kubernetes or Open MPI job says itself who takes part.
      num_processes, process_id: how many there are, and which one this is; with an address, or independent.
      local_device_ids: devices of this process, as '0,1'; '' takes all that it sees.
      independent: the processes share work and need not talk: without initialize_jax_distributed their
        number and this one's are enough, and one that dies takes no other along; with it only the first one does.

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
    """Makes this process one of many, if it is to be. Call it before jax starts its backends.

    Raises:
      ValueError: the environment does not say who takes part, or the others cannot be reached.
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
        # One that ends early leaves at once, and the others go on (unless it is the first, whom they have joined).
        jax.config.update("jax_enable_recoverability", True)
        # It would keep SIGTERM from this process.
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
    """Which share of independent work is this process's: its number, of how many. Call it after `join_hosts`."""
    if hosts.initialize_jax_distributed:
        return jax.process_index(), jax.process_count()
    return hosts.process_id, hosts.num_processes


def is_first_host() -> bool:
    """Whether this process writes what a run writes once."""
    return jax.process_index() == 0


def wait_for_hosts(name: str) -> None:
    """Returns when every process of the run has come to this point. Alone, at once."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def local_rows(sharding: NamedSharding, shape: tuple[int, ...]) -> list[int]:
    """The rows (first axis) of a global array that devices of this process hold a part of, ascending."""
    held = sharding.addressable_devices_indices_map(shape).values()
    spans = [range(*index[0].indices(shape[0])) for index in held if index is not None]
    return sorted({row for span in spans for row in span})


def global_array(
    local: np.ndarray, rows: Sequence[int], sharding: NamedSharding, num_rows: int
) -> jax.Array:
    """The global array of which this process has the rows `rows`, laid out as `sharding` says."""
    place = {row: number for number, row in enumerate(rows)}

    def part(index: Any) -> np.ndarray:  # a slice for each axis
        wanted = [place[row] for row in range(*index[0].indices(num_rows))]
        return local[wanted[0] : wanted[-1] + 1][(slice(None), *index[1:])]

    return jax.make_array_from_callback((num_rows, *local.shape[1:]), sharding, part)


def platform_of(mesh: Mesh | None) -> str:
    """'cpu', 'gpu' or 'tpu': that of the mesh's devices, or without a mesh of the default one."""
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def memory_limit(mesh: Mesh) -> int | None:
    """Bytes that the programs of this process may have on one of the mesh's devices; on a CPU the machine's. None: not known."""
    if platform_of(mesh) == "cpu":
        names = getattr(os, "sysconf_names", {})
        if not {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= names.keys():
            return None
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit")


def set_up_cpu() -> None:
    """One CPU device per core, up to 8, unless the user decided otherwise, and small memory. Call before jax starts its backends.

    Elementwise work inside loops runs on one core per device, so that attention over heads on two devices takes about 60 %
    of the time of one (measured on two cores).
    """
    return_after_compiling()
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" in flags or "JAX_NUM_CPU_DEVICES" in os.environ:
        return
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    with contextlib.suppress(RuntimeError):  # the backends run already: keep what they have
        jax.config.update("jax_num_cpu_devices", min(8, 1 << (cores.bit_length() - 1)))

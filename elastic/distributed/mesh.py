"""The device mesh of `mesh_dim`, with the axes dp, fsdp, tp and sp; platform and memory limit of its devices."""

import logging
import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from elastic.distributed.ring_topology import ring_grid

log = logging.getLogger(__name__)

AXES = ("dp", "fsdp", "tp", "sp")
_FLAT = ("TPU v5 lite", "TPU v5e")  # chips whose slices are grids without wrap-around links


def parse_mesh_dim(mesh_dim: str, num_devices: int) -> tuple[dict[str, int], bool]:
    """Axis sizes for `num_devices` devices, and whether the devices keep their order.

    Accepts '1,1,-1,1' (in the order dp, fsdp, tp, sp) or 'dp:1,fsdp:-1'. A leading '!' keeps the devices in their given
    order. One size may be -1: the number of devices divided by the other sizes.

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

    Every mesh is built here, because the code needs axes of type Auto and `jax.make_mesh` defaults to Explicit.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes, keep_order = parse_mesh_dim(mesh_dim, len(devices))
    shape = tuple(sizes[axis] for axis in AXES)
    grid = np.asarray(devices).reshape(shape) if keep_order else _placed(devices, shape)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _placed(devices: list[Any], shape: tuple[int, ...]) -> np.ndarray:
    """The devices as an array in which neighbours on a mesh axis are physical neighbours where possible."""
    if shape[-1] > 1 and devices[0].device_kind in _FLAT:
        if (grid := ring_grid(devices, shape)) is not None:
            return grid
        log.warning(
            "No ring of sp=%d devices fits into this slice with each device next to its successor; sends may not overlap with arithmetic.",
            shape[-1],
        )
    # A mesh axis may use part of a physical axis, as a ring of 32 devices on a torus of 4 x 4 x 4 must.
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def platform_of(mesh: Mesh | None) -> str:
    """The platform of the mesh's devices, or without a mesh of the default device: 'cpu', 'gpu' or 'tpu'."""
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def memory_limit(mesh: Mesh) -> int | None:
    """Bytes that this process may use on one device of the mesh; on a CPU, the machine's memory; None: not known."""
    if platform_of(mesh) == "cpu":
        names = getattr(os, "sysconf_names", {})
        if not {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= names.keys():
            return None
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit")

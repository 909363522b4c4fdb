"""Hardware to compile for without having it: names, shapes of slices, memory, device descriptions.

Import this before jax: `prepare` sets environment variables that the compilers read.
"""

import contextlib
import dataclasses
import difflib
import importlib.util
import math
import os
import re
from typing import Any

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """A kind of device.

    Attributes:
      kind: 'tpu', 'cuda' or 'cpu'.
      memory: its size as sold.
      usable_bytes: bytes that a program can use. TPU: what libtpu reports as available. GPU: all memory, though jax
        takes three quarters of it unless XLA_PYTHON_CLIENT_MEM_FRACTION is higher.
      accelerator_type: TPU: libtpu's name of the smallest machine with such chips.
      slices: TPU: number of chips -> topology, for the slices on offer.
      memory_bandwidth: GPU: bytes per second.
      description: GPU: the name that the driver gives.
    """

    kind: str
    memory: str
    usable_bytes: int
    accelerator_type: str = ""
    slices: dict[int, str] = dataclasses.field(default_factory=dict)
    memory_bandwidth: int = 0
    description: str = ""


_CUBES = {
    1: "1x1x1", 4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8",
}  # fmt: skip
_SQUARES = {
    1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16",
}  # fmt: skip
CHIPS = {
    "v4": Chip(kind="tpu", memory="32 GiB", usable_bytes=int(30.75 * GIB), accelerator_type="v4-8", slices=_CUBES),
    "v5e": Chip(kind="tpu", memory="16 GiB", usable_bytes=int(15.75 * GIB), accelerator_type="v5litepod-4", slices=_SQUARES),
    "v5p": Chip(kind="tpu", memory="95 GiB", usable_bytes=int(95.74 * GIB), accelerator_type="v5p-8", slices=_CUBES),
    "v6e": Chip(kind="tpu", memory="32 GiB", usable_bytes=int(31.25 * GIB), accelerator_type="v6e-4", slices=_SQUARES),
    "h100": Chip(kind="cuda", memory="80 GB", usable_bytes=84_942_979_072,
                 memory_bandwidth=3_352_320_000_000, description="NVIDIA H100 80GB HBM3"),
    "h200": Chip(kind="cuda", memory="141 GB", usable_bytes=151_397_597_184,
                 memory_bandwidth=4_800_000_000_000, description="NVIDIA H200 141GB HBM3e"),
    "cpu": Chip(kind="cpu", memory="", usable_bytes=0),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Target:
    """A number of chips of one kind.

    Attributes:
      name: the name of the chip, a key of `CHIPS`.
      shape: TPU: the topology of the slice, e.g. (4, 4, 4). Others: the number of chips.
    """

    name: str
    shape: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        """The kind of device."""
        return CHIPS[self.name]

    @property
    def num_chips(self) -> int:
        """The number of chips; each is one device."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.name}:{'x'.join(map(str, self.shape))}"


def parse_target(text: str) -> Target:
    """The target in 'v4:4x4x4', 'v4-64chips', 'h100', 'h100:8' or 'cpu:8'.

    Raises:
      ValueError: there is no such chip, or no such slice of them.
    """
    form = re.fullmatch(r"([a-z0-9]+)(?::(\d+(?:x\d+)*)|-(\d+)(chips?)?)?", text)
    name = form[1] if form else text.split(":")[0].split("-")[0]
    if form is None or name not in CHIPS:
        close = difflib.get_close_matches(name, CHIPS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close and close[0] != name else ""
        raise ValueError(
            f"target={text!r} must be a chip and how many, such as v4:4x4x4, v4-64chips, h100:8 or "
            f"cpu:8; known chips are {', '.join(CHIPS)}.{hint}"
        )
    if form[3] and not form[4]:
        raise ValueError(
            f"target={text!r}: Google's names of v4 and v5p slices count cores, two per chip; write "
            f"{name}-{form[3]}chips for {form[3]} chips."
        )
    slices = CHIPS[name].slices
    if form[2]:
        shape = tuple(map(int, form[2].split("x")))
        if len(shape) != (len(slices[1].split("x")) if slices else 1) or not all(shape):
            example = slices.get(16, "8")
            raise ValueError(f"target={text!r}: chips of {name} are given as in {name}:{example}.")
        return Target(name, shape)
    number = int(form[3] or 1)
    if not slices and number:
        return Target(name, (number,))
    if number not in slices:
        raise ValueError(
            f"target={text!r}: slices of {name} have {', '.join(map(str, slices))} chips; for "
            f"another shape write it out, as in {name}:{slices[16]}."
        )
    return Target(name, tuple(map(int, slices[number].split("x"))))


def prepare(target: Target) -> None:
    """Sets the environment so that jax finds the target's compiler and no accelerator.

    Call it before jax is imported.

    Raises:
      ValueError: the compiler is not installed.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    if target.chip.kind == "tpu":
        if importlib.util.find_spec("libtpu") is None:
            raise ValueError(
                f"target={str(target)!r} needs the TPU compiler; install it with: "
                "pip install 'jax[tpu]' (Linux; no TPU is needed)."
            )
        os.environ["TPU_ACCELERATOR_TYPE"] = target.chip.accelerator_type
        os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"
        os.environ["TPU_SKIP_MDS_QUERY"] = "1"
        os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # nothing runs: several may compile at once
    elif target.chip.kind == "cuda" and not _has_cuda_plugin():
        raise ValueError(
            f"target={str(target)!r} needs the CUDA compiler; install it with: "
            "pip install -r gpu_requirements.txt (Linux; no GPU is needed)."
        )


def _has_cuda_plugin() -> bool:
    try:
        return importlib.util.find_spec("jax_plugins.xla_cuda13") is not None
    except ModuleNotFoundError:  # its parent package is missing too where jax has no plugin at all
        return False


def devices(target: Target) -> list[Any]:
    """Descriptions of the target's devices to compile for; for 'cpu', virtual devices of this machine."""
    import jax
    from jax.experimental import topologies

    if target.chip.kind == "cpu":
        jax.config.update("jax_num_cpu_devices", target.num_chips)
        return jax.devices()
    if target.chip.kind == "cuda":
        topology = topologies.get_topology_desc(
            "",
            platform="cuda",
            target_config=_hopper(target.chip),
            topology=f"1x1x{target.num_chips}",  # partitions, hosts, devices of a host
        )
        return list(topology.devices)
    options: dict[str, Any] = {}
    if target.name == "v4":  # one device per chip; the default is one per core
        options["chip_config_name"] = "megacore"
    if any(size % 2 for size in target.shape[:2]):  # hosts have 2 x 2 chips
        options["chips_per_host_bounds"] = (1, 1, 1)
    topology = topologies.get_topology_desc(platform="tpu", topology_name=str(target), **options)
    return list(topology.devices)


def described(device: Any) -> contextlib.AbstractContextManager[Any]:
    """A context for tracing programs for a device. From jax 0.11 on, Pallas kernels for a GPU read the device from it."""
    import jax

    if device.platform != "gpu":
        return contextlib.nullcontext()
    abstract = jax.sharding.AbstractDevice(device.device_kind, None, device.platform)
    return jax.sharding.use_abstract_mesh(
        jax.sharding.AbstractMesh((), (), abstract_device=abstract)
    )


def _hopper(chip: Chip) -> str:
    """A GPU of compute capability 9.0 in the text form of XLA's GpuTargetConfigProto."""
    device = dict(
        threads_per_block_limit=1024,
        threads_per_warp=32,
        shared_memory_per_block=49_152,
        shared_memory_per_block_optin=232_448,
        shared_memory_per_core=233_472,
        threads_per_core_limit=2048,
        core_count=132,
        fpus_per_core=128,
        block_dim_limit_x=2**31 - 1,
        block_dim_limit_y=65_535,
        block_dim_limit_z=65_535,
        thread_dim_limit_x=1024,
        thread_dim_limit_y=1024,
        thread_dim_limit_z=64,
        registers_per_core_limit=65_536,
        registers_per_block_limit=65_536,
        memory_bandwidth=chip.memory_bandwidth,
        l2_cache_size=50 * 2**20,
        clock_rate_ghz=1.98,
        device_memory_size=chip.usable_bytes,
    )
    # The toolkit version decides the PTX version, which the driver in gpu_requirements.txt can read.
    words = dict(
        device_vendor="NVIDIA Corporation",
        driver_version="13.0.0",
        runtime_version="12.8.0",
        compile_time_toolkit_version="12.8.0",
        dnn_version="9.10.0",
    )
    lines = [f"{name}: {value}" for name, value in device.items()]
    lines += [f'{name}: "{value}"' for name, value in words.items()]
    lines.append("cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }")
    lines.append("device_interconnect_info { active_links: 18 }")
    return (
        "gpu_device_info { " + " ".join(lines) + ' } platform_name: "CUDA" '
        "dnn_version_info { major: 9 minor: 10 patch: 0 } "
        f'device_description_str: "{chip.description}"'
    )

"""Measures training steps on this machine and prints one JSON object: seconds, tokens/s, FLOP/s, memory.

  python3 scripts/bench/train.py                                  # debug and 200m-fsq, fp32
  python3 scripts/bench/train.py --cases=debug --dtypes=fp32,bf16 --mesh_dim='!2,1,1,1'
  python3 scripts/bench/train.py --cases=200m-fsq-16k --dtypes=bf16   # on an accelerator

Each case runs in a process of its own, so that its peak memory is its own. Data are random: time does not depend on them. What the
data path delivers is measured by scripts/bench/data.py.
"""

import json
import pathlib
import sys
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from scripts.bench.inference import (  # noqa: E402
    case_parser,
    hardware,
    in_new_process,
    parse_cases,
    peak_memory_mb,
    start_jax,
)

_LONG = "remat_block='nothing_saveable',scan_mlp=True"
# Preset, changes, sequences in a step.
CASES = {
    "tiny": (
        "debug",
        "dict(hidden_size=64,intermediate_size=96,num_encoder_layers=1,num_decoder_layers=1,max_toks=64,min_toks=4,max_sequence_length=128,attention_implementation='reference')",
        1,
    ),
    "debug": ("debug", "dict(max_toks=256,min_toks=16,max_sequence_length=1024)", 2),
    "200m-fsq": ("200m", "dict(max_sequence_length=4096)", 1),
    "200m-vae": (
        "200m",
        "dict(bottleneck_type='vae',patch_size=(2,8,8),max_toks=2048,min_toks=128,theta=5000000,max_sequence_length=2048)",
        2,
    ),
    "200m-fsq-16k": ("200m", f"dict(max_sequence_length=16384,{_LONG})", 1),
    "200m-fsq-32k": ("200m", f"dict(max_sequence_length=32768,{_LONG})", 1),
    "200m-fsq-64k": ("200m", f"dict(max_sequence_length=65536,{_LONG})", 1),
    "200m-fsq-128k": ("200m", f"dict(max_sequence_length=131072,{_LONG})", 1),
    "small-fsq": ("small-fsq", "dict()", 1),
    "small-vae": ("small-vae", "dict()", 4),
}


def main() -> None:
    """Runs the cases asked for and prints what they measured."""
    parser = case_parser(str(__doc__), CASES, default="debug,200m-fsq", repeats=5)
    parser.add_argument("--mesh_dim", default="!1,1,-1,1", help="devices along dp,fsdp,tp,sp")
    parser.add_argument("--lpips", action="store_true", help="with the perceptual loss")
    parser.add_argument(
        "--update_elastic_config", default="dict()", help="changes to every case's model"
    )
    arguments = parse_cases(parser, CASES)
    results: dict[str, Any] = {"hardware": in_new_process(hardware, arguments.devices)}
    for dtype in arguments.dtypes.split(","):
        for case in arguments.cases.split(","):
            results[f"{case} {dtype}"] = in_new_process(measure, case, dtype, vars(arguments))
    print(json.dumps(results, indent=2))


def measure(case: str, dtype: str, options: dict[str, Any]) -> dict[str, Any]:
    """The median of some steps, after two that compile and warm up."""
    jax = start_jax(options["devices"])
    import numpy as np

    from elastic.config import load_config, update_config
    from elastic.data.config import DataConfig
    from elastic.distributed.mesh import make_mesh
    from elastic.metrics import load_lpips_weights
    from elastic.model import ElasticTok
    from elastic.model.flops import peak_flops, training_flops
    from elastic.training.config import TrainConfig
    from elastic.training.feed import DeviceBatches
    from elastic.training.optimizer import make_optimizer
    from elastic.training.state import first_state, state_layout
    from elastic.training.step import step_program
    from elastic.training.throughput import memory_in_use

    preset, changes, batch_size = CASES[case]
    model_config = update_config(load_config(preset), changes)
    model_config = update_config(model_config, options["update_elastic_config"])
    model_config = model_config.replace(lpips_loss_ratio=0.1 if options["lpips"] else 0.0)
    length = model_config.max_sequence_length
    config = TrainConfig(
        data=DataConfig(path="not read", batch_size=batch_size),
        output_dir="not written",
        mesh_dim=options["mesh_dim"],
        dtype=dtype,
    )
    mesh = make_mesh(config.mesh_dim)
    optimizer = make_optimizer(config.optimizer)
    layout = state_layout(config, model_config, optimizer, mesh)
    state = first_state(config, model_config, optimizer, layout, lambda *_: np.zeros(0))
    model = ElasticTok(model_config, dtype=config.compute_dtype, mesh=mesh)
    step = step_program(config, model, optimizer, layout[1])
    vgg = load_lpips_weights() if options["lpips"] else None
    batch = DeviceBatches(mesh, config.data, model_config).placed(
        random_sequences(model_config, batch_size, length)
    )

    times = []
    for number in range(options["repeats"] + 2):
        started = time.perf_counter()
        state, terms = step(state, batch, vgg)
        jax.block_until_ready(terms)
        times.append(time.perf_counter() - started)
        if number == 0:
            print(f"{case} {dtype}: compiled in {times[0]:.1f} s", file=sys.stderr, flush=True)
    seconds = float(np.median(times[2:]))
    rate = batch_size * training_flops(model_config, length) / seconds
    device = jax.devices()[0]
    peak = peak_flops(device.device_kind)
    return {
        "device": device.device_kind,
        "mesh": dict(mesh.shape),
        "batch": batch_size,
        "tokens": length,
        "seconds_per_step": round(seconds, 4),
        "tokens_per_second": round(batch_size * length / seconds, 1),
        "model_gflops": round(rate / 1e9, 1),
        "share_of_peak": None if peak is None else round(rate / mesh.size / peak, 4),
        "compile_seconds": round(times[0], 1),
        "memory_mb": round(memory_in_use() / 1e6),
        "host_memory_mb": peak_memory_mb(),
        "loss": float(terms["loss"]),
    }


def random_sequences(model_config: Any, batch_size: int, length: int) -> Any:
    """A batch of noise, one file a sequence."""
    import numpy as np

    from elastic.data.dataset import HostBatch

    blocks = (batch_size, length // model_config.tokens_per_block)
    pixels = np.random.default_rng(0).integers(
        0, 256, (batch_size, length, model_config.patch_dim), np.uint8
    )
    places = np.broadcast_to(np.arange(blocks[1], dtype=np.int32), blocks)
    return HostBatch(pixels, np.zeros(blocks, np.int32), places, np.ones(blocks, bool))


if __name__ == "__main__":
    main()

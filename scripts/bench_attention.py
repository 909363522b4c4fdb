"""Measures attention alone on this machine and prints one JSON object.

  python3 scripts/bench_attention.py                                    # what suits the device
  python3 scripts/bench_attention.py --lengths=16384 --dtypes=fp32,bf16 --devices=1,2

Block-causal self-attention (forward; forward and backward), and one block on a cached past that is filled to 1, 4 and 16 of 16
blocks. GFLOP/s count visible pairs of queries and keys alone: 4 d for each forward, 14 d for forward and backward. Where PyTorch is
installed its scaled_dot_product_attention, called once for each row of blocks, runs beside ours on the CPU. `--implementations` also takes
`jax.nn-xla` and `jax.nn-cudnn` (on a GPU): jax.nn's attention, called the same way. Each case runs in a process of its own.
"""

import argparse
import functools
import importlib.util
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from elastic.flops import visible_pairs
from scripts.bench_inference import (
    hardware,
    in_new_process,
    median_seconds,
    peak_memory_mb,
    start_jax,
)

HEADS, HEAD_DIM = 8, 128
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def main() -> None:
    """Runs the cases asked for and prints what they measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", default="16384", help="tokens, comma-separated")
    parser.add_argument("--block", type=int, default=4096, help="tokens of a block")
    parser.add_argument("--dtypes", default="fp32,bf16", help="comma-separated, of: fp32, bf16")
    parser.add_argument(
        "--implementations", default="", help="comma-separated; empty: the best for the device"
    )
    parser.add_argument("--devices", default="1", help="virtual CPU devices to share the heads")
    parser.add_argument("--tiles", default="1024x512", help="queries x keys, comma-separated")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs; the median is printed")
    arguments = parser.parse_args()

    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    results: dict[str, Any] = {"hardware": in_new_process(hardware, 1), "cases": []}
    rates = results["hardware"]["matrix_gflops"]
    for dtype in arguments.dtypes.split(","):
        for length in numbers(arguments.lengths):
            runs: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
                (ours, (length, arguments.block, dtype, name, devices, tiles, arguments.repeats))
                for name in arguments.implementations.split(",")
                for devices in numbers(arguments.devices)
                for tiles in arguments.tiles.split(",")
            ]
            if importlib.util.find_spec("torch"):
                runs.append((pytorch, (length, arguments.block, dtype, arguments.repeats)))
            for function, values in runs:
                case = in_new_process(function, *values)
                for name in ("forward", "forward_backward"):
                    if name in case:
                        case[f"{name}_share_of_matrix_rate"] = round(
                            case[name]["gflops"] / rates[dtype], 3
                        )
                results["cases"].append(case)
    print(json.dumps(results, indent=2))


def figures(seconds: float, flops: float) -> dict[str, float]:
    """Seconds and rate."""
    return {"seconds": round(seconds, 4), "gflops": round(flops / seconds / 1e9, 1)}


def ours(
    length: int, block: int, dtype: str, name: str, devices: int, tiles: str, repeats: int
) -> dict[str, Any]:
    """One of our implementations."""
    jax = start_jax(devices)
    import jax.numpy as jnp

    from elastic import ops
    from elastic.mesh import make_mesh

    mesh = make_mesh("1,1,-1,1")
    q_tile, kv_tile = (int(size) for size in tiles.split("x"))
    options: dict[str, Any] = dict(
        mesh=mesh, implementation=name or None, q_tile=q_tile, kv_tile=kv_tile
    )
    keys = jax.random.split(jax.random.key(0), 3)
    shape = (1, length, HEADS, HEAD_DIM)
    q, k, v = (jax.random.normal(key, shape, DTYPES[dtype]) for key in keys)

    def attend(q, k, v):
        if name.startswith("jax.nn-"):
            call = functools.partial(
                jax.nn.dot_product_attention, implementation=name.removeprefix("jax.nn-")
            )
            rows = [
                call(q[:, at : at + block], k[:, : at + block], v[:, : at + block])
                for at in range(0, length, block)
            ]
            return jnp.concatenate(rows, axis=1)
        return ops.attention(q, k, v, block_size=block, **options)

    forward = jax.jit(attend)
    both = jax.jit(
        jax.grad(lambda *qkv: jnp.sum(jnp.square(attend(*qkv).astype(jnp.float32))), (0, 1, 2))
    )
    flops = 4.0 * visible_pairs(length, block) * HEADS * HEAD_DIM

    def timed(run: Callable[..., Any]) -> float:
        return median_seconds(lambda: jax.block_until_ready(run(q, k, v)), repeats)

    foreign = name.startswith("jax.nn-")
    result: dict[str, Any] = {
        "implementation": name if foreign else ops.choose_implementation(name, mesh=mesh),
        "dtype": dtype, "length": length, "block": block, "devices": mesh.size, "tiles": tiles,
        "forward": figures(timed(forward), flops),
        "forward_backward": figures(timed(both), 3.5 * flops),
        "peak_memory_mb": peak_memory_mb(),
    }  # fmt: skip
    if not foreign:
        result["cached_past"] = cached_past(block, DTYPES[dtype], options, repeats)
    return result


def cached_past(block: int, dtype: str, options: dict[str, Any], repeats: int) -> dict[str, Any]:
    """One block, on a past for 16 blocks that holds 1, 4 or 16."""
    import jax
    import jax.numpy as jnp

    from elastic import ops

    shape = (1, block, HEADS, HEAD_DIM)
    q, k, v = (
        jax.random.normal(key, shape, dtype) for key in jax.random.split(jax.random.key(1), 3)
    )
    stored = "uint16" if dtype == "bfloat16" and jax.default_backend() == "cpu" else dtype
    cache = jnp.zeros((1, 1, HEADS, 16 * block, HEAD_DIM), stored)
    attend = jax.jit(
        lambda q, past: ops.attention_with_past(q, k, v, past=past, layer=jnp.int32(0), **options)
    )

    def timed(filled: int) -> float:
        past = ops.Past(cache, cache, jnp.full(1, filled * block, jnp.int32))
        return median_seconds(lambda: attend(q, past).block_until_ready(), repeats)

    seconds = {filled: timed(filled) for filled in (1, 4, 16)}
    per_block = {  # the block itself counts as one more
        filled: value / (filled + 1) for filled, value in seconds.items()
    }
    return {
        "block": block,
        "seconds": {str(filled): round(value, 4) for filled, value in seconds.items()},
        "seconds_per_visible_block_relative_to_16": {
            str(filled): round(value / per_block[16], 3) for filled, value in per_block.items()
        },
    }


def pytorch(length: int, block: int, dtype: str, repeats: int) -> dict[str, Any]:
    """PyTorch's attention on the CPU, exact, one call for each row of blocks."""
    import torch  # pyright: ignore[reportMissingImports]

    kind = getattr(torch, DTYPES[dtype])
    q, k, v = (torch.randn(1, HEADS, length, HEAD_DIM).to(kind).requires_grad_() for _ in range(3))

    def attend() -> Any:
        attention = torch.nn.functional.scaled_dot_product_attention
        rows = [
            attention(q[:, :, at : at + block], k[:, :, : at + block], v[:, :, : at + block])
            for at in range(0, length, block)
        ]
        return torch.cat(rows, dim=2)

    def forward() -> None:
        with torch.no_grad():
            attend()

    flops = 4.0 * visible_pairs(length, block) * HEADS * HEAD_DIM
    return {
        "implementation": f"torch {torch.__version__}",
        "dtype": dtype, "length": length, "block": block, "devices": 1,
        "forward": figures(median_seconds(forward, repeats), flops),
        "forward_backward": figures(
            median_seconds(lambda: attend().float().square().sum().backward(), repeats), 3.5 * flops
        ),
        "peak_memory_mb": peak_memory_mb(),
    }  # fmt: skip


if __name__ == "__main__":
    main()

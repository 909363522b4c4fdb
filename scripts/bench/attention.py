"""Measures attention alone on this machine and prints one JSON object.

  python3 scripts/bench/attention.py                                    # what suits the device
  python3 scripts/bench/attention.py --lengths=16384 --dtypes=fp32,bf16 --devices=1,2

Block-causal self-attention (forward; forward and backward), and one block on a cache that is filled to 1, 4 and 16 of 16
blocks. GFLOP/s count visible pairs of queries and keys alone: 4 d for each forward, 14 d for forward and backward. Where PyTorch is
installed, it runs beside ours: on the CPU its scaled_dot_product_attention, called once for each row of blocks, on a GPU FlexAttention
with a mask of blocks. `--implementations` also takes others' for comparison: `jax.nn-xla` and `jax.nn-cudnn`, called once for each row
of blocks, and, where tokamax is installed, `tokamax-mosaic_gpu` and `tokamax-triton`.

Each case runs in a process of its own; with --together the cases of one implementation share a process, which saves starts on a GPU.
"""

import argparse
import functools
import importlib.util
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from elastic.model.flops import visible_pairs
from scripts.bench.inference import (
    hardware,
    in_new_process,
    median_of_runs,
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
    parser.add_argument(
        "--together", action="store_true", help="one process for all lengths of an implementation"
    )
    parser.add_argument("--repeats", type=int, default=3, help="timed runs; the median is printed")
    arguments = parser.parse_args()

    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    results: dict[str, Any] = {"hardware": in_new_process(hardware, 1), "cases": []}
    rates = results["hardware"]["matrix_gflops"]
    lengths = numbers(arguments.lengths)
    for dtype in arguments.dtypes.split(","):
        runs: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
            (ours, (arguments.block, dtype, name, devices, tiles, arguments.repeats))
            for name in arguments.implementations.split(",")
            for devices in numbers(arguments.devices)
            for tiles in arguments.tiles.split(",")
        ]
        if importlib.util.find_spec("torch"):
            runs.append((pytorch, (arguments.block, dtype, arguments.repeats)))
        for function, values in runs:
            for group in [lengths] if arguments.together else [[length] for length in lengths]:
                for case in in_new_process(of_lengths, function, group, values):
                    for name in ("forward", "forward_backward"):
                        if name in case:
                            case[f"{name}_share_of_matrix_rate"] = round(
                                case[name]["gflops"] / rates[dtype], 3
                            )
                    results["cases"].append(case)
                    print(json.dumps(case), file=sys.stderr, flush=True)
    print(json.dumps(results, indent=2))


def of_lengths(
    function: Callable[..., dict[str, Any]], lengths: list[int], values: tuple[Any, ...]
) -> list[dict[str, Any]]:
    """The function's result for each length, or the reason why the machine or a library refuses it."""
    cases = []
    for length in lengths:
        try:
            cases.append(function(length, *values))
        except Exception as error:  # noqa: BLE001 - others' libraries, any of theirs
            cases.append({"length": length, "of": values, "error": f"{error!r:.300}"})
    return cases


def figures(seconds: float, flops: float) -> dict[str, float]:
    """Seconds, and GFLOP/s."""
    return {"seconds": round(seconds, 4), "gflops": round(flops / seconds / 1e9, 1)}


def ours(
    length: int, block: int, dtype: str, name: str, devices: int, tiles: str, repeats: int
) -> dict[str, Any]:
    """One of our implementations."""
    jax = start_jax(devices)
    import jax.numpy as jnp

    from elastic import ops
    from elastic.distributed.mesh import make_mesh

    mesh = make_mesh("1,1,-1,1")
    q_tile, kv_tile = (int(size) for size in tiles.split("x"))
    options: dict[str, Any] = dict(
        mesh=mesh, implementation=name or None, q_tile=q_tile, kv_tile=kv_tile
    )
    keys = jax.random.split(jax.random.key(0), 3)
    shape = (1, length, HEADS, HEAD_DIM)
    q, k, v = (jax.random.normal(key, shape, DTYPES[dtype]) for key in keys)

    foreign = name.startswith(("jax.nn-", "tokamax-"))
    attend = (
        others(name, length, block)
        if foreign
        else functools.partial(ops.attention, block_size=block, **options)
    )
    forward = jax.jit(attend)
    both = jax.jit(
        jax.grad(lambda *qkv: jnp.sum(jnp.square(attend(*qkv).astype(jnp.float32))), (0, 1, 2))
    )
    flops = 4.0 * visible_pairs(length, block) * HEADS * HEAD_DIM

    def timed(run: Callable[..., Any]) -> float:
        return median_seconds(lambda: run(q, k, v), repeats)

    result: dict[str, Any] = {
        "implementation": name if foreign else ops.choose_implementation(name, mesh=mesh),
        "dtype": dtype, "length": length, "block": block, "devices": mesh.size, "tiles": tiles,
        "forward": figures(timed(forward), flops),
        "forward_backward": figures(timed(both), 3.5 * flops),
        "peak_memory_mb": peak_memory_mb(),
    }  # fmt: skip
    if not foreign:
        result["cache"] = cached_attention(block, DTYPES[dtype], options, repeats)
    return result


def others(name: str, length: int, block: int) -> Callable[..., Any]:
    """Another library's attention with the same rule."""
    import jax
    import jax.numpy as jnp

    library, implementation = name.split("-", 1)
    if library == "tokamax":
        from tokamax._src.ops.attention import api, base  # pyright: ignore[reportMissingImports]

        ends = (jnp.arange(length, dtype=jnp.int32) // block + 1) * block
        mask = base.Mask(k_end=ends[None, None])  # its public function knows no such mask
        return functools.partial(
            api.IMPLEMENTATIONS[implementation], mask=mask, logits_scale=HEAD_DIM**-0.5
        )

    def by_rows_of_blocks(q, k, v):
        attention: Any = jax.nn.dot_product_attention
        call = functools.partial(attention, implementation=implementation)
        rows = [call(q[:, own], k[:, seen], v[:, seen]) for own, seen in blocks_of(length, block)]
        return jnp.concatenate(rows, axis=1)

    return by_rows_of_blocks


def blocks_of(length: int, block: int) -> list[tuple[slice, slice]]:
    """The queries of each block, and the keys that they see."""
    return [(slice(at, at + block), slice(0, at + block)) for at in range(0, length, block)]


def cached_attention(
    block: int, dtype: str, options: dict[str, Any], repeats: int
) -> dict[str, Any]:
    """Times of one block on a cache for 16 blocks that holds 1, 4 or 16 blocks."""
    import jax
    import jax.numpy as jnp

    from elastic import ops

    shape = (1, block, HEADS, HEAD_DIM)
    q, k, v = (
        jax.random.normal(key, shape, dtype) for key in jax.random.split(jax.random.key(1), 3)
    )
    stored = "uint16" if dtype == "bfloat16" and jax.default_backend() == "cpu" else dtype
    zeros = jnp.zeros((1, 1, HEADS, 16 * block, HEAD_DIM), stored)
    attend = jax.jit(
        lambda q, cache: ops.attention_with_cache(
            q, k, v, cache=cache, layer=jnp.int32(0), **options
        )
    )

    def timed(filled: int) -> float:
        cache = ops.KVCache(zeros, zeros, jnp.full(1, filled * block, jnp.int32))
        return median_seconds(lambda: attend(q, cache), repeats)

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
    """PyTorch's attention, exact: on the CPU one call for each row of blocks, on a GPU FlexAttention."""
    import torch  # pyright: ignore[reportMissingImports]

    cuda = torch.cuda.is_available()
    kind, device = getattr(torch, DTYPES[dtype]), "cuda" if cuda else "cpu"
    q, k, v, dout = (
        torch.randn(1, HEADS, length, HEAD_DIM, device=device).to(kind) for _ in range(4)
    )
    for x in (q, k, v):
        x.requires_grad_()

    def by_rows_of_blocks(q: Any, k: Any, v: Any) -> Any:
        attention = torch.nn.functional.scaled_dot_product_attention
        rows = [
            attention(q[:, :, own], k[:, :, seen], v[:, :, seen])
            for own, seen in blocks_of(length, block)
        ]
        return torch.cat(rows, dim=2)

    attend = flex_attention(length, block) if cuda else by_rows_of_blocks

    def forward() -> None:
        with torch.no_grad():
            attend(q, k, v)

    def both() -> None:
        q.grad = k.grad = v.grad = None
        attend(q, k, v).backward(dout)

    def timed(run: Callable[[], None]) -> float:
        def wait(_: Any) -> None:
            if cuda:
                torch.cuda.synchronize()

        return median_of_runs(run, wait, repeats, queued=cuda)

    flops = 4.0 * visible_pairs(length, block) * HEADS * HEAD_DIM
    return {
        "implementation": f"torch {torch.__version__}{' FlexAttention' if cuda else ''}",
        "dtype": dtype, "length": length, "block": block, "devices": 1,
        "forward": figures(timed(forward), flops),
        "forward_backward": figures(timed(both), 3.5 * flops),
        "peak_memory_mb": peak_memory_mb(),
    }  # fmt: skip


def flex_attention(length: int, block: int) -> Callable[..., Any]:
    """FlexAttention, compiled, with a mask of blocks."""
    import torch  # pyright: ignore[reportMissingImports]
    from torch.nn.attention import flex_attention as flex  # pyright: ignore[reportMissingImports]

    mask = flex.create_block_mask(
        lambda b, h, i, j: j // block <= i // block, None, None, length, length, device="cuda"
    )
    return functools.partial(torch.compile(flex.flex_attention, dynamic=False), block_mask=mask)


if __name__ == "__main__":
    main()

"""Measures tokenizing on this machine and prints one JSON object: passes, seconds, memory, share of the matrix rate.

  python3 scripts/bench/inference.py                                  # every case, fp32
  python3 scripts/bench/inference.py --cases=200m-fsq --dtypes=fp32,bf16

Each case runs in a process of its own, so that its peak memory is its own. Weights are random except for those in example/: time does
not depend on them, only the number of passes does.
"""

import argparse
import concurrent.futures
import functools
import json
import multiprocessing
import os
import pathlib
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterable
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

# The released command's settings; a block is 4 frames of 256 x 256 pixels.
CASES = {
    "200m-fsq": "dict()",
    "200m-vae": "dict(bottleneck_type='vae',patch_size=(2,8,8),max_toks=2048,min_toks=128,theta=5000000,max_sequence_length=8192)",
    "debug": "dict(max_toks=256,min_toks=16,max_sequence_length=1024)",
    "example-fsq": "",
    "example-vae": "",
}
BLOCKS = 4
_LEAST_SECONDS = 0.1  # of what is timed on an accelerator


def main() -> None:
    """Runs the cases asked for and prints what they measured."""
    parser = case_parser(str(__doc__), CASES, default=",".join(CASES), repeats=3)
    arguments = parse_cases(parser, CASES)
    results: dict[str, Any] = {"hardware": in_new_process(hardware, arguments.devices)}
    for dtype in arguments.dtypes.split(","):
        for case in arguments.cases.split(","):
            results[f"{case} {dtype}"] = in_new_process(
                measure, case, dtype, arguments.repeats, arguments.devices
            )
    rates = results["hardware"]["matrix_gflops"]
    for result in results.values():
        for figures in result.get("passes", {}).values():
            figures["share_of_fp32_matrix_rate"] = round(figures["gflops"] / rates["fp32"], 3)
    print(json.dumps(results, indent=2))


def case_parser(
    description: str, cases: Iterable[str], *, default: str, repeats: int
) -> argparse.ArgumentParser:
    """The options of a benchmark that runs named cases; more may be added."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default=default, help=f"comma-separated, of: {', '.join(cases)}")
    parser.add_argument("--dtypes", default="fp32", help="comma-separated, of: fp32, bf16")
    parser.add_argument(
        "--repeats", type=int, default=repeats, help="timed runs; the median is printed"
    )
    parser.add_argument(
        "--devices",
        type=int,
        default=os.cpu_count(),
        help="virtual CPU devices; as many as cores, as the scripts do",
    )
    return parser


def parse_cases(parser: argparse.ArgumentParser, cases: Collection[str]) -> argparse.Namespace:
    """Parses the command line; an unknown case is an error."""
    arguments = parser.parse_args()
    unknown = [case for case in arguments.cases.split(",") if case not in cases]
    if unknown:
        parser.error(f"unknown cases {unknown}; known are {', '.join(cases)}")
    return arguments


def in_new_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's result, computed in a fresh process."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def start_jax(num_devices: int) -> Any:
    """Imports jax, set up as in the scripts, with this number of CPU devices or with the accelerator."""
    import jax

    from elastic.distributed.cpu_devices import return_after_compiling

    return_after_compiling()
    jax.config.update("jax_num_cpu_devices", num_devices)
    return jax


def median_seconds(run: Callable[[], Any], repeats: int) -> float:
    """Median wall-clock time of a run, until its results are there; a first run is not counted."""
    import jax

    return median_of_runs(
        run, jax.block_until_ready, repeats, queued=jax.default_backend() != "cpu"
    )


def median_of_runs(
    run: Callable[[], Any], wait_for: Callable[[Any], Any], repeats: int, *, queued: bool
) -> float:
    """The same for any library. `queued`: short runs are started many times in a row, and timed together."""

    def timed(count: int) -> float:
        started = time.perf_counter()
        for _ in range(count):
            result = run()
        wait_for(result)
        return (time.perf_counter() - started) / count

    timed(1)
    count = max(1, min(100, round(_LEAST_SECONDS / timed(1)))) if queued else 1
    return statistics.median(timed(count) for _ in range(repeats))


def hardware(num_devices: int, size: int | None = None) -> dict[str, Any]:
    """The machine, and how fast it multiplies matrices (bf16: operands in bfloat16, sums in float32).

    They are of `size` x `size` numbers, drawn at random: zeros and ones can be faster. None: 3072, on an accelerator 8192.
    """
    jax = start_jax(num_devices)
    import jax.numpy as jnp

    from elastic.ops.dense import dot

    size = size or (3072 if jax.default_backend() == "cpu" else 8192)
    rates = {}
    for name, dtype in (("fp32", jnp.float32), ("bf16", jnp.bfloat16)):
        x = jax.random.normal(jax.random.key(0), (size, size), dtype)
        seconds = median_seconds(functools.partial(jax.jit(dot), x, x), 5)
        rates[name] = round(2 * size**3 / seconds / 1e9, 1)
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "num_devices": num_devices,
        "processor": (names or [platform.processor()])[0],
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "matrix_gflops": rates,
    }


def measure(case: str, dtype: str, repeats: int, num_devices: int) -> dict[str, Any]:
    """One case: passes on a growing cache, then a whole search."""
    jax = start_jax(num_devices)
    import numpy as np

    from elastic.config import load_config, update_config
    from elastic.model import param_shapes
    from elastic.model.flops import forward_flops
    from elastic.patches import patchify
    from elastic.tokenizer import ElasticTokenizer

    if case.startswith("example-"):
        folder = ROOT / "example" / case.removeprefix("example-")
        tokenizer = ElasticTokenizer.from_pretrained(folder, dtype=dtype, window_blocks=BLOCKS)
    else:
        config = update_config(load_config("debug" if case == "debug" else "200m"), CASES[case])
        rng = np.random.default_rng(0)
        params = jax.tree.map(  # NumPy's bfloat16, as a released file is read
            lambda leaf: (0.02 * rng.standard_normal(leaf.shape, np.float32)).astype("bfloat16"),
            param_shapes(config),
        )
        tokenizer = ElasticTokenizer(config, params, dtype=dtype, window_blocks=BLOCKS)
        del params
    config, codec = tokenizer.config, tokenizer.codec
    frames = np.random.default_rng(1).integers(
        0,
        256,
        (BLOCKS * config.frames_per_block, config.resolution, config.resolution, 3),
        np.uint8,
    )
    patches = patchify(
        frames.reshape(BLOCKS, 1, -1, *frames.shape[1:]), config.patch_size, config.token_order
    )
    counts = np.full((1, 1), config.max_toks, np.int32)

    cache, passes = codec.new_cache(), {}
    for block in range(BLOCKS):
        if block in (0, BLOCKS - 1):
            run = functools.partial(
                codec.try_counts, tokenizer.weights, cache, patches[block], counts, keep=False
            )
            seconds = median_seconds(lambda run=run: run().losses, repeats)
            flops = forward_flops(config, config.max_toks, cache=block * config.max_toks)
            passes[f"block {block + 1}"] = {
                "seconds": round(seconds, 4),
                "gflops": round(flops / seconds / 1e9, 1),
            }
        peak_of_passes = peak_memory_mb()
        if (
            block < BLOCKS - 1
        ):  # the cache is zeros of the right length: as slow as real numbers, and no trial is held
            cache = cache._replace(
                encoder=cache.encoder._replace(length=cache.encoder.length + config.max_toks),
                decoder=cache.decoder._replace(length=cache.decoder.length + config.max_toks),
                num_blocks=cache.num_blocks + 1,
            )
    result = {
        "passes": passes,
        "peak_memory_mb_of_passes": peak_of_passes,
        "cache_mb": round(codec.cache_bytes() / 1e6),
    }
    del cache
    if not case.startswith("200m"):
        result["search"] = search(tokenizer, frames, repeats)
        result["peak_memory_mb"] = peak_memory_mb()
    return result


def search(tokenizer: Any, frames: Any, repeats: int) -> dict[str, Any]:
    """Whole tokenizations of the frames at the median loss of half of the tokens, by every search, and by a fixed count as large.

    The example's own clip with its own model; noise with random weights, whose curves no search can guess.
    """
    config, clip = tokenizer.config, frames
    if tokenizer.prior is not None:
        from elastic import media

        with media.open_clip(
            ROOT / "example" / "video.mp4", resolution=config.resolution, max_frames=48
        ) as reader:
            clip = reader.read()
    losses = [
        block.loss for block in tokenizer.encode(clip, num_tokens=config.max_toks // 2).blocks
    ]
    threshold = statistics.median(losses)
    found: dict[str, Any] = {"frames": len(clip), "threshold": threshold}
    mean = config.max_toks // 2
    for name in ("predict", "binary", "fixed"):
        options: dict[str, Any] = dict(threshold=threshold, search=name)
        if name == "fixed":
            options = dict(num_tokens=mean)
        results = list(tokenizer.stream(clip, **options))
        tokens = [result.tokens.num_kept for result in results]
        if name == "predict":
            mean = round(statistics.mean(tokens))
        seconds = median_seconds(functools.partial(tokenizer.encode, clip, **options), repeats)
        found[name] = {
            "seconds": round(seconds, 4),
            "frames_per_second": round(len(clip) / seconds, 1),
            "passes_per_block": round(statistics.mean(r.passes for r in results), 3),
            "mean_tokens": round(statistics.mean(tokens), 1),
            "blocks_met": sum(result.tokens.met_threshold for result in results),
        }
    return found


def peak_memory_mb() -> int:
    """Largest resident memory of this process so far."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6)


if __name__ == "__main__":
    main()

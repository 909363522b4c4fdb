"""Checks and measures one GPU, and writes gpu_check.json and gpu_check.md with the date and the hardware.

  python3 scripts/bench/gpu_check.py          # one GPU, under five minutes
  python3 scripts/bench/gpu_check.py --toy    # the same at toy sizes on the CPU, kernels interpreted: tries this script out

Four sections: `kernels` compares every attention kernel with the reference (values; gradients; packed files; a KV cache),
`tokenizing` runs the 200m models with a linear start on 33 frames, `training` takes steps of 16K tokens, `attention`
measures attention beside cuDNN, tokamax, plain XLA and FlexAttention; a library that is not installed is named. On a GPU
each section runs in processes of its own, because a process keeps the memory that it took. What is done is written at once.
Exit code 1: a kernel differs by more than its limit, or a section failed.
"""

import argparse
import contextlib
import datetime
import functools
import importlib.metadata
import importlib.util
import pathlib
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import scripts.bench.attention as attention_bench  # noqa: E402
import scripts.bench.inference as inference_bench  # noqa: E402
import scripts.bench.train as train_bench  # noqa: E402
from elastic.io.atomic import atomic_write  # noqa: E402
from elastic.io.json_file import write_json  # noqa: E402
from scripts.bench.inference import in_new_process, start_jax  # noqa: E402

_TINY = dict(
    hidden_size=64, intermediate_size=96, num_attention_heads=2, num_encoder_layers=1, num_decoder_layers=1, min_toks=4, max_toks=16,
    max_sequence_length=64, attention_implementation="reference",  # which compiles fastest
)  # fmt: skip


class Sizes(NamedTuple):
    """How large everything is."""

    dtypes: tuple[str, ...]  # of the kernels' comparison
    cases: tuple[str, ...]  # of it
    length: int  # tokens of the kernels' comparison
    block: int  # tokens of a block there
    heads: int
    models: dict[str, str]  # FSQ, VAE: changes to the 200m model, as a literal
    frames: int  # of a clip
    clips: tuple[int, ...]  # how many go through a model at once
    dtype: str  # of models and of the table of attention
    train_case: str  # of scripts/bench/train.py
    lengths: tuple[int, ...]  # tokens of the table of attention
    table_block: int  # tokens of a block there
    repeats: int


FULL = Sizes(
    dtypes=("fp32", "bf16"),
    cases=("plain", "packed", "cached"),
    length=4096,
    block=1024,
    heads=8,
    models={kind: inference_bench.CASES[f"200m-{kind.lower()}"] for kind in ("FSQ", "VAE")},
    frames=33,
    clips=(1, 8),
    dtype="bf16",
    train_case="200m-fsq-16k",
    lengths=(4096, 16384, 65536),
    table_block=4096,
    repeats=3,
)
TOY = Sizes(
    dtypes=("fp32",),
    cases=("packed", "cached"),
    length=48,
    block=16,
    heads=1,
    models={
        "FSQ": repr(_TINY | dict(bottleneck_type="fsq", patch_size=(1, 8, 8), frames_per_block=1)),
        "VAE": repr(
            _TINY
            | dict(bottleneck_type="vae", vae_bottleneck_dim=8)
            | dict(patch_size=(2, 8, 8), frames_per_block=2)
        ),
    },
    frames=3,
    clips=(2,),
    dtype="fp32",
    train_case="tiny",
    lengths=(64,),
    table_block=32,
    repeats=1,
)
# The largest difference of values and of gradients from the reference, as a share of the largest number expected if that is above 1.
LIMITS = {"fp32": (2e-6, 2e-5), "bf16": (2e-2, 2e-2)}
# Of the table of attention: name -> the library that it needs. `jax.nn-xla` makes arrays of queries x keys.
OTHERS = {
    "jax.nn-cudnn": "jax",
    "jax.nn-xla": "jax",
    "tokamax-mosaic_gpu": "tokamax",
    "FlexAttention": "torch",
}
_LONGEST_XLA = 16384  # tokens


def main(arguments: list[str] | None = None) -> int:
    """Runs the sections asked for, writes what they found, and returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output_folder", default="outputs/gpu_check", help="where the two files go"
    )
    parser.add_argument(
        "--toy", action="store_true", help="toy sizes on the CPU, kernels interpreted"
    )
    parser.add_argument(
        "--sections",
        default="kernels,tokenizing,training,attention",
        help="comma-separated, of: kernels, tokenizing, training, attention",
    )
    options = parser.parse_args(arguments)
    chosen = options.sections.split(",")
    if unknown := set(chosen) - set(SECTIONS):
        parser.error(f"unknown sections {sorted(unknown)}; known are {', '.join(SECTIONS)}")
    sizes = TOY if options.toy else FULL
    run: Callable[..., Any] = _call if options.toy else in_new_process
    folder = pathlib.Path(options.output_folder)

    hardware = run(inference_bench.hardware, 1, 256 if options.toy else None)
    if not options.toy and hardware["platform"] != "gpu":
        print(
            f"gpu_check: JAX sees no GPU, only {hardware['device']!r}. On a GPU: pip install -r gpu_requirements.txt, and "
            "unset JAX_PLATFORMS. Without one: --toy runs everything at toy sizes, interpreted.",
            file=sys.stderr,
        )
        return 1
    results: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "toy": options.toy,
        "hardware": hardware,
        "versions": _versions(),
        "seconds": {},
    }
    for name in chosen:
        started = time.perf_counter()
        results[name] = SECTIONS[name](sizes, run)
        results["seconds"][name] = round(time.perf_counter() - started, 1)
        print(f"gpu_check: {name}: {results['seconds'][name]} s", file=sys.stderr, flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "gpu_check.json", results)
        atomic_write(folder / "gpu_check.md", as_table(results).encode())
    print(as_table(results))
    wrong = failures(results)
    for line in wrong:
        print(f"gpu_check: {line}", file=sys.stderr)
    return 1 if wrong else 0


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    """As `in_new_process`, in this process: on a CPU there is no memory to give back."""
    return function(*arguments)


def _attempt(
    run: Callable[..., Any], function: Callable[..., Any], *arguments: Any
) -> dict[str, Any]:
    """The function's result, or {'error': why there is none}: one failure must not lose what others measured."""
    try:
        return run(function, *arguments)
    except Exception as error:  # noqa: BLE001 - whatever a driver, compiler or another library raises
        return {"error": f"{error!r:.300}"}


def _versions() -> dict[str, str]:
    found = {}
    for name in ("jax", "jaxlib", "jax-cuda13-plugin", "nvidia-cudnn-cu13", "tokamax", "torch"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True)
        found |= {"driver": done.stdout.split("\n")[0]} if done.returncode == 0 else {}
    return found


# Kernels beside the reference


def _kernels(sizes: Sizes, run: Callable[..., Any]) -> dict[str, Any]:
    return _attempt(run, compare_kernels, sizes)


def compare_kernels(sizes: Sizes) -> dict[str, Any]:
    """How far every kernel that this device runs is from the reference: {'rows': [...]}, one for each kernel, dtype and case."""
    start_jax(1)
    import jax.numpy as jnp

    from elastic import ops

    rows = []
    for dtype in sizes.dtypes:
        kind = jnp.dtype(attention_bench.DTYPES[dtype])
        names = [name for name in ops.IMPLEMENTATIONS if _runs(name, kind)]
        for case in sizes.cases:
            errors_of = (
                _errors_with_cache
                if case == "cached"
                else functools.partial(_errors, packed=case == "packed")
            )
            for name, errors in errors_of(sizes, kind, names):
                limits = LIMITS[dtype]
                rows.append(
                    {
                        "implementation": name, "dtype": dtype, "case": case, "errors": errors, "limits": limits[: len(errors)],
                        "within": all(error <= limit for error, limit in zip(errors, limits, strict=False)),
                    }
                )  # fmt: skip
    return {"length": sizes.length, "block": sizes.block, "rows": rows}


def _runs(name: str, dtype: Any) -> bool:
    """Whether a kernel is compared on this device: on a CPU those for a GPU, interpreted; else all that can serve it."""
    import jax

    from elastic import ops

    if jax.default_backend() == "cpu":
        return name == "pallas_gpu_interpret"
    if name == "reference" or name.endswith("_interpret"):
        return False
    try:
        ops.choose_implementation(name, dtype=dtype)
    except ValueError:
        return False
    return True


def _full_precision(name: str) -> Any:
    """A context for `blockwise`: a GPU rounds float32 operands of XLA's products to TF32, and the algorithm is compared."""
    import jax

    if name == "blockwise":
        return jax.default_matmul_precision("highest")
    return contextlib.nullcontext()


def _difference(ours: Any, expected: Any) -> float:
    import numpy as np

    ours, expected = (np.asarray(x, np.float32) for x in (ours, expected))
    return float(np.abs(ours - expected).max() / max(1.0, np.abs(expected).max()))


def _errors(
    sizes: Sizes, dtype: Any, names: list[str], *, packed: bool
) -> list[tuple[str, list[float]]]:
    """For each kernel: the largest difference of its output and of its gradients, without a cache."""
    import jax
    import jax.numpy as jnp

    from elastic import ops

    shape = (2, sizes.length, sizes.heads, attention_bench.HEAD_DIM)
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, dout = (jax.random.normal(key, shape).astype(dtype) for key in keys)
    seen: dict[str, Any] = {}
    if packed:  # three files that end inside a block, and hidden tokens
        token = jnp.arange(sizes.length)
        ends = (sizes.length // 5, sizes.length * 7 // 11)
        files = sum((token >= end).astype(jnp.int32) for end in ends)
        seen["segment_ids"] = jnp.stack([files, jnp.zeros_like(files)])
        seen["valid"] = jax.random.bernoulli(jax.random.key(1), 0.7, shape[:2])

    def run(name: str, qkv: Any) -> list[Any]:
        def loss(qkv: Any, dout: Any, seen: Any) -> Any:
            out = ops.attention(*qkv, block_size=sizes.block, implementation=name, **seen)
            return jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32)), out

        with _full_precision(name):
            program = jax.jit(jax.value_and_grad(loss, has_aux=True))
            (_, out), gradients = program(qkv, dout, seen)
        return [out, *gradients]

    expected = run("reference", tuple(x.astype(jnp.float32) for x in (q, k, v)))
    found = []
    for name in names:
        values, *gradients = map(_difference, run(name, (q, k, v)), expected)
        found.append((name, [values, max(gradients)]))
    return found


def _errors_with_cache(sizes: Sizes, dtype: Any, names: list[str]) -> list[tuple[str, list[float]]]:
    """For each kernel: the largest difference of one block on the caches of two clips, which hold different lengths."""
    import jax
    import jax.numpy as jnp

    from elastic import ops
    from elastic.ops import bf16_bits

    shape = (2, sizes.block, sizes.heads, attention_bench.HEAD_DIM)
    keys = jax.random.split(jax.random.key(2), 5)
    q, k, v = (jax.random.normal(key, shape).astype(dtype) for key in keys[:3])
    cached = (2, 2, sizes.heads, 3 * sizes.block, attention_bench.HEAD_DIM)  # two layers
    arrays = [jax.random.normal(key, cached).astype(dtype) for key in keys[3:]]
    filled = jnp.array([2 * sizes.block, sizes.block], jnp.int32)
    bits = bf16_bits.to_bits if jax.default_backend() == "cpu" else lambda x: x

    def run(name: str, qkv: Any, arrays: Any) -> Any:
        cache = ops.KVCache(arrays[0], arrays[1], filled)
        with _full_precision(name):
            return jax.jit(
                lambda qkv, cache: ops.attention_with_cache(
                    *qkv, cache=cache, layer=jnp.int32(1), implementation=name
                )
            )(qkv, cache)

    exact = [[x.astype(jnp.float32) for x in group] for group in ((q, k, v), arrays)]
    expected = run("reference", *exact)
    stored = [bits(x) for x in arrays]
    return [(name, [_difference(run(name, (q, k, v), stored), expected)]) for name in names]


# Tokenizing


def _tokenizing(sizes: Sizes, run: Callable[..., Any]) -> dict[str, Any]:
    return {kind: _attempt(run, tokenize, kind, sizes) for kind in sizes.models}


def tokenize(kind: str, sizes: Sizes) -> dict[str, Any]:
    """Seconds of tokenizing one clip and several at once, by every search, with a model of a linear start.

    The threshold is the median loss at half of the tokens; `fixed` takes half of the tokens.
    """
    jax = start_jax(1)
    import numpy as np

    from elastic import media
    from elastic.config import load_config, update_config
    from elastic.model import param_shapes
    from elastic.model.linear_init import linear_init
    from elastic.patches import patchify
    from elastic.tokenizer import ElasticTokenizer

    config = update_config(load_config("200m"), sizes.models[kind])
    path = ROOT / "example" / "video.mp4"
    with media.open_clip(path, resolution=config.resolution, rate=None) as reader:
        frames = reader.read()
    starts = np.linspace(0, len(frames) - sizes.frames, max(sizes.clips)).astype(int)
    clips = [frames[start : start + sizes.frames] for start in starts]
    slices = frames[: len(frames) // config.patch_size[0] * config.patch_size[0]]
    patches = patchify(slices, config.patch_size)
    sample = patches[:: max(1, len(patches) // (20 * config.patch_dim))]
    rng = np.random.default_rng(0)

    def drawn(
        path: Any, leaf: Any
    ) -> Any:  # as init_params draws them, without a program to compile
        of_norm = "norm" in jax.tree_util.keystr(path) or "ln_f" in jax.tree_util.keystr(path)
        values = np.ones(leaf.shape) if of_norm else rng.standard_normal(leaf.shape, np.float32)
        return values if of_norm else config.initializer_range * values

    params = jax.tree_util.tree_map_with_path(drawn, param_shapes(config))
    tokenizer = ElasticTokenizer(
        config,
        linear_init(params, config, sample),
        dtype=sizes.dtype,
        window_blocks=inference_bench.BLOCKS,
    )
    del params
    result: dict[str, Any] = {"frames": sizes.frames, "clips": {}}
    first: dict[str, Any] = {}  # what the first clip gets among the fewest
    for count in sizes.clips:
        figures = {}
        for search in ("fixed", "predict", "binary"):
            options: dict[str, Any] = dict(num_tokens=config.max_toks // 2)
            if search != "fixed":
                losses = [block.loss for block in first["fixed"].blocks]
                result["threshold"] = statistics.median(losses)
                options = dict(threshold=result["threshold"], search=search)
            encode = functools.partial(tokenizer.encode_many, clips[:count], batch=count, **options)
            found: dict[int, Any] = dict(encode())  # compiles
            started = time.perf_counter()
            list(encode())
            seconds = time.perf_counter() - started
            among_fewest = first.setdefault(search, found[0])
            figures[search] = {
                "seconds_per_clip": round(seconds / count, 4),
                "mean_tokens": statistics.mean(block.num_kept for block in found[0].blocks),
                "blocks_met": sum(bool(block.met_threshold) for block in found[0].blocks),
                "blocks": len(found[0].blocks),
                "same_counts": found[0].counts == among_fewest.counts,
            }
        result["clips"][str(count)] = figures
    return result


# Training


def _training(sizes: Sizes, run: Callable[..., Any]) -> dict[str, Any]:
    options = dict(
        devices=1, mesh_dim="!1,1,1,1", lpips=False, update_elastic_config="dict(remat_block='')", repeats=sizes.repeats,
    )  # fmt: skip
    return _attempt(run, train_bench.measure, sizes.train_case, sizes.dtype, options)


# Attention beside others


def _attention(sizes: Sizes, run: Callable[..., Any]) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    ours = ("pallas_gpu_interpret",) if run is _call else ("gpu", "pallas_gpu")
    for name in (*ours, *OTHERS):
        library = OTHERS.get(name, "jax")
        if importlib.util.find_spec(library) is None:
            rows[name] = {"missing": f"{library} is not installed"}
            continue
        lengths = [n for n in sizes.lengths if name != "jax.nn-xla" or n <= _LONGEST_XLA]
        function: Callable[..., dict[str, Any]] = attention_bench.ours
        values: tuple[Any, ...] = (name, 1, "1024x512", sizes.repeats)
        if name == "FlexAttention":
            function, values = attention_bench.pytorch, (sizes.repeats,)
        values = (sizes.table_block, sizes.dtype, *values)
        found = _attempt(run, _measured, function, lengths, values)
        rows[name] = found if "error" in found else {"cases": found["cases"]}
    return {
        "block": sizes.table_block,
        "lengths": sizes.lengths,
        "dtype": sizes.dtype,
        "rows": rows,
    }


def _measured(
    function: Callable[..., Any], lengths: list[int], values: tuple[Any, ...]
) -> dict[str, Any]:
    return {"cases": attention_bench.of_lengths(function, lengths, values)}


# What is written


def failures(results: dict[str, Any]) -> list[str]:
    """One line for everything that is wrong: a kernel beyond its limit, a section of ours that failed."""
    lines = []
    kernels = results.get("kernels", {})
    lines += [
        f"{row['implementation']} in {row['dtype']}, {row['case']}: differs from the reference by {row['errors']}, "
        f"allowed are {list(row['limits'])}."
        for row in kernels.get("rows", ())
        if not row["within"]
    ]
    sections = {"kernels": kernels, "training": results.get("training", {})}
    sections |= {f"tokenizing {kind}": x for kind, x in results.get("tokenizing", {}).items()}
    rows = results.get("attention", {}).get("rows", {})
    sections |= {f"attention {name}": x for name, x in rows.items() if name not in OTHERS}
    for name, section in sections.items():
        errors = [part["error"] for part in (section, *section.get("cases", ())) if "error" in part]
        lines += [f"{name} failed: {error}" for error in errors]
    return lines


def as_table(results: dict[str, Any]) -> str:
    """The results as Markdown, with the date and the hardware."""
    hardware = results["hardware"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    rates = hardware["matrix_gflops"]
    lines = [
        f"# {hardware['device']}, {results['date'][:10]}{', toy sizes' if results['toy'] else ''}",
        "",
        f"{hardware['processor']}, {hardware['cores']} cores, Python {hardware['python']}, {versions}. A large matrix product: "
        f"{_rate(rates['fp32'])} in fp32, {_rate(rates['bf16'])} in bf16.",
    ]
    if "kernels" in results:
        lines += _kernel_table(results["kernels"])
    if "attention" in results:
        lines += _attention_table(results["attention"], rates)
    if "training" in results:
        lines += _training_lines(results["training"])
    if "tokenizing" in results:
        lines += _tokenizing_table(results["tokenizing"])
    return "\n".join([*lines, ""])


def _rate(gflops: float) -> str:
    return f"{gflops / 1000:.0f} TFLOP/s" if gflops >= 10_000 else f"{gflops:.0f} GFLOP/s"


def _kernel_table(section: dict[str, Any]) -> list[str]:
    lines = ["", "## Kernels beside the reference", ""]
    if "error" in section:
        return [*lines, f"failed: {section['error']}"]
    lines += [
        f"{section['length']} tokens in blocks of {section['block']}: the largest difference.",
        "",
        "| Kernel | | | Values | Gradients | |",
        "|---|---|---|---|---|---|",
    ]
    for row in section["rows"]:
        errors = [f"{error:.1e}" for error in row["errors"]] + [""] * (2 - len(row["errors"]))
        verdict = "within" if row["within"] else "**beyond its limit**"
        lines.append(
            f"| `{row['implementation']}` | {row['dtype']} | {row['case']} | {' | '.join(errors)} | {verdict} |"
        )
    return lines


def _attention_table(section: dict[str, Any], rates: dict[str, float]) -> list[str]:
    lengths = section["lengths"]
    titles = [f"{n} {way}" for way in ("forward", "forward and backward") for n in lengths]
    lines = [
        "",
        "## Attention",
        "",
        f"{attention_bench.HEADS} heads of {attention_bench.HEAD_DIM} in blocks of {section['block']}, {section['dtype']} "
        "(share of the matrix rate).",
        "",
        f"| Tokens | {' | '.join(titles)} |",
        "|---" * (len(titles) + 1) + "|",
    ]
    for name, row in section["rows"].items():
        if "cases" not in row:
            why = row.get("missing") or f"failed: {row['error']}"
            lines.append(f"| {name} | {why} |" + " |" * (len(titles) - 1))
            continue
        cases = {case["length"]: case for case in row["cases"]}
        cells = [
            _attention_cell(cases.get(n), way, rates[section["dtype"]])
            for way in ("forward", "forward_backward")
            for n in lengths
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _attention_cell(case: dict[str, Any] | None, way: str, rate: float) -> str:
    if case is None:
        return "not run"
    if "error" in case:
        return f"failed: {case['error'][:60]}".replace("|", "/").replace("\n", " ")
    gflops = case[way]["gflops"]
    return f"{_rate(gflops)} ({100 * gflops / rate:.0f} %)"


def _training_lines(section: dict[str, Any]) -> list[str]:
    lines = ["", "## Training", ""]
    if "error" in section:
        return [*lines, f"failed: {section['error']}"]
    return [
        *lines,
        f"A step of {section['batch'] * section['tokens']} tokens: {section['seconds_per_step']} s, "
        f"{section['tokens_per_second']:.0f} tokens/s, {_rate(section['model_gflops'])} of the model's arithmetic, "
        f"{section['memory_mb'] / 1000:.1f} GB.",
    ]


def _tokenizing_table(section: dict[str, Any]) -> list[str]:
    lines = [
        "",
        "## Tokenizing",
        "",
        "Seconds a clip; in brackets the mean count of tokens of the first clip.",
        "",
        "| Model | Frames | Clips at once | `fixed` | `predict` | `binary` |",
        "|---|---|---|---|---|---|",
    ]
    for kind, model in section.items():
        if "error" in model:
            lines.append(f"| {kind} | failed: {model['error']} | | | | |")
            continue
        for count, searches in model["clips"].items():
            cells = [
                f"{x['seconds_per_clip']:.3f} ({x['mean_tokens']:.0f})" for x in searches.values()
            ]
            lines.append(f"| {kind} | {model['frames']} | {count} | {' | '.join(cells)} |")
    return lines


SECTIONS: dict[str, Callable[[Sizes, Callable[..., Any]], dict[str, Any]]] = {
    "kernels": _kernels,
    "tokenizing": _tokenizing,
    "training": _training,
    "attention": _attention,
}


if __name__ == "__main__":
    sys.exit(main())

"""Measures how many frames a second the training data path delivers and prints JSON: by size, sequence length and workers.

    python3 scripts/bench/data.py FOLDER --seconds=20

The first epoch decodes the folder, as far as `--seconds` goes; later ones find it in the workers'
memory, if it fits (`--warm` reads an epoch first, and then measures). scripts/bench/train.py
measures training steps.
"""

import argparse
import contextlib
import itertools
import json
import os
import pathlib
import platform
import resource
import sys
import tempfile
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))


def cpu_seconds() -> float:
    """CPU seconds of this process and of the workers that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def measure(args: Any, index: str, side: int, num_blocks: int, workers: int) -> dict[str, Any]:
    """Frames a second in one setting. The frames of an image's block count like those of a video."""
    from elastic.config import ElasticTokConfig
    from elastic.data.config import DataConfig
    from elastic.data.dataset import TrainingData, load_index

    tokens = 2 * (side // 8) ** 2
    model = ElasticTokConfig(
        frames_per_block=4,
        patch_size=(2, 8, 8),
        min_toks=1,
        max_toks=tokens,
        max_sequence_length=num_blocks * tokens,
    )
    config = DataConfig(
        path=args.folder,
        batch_size=max(1, args.blocks // num_blocks),
        workers=workers,
        random_crop=args.random_crop,
    )
    started, used = time.perf_counter(), cpu_seconds()
    data = TrainingData(config, model, index=load_index(config, model, path=index))
    with contextlib.closing(data.batches(0, 10**9)) as batches:
        next(batches)
        first = time.perf_counter() - started
        if args.warm:
            for _ in range(-(-data.num_sequences // config.batch_size)):
                next(batches)
        frames, begin = 0, time.perf_counter()
        while (spent := time.perf_counter() - begin) < args.seconds:
            frames += int(next(batches).filled.sum()) * model.frames_per_block
        closing = time.perf_counter()
    result = {
        "resolution": side,
        "blocks_per_sequence": num_blocks,
        "batch_size": config.batch_size,
        "workers": workers,
        "frames_per_second": round(frames / spent),
        "seconds_to_first_batch": round(first, 1),
        "seconds_to_end": round(time.perf_counter() - closing, 1),
        "fill": round(data.fill, 4),
    }
    if not args.warm:
        result["frames_per_cpu_second"] = round(frames / (cpu_seconds() - used))
    return result


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="images and videos")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each setting")
    parser.add_argument("--blocks", type=int, default=16, help="of a batch")
    parser.add_argument("--sizes", type=int, nargs="*", default=[64, 128, 256])
    parser.add_argument("--lengths", type=int, nargs="*", default=[2, 16])
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--random_crop", action="store_true")
    parser.add_argument("--warm", action="store_true", help="measure the second epoch")
    args = parser.parse_args()

    from elastic.data.file_index import load_or_build

    with tempfile.TemporaryDirectory() as folder:
        index = os.path.join(folder, "index.json")
        started = time.perf_counter()
        found = load_or_build(args.folder, fps=24.0, path=index)
        seconds = time.perf_counter() - started
        settings = itertools.product(args.sizes, args.lengths, args.workers)
        report = {
            "machine": f"{os.cpu_count()} cores, {platform.machine()}",
            "load_before": os.getloadavg()[0],
            "files": len(found.files),
            "bad_files": len(found.bad),
            "seconds_to_index": round(seconds, 1),
            "warm": args.warm,
            "random_crop": args.random_crop,
            "settings": [measure(args, index, *setting) for setting in settings],
        }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()

"""Compares libraries that read video and prints JSON: speed, memory and exactness of each.

    python3 -m scripts.bench.readers FOLDER_OR_FILES...

Every reader gets every file in a process of its own, delivers all frames as RGB arrays, four at a time, and keeps
none. `exact` is asked of the test clip, whose frames carry their number as a barcode. decord and
decord2 are two packages of one module name: what is installed is measured, run it in two environments
to compare them.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np

FRAMES_PER_BLOCK = 4
BARCODE_CLIP = pathlib.Path(__file__).parents[2] / "tests/golden/media/clip_160x120_30fps_97f.mp4"


def read_elastic(path: str) -> Iterator[np.ndarray]:
    from elastic.media import images

    source = images.open_source(path)
    for frame in source.frames(np.arange(source.info.num_frames)):
        yield np.asarray(frame)


def read_pyav(path: str) -> Iterator[np.ndarray]:
    import av

    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        for frame in container.decode(stream):
            yield frame.to_ndarray(format="rgb24")


def read_decord(path: str) -> Iterator[np.ndarray]:
    import decord  # pyright: ignore[reportMissingImports]

    reader = decord.VideoReader(path)
    for start in range(0, len(reader), FRAMES_PER_BLOCK):
        picked = list(range(start, min(start + FRAMES_PER_BLOCK, len(reader))))
        yield from reader.get_batch(picked).asnumpy()


def read_imageio(path: str) -> Iterator[np.ndarray]:
    import imageio.v3  # pyright: ignore[reportMissingImports]

    yield from imageio.v3.imiter(path, plugin="FFMPEG")


READERS: dict[str, tuple[tuple[str, ...], Callable[[str], Iterator[np.ndarray]]]] = {
    "elastic.media": (("av", "pillow"), read_elastic),
    "pyav": (("av",), read_pyav),
    "decord": (("decord", "decord2"), read_decord),
    "imageio-ffmpeg": (("imageio", "imageio-ffmpeg"), read_imageio),
}


def peak_mb() -> float:
    """The most memory that this process, or a child that it waited for, has held."""
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    most = max(resource.getrusage(each).ru_maxrss for each in who)
    return most / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def measure(reader: str, path: str) -> dict[str, object]:
    """Runs in a child process: one reader, one file."""
    read = READERS[reader][1]
    try:
        next(read(str(BARCODE_CLIP)))  # imports and tables, outside the clock
    except ImportError as error:
        return {"not_installed": str(error)}
    before, start = peak_mb(), time.perf_counter()
    num_frames, barcodes, total = 0, [], 0
    for frame in read(path):
        num_frames += 1
        total += int(frame[::16, ::16].sum())
        if path == str(BARCODE_CLIP):
            barcodes.append(sum(int(frame[4, 8 * bit + 4, 1] > 127) << bit for bit in range(7)))
    seconds = time.perf_counter() - start
    result: dict[str, object] = {
        "frames": num_frames,
        "frames_per_second": round(num_frames / seconds, 1),
        "peak_mb": round(peak_mb(), 1),
        "peak_mb_above_start": round(peak_mb() - before, 1),
        "sampled_pixel_sum": total,  # equal sums: (nearly surely) equal pixels
    }
    if barcodes:
        result["exact"] = barcodes == list(range(97))
    return result


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("paths", nargs="*", help="files or folders; none: the test clip alone")
    parser.add_argument("--readers", nargs="+", choices=list(READERS), default=list(READERS))
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(*options.child)))
        return
    files = [str(BARCODE_CLIP)]
    for path in map(pathlib.Path, options.paths):
        files += map(str, sorted(path.glob("*.mp4")) if path.is_dir() else [path])
    report: dict[str, object] = {
        "hardware": {"machine": platform.machine(), "cpus": os.cpu_count()},
        "python": platform.python_version(),
    }
    for reader in options.readers:
        entry: dict[str, object] = {"versions": versions(READERS[reader][0])}
        for file in files:
            command = [sys.executable, "-m", "scripts.bench.readers", "--child", reader, file]
            child = subprocess.run(command, capture_output=True, text=True, check=False)
            if child.returncode:
                entry[pathlib.Path(file).name] = {"failed": child.stderr.strip().splitlines()[-1:]}
            else:
                entry[pathlib.Path(file).name] = json.loads(child.stdout.splitlines()[-1])
        report[reader] = entry
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()

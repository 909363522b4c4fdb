"""Measures `tokenize_dataset` from files to shards and prints JSON: frames a second, beside the model's own rate and beside decoding alone.

    python3 scripts/bench/bench_dataset.py --clips=16 --frames=48

The clips are made: pieces of example/video.mp4 at the size of `--size`. The model's own rate is that of the same clips when their
frames are in memory already and no token is written. Runs take turns, and medians are printed: other work slows all of them alike.
Where it does not, seconds of the processor tell more: on one core they are what the run would take on an idle machine.
"""

import argparse
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from scripts.bench.inference import hardware, in_new_process, start_jax  # noqa: E402


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="small-vae", help="as --load_checkpoint takes it")
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--frames", type=int, default=48, help="of a clip")
    parser.add_argument("--size", default="320x180", help="width x height of the clips")
    parser.add_argument("--threshold", type=float, default=0.03)
    parser.add_argument("--batch", type=int, default=1, help="clips that are tokenized together")
    parser.add_argument("--repeats", type=int, default=3, help="of each measurement")
    parser.add_argument(
        "--devices", type=int, default=len(os.sched_getaffinity(0)), help="virtual CPU devices"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = pathlib.Path(place)
        make_clips(folder / "clips", args.clips, args.frames, args.size)
        report: dict[str, Any] = {
            "hardware": in_new_process(hardware, args.devices, 1024),
            "usable_cores": len(os.sched_getaffinity(0)),
            "load_before": os.getloadavg()[0],
            "settings": vars(args),
        }
        report |= in_new_process(measure, folder, args)
    import json

    print(json.dumps(report, indent=1))


def make_clips(folder: pathlib.Path, clips: int, frames: int, size: str) -> None:
    """Writes clips of the example, each from another frame on."""
    import numpy as np
    from PIL import Image

    from elastic import media

    width, height = map(int, size.split("x"))
    folder.mkdir()
    with media.open_clip(ROOT / "example" / "video.mp4", resolution=256) as clip:
        found = clip.read()
    pictures = [np.asarray(Image.fromarray(f).resize((width, height))) for f in found]
    for number in range(clips):
        first = number * len(pictures) // clips
        few = [pictures[(first + k) % len(pictures)] for k in range(frames)]
        media.write_video(folder / f"{number:03d}.mp4", np.stack(few), 24)


def measure(folder: pathlib.Path, args: argparse.Namespace) -> dict[str, Any]:
    """Everything but the hardware."""
    start_jax(args.devices)
    from elastic import media
    from elastic.pipeline import dataset
    from elastic.tokenizer import ElasticTokenizer, EncodeOptions

    tokenizer = ElasticTokenizer.from_pretrained(args.model)
    options = EncodeOptions(threshold=args.threshold)
    inputs = dataset.list_inputs(folder / "clips", folder / "shards")
    resolution = tokenizer.config.resolution
    frames: Sequence[Any] = []

    def decode() -> None:
        nonlocal frames
        frames = []
        for place in inputs.values():
            with media.open_clip(place, resolution=resolution, rate=options.rate) as clip:
                frames.append(clip.read())

    def model() -> None:
        for _ in tokenizer.encode_each(frames, options, batch=args.batch):
            pass

    runs, waits, of_clips = 0, [], []

    def whole(inputs: Mapping[str, Any] = inputs) -> None:
        nonlocal runs
        runs += 1
        worked, started = tokenizer.codec.model_seconds, time.perf_counter()
        outcome = dataset.tokenize_dataset(
            tokenizer,
            inputs,
            folder / "shards" / str(runs),
            options,
            batch=args.batch,
            progress=False,
        )
        seconds = time.perf_counter() - started
        assert outcome.summary is not None
        assert outcome.summary["totals"]["clips"] == len(inputs)
        of_clips.append(outcome.summary["totals"]["seconds"] / seconds)
        waits.append(1 - (tokenizer.codec.model_seconds - worked) / seconds)

    decode()
    num_frames = sum(map(len, frames))
    whole(dict([*inputs.items()][:1]))  # compiles, and loads what draws the summary
    waits.clear()
    of_clips.clear()
    clocks = {"seconds": time.perf_counter, "processor_seconds": time.process_time}
    runs_of = {"decode": decode, "model": model, "end_to_end": whole}
    report: dict[str, Any] = {"frames": num_frames}
    for name, seconds in take_turns(runs_of, clocks, args.repeats).items():
        median = {run: statistics.median(found) for run, found in seconds.items()}
        pairs = zip(seconds["model"], seconds["end_to_end"], strict=True)
        shares = [model / whole for model, whole in pairs]
        report[name] = {
            "all": {run: [round(s, 2) for s in found] for run, found in seconds.items()},
            "frames_per_second": {run: round(num_frames / s, 1) for run, s in median.items()},
            "clips_per_second": round(args.clips / median["end_to_end"], 3),
            "share_of_model_rate": round(statistics.median(shares), 3),
            "share_of_decode_rate": round(median["decode"] / median["end_to_end"], 3),
        }
    return report | {
        "model_waits": round(statistics.median(waits), 3),
        "share_in_clips": round(statistics.median(of_clips), 3),  # the rest: plan, shard, summary
    }


def take_turns(
    runs: dict[str, Callable[[], None]], clocks: dict[str, Callable[[], float]], repeats: int
) -> dict[str, dict[str, list[float]]]:
    """What every clock says of every run, one after the other, several times."""
    found = {clock: {name: [] for name in runs} for clock in clocks}
    for _ in range(repeats):
        for name, run in runs.items():
            started = {clock: read() for clock, read in clocks.items()}
            run()
            for clock, read in clocks.items():
                found[clock][name].append(read() - started[clock])
    return found


if __name__ == "__main__":
    main()

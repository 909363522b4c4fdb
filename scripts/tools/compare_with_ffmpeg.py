"""Compares the frames that the project reads with those of the ffmpeg program, file by file.

    python3 scripts/tools/compare_with_ffmpeg.py example/video.mp4 FOLDER ...

Prints a table: frames of both, whether their order agrees, and how far apart their levels (0 to 255) are in the mean and at most.
ffmpeg scales with accurate_rnd+full_chroma_int. Needs the package imageio-ffmpeg.
"""

import argparse
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import numpy as np

# So that the documented command runs wherever the requirements are installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from elastic.media import MediaError, find_media, images

FLAGS = "bicubic+accurate_rnd+full_chroma_int"
_MOST_FRAMES = 24


def ffmpeg_frames(path: pathlib.Path, rows: int, columns: int, num_frames: int) -> np.ndarray:
    """The first frames as the ffmpeg program shows them, uint8 [frames, rows, columns, 3], and how many it decodes."""
    import imageio_ffmpeg

    scale = f"scale={columns}:{rows}:flags={FLAGS}:interl=-1,format=rgb24"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", f"file:{path}"]
    command += ["-map", "0:V:0", "-fps_mode", "passthrough", "-vf", scale]
    command += ["-frames:v", str(num_frames), "-f", "rawvideo", "-"]
    raw = subprocess.run(command, capture_output=True, check=False).stdout
    frame = rows * columns * 3
    whole = len(raw) // frame
    return np.frombuffer(raw[: whole * frame], np.uint8).reshape(whole, rows, columns, 3)


def count_of_ffmpeg(path: pathlib.Path) -> int:
    """How many frames the ffmpeg program decodes."""
    import imageio_ffmpeg

    command = [
        imageio_ffmpeg.get_ffmpeg_exe(),
        "-v",
        "quiet",
        "-i",
        f"file:{path}",
        "-map",
        "0:V:0",
    ]
    command += ["-fps_mode", "passthrough", "-f", "framecrc", "-"]
    listed = subprocess.run(command, capture_output=True, check=False).stdout
    return sum(not line.startswith(b"#") for line in listed.splitlines())


def compare(path: pathlib.Path, *, exact_color: bool, most_frames: int) -> tuple[str, ...]:
    """One row of the table."""
    try:
        source = images.open_source(path, exact_color=exact_color)
        num = min(source.info.num_frames, most_frames)
        ours = np.stack([np.asarray(frame) for frame in source.frames(np.arange(num))])
    except MediaError as error:
        return (path.name, "refused", str(error)[:90], "", "", "", "")
    info = source.info
    size = f"{info.width}x{info.height}"
    theirs = ffmpeg_frames(path, info.height, info.width, num)
    counts = f"{info.num_frames} / {count_of_ffmpeg(path)}"
    if len(theirs) != num:
        return (path.name, size, counts, "", "", "", info.transfer)
    apart = np.abs(ours.astype(np.int16) - theirs)
    # Each frame must be nearest to the frame of the same number.
    small, others = (x[:, ::4, ::4].reshape(num, -1).astype(np.float32) for x in (ours, theirs))
    small, others = (x - x.mean(1, keepdims=True) for x in (small, others))
    distances = np.abs(small[:, None] - others[None]).mean(-1)
    same = bool((np.diag(distances) <= distances.min(1) + 0.01).all())
    mean, bias = apart.mean(), (ours.astype(np.int16) - theirs).mean()
    order = "same" if same else "DIFFERS"
    return (
        path.name,
        size,
        counts,
        order,
        f"{mean:.2f} ({bias:+.2f})",
        str(apart.max()),
        info.transfer,
    )


def files_of(places: list[pathlib.Path]) -> Iterator[pathlib.Path]:
    for place in places:
        yield from find_media(place) if place.is_dir() else [place]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("places", nargs="+", type=pathlib.Path, help="files and folders")
    parser.add_argument(
        "--exact_color", action="store_true", help="round the colours of every video exactly"
    )
    parser.add_argument("--frames", type=int, default=_MOST_FRAMES, help="compared from each file")
    options = parser.parse_args()
    heads = ("file", "size", "frames: ours / ffmpeg", "order", "mean (bias)", "most", "transfer")
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    for path in files_of(options.places):
        row = compare(path, exact_color=options.exact_color, most_frames=options.frames)
        print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()

"""Compares the frames that the project reads with those of the ffmpeg program, file by file.

    python3 scripts/tools/compare_with_ffmpeg.py example/video.mp4 FOLDER ...
    python3 scripts/tools/compare_with_ffmpeg.py --matrix --exact_color

Prints a table: frames of both, whether their order agrees, and how far apart their levels (0 to 255) are in the mean and at most.
ffmpeg scales with accurate_rnd+full_chroma_int. `--matrix` makes clips of every codec, pixel format, range of levels, colour matrix
and container of the table below, and exits with 1 if one is more than a level off in the mean, or has other frames. Needs the
package imageio-ffmpeg.
"""

import argparse
import itertools
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import numpy as np

# So that the documented command runs wherever the requirements are installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from elastic.media import MediaError, find_media, images

# Encoder and its options, pixel formats, containers.
MATRIX = (
    ("libx264", "yuv420p yuv422p yuv444p yuv420p10le yuv422p10le", "mp4 mkv avi ts"),
    ("libx265", "yuv420p yuv420p10le yuv444p", "mp4 mkv"),
    ("libvpx", "yuv420p", "webm"),
    ("libvpx-vp9", "yuv420p yuv422p yuv444p yuv420p10le", "webm mp4"),
    ("libaom-av1 -cpu-used 8", "yuv420p yuv420p10le", "mp4 mkv"),
    ("mpeg4", "yuv420p", "avi mp4"),
    ("mpeg2video", "yuv420p yuv422p", "mpg ts mkv"),
    ("mpeg2video -flags +ilme+ildct", "yuv420p", "ts"),
    ("mjpeg -strict -1", "yuvj420p yuvj422p yuvj444p", "avi mov"),
    ("prores_ks", "yuv422p10le yuv444p10le", "mov"),
    ("ffv1", "yuv420p yuv422p yuv444p yuv410p yuv420p10le yuv444p12le gray bgr0", "mkv avi"),
    ("utvideo", "yuv420p yuv422p gbrp", "avi"),
    ("qtrle", "rgb24", "mov"),
)
RANGES, COLOR_MATRICES = ("tv", "pc"), ("smpte170m", "bt709")
_RGB = ("gray", "bgr0", "gbrp", "rgb24")  # formats without a colour matrix
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


def make_matrix(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Makes the clips of `MATRIX`; a combination that the encoder or the container refuses is left out and named."""
    import imageio_ffmpeg

    for encoder, formats, containers in MATRIX:
        codec, *options = encoder.split()
        # Every pixel format in the first container, and the first format in every container.
        (first, *others), (home, *away) = formats.split(), containers.split()
        pairs = [(pixels, home) for pixels in (first, *others)]
        pairs += [(first, container) for container in away]
        for pixels, container in pairs:
            plain = pixels in _RGB or pixels.startswith("yuvj")
            kinds = itertools.product(("pc",) if plain else RANGES, COLOR_MATRICES)
            for levels, matrix in [("pc", "")] if pixels in _RGB else kinds:
                name = f"{codec}{'_interlaced' * ('+ilme+ildct' in options)}_{pixels}_{levels}_{matrix}.{container}"
                scale = f"scale=out_range={levels}:flags=accurate_rnd+full_chroma_int"
                tags = ["-color_range", levels]
                if matrix:
                    scale += f":out_color_matrix={matrix}"
                    tags += ["-colorspace", matrix]
                command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", "-f", "lavfi"]
                command += ["-i", "testsrc2=size=96x80:rate=24", "-frames:v", "8", "-vf"]
                command += [f"{scale},format={pixels}", "-c:v", codec, *options, "-b:v", "4M"]
                command += [*tags, str(folder / name)]
                done = subprocess.run(command, capture_output=True, check=False, text=True)
                if done.returncode:
                    print(f"not made: {name}: {done.stderr.splitlines()[-1]}", file=sys.stderr)
                else:
                    yield folder / name


def agrees(row: tuple[str, ...]) -> bool:
    """Whether a row has the same frames in the same order, and at most a level between them in the mean."""
    _, _, counts, order, mean, _, _ = row
    ours, _, theirs = counts.partition(" / ")
    return ours == theirs and order == "same" and float(mean.split()[0]) <= 1


def files_of(places: list[pathlib.Path]) -> Iterator[pathlib.Path]:
    for place in places:
        yield from find_media(place) if place.is_dir() else [place]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("places", nargs="*", type=pathlib.Path, help="files and folders")
    parser.add_argument(
        "--matrix", action="store_true", help="also make and compare clips of every kind"
    )
    parser.add_argument(
        "--exact_color", action="store_true", help="round the colours of every video exactly"
    )
    parser.add_argument("--frames", type=int, default=_MOST_FRAMES, help="compared from each file")
    options = parser.parse_args()
    heads = ("file", "size", "frames: ours / ffmpeg", "order", "mean (bias)", "most", "transfer")
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        made = make_matrix(pathlib.Path(folder)) if options.matrix else iter(())
        for path in itertools.chain(files_of(options.places), made):
            row = compare(path, exact_color=options.exact_color, most_frames=options.frames)
            print("| " + " | ".join(row) + " |", flush=True)
            if options.matrix and not agrees(row):
                wrong.append(path.name)
    if wrong:
        sys.exit(f"{len(wrong)} clips differ from ffmpeg's: {', '.join(wrong)}")


if __name__ == "__main__":
    main()

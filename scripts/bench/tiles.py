"""Measures frames in tiles and prints JSON: the error on seams for each overlap, and what each fit costs.

    python3 scripts/bench/tiles.py seams --overlaps=0,16,32 FILES...
    python3 scripts/bench/tiles.py fits FILES...
    python3 scripts/bench/tiles.py adapt PICTURES...

`seams` cuts the middle out of pictures so that two by two tiles overlap by just so much. It gives the PSNR of the pixels within
16 pixels of the middle of an overlap, and of the same pixels where they lie inside of one tile; how much the error changes from pixel to
pixel where tiles meet, over the same inside of one tile; and how far the pixels that only one tile covers differ from those of the same
tile tokenized alone, in levels.
`fits` tokenizes files with every fit, at the model's short side and at the files' own size: tokens, PSNR on the whole frame, seconds
without compiling, and the peak memory of a process that does nothing else. What a crop leaves out counts in no PSNR. With `--random` the
weights are random, of the shape that --model names, such as 200m: every tile has --num_tokens, and time, with compiling, and memory alone
mean something.
`adapt` lets a piece of a still picture move inside of one of four tiles: the tokens of each tile under a threshold, how many it takes
where all tiles of all blocks have the same count and the error is the same, and the PSNR where the tiles share so many as a budget.
"""

import argparse
import functools
import json
import math
import pathlib
import resource
import subprocess
import sys
import time
from typing import Any

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

SEAM = 16  # pixels on either side of the middle of an overlap
FITS = ("crop", "pad", "stretch", "tile", "tile at its own size")


def psnr(squares: float, count: float) -> float:
    """PSNR in dB of summed squared differences of 8-bit levels."""
    return round(10 * math.log10(255**2 * count / squares), 2)


def seams(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each overlap."""
    from elastic import media
    from elastic.tokenizer import ElasticTokenizer

    tokenizer = ElasticTokenizer.from_pretrained(arguments.model)
    tile = tokenizer.config.resolution
    rows, pictures = [], []
    for overlap in map(int, arguments.overlaps.split(",")):
        side = 2 * tile - overlap
        first = (side - tile) // 2  # of the tile in the middle, in which the seams of the four meet
        place = np.arange(tile)
        near = np.abs(place + 0.5 - tile / 2) < SEAM
        inside = (place >= SEAM) & (place < tile - SEAM)
        seam = (near[:, None] | near[None]) & inside[:, None] & inside[None]
        sums, jumps, apart = np.zeros((2, 2)), np.zeros(2), 0
        for file in arguments.files:
            with media.open_clip(file, resolution=2 * tile, max_frames=1) as reader:
                cut = overlap // 2  # the same middle for each overlap
                frame = reader.read()[0, cut : cut + side, cut : cut + side]
            made = tokenizer.reconstruct(
                frame, fit="tile", resolution=0, tile_overlap=overlap, num_tokens=arguments.num_tokens
            )  # fmt: skip
            assert made.tokens.num_tiles == 4
            middle = np.s_[first : first + tile, first : first + tile]
            alone = tokenizer.reconstruct(frame[middle], num_tokens=arguments.num_tokens).frames[0]
            for row, frames in enumerate((made.frames[0][middle], alone)):
                error = frames.astype(int) - frame[middle]
                sums[row] += np.square(error[seam]).sum(), error[seam].size
                for axis in (0, 1):
                    steps = np.abs(np.diff(error, axis=axis)).sum(axis=(1 - axis, 2))
                    jumps[row] += steps[tile // 2 - 1]
            corner = tokenizer.reconstruct(frame[:tile, :tile], num_tokens=arguments.num_tokens)
            own = np.s_[: tile - overlap, : tile - overlap]  # no other tile covers these
            difference = corner.frames[0][own].astype(int) - made.frames[0][own]
            apart = max(apart, int(np.abs(difference).max()))
        rows.append({
            "overlap": overlap,
            "psnr_on_seams": psnr(*sums[0]),
            "psnr_of_the_same_inside": psnr(*sums[1]),
            "jump_on_seams": round(float(jumps[0] / jumps[1]), 3),
            "largest_difference_to_a_tile_alone": apart,
        })  # fmt: skip
        print(rows[-1], file=sys.stderr, flush=True)
        shown = np.s_[tile // 4 : -tile // 4]
        frame, blended = (x[middle][shown, shown] for x in (frame, made.frames[0]))
        pictures += [blended] if pictures else [frame, blended]
    if arguments.picture:
        gap = np.full((tile // 2, 2, 3), 255, np.uint8)
        strip = np.concatenate([part for one in pictures for part in (one, gap)][:-1], axis=1)
        media.write_image(pathlib.Path(arguments.picture), strip.repeat(4, 0).repeat(4, 1))
    return rows


def adapt(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each picture: the tokens under a threshold, and the equal count of all tiles that has the same error."""
    from elastic import media
    from elastic.tokenizer import ElasticTokenizer

    tokenizer = ElasticTokenizer.from_pretrained(arguments.model)
    config, rows = tokenizer.config, []
    tile = config.resolution
    side, overlap, moving = 2 * tile - 16, 16, 3 * tile // 8
    options: dict[str, Any] = dict(fit="tile", resolution=0, tile_overlap=overlap)
    for file in arguments.files:
        with media.open_clip(file, resolution=side, max_frames=1) as reader:
            clip = np.repeat(reader.read(), arguments.max_frames, axis=0)
        thing = clip[
            0, -moving:, -moving:
        ].copy()  # a piece of the picture moves inside of the first tile
        for number, frame in enumerate(clip):
            at = 8 + 4 * number % (tile - moving - 24)
            frame[24 : 24 + moving, at : at + moving] = thing
        made = tokenizer.reconstruct(
            clip, threshold=arguments.threshold, batch=arguments.batch, **options
        )
        wanted = float(np.mean(np.square(made.frames.astype(int) - clip)))
        low, high = config.min_toks, config.max_toks
        while high - low > 16:  # the smallest equal count that is as good
            count = (low + high) // 2
            equal = tokenizer.reconstruct(clip, num_tokens=count, batch=arguments.batch, **options)
            good = float(np.mean(np.square(equal.frames.astype(int) - clip))) <= wanted
            low, high = (low, count) if good else (count, high)
        tokens = made.tokens
        shared = tokenizer.reconstruct(clip, avg_tokens=high, **options)
        rows.append({
            "file": pathlib.Path(file).name,
            "psnr": psnr(wanted, 1),
            "psnr_of_a_budget_of_equal_counts": psnr(float(np.mean(np.square(shared.frames.astype(int) - clip))), 1),
            "tokens_of_that_budget": shared.tokens.num_tokens,
            "tokens": tokens.num_tokens,
            "tokens_of_equal_counts": high * len(tokens),
            "tokens_of_each_tile": tokens.counts.reshape(-1, tokens.num_tiles).tolist(),
        })  # fmt: skip
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def fits(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each fit and file; each fit in a process of its own."""
    rows = []
    for fit in FITS:
        command = [sys.executable, __file__, "one", *arguments.files, f"--fit={fit}"]
        names = ("model", "threshold", "num_tokens", "max_frames", "batch", "dtype")
        command += [f"--{name}={getattr(arguments, name)}" for name in names]
        command += ["--random"] * arguments.random
        rows += json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def one(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one fit."""
    import jax

    from elastic.config import load_config
    from elastic.io.user_cache import keep_programs
    from elastic.model import init_params
    from elastic.tokenizer import ElasticTokenizer

    keep_programs()
    fit, _, own = arguments.fit.partition(" ")
    options: dict[str, Any] = {"fit": fit} | ({"resolution": 0} if own else {})
    if arguments.random:
        config = load_config(arguments.model)
        params = functools.partial(init_params, config, jax.random.key(0))
        tokenizer = ElasticTokenizer(config, params, dtype=arguments.dtype)
        options["num_tokens"] = arguments.num_tokens
    else:
        tokenizer = ElasticTokenizer.from_pretrained(arguments.model, dtype=arguments.dtype)
        options["threshold"] = arguments.threshold
        side, frames = tokenizer.config.resolution, tokenizer.config.frames_per_block + 1
        black = np.zeros((frames, side, 2 * side, 3), np.uint8)
        easy: dict[str, Any] = options | {"threshold": 1.0}
        tokenizer.encode(black, batch=arguments.batch, **easy)
    rows = []
    for file in arguments.files:
        started = time.perf_counter()
        squares, values, passes = 0, 0, 0
        session = tokenizer.stream(
            file, max_frames=arguments.max_frames, batch=arguments.batch, **options
        )  # fmt: skip
        for block in session:
            squares += block.squares
            values += block.frames.size
            passes += block.passes
        tokens = session.tokens()
        rows.append({
            "fit": arguments.fit,
            "file": pathlib.Path(file).name,
            "frame": "x".join(map(str, tokens.frame)),
            "tiles": tokens.num_tiles,
            "blocks": tokens.num_blocks,
            "tokens": tokens.num_tokens,
            "tokens_per_tile_of_a_block": round(tokens.mean_tokens, 1),
            "met": round(float(np.mean([block.met_threshold for block in tokens.blocks])), 3),
            "psnr": psnr(squares, values),
            "seconds": round(time.perf_counter() - started, 2),
            "passes": passes,
        })  # fmt: skip
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return [row | {"peak_mb_of_all_files": round(peak)} for row in rows]


def main() -> None:
    """Prints what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("seams", "fits", "adapt", "one"))
    parser.add_argument("files", nargs="+")
    parser.add_argument("--model", default="small-fsq")
    parser.add_argument("--random", action="store_true", help="random weights, for fits")
    parser.add_argument("--dtype", default="fp32", help="for fits")
    parser.add_argument("--overlaps", default="0,8,16,32")
    parser.add_argument(
        "--num_tokens", type=int, default=1024, help="of each tile, for seams and --random"
    )
    parser.add_argument("--threshold", type=float, default=0.02, help="for fits")
    parser.add_argument("--max_frames", type=int, default=8)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument(
        "--picture",
        default="",
        help="of seams: the middle of the last file, and as each overlap gives it",
    )
    parser.add_argument("--fit", default="crop", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    print(json.dumps(globals()[arguments.what](arguments), indent=1))


if __name__ == "__main__":
    main()

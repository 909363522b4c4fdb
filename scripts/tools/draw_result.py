"""Draws imgs/result.png, the picture of a result: frames, what their tokens decode to, and the tokens of every block.

Also imgs/result.webp: the clip under the smallest threshold, beside its reconstruction and above its tokens, in motion.

    python3 scripts/tools/draw_result.py
    python3 scripts/tools/draw_result.py --input_path=clip.mp4 --thresholds=0.05,0.02 --load_checkpoint=example/vae

Each threshold is one tokenization by the same model. A picture of the example takes some minutes on two CPU cores. The
frames shown are the middles of the longest shots that video.json beside the clip lists, else frames at equal distances.
"""

import argparse
import io
import itertools
import json
import pathlib
import sys
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import ConnectionPatch
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from elastic.media import open_clip  # noqa: E402
from elastic.metrics import psnr  # noqa: E402
from elastic.report import strip_frames  # noqa: E402
from elastic.tokenizer import ElasticTokenizer  # noqa: E402
from elastic.tokens import TokenizedClip  # noqa: E402

INK, SOFT, LINE = "#1f2933", "#52606d", "#9aa5b1"
# Of the thresholds, the largest first: bars of their tokens, and the same for the blocks that are shown.
BARS = (("#5fb8b0", "#0b6e65"), ("#f4cf96", "#c77700"), ("#c3d0e6", "#4a6aa5"))
COLUMNS = 6
# Inches: a picture of a frame, between two of them, left of all, below each row, the chart and what stands below it.
SIDE, GAP, LEFT, CAPTION, CHART, BELOW = 1.28, 0.08, 0.7, 0.24, 1.1, 0.42


class Result(NamedTuple):
    """One tokenization: its threshold, its tokens, the number of each block, and the decoded uint8 frames."""

    threshold: float
    tokens: TokenizedClip
    counts: np.ndarray
    decoded: np.ndarray


def frames_to_show(input_path: pathlib.Path, num_frames: int) -> list[int]:
    """The middle frame of each of the longest shots; frames at equal distances where no shots are listed."""
    listed = input_path.with_suffix(".json")
    if listed.exists():
        shots = json.loads(listed.read_text(encoding="utf-8"))["shots"]
        shots = sorted(shots, key=lambda shot: shot["first_frame"] - shot["last_frame"])[:COLUMNS]
        return sorted((shot["first_frame"] + shot["last_frame"]) // 2 for shot in shots)
    return [int(frame) for frame in (np.arange(COLUMNS) + 0.5) * num_frames / COLUMNS]


def draw(
    originals: np.ndarray,
    results: list[Result],
    *,
    shown: list[int],
    frames_per_block: int,
    tokens_per_block: int,
    output: pathlib.Path,
) -> None:
    """Writes the picture.

    Args:
      originals: the clip, uint8 [frames, rows, columns, 3].
      results: its tokenizations, the largest threshold first.
      shown: the frames that are shown, from left to right.
      frames_per_block, tokens_per_block: of the model.
      output: a PNG file.
    """
    plt.rcParams.update({"font.family": "DejaVu Sans", "text.color": INK})
    plt.rcParams.update(
        {"image.interpolation": "nearest"}
    )  # a frame of 128 x 128 is shown as it is
    width = LEFT + len(shown) * (SIDE + GAP) + 0.1
    height = 0.1 + SIDE + GAP + len(results) * (SIDE + CAPTION) + 0.3 + CHART + BELOW
    figure = plt.figure(figsize=(width, height), dpi=100, facecolor="white")

    def at(left: float, bottom: float, wide: float, high: float):
        """Axes, placed in inches."""
        return figure.add_axes((left / width, bottom / height, wide / width, high / height))

    chart = at(LEFT, BELOW, width - LEFT - 0.12, CHART)
    marked = [frame // frames_per_block for frame in shown]
    for number, result in reversed(list(enumerate(results))):
        colors = [BARS[number][block in marked] for block in range(len(result.counts))]
        chart.bar(range(len(result.counts)), result.counts, width=0.86, color=colors)
    chart.set_xlim(-0.6, len(results[0].counts) - 0.4)
    chart.set_ylim(0, tokens_per_block)
    chart.set_yticks([0, tokens_per_block // 2, tokens_per_block])
    chart.set_xlabel(
        f"block of {frames_per_block} frames, in time", fontsize=9, color=SOFT, labelpad=1
    )
    chart.set_ylabel("tokens kept", fontsize=9, color=SOFT)
    chart.tick_params(labelsize=8, colors=SOFT, length=2)
    for side, spine in chart.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(LINE)

    rows = [("original", None, 0), *(("", result, n) for n, result in enumerate(results))]
    top = height - 0.1
    for name, result, number in rows:
        bottom = top - SIDE
        label = name if result is None else f"error \N{LESS-THAN OR EQUAL TO} {result.threshold:g}"
        color = INK if result is None else BARS[number][1]
        middle = (bottom + SIDE / 2) / height
        figure.text(
            (LEFT - 0.2) / width, middle, label, rotation=90, ha="center", va="center", color=color
        )
        for column, frame in enumerate(shown):
            left = LEFT + column * (SIDE + GAP)
            axes = at(left, bottom, SIDE, SIDE)
            axes.imshow((originals if result is None else result.decoded)[frame], aspect="auto")
            axes.axis("off")
            if result is not None:
                block = frame // frames_per_block
                part = slice(block * frames_per_block, (block + 1) * frames_per_block)
                count, quality = result.counts[block], psnr(originals[part], result.decoded[part])
                caption = f"{count:,} tokens · {quality:.1f} dB"
                x, y = (left + SIDE / 2) / width, (bottom - 0.04) / height
                figure.text(x, y, caption, ha="center", va="top", fontsize=8, color=color)
        top = bottom - (GAP if result is None else CAPTION)
    for column, block in enumerate(marked):
        left = LEFT + column * (SIDE + GAP) + SIDE / 2
        ends = ((left / width, top / height), (block, max(r.counts[block] for r in results)))
        figure.add_artist(
            ConnectionPatch(
                *ends, "figure fraction", "data", axesB=chart, color=LINE, linewidth=0.8
            )
        )

    output.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    levels = np.asarray(Image.open(drawn).convert("RGB"), np.int32)
    # 64 levels of each colour: no eye tells them from 256, and the file is half as large.
    levels = np.minimum((levels + 2) // 4 * 4, 255).astype(np.uint8)
    Image.fromarray(levels).save(output, optimize=True)
    plt.close(figure)


def animate(originals: np.ndarray, result: Result, output: pathlib.Path) -> None:
    """Writes every second frame of the strip picture as a WebP that repeats.

    Args:
      originals: the clip, uint8 [frames, rows, columns, 3].
      result: its tokenization.
      output: the file.
    """
    tokens = result.tokens
    drawn = strip_frames(
        originals,
        result.decoded,
        counts=result.counts,
        tokens_per_block=tokens.tokens_per_block,
        frames_per_block=tokens.frames_per_block,
        losses=[block.loss for block in tokens.blocks],
        met=[block.met_threshold for block in tokens.blocks],
        rate=tokens.rate,
    )
    first, *others = (Image.fromarray(frame) for frame in itertools.islice(drawn, 0, None, 2))
    duration = round(2 * 1000 / tokens.rate)  # milliseconds
    first.save(
        output, save_all=True, append_images=others, duration=duration, loop=0, quality=60, method=6
    )


def main() -> None:
    """Tokenizes the clip once for each threshold, decodes, draws."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--input_path", type=pathlib.Path, default=ROOT / "example" / "video.mp4")
    parser.add_argument("--load_checkpoint", default=str(ROOT / "example" / "fsq"))
    parser.add_argument("--thresholds", default="0.01,0.005", help="comma-separated, at most 3")
    parser.add_argument(
        "--output", type=pathlib.Path, default=ROOT / "imgs" / "result.png", help="a PNG file"
    )
    options = parser.parse_args()

    tokenizer = ElasticTokenizer.from_pretrained(options.load_checkpoint)
    results = []
    for threshold in sorted(map(float, options.thresholds.split(",")), reverse=True):
        tokens = tokenizer.encode(options.input_path, threshold=threshold)
        counts = np.asarray(tokens.counts)
        results.append(Result(threshold, tokens, counts, tokenizer.decode(tokens)))
        met = sum(block.met_threshold for block in tokens.blocks)
        print(
            f"{threshold}: {tokens.mean_tokens:.0f} tokens a block, {met} of {len(tokens.blocks)} met"
        )
    with open_clip(options.input_path, resolution=tokenizer.config.resolution) as reader:
        originals = reader.read()
    draw(
        originals,
        results,
        shown=frames_to_show(options.input_path, len(originals)),
        frames_per_block=tokenizer.config.frames_per_block,
        tokens_per_block=tokenizer.config.tokens_per_block,
        output=options.output,
    )
    animate(originals, results[-1], options.output.with_suffix(".webp"))


if __name__ == "__main__":
    main()

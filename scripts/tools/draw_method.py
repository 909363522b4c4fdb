"""Draws imgs/method.png, the picture of the method: python scripts/tools/draw_method.py [FILE]

Everything is placed by hand on a canvas of 128 x 74 units; the same input gives the same file.
"""

import argparse
import itertools
import math
import pathlib
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Polygon, Rectangle

WIDTH, HEIGHT = 128, 74
INK, SOFT, LINE = "#1f2933", "#52606d", "#9aa5b1"
KEPT, KEPT_EDGE, TAIL = "#0f9488", "#0b6e65", "#cbd2d9"
NETWORK, NETWORK_EDGE, CODE = "#e4ecf7", "#7b93b8", "#fde8c4"
SKY, SUN, HILL, HILL_FAR, BALL = "#cfe6f5", "#f6b73c", "#5f9e6e", "#93c19b", "#d64545"

ROWS = (57.0, 44.5, 32.0)  # the middle of block 1, 2 and 3
NUM_KEPT, NUM_TOKENS = (3, 7, 14), 16
CONTENT = ("a still shot", "a slow pan", "fast motion")


def scene(ax: Axes, x: float, y: float, width: float, height: float, block: int, time: int):
    """One frame of block `block` at `time` 0..3, its lower left corner at (x, y)."""
    frame = Rectangle((x, y), width, height, facecolor=SKY, edgecolor=INK, linewidth=1.1)
    ax.add_patch(frame)
    pan = (0.0, 0.09 * time, 0.0)[block]

    def put(patch):
        ax.add_patch(patch)
        patch.set_clip_path(frame)

    put(Circle((x + width * (0.78 - pan), y + height * 0.74), height * 0.13, facecolor=SUN))
    for color, base, swing, phase in ((HILL_FAR, 0.40, 0.13, 0.4), (HILL, 0.24, 0.11, 2.4)):
        steps = [step / 24 for step in range(25)]
        ridge = [
            (x + width * s, y + height * (base + swing * math.sin(5.2 * (s + pan) + phase)))
            for s in steps
        ]
        put(Polygon([(x, y), *ridge, (x + width, y)], facecolor=color))
    if block == 2:  # balls that are somewhere else in every frame
        for ball in range(3):
            angle = 1.9 * time + 2.1 * ball
            center = (
                x + width * (0.5 + 0.33 * math.cos(angle)),
                y + height * (0.5 + 0.3 * math.sin(angle)),
            )
            put(Circle(center, height * 0.12, facecolor=BALL, edgecolor="white", linewidth=0.8))
    ax.add_patch(Rectangle((x, y), width, height, facecolor="none", edgecolor=INK, linewidth=1.1))


def stack(ax: Axes, x: float, block: int):
    """The four frames of a block, the first in front."""
    for time in reversed(range(4)):
        scene(ax, x + 1.5 * time, ROWS[block] - 4.4 + 0.9 * time, 9.6, 7.0, block, time)


def patches(ax: Axes, x: float, block: int):
    """The block's first frame, cut into patches."""
    left, bottom, width, height = x, ROWS[block] - 4.2, 11.4, 8.4
    scene(ax, left, bottom, width, height, block, 0)
    for cut in range(1, 4):
        ax.plot(
            [left + width * cut / 4] * 2, [bottom, bottom + height], color="white", linewidth=2.6
        )
        ax.plot([left, left + width], [bottom + height * cut / 4] * 2, color="white", linewidth=2.6)


def box(ax: Axes, x: float, width: float, color: str, edge: str):
    """A rounded box that spans the three rows."""
    bottom, top = ROWS[2] - 6.4, ROWS[0] + 6.4
    shape = FancyBboxPatch(
        (x, bottom), width, top - bottom, boxstyle="round,pad=0,rounding_size=1.6",
        facecolor=color, edgecolor=edge, linewidth=1.5,
    )  # fmt: skip
    ax.add_patch(shape)


def arrow(
    ax: Axes, start: tuple, end: tuple, color: str = INK, bend: float = 0.0, size: float = 13
):
    """An arrow from `start` to `end`, bent to the side by `bend`."""
    ax.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=size, color=color, linewidth=1.5,
            connectionstyle=f"arc3,rad={bend}", shrinkA=0, shrinkB=0,
        )
    )  # fmt: skip


def network(ax: Axes, x: float, width: float):
    """A transformer: one node a block; a block sees itself and the earlier ones."""
    box(ax, x, width, NETWORK, NETWORK_EDGE)
    middle = x + width / 2
    for number, row in enumerate(ROWS, 1):
        node = FancyBboxPatch(
            (middle - 3.3, row - 1.9), 6.6, 3.8, boxstyle="round,pad=0,rounding_size=1.2",
            facecolor="white", edgecolor=NETWORK_EDGE, linewidth=1.3,
        )  # fmt: skip
        ax.add_patch(node)
        text(ax, middle, row, f"block {number}", size=10.5)
    for upper, lower in itertools.pairwise(ROWS):
        arrow(ax, (middle, upper - 1.9), (middle, lower + 1.9), NETWORK_EDGE)
    arrow(
        ax, (middle + 3.3, ROWS[0] - 0.6), (middle + 3.3, ROWS[2] + 0.6), NETWORK_EDGE, bend=-0.26
    )


def tokens(ax: Axes, x: float, block: int):
    """The tokens of a block: the first ones are kept, the tail is dropped."""
    size, gap, kept = 1.5, 0.27, NUM_KEPT[block]
    bottom = ROWS[block] - 1.3
    for index in range(NUM_TOKENS):
        is_kept = index < kept
        cell = Rectangle(
            (x + index * (size + gap), bottom), size, 2.6,
            facecolor=KEPT if is_kept else "white", edgecolor=KEPT_EDGE if is_kept else TAIL,
            linewidth=1.1, linestyle="-" if is_kept else (0, (2.2, 1.6)),
        )  # fmt: skip
        ax.add_patch(cell)
    text(ax, x, bottom + 4.3, f"{kept} kept", size=12, color=KEPT_EDGE, weight="bold", ha="left")
    end = x + NUM_TOKENS * (size + gap) - gap
    if kept < 10:
        text(ax, end, bottom + 4.3, "tail dropped", size=11, color=SOFT, ha="right")


def text(
    ax: Axes, x: float, y: float, words: str, *, size: float = 13, color: str = INK, **more: Any
):
    """Words around (x, y)."""
    style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": size, "color": color}
    ax.text(x, y, words, **(style | more))


def timeline(ax: Axes):
    """How many tokens each block of a clip takes, the content named below."""
    left, right, bottom, top = 12.0, 125.0, 6.3, 18.6
    # (what is seen, number of blocks, share of tokens of block i)
    parts = (
        ("a still shot", 14, lambda i: 0.34 if i == 0 else 0.13 + 0.012 * math.sin(3 * i)),
        ("a slow pan", 16, lambda i: 0.36 + 0.05 * math.sin(1.3 * i) + 0.02 * math.sin(4.1 * i)),
        ("a cut to fast motion", 18, lambda i: 0.97 if i == 0 else 0.76 + 0.15 * math.sin(2.2 * i)),
        ("slowing down", 12, lambda i: 0.62 * math.exp(-0.26 * i) + 0.14),
    )
    step = (right - left) / sum(count for _, count, _ in parts)
    x = left
    for part, (label, count, share) in enumerate(parts):
        width = count * step
        shade = "#f5f7fa" if part % 2 == 0 else "#ffffff"
        ax.add_patch(Rectangle((x, bottom), width, top - bottom, facecolor=shade, zorder=0))
        for index in range(count):
            height = (top - bottom) * share(index)
            bar = Rectangle(
                (x + index * step + 0.15 * step, bottom), step * 0.7, height, facecolor=KEPT
            )
            ax.add_patch(bar)
        text(ax, x + width / 2, bottom - 2.0, label, size=12.5, color=SOFT)
        x += width
    ax.plot([left, right], [bottom, bottom], color=INK, linewidth=1.3)
    ax.plot([left, right], [top, top], color=LINE, linewidth=1.1, linestyle=(0, (4, 3)))
    text(ax, left - 1.0, top, "all", size=12, color=SOFT, ha="right")
    text(ax, left - 1.0, bottom, "0", size=12, color=SOFT, ha="right")
    text(ax, left - 5.6, (top + bottom) / 2, "tokens\nper block", size=12, color=SOFT, rotation=90)
    arrow(ax, (right - 8, bottom - 4.6), (right, bottom - 4.6), SOFT, size=11)
    text(ax, right - 8.8, bottom - 4.6, "time", size=12, color=SOFT, ha="right")


def draw(path: pathlib.Path):
    """Writes the picture as PNG."""
    figure = plt.figure(figsize=(WIDTH / 10, HEIGHT / 10), dpi=150, facecolor="white")
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set_xlim(0, WIDTH)
    ax.set_ylim(0, HEIGHT)
    ax.axis("off")

    columns = {
        "Frames in blocks": 10.4, "Patches": 26.2, "Encoder": 43.5, "Tokens": 67.5,
        "Bottleneck": 87.6, "Decoder": 101.0, "Reconstruction": 117.6,
    }  # fmt: skip
    for title, x in columns.items():
        text(ax, x, 70.0, title, size=13.5, weight="bold")
    for block, row in enumerate(ROWS):
        stack(ax, 3.0, block)
        text(ax, 10.0, row - 6.1, CONTENT[block], size=11.5, color=SOFT)
        patches(ax, 20.5, block)
        tokens(ax, 53.5, block)
        stack(ax, 111.0, block)
        for start, end in (
            (17.9, 20.2),
            (32.2, 36.4),
            (50.6, 53.2),
            (82.0, 84.0),
            (91.4, 94.0),
            (108.0, 110.6),
        ):
            arrow(ax, (start, row), (end, row))
    network(ax, 37.0, 13.2)
    network(ax, 94.4, 13.2)
    box(ax, 84.3, 6.8, CODE, "#d9a441")
    text(
        ax,
        87.7,
        (ROWS[0] + ROWS[2]) / 2,
        "FSQ: an index    or    VAE: a vector",
        size=12,
        rotation=90,
    )
    text(ax, 43.6, 66.8, "block-causal", size=11, color=SOFT)
    text(ax, 101.0, 66.8, "block-causal", size=11, color=SOFT)
    text(ax, 67.5, 66.8, "as few as meet the threshold", size=11, color=SOFT)
    text(ax, 12.0, 22.4, "Tokens used over time", size=13.5, weight="bold", ha="left")
    timeline(ax)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(
        path, metadata={"Software": None}
    )  # no version in the file: same picture, same bytes
    plt.close(figure)


if __name__ == "__main__":
    default = pathlib.Path(__file__).resolve().parents[2] / "imgs" / "method.png"
    parser = argparse.ArgumentParser(description="Draws the picture of the method.")
    parser.add_argument(
        "output", nargs="?", type=pathlib.Path, default=default, help="[%(default)s]"
    )
    draw(parser.parse_args().output)

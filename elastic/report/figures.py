"""Figures, drawn with matplotlib."""

import io
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from elastic.io.atomic import atomic_write
from elastic.report.strip import MET, NOT_MET, number


def plot_report(report: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Draws tokens and loss of each block over time as PNG; `report` is what `build_report` gives."""
    clip, totals, blocks = report["clip"], report["totals"], report["blocks"]
    edges = np.arange(len(blocks) + 1, dtype=float)
    if clip["rate"]:
        edges = np.minimum(edges * clip["frames_per_block"], totals["frames"]) / clip["rate"]
    kept = np.array([block["kept"] for block in blocks], float)
    loss = np.array([number(block["loss"]) for block in blocks])
    missed = np.array([clip["threshold"] is not None and not block["met"] for block in blocks])

    figure = new_figure(9, 5.2)
    tokens_axes, loss_axes = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    met_colour, missed_colour = (tuple(c / 255 for c in rgb) for rgb in (MET, NOT_MET))
    tokens_axes.stairs(kept, edges, fill=True, color=met_colour, alpha=0.25)
    tokens_axes.stairs(kept, edges, color=met_colour, linewidth=1.5)
    tiles = totals.get("tiles", 1)
    of_tiles = "" if tiles == 1 else f", all {tiles} tiles"
    tokens_axes.axhline(kept.mean(), color="0.35", linestyle=":", label=f"mean {kept.mean():.1f}")
    tokens_axes.set_ylim(0, clip["tokens_per_block"] * tiles * 1.04)
    tokens_axes.set_ylabel(f"tokens per block{of_tiles}")
    tokens_axes.set_title(
        f"{totals['tokens']} tokens for {totals['frames']} frames, "
        f"{totals['bits_per_pixel']:.3g} bits per pixel",
        loc="left",
        fontsize=11,
    )
    loss_axes.stairs(loss, edges, color="0.25", linewidth=1.5, baseline=None)
    if clip["threshold"] is not None:
        threshold = f"threshold {clip['threshold']:g}"
        loss_axes.axhline(clip["threshold"], color="0.35", linestyle="--", label=threshold)
    if missed.any():
        middles = (edges[:-1] + edges[1:]) / 2
        label = f"threshold not met ({int(missed.sum())} of {len(blocks)})"
        for axes, values in ((tokens_axes, kept), (loss_axes, loss)):
            axes.plot(middles[missed], values[missed], "v", color=missed_colour, label=label)
    loss_axes.set_ylim(0, 1.08 * max(np.nanmax(loss, initial=0), clip["threshold"] or 1e-9))
    loss_axes.set_ylabel("loss")
    loss_axes.set_xlabel("seconds" if clip["rate"] else "block")
    loss_axes.set_xlim(edges[0], edges[-1])
    for axes in (tokens_axes, loss_axes):
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            # Above the axes, because inside it would hide blocks.
            axes.legend(
                loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, fontsize=9
            )
    write_figure(figure, path)


def new_figure(width: float, height: float) -> Any:
    """A matplotlib figure without a window; width and height are in inches."""
    from matplotlib.figure import Figure  # its import takes a second, and only plots need it

    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def write_figure(figure: Any, path: str | os.PathLike) -> None:
    """Writes the figure as PNG, atomically."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    atomic_write(path, buffer.getvalue())

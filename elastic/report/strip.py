"""What a run tells: the numbers as JSON, the strip of tokens used over time, and a plot.

`strip_frames` draws the paper's signature picture: original and reconstruction side by side, above a
chart of the tokens that each block took, with a playhead. Callers write the frames to a file.
"""

import io
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageDraw, ImageFont

from elastic.metrics.image import psnr
from elastic.tokens.clip import TokenizedClip
from elastic.tokens.npz_file import write_atomically

_PAPER, _INK, _MUTED, _GRID = (255, 255, 255), (33, 37, 45), (118, 124, 136), (226, 229, 234)
_MET, _NOT_MET = (38, 108, 188), (217, 95, 38)  # apart for the colour-blind too
_FAINT = 0.7  # how far the blocks still to come fade into the paper
_MARGIN, _GAP, _LINE, _CHART, _GUTTER = 16, 12, 26, 96, 46  # pixels
_MIN_SIDE = 256  # frames are shown at least this large
_ENLARGED = 4  # times: a picture of errors would be black


def build_report(
    clip: TokenizedClip,
    *,
    per_block: Sequence[Mapping[str, Any]],
    totals: Mapping[str, Any],
) -> dict[str, Any]:
    """The report of one run, ready for `write_json`.

    Args:
      clip: the tokens; the source of every count, loss and `met`.
      per_block: for each block what only the run knows, such as `passes` and `seconds`.
      totals: the same for the whole run, such as `seconds` (of the whole run) and `psnr` in dB.

    Returns:
      `clip` (what was tokenized and how), `totals` and `blocks`.

    Raises:
      ValueError: `per_block` has not one entry for each block.
    """
    if len(per_block) != len(clip.blocks):
        raise ValueError(f"{len(per_block)} entries for {len(clip.blocks)} blocks; give one each.")
    blocks = [
        {**measured, "kept": block.num_kept, "loss": block.loss, "met": block.met_threshold}
        for block, measured in zip(clip.blocks, per_block, strict=True)
    ]
    counts = clip.counts
    met = sum(block.met_threshold for block in clip.blocks)
    sums: dict[str, Any] = {
        "frames": clip.num_frames,
        "blocks": len(blocks),
        "blocks_met": met,
        "blocks_not_met": len(blocks) - met,
        "tokens": clip.num_tokens,
        "mean_tokens": clip.mean_tokens,
        "min_tokens": int(counts.min()),
        "max_tokens": int(counts.max()),
        "share_of_tokens": clip.mean_tokens / clip.tokens_per_block,
        "bits": clip.num_bits,
        "bits_per_pixel": clip.bits_per_pixel,
        "compression_ratio": clip.compression_ratio,
        "mean_loss": float(np.mean([block.loss for block in clip.blocks])),
    }
    if all("passes" in block for block in blocks):
        sums["passes"] = sum(block["passes"] for block in blocks)
        sums["passes_per_block"] = sums["passes"] / len(blocks)
    seconds = totals.get("seconds")
    if seconds:
        sums["frames_per_second"] = clip.num_frames / seconds
    about = {
        name: getattr(clip, name)
        for name in (
            "model_id config_hash bottleneck_type codebook_size resolution source rate is_image "
            "frames_per_block tokens_per_block threshold search window_blocks context"
        ).split()
    }
    return {"clip": about, "totals": {**totals, **sums}, "blocks": blocks}


def write_json(path: str | os.PathLike, obj: Any) -> None:
    """Writes JSON, whole or not at all; numbers that are not finite become null."""
    text = json.dumps(_plain(obj), indent=1, allow_nan=False, ensure_ascii=False)
    write_atomically(path, (text + "\n").encode())


def strip_frames(
    originals: Iterable[UInt8[np.ndarray, "rows columns 3"]],
    reconstructions: Iterable[UInt8[np.ndarray, "rows columns 3"]],
    *,
    counts: Sequence[int] | np.ndarray,
    tokens_per_block: int,
    frames_per_block: int,
    losses: Sequence[float] | np.ndarray | None = None,
    met: Sequence[bool] | np.ndarray | None = None,
    rate: float | None = None,
) -> Iterator[UInt8[np.ndarray, "height width 3"]]:
    """Original and reconstruction above the strip of tokens used over time, frame by frame.

    Takes one frame of each at a time and keeps none. Height and width are even, as video wants them.

    Args:
      originals, reconstructions: equally many frames of one size.
      counts: tokens kept in each block.
      losses: the error of each block, to be shown.
      met: whether each block met its threshold; those that did not are drawn in another colour.
      rate: frames per second, to show the time.

    Raises:
      ValueError: the numbers do not fit each other, or the frames do not fit the numbers.
    """
    counts = np.asarray(counts)
    _check_counts(counts, tokens_per_block, losses, met)
    if frames_per_block < 1:
        raise ValueError(f"frames_per_block={frames_per_block} must be at least 1.")
    passed = np.ones(len(counts), bool) if met is None else np.asarray(met, bool)

    def draw() -> Iterator[np.ndarray]:
        strip = None
        for index, pair in enumerate(itertools.zip_longest(originals, reconstructions)):
            original, reconstruction = pair
            if original is None or reconstruction is None:
                raise ValueError(f"Originals and reconstructions part at frame {index}.")
            about = _about(index, counts, passed, losses, tokens_per_block, frames_per_block, rate)
            if strip is None:
                bars = _bars(counts, passed, tokens_per_block)
                strip = _Strip(original.shape, bars, axis_top=tokens_per_block)
            yield strip.draw(original, reconstruction, **about)

    return draw()


def strip_frame(
    original: UInt8[np.ndarray, "rows columns 3"],
    reconstruction: UInt8[np.ndarray, "rows columns 3"],
    *,
    index: int,
    counts: Sequence[int] | np.ndarray,
    tokens_per_block: int,
    frames_per_block: int,
    losses: Sequence[float] | np.ndarray | None = None,
    met: Sequence[bool] | np.ndarray | None = None,
    rate: float | None = None,
) -> UInt8[np.ndarray, "height width 3"]:
    """Frame `index` as `strip_frames` draws it, with the error, enlarged, as a third picture beside it."""
    counts = np.asarray(counts)
    _check_counts(counts, tokens_per_block, losses, met)
    passed = np.ones(len(counts), bool) if met is None else np.asarray(met, bool)
    about = _about(index, counts, passed, losses, tokens_per_block, frames_per_block, rate)
    bars = _bars(counts, passed, tokens_per_block)
    strip = _Strip(original.shape, bars, axis_top=tokens_per_block, with_error=True)
    return strip.draw(original, reconstruction, **about)


def strip_picture(
    original: UInt8[np.ndarray, "rows columns 3"],
    reconstruction: UInt8[np.ndarray, "rows columns 3"],
    *,
    count: int,
    tokens_per_block: int,
    loss: float | None = None,
    met: bool = True,
) -> UInt8[np.ndarray, "height width 3"]:
    """The same picture for an image: its one block as a bar across, full at `tokens_per_block`."""
    losses = None if loss is None else [loss]
    _check_counts(np.array([count]), tokens_per_block, losses, [met])

    def gauge(width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
        filled = np.arange(width) < round(count / tokens_per_block * width)
        return np.broadcast_to(filled, (height, width)), np.full(width, met)

    return _Strip(original.shape, gauge, axis_top=None).draw(
        original,
        reconstruction,
        position=None,
        texts=("", _share(count, tokens_per_block), _verdict(losses, np.array([met]), 0)),
        met=met,
    )


# (width, height) in pixels -> filled [height, width], met [width]
_Bars = Callable[[int, int], tuple[Bool[np.ndarray, "height width"], Bool[np.ndarray, "width"]]]


class _Strip:
    """The canvas: what never changes is drawn once, each frame adds the rest.

    `bars(width, height)` gives the chart: which pixels are filled, bool [height, width], and for
    each column whether its blocks met the threshold. `axis_top` names the top of the chart; None
    makes it a bar as high as a line of text, without an axis.
    """

    def __init__(
        self,
        frame_shape: tuple[int, ...],
        bars: _Bars,
        *,
        axis_top: int | None,
        with_error: bool = False,
    ):
        if len(frame_shape) != 3 or frame_shape[2] != 3:
            raise ValueError(f"A frame of shape {frame_shape} must be [rows, columns, 3].")
        self.frame_shape = frame_shape
        rows, columns, _ = frame_shape
        factor = max(1, math.ceil(_MIN_SIDE / min(rows, columns)))
        self.panel = (columns * factor, rows * factor)
        titles = ["original", "reconstruction"] + [f"error x {_ENLARGED}"] * with_error
        self.lefts = [_MARGIN + k * (self.panel[0] + _GAP) for k in range(len(titles))]
        self.top = _LINE + 4
        right = self.lefts[-1] + self.panel[0]
        chart_top = self.top + self.panel[1] + _LINE + 8
        gutter, height = (0, _LINE) if axis_top is None else (_GUTTER, _CHART)
        self.chart = (_MARGIN + gutter, chart_top, right, chart_top + height)
        self.text_y = (self.top + self.panel[1] + 7, self.chart[3] + 6)
        below = _MARGIN if axis_top is None else _LINE + 8
        size = (right + _MARGIN, self.chart[3] + below)
        self.fonts = {points: ImageFont.load_default(points) for points in (12, 15)}
        self.base = Image.new("RGB", (size[0] + size[0] % 2, size[1] + size[1] % 2), _PAPER)

        width = right - self.chart[0]
        filled, met = bars(width, height)
        colours = np.where(met[:, None], np.array(_MET), np.array(_NOT_MET))
        faint = colours + _FAINT * (np.array(_PAPER) - colours)
        paper = np.full((height, width, 3), _GRID if axis_top is None else _PAPER, np.uint8)
        paper[:: max(1, (height - 1) // 4)] = _GRID
        self.done = np.where(filled[..., None], colours, paper).astype(np.uint8)
        self.ahead = np.where(filled[..., None], faint, paper).astype(np.uint8)

        pen = ImageDraw.Draw(self.base)
        for x, title in zip(self.lefts, titles, strict=True):
            self._text(pen, (x, 6), title, _INK, 15)
        if axis_top is not None:
            x, y = self.chart[0] - 6, self.chart[1] - 3
            self._text(pen, (x, y), str(axis_top), _MUTED, 12, "ra")
            self._text(pen, (x, y + 14), "tokens", _MUTED, 12, "ra")
            self._text(pen, (x, self.chart[3] - 14), "0", _MUTED, 12, "ra")

    def draw(
        self,
        original: np.ndarray,
        reconstruction: np.ndarray,
        *,
        position: float | None,
        texts: tuple[str, str, str],
        met: bool,
    ) -> np.ndarray:
        """One frame; `position` in 0 to 1 is where the playhead stands."""
        canvas = self.base.copy()
        panels = [original, reconstruction]
        if len(self.lefts) > len(panels):
            error = np.abs(original.astype(np.int32) - reconstruction)
            panels.append(np.minimum(_ENLARGED * error, 255).astype(np.uint8))
        for left, frame in zip(self.lefts, panels, strict=True):
            if frame.shape != self.frame_shape or frame.dtype != np.uint8:
                raise ValueError(
                    f"A frame of {frame.dtype}{list(frame.shape)} must be "
                    f"uint8{list(self.frame_shape)} like the first."
                )
            picture = Image.fromarray(frame).resize(self.panel, Image.Resampling.BICUBIC)
            canvas.paste(picture, (left, self.top))
        left, top, right, bottom = self.chart
        width = right - left
        x = width if position is None else min(width - 1, int(position * width))
        chart = np.concatenate([self.done[:, :x], self.ahead[:, x:]], axis=1)
        canvas.paste(Image.fromarray(chart), (left, top))
        pen = ImageDraw.Draw(canvas)
        if position is not None:
            pen.rectangle((left + x - 1, top - 4, left + x, bottom + 2), fill=_INK)
        quality = psnr(original, reconstruction)
        label = "identical" if math.isinf(quality) else f"{quality:.1f} dB"
        self._text(pen, (right, 6), label, _INK, 15, "ra")
        self._text(pen, (_MARGIN, self.text_y[0]), texts[1], _INK, 15)
        self._text(pen, (right, self.text_y[0]), texts[2], _INK if met else _NOT_MET, 15, "ra")
        self._text(pen, (left, self.text_y[1]), texts[0], _MUTED, 15)
        return np.asarray(canvas)

    def _text(self, pen, at, text, colour, size, anchor="la") -> None:
        pen.text(at, text, fill=colour, font=self.fonts[size], anchor=anchor)


def _bars(counts: np.ndarray, met: np.ndarray, tokens_per_block: int) -> _Bars:
    """The chart over time. Where several blocks share a column, the largest count shows."""

    def bars(width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
        num_blocks = len(counts)
        first = np.arange(width) * num_blocks // width
        last = np.maximum(first + 1, (np.arange(width) + 1) * num_blocks // width)
        tallest = np.array([counts[a:b].max() for a, b in zip(first, last, strict=True)])
        all_met = np.array([met[a:b].all() for a, b in zip(first, last, strict=True)])
        heights = np.maximum(1, np.round(tallest / tokens_per_block * height))
        filled = np.arange(height)[::-1, None] < heights
        if width >= 6 * num_blocks:  # room for a gap before the next block
            filled &= np.append(first[1:] == first[:-1], True)
        return filled, all_met

    return bars


def plot_report(report: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Draws tokens and loss of each block over time as PNG, from what `build_report` gave."""
    clip, totals, blocks = report["clip"], report["totals"], report["blocks"]
    edges = np.arange(len(blocks) + 1, dtype=float)
    if clip["rate"]:
        edges = np.minimum(edges * clip["frames_per_block"], totals["frames"]) / clip["rate"]
    kept = np.array([block["kept"] for block in blocks], float)
    loss = np.array([_number(block["loss"]) for block in blocks])
    missed = np.array([clip["threshold"] is not None and not block["met"] for block in blocks])

    figure = new_figure(9, 5.2)
    tokens_axes, loss_axes = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    met_colour, missed_colour = (tuple(c / 255 for c in rgb) for rgb in (_MET, _NOT_MET))
    tokens_axes.stairs(kept, edges, fill=True, color=met_colour, alpha=0.25)
    tokens_axes.stairs(kept, edges, color=met_colour, linewidth=1.5)
    tokens_axes.axhline(
        kept.mean(), color="0.35", linestyle=":", label=f"mean {totals['mean_tokens']:.1f}"
    )
    tokens_axes.set_ylim(0, clip["tokens_per_block"] * 1.04)
    tokens_axes.set_ylabel("tokens per block")
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
            # Above the axes: inside it would hide blocks.
            axes.legend(
                loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, fontsize=9
            )
    write_figure(figure, path)


def new_figure(width: float, height: float) -> Any:
    """A matplotlib figure of so many inches, which no window shows."""
    from matplotlib.figure import Figure  # takes a second, and only plots need it

    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def write_figure(figure: Any, path: str | os.PathLike) -> None:
    """The figure as PNG; `path` is replaced as a whole or not touched."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    write_atomically(path, buffer.getvalue())


def _check_counts(counts: np.ndarray, tokens_per_block: int, losses, met) -> None:
    if counts.ndim != 1 or not len(counts) or counts.min() < 0 or counts.max() > tokens_per_block:
        raise ValueError(
            f"counts={counts} must be one count for each block, 0 to {tokens_per_block}."
        )
    for name, values in (("losses", losses), ("met", met)):
        if values is not None and len(values) != len(counts):
            raise ValueError(f"{len(values)} {name} for {len(counts)} blocks; give one each.")


def _about(
    index: int,
    counts: np.ndarray,
    met: np.ndarray,
    losses: Sequence[float] | np.ndarray | None,
    tokens_per_block: int,
    frames_per_block: int,
    rate: float | None,
) -> dict[str, Any]:
    """What `_Strip.draw` says about frame `index` of a clip."""
    block = index // frames_per_block
    if block >= len(counts):
        raise ValueError(
            f"Frame {index} is beyond {len(counts)} blocks of {frames_per_block} frames."
        )
    when = f"frame {index + 1}" + (f"   {index / rate:.2f} s" if rate else "")
    used = f"block {block + 1} of {len(counts)}:  {_share(counts[block], tokens_per_block)}"
    return dict(
        position=(index + 0.5) / (len(counts) * frames_per_block),
        texts=(when, used, _verdict(losses, met, block)),
        met=bool(met[block]),
    )


def _share(count: int, tokens_per_block: int) -> str:
    return f"{count} of {tokens_per_block} tokens"


def _verdict(losses: Sequence[float] | np.ndarray | None, met: np.ndarray, block: int) -> str:
    shown = losses is not None and math.isfinite(losses[block])
    text = f"loss {losses[block]:.5f}" if losses is not None and shown else ""
    return text if met[block] else f"{text}  threshold not met".strip()


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _plain(obj: Any) -> Any:
    """Only what JSON knows: mappings, lists, strings, integers, booleans, finite numbers, null."""
    if isinstance(obj, Mapping):
        return {str(key): _plain(value) for key, value in obj.items()}
    if isinstance(obj, np.ndarray):
        return _plain(obj.tolist())
    if isinstance(obj, (list, tuple)):
        return [_plain(value) for value in obj]
    if isinstance(obj, np.generic):
        return _plain(obj.item())
    if isinstance(obj, float):
        return obj if math.isfinite(obj) else None
    if isinstance(obj, os.PathLike):
        return os.fspath(obj)
    return obj

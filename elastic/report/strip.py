"""The strip picture: original and reconstruction side by side, above the tokens used over time.

Where frames lie in several tiles, a map shows the tokens of each over the frame.

The paper shows its results this way. The chart has a bar for each block and a playhead. Callers write
the frames to a file.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image, ImageDraw, ImageFont

from elastic.metrics import psnr
from elastic.tiles import FrameLayout, ramps

_PAPER, _INK, _MUTED, _GRID = (255, 255, 255), (33, 37, 45), (118, 124, 136), (226, 229, 234)
MET, NOT_MET = (38, 108, 188), (217, 95, 38)  # colour-blind people can tell them apart
_FADE = 0.7  # how far the blocks after the playhead fade into the background
_MARGIN, _GAP, _LINE, _CHART, _GUTTER = 16, 12, 26, 96, 46  # pixels
_MIN_SIDE = 256  # pixels; smaller frames are enlarged
_MAX_SIDE = 960  # larger ones are reduced
_GREY_SHARE = 0.35  # of the frame itself in the map of tokens
_ERROR_GAIN = 4  # without it a picture of errors would be black


class TileCounts(NamedTuple):
    """The tokens of each tile of a clip, and where the tiles lie."""

    layout: FrameLayout
    counts: Int[np.ndarray, "blocks tiles"]

    @property
    def range(self) -> tuple[int, int]:
        """The fewest and the most tokens that a tile of a block has."""
        return int(self.counts.min()), int(self.counts.max())

    def tint(self, block: int, width: int, height: int) -> Float[np.ndarray, "height width"]:
        """What each place of the frame takes in a block, in a picture of the given size: 0 for the fewest tokens, 1 for the most."""
        layout = self.layout
        fewest, most = self.range
        shares = (self.counts[block] - fewest) / max(1, most - fewest)
        grid = shares.reshape(len(layout.tops), len(layout.lefts))
        rows = _at_pixels(layout.tops, layout.tile, layout.frame[1], height)
        columns = _at_pixels(layout.lefts, layout.tile, layout.frame[0], width)
        return rows.T @ grid @ columns


def _at_pixels(starts: tuple[int, ...], tile: int, length: int, size: int) -> np.ndarray:
    """The weights of tiles along an axis, at the pixels of a picture of it, [tiles, size]."""
    places = ((np.arange(size) + 0.5) * length / size).astype(int)
    found = np.zeros((len(starts), size))
    for number, (start, weights) in enumerate(
        zip(starts, ramps(starts, tile, length), strict=True)
    ):
        inside = (places >= start) & (places < start + tile)
        found[number, inside] = weights[places[inside] - start]
    return found


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
    tiles: TileCounts | None = None,
) -> Iterator[UInt8[np.ndarray, "height width 3"]]:
    """The strip picture of each frame: original and reconstruction above the tokens used over time.

    One frame of each is in memory at a time. Height and width are even, as video codecs require.

    Args:
      originals: the frames, all of one size.
      reconstructions: as many frames of the same size.
      counts: tokens kept in each block.
      tokens_per_block: tokens of a block, the top of the chart.
      frames_per_block: frames of a block.
      losses: the loss of each block, which is shown as text.
      met: whether each block met its threshold; a block that did not has another colour.
      rate: frames per second; with it the time is shown.
      tiles: for frames of several tiles, the tokens of each, which a map over the frame shows. `counts` and `tokens_per_block` are
        those of all tiles then.

    Raises:
      ValueError: the numbers of blocks differ, or frames are missing or of another size.
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
                raise ValueError(
                    f"Originals and reconstructions differ in number: one of them ends at frame {index}."
                )
            about = _about(index, counts, passed, losses, tokens_per_block, frames_per_block, rate)
            if strip is None:
                bars = _bars(counts, passed, tokens_per_block)
                strip = _Strip(original.shape, bars, axis_top=tokens_per_block, tiles=tiles)
            yield strip.draw(original, reconstruction, block=index // frames_per_block, **about)

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
    """Frame `index` as `strip_frames` draws it, with the amplified error as a third picture.

    Args:
      original: the frame.
      reconstruction: its reconstruction.
      index: its number in the clip.
      counts, tokens_per_block, frames_per_block, losses, met, rate: as in `strip_frames`.

    Raises:
      ValueError: as in `strip_frames`.
    """
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
    tiles: TileCounts | None = None,
) -> UInt8[np.ndarray, "height width 3"]:
    """The strip picture of an image: its only block is a horizontal bar.

    Args:
      original: the image.
      reconstruction: its reconstruction.
      count: tokens kept; the bar is full at `tokens_per_block`.
      tokens_per_block: tokens of a block.
      loss: the loss, which is shown as text.
      met: whether the threshold was met.
      tiles: as in `strip_frames`.

    Raises:
      ValueError: `count` is not in 0 to `tokens_per_block`, or the two differ in size.
    """
    losses = None if loss is None else [loss]
    _check_counts(np.array([count]), tokens_per_block, losses, [met])

    def gauge(width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
        filled = np.arange(width) < round(count / tokens_per_block * width)
        return np.broadcast_to(filled, (height, width)), np.full(width, met)

    return _Strip(original.shape, gauge, axis_top=None, tiles=tiles).draw(
        original,
        reconstruction,
        position=None,
        texts=("", _share(count, tokens_per_block), _verdict(losses, np.array([met]), 0)),
        met=met,
    )


# (width, height) in pixels -> filled [height, width], met [width]
_Bars = Callable[[int, int], tuple[Bool[np.ndarray, "height width"], Bool[np.ndarray, "width"]]]


class _Strip:
    """A canvas: the parts that all frames share are drawn once, each frame draws the others.

    Args:
      frame_shape: rows, columns and channels of a frame.
      bars: gives the chart for a width and a height in pixels: which pixels are filled, bool [height,
        width], and for each column whether its blocks met the threshold.
      axis_top: the number at the top of the chart; None draws a bar of one line's height without an axis.
      with_error: show the error as a third picture.
      tiles: show a map of the tokens over the frame as the last picture.
    """

    def __init__(
        self,
        frame_shape: tuple[int, ...],
        bars: _Bars,
        *,
        axis_top: int | None,
        with_error: bool = False,
        tiles: TileCounts | None = None,
    ):
        if len(frame_shape) != 3 or frame_shape[2] != 3:
            raise ValueError(f"A frame of shape {frame_shape} must be [rows, columns, 3].")
        self.frame_shape = frame_shape
        rows, columns, _ = frame_shape
        factor = max(1, math.ceil(_MIN_SIDE / min(rows, columns)))
        self.panel = (columns * factor, rows * factor)
        if (longest := max(rows, columns)) > _MAX_SIDE:
            wide, high = (max(1, round(side * _MAX_SIDE / longest)) for side in (columns, rows))
            self.panel = (wide, high)
        self.with_error, self.tiles = with_error, tiles
        self.tinted: tuple[int, np.ndarray] | None = None  # of the block drawn last
        titles = ["original", "reconstruction"] + [f"error x {_ERROR_GAIN}"] * with_error
        if tiles is not None:
            titles.append("tokens of a tile: {} to {}".format(*tiles.range))
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
        colours = np.where(met[:, None], np.array(MET), np.array(NOT_MET))
        faint = colours + _FADE * (np.array(_PAPER) - colours)
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
        block: int = 0,
    ) -> np.ndarray:
        """Draws one frame; `position` (0 to 1) is the playhead's, None draws no playhead."""
        canvas = self.base.copy()
        panels = [original, reconstruction]
        if self.with_error:
            error = np.abs(original.astype(np.int32) - reconstruction)
            panels.append(np.minimum(_ERROR_GAIN * error, 255).astype(np.uint8))
        for left, frame in zip(self.lefts, panels, strict=False):  # the map follows
            if frame.shape != self.frame_shape or frame.dtype != np.uint8:
                raise ValueError(
                    f"A frame of {frame.dtype}{list(frame.shape)} must be "
                    f"uint8{list(self.frame_shape)} like the first."
                )
            picture = Image.fromarray(frame).resize(self.panel, Image.Resampling.BICUBIC)
            canvas.paste(picture, (left, self.top))
        if self.tiles is not None:
            grey = (
                Image.fromarray(original).resize(self.panel, Image.Resampling.BICUBIC).convert("L")
            )
            faint = _GREY_SHARE * np.asarray(grey, np.float32)[..., None]
            tinted = faint + (1 - _GREY_SHARE) * self._tint(self.tiles, block)
            canvas.paste(Image.fromarray(tinted.astype(np.uint8)), (self.lefts[-1], self.top))
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
        self._text(pen, (right, self.text_y[0]), texts[2], _INK if met else NOT_MET, 15, "ra")
        self._text(pen, (left, self.text_y[1]), texts[0], _MUTED, 15)
        return np.asarray(canvas)

    def _tint(self, tiles: TileCounts, block: int) -> np.ndarray:
        """The colour of each pixel of the map, by the tokens of its tiles; where they overlap, as the frame is blended."""
        if self.tinted is None or self.tinted[0] != block:
            shares = tiles.tint(block, *self.panel)[..., None]
            self.tinted = block, np.array(_GRID) + shares * (np.array(MET) - np.array(_GRID))
        return self.tinted[1]

    def _text(self, pen, at, text, colour, size, anchor="la") -> None:
        pen.text(at, text, fill=colour, font=self.fonts[size], anchor=anchor)


def _bars(counts: np.ndarray, met: np.ndarray, tokens_per_block: int) -> _Bars:
    """The chart over time. Where several blocks share a column, it shows the largest count."""

    def bars(width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
        num_blocks = len(counts)
        first = np.arange(width) * num_blocks // width
        last = np.maximum(first + 1, (np.arange(width) + 1) * num_blocks // width)
        tallest = np.array([counts[a:b].max() for a, b in zip(first, last, strict=True)])
        all_met = np.array([met[a:b].all() for a, b in zip(first, last, strict=True)])
        heights = np.maximum(1, np.round(tallest / tokens_per_block * height))
        filled = np.arange(height)[::-1, None] < heights
        if width >= 6 * num_blocks:  # wide enough for a gap before the next block
            filled &= np.append(first[1:] == first[:-1], True)
        return filled, all_met

    return bars


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
    """Arguments of `_Strip.draw` for frame `index` of a clip."""
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


def number(value: float | None) -> float:
    """`value` for a plot; None becomes NaN, which plots leave out."""
    return math.nan if value is None else value

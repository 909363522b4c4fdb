"""The numbers of a data set run: sums for each shard and for all shards, and a plot of tokens per block."""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from elastic.io.atomic import atomic_write
from elastic.io.json_file import read_marked, write_json
from elastic.pipeline.contact_sheet import Draw, Sample, draw_samples, num_rows
from elastic.pipeline.dataset_plan import DatasetPlan, clear_unfinished
from elastic.pipeline.shard_numbers import count_clips
from elastic.report.figures import new_figure, write_figure
from elastic.tokens import TokenizedClip, TokenShards

SUMMARY, PLOT, BAD = "summary.json", "summary.png", "bad.jsonl"
_FORMAT = {"format": "elastictok-shard-summary", "version": 1}
_MOST_BARS = 32


@dataclasses.dataclass
class Tally:
    """Sums over clips, and the files that could not be read.

    Attributes:
      histogram: {token count: number of blocks that keep so many tokens}.
      seconds: time spent on tokenizing, summed over the processes.
      bad: [name, reason] of each file that could not be read.
      contents: {name: digest of all bytes} of each file, which tells later whether the file has changed.
    """

    clips: int = 0
    images: int = 0
    frames: int = 0
    blocks: int = 0
    blocks_met: int = 0
    tokens: int = 0
    bits: int = 0
    seconds: float = 0.0
    histogram: Counter[int] = dataclasses.field(default_factory=Counter)
    bad: list[list[str]] = dataclasses.field(default_factory=list)
    contents: dict[str, str | None] = dataclasses.field(default_factory=dict)

    def add(self, clip: TokenizedClip) -> None:
        """Adds the numbers of one clip."""
        self.clips += 1
        self.images += clip.is_image
        self.frames += clip.num_frames
        self.blocks += len(clip.blocks)
        # Of several tiles, each counts as a block.
        self.blocks_met += sum(block.met_threshold for block in clip.blocks)
        self.tokens += clip.num_tokens
        self.bits += clip.num_bits
        self.histogram.update(clip.counts.tolist())

    def merge(self, other: "Tally") -> None:
        """Adds the sums and the bad files of another tally."""
        for name in "clips images frames blocks blocks_met tokens bits seconds".split():
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.histogram.update(other.histogram)
        self.bad += other.bad

    def save(self, path: Path, shard: str | None) -> None:
        """Writes the numbers of a shard. The existence of this file marks the shard as finished."""
        histogram = {str(count): blocks for count, blocks in sorted(self.histogram.items())}
        write_json(
            path, _FORMAT | {"shard": shard} | dataclasses.asdict(self) | {"histogram": histogram}
        )

    @classmethod
    def load(cls, path: Path) -> "Tally":
        """Reads what `save` wrote.

        Raises:
          ValueError: the file is damaged or is not a shard's summary.
        """
        try:
            values = read_marked(path, _FORMAT)
            del values["shard"]
            histogram = values["histogram"].items()
            values["histogram"] = Counter({int(count): int(blocks) for count, blocks in histogram})
            return cls(**values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is not the summary of a shard ({error}); remove it, and the shard is made again."
            ) from error


def bars(histogram: Mapping[int, int], tokens_per_block: int) -> dict[str, list[int]]:
    """The histogram in at most 32 bars; bar k counts blocks of more than `edges[k]` and at most `edges[k + 1]` tokens."""
    edges = np.linspace(0, tokens_per_block, min(_MOST_BARS, tokens_per_block) + 1).astype(int)
    counts = np.array(list(histogram), np.int64)
    which = np.searchsorted(edges, counts, side="left") - 1
    blocks = np.zeros(len(edges) - 1, np.int64)
    np.add.at(blocks, which, np.array(list(histogram.values()), np.int64))
    return {"edges": edges.tolist(), "blocks": blocks.tolist()}


def write_summary(
    folder: Path,
    plan: DatasetPlan,
    shards: Sequence[tuple[str, Tally]],
    *,
    draw: Draw | None = None,
) -> dict[str, Any]:
    """Writes summary.json, summary.png and bad.jsonl, and returns the content of summary.json.

    The files depend on the finished shards alone, so that every process writes the same bytes.

    Args:
      folder: the folder of the run.
      plan: of the run.
      shards: name and numbers of each shard.
      draw: gives pictures of the worst and the best clips; None: there are none.
    """
    total = Tally()
    for _, tally in shards:
        total.merge(tally)
    sums = dataclasses.asdict(total)
    del sums["histogram"], sums["bad"], sums["contents"]
    blocks = total.blocks or math.nan
    paths = [folder / f"{name}.parquet" for name, tally in shards if tally.clips]
    mean_square = plan.options.get("metric", "mse") == "mse"
    facts = TokenShards(paths).facts() if paths else iter(())
    numbers = count_clips(facts, mean_square=mean_square)
    found = {
        "model": plan.model,
        "options": {name: value for name, value in plan.options.items() if value is not None},
        "totals": sums
        | {
            "files": len(plan.files),
            "bad_files": len(total.bad),
            "shards": sum(tally.clips > 0 for _, tally in shards),
            "mean_tokens": total.tokens / blocks,
            "share_met": total.blocks_met / blocks,
            "frames_per_second": total.frames / total.seconds if total.seconds else 0.0,
        },
        "tokens_per_block": bars(total.histogram, plan.model["tokens_per_block"]),
    } | numbers.to_json()
    lines = [
        json.dumps({"id": name, "reason": reason, "shard": shard}) + "\n"
        for shard, tally in shards
        for name, reason in tally.bad
    ]
    for name in (SUMMARY, PLOT, BAD):
        clear_unfinished(folder, name)
    atomic_write(folder / BAD, "".join(lines).encode())
    if total.blocks:
        listed = [*numbers.worst, *numbers.best]
        plot_numbers(found, folder / PLOT, draw(folder, listed) if draw is not None else [])
    write_json(folder / SUMMARY, found)
    return found


def describe(summary: Mapping[str, Any], folder: Path) -> str:
    """The table that is printed at the end of a run."""
    totals = summary["totals"]
    rows = {
        "clips": f"{totals['clips']} ({totals['images']} images), {totals['frames']} frames, in {totals['shards']} shards",
        "tokens": f"{totals['tokens']} in {totals['blocks']} blocks, mean {totals['mean_tokens']:.1f} a block",
        "bad files": f"{totals['bad_files']}" + (f", listed in {BAD}" * (totals["bad_files"] > 0)),
        "speed": f"{totals['frames_per_second']:.3g} frames/s a process",
    }
    if summary["options"].keys() & {"threshold", "psnr"}:
        rows["target"] = f"met by {totals['blocks_met']} blocks ({totals['share_met']:.1%})"
    width = max(map(len, rows))
    return "\n".join([f"{folder}:", *(f"  {name:{width}}  {text}" for name, text in rows.items())])


def plot_numbers(summary: Mapping[str, Any], path: Path, samples: Sequence[Sample] = ()) -> None:
    """Draws the histograms of summary.json, and clips under them, as PNG."""
    totals, rates = summary["totals"], summary["tokens_per_second"]
    rows = num_rows(samples)
    figure = new_figure(11, 3.4 + 1.7 * rows)
    upper, lower = figure, None
    if rows:
        upper, lower = figure.subfigures(2, 1, height_ratios=(3.4, 1.7 * rows))
        draw_samples(lower, samples)
    panels = [
        ("tokens per block", "blocks", summary["tokens_per_block"], totals["mean_tokens"]),
        ("PSNR of a block, dB", "blocks", summary["psnr_per_block"], None),
        ("tokens per second of video", "clips", rates, rates["mean"]),
    ]
    panels = [panel for panel in panels if panel[2]["edges"]]
    all_axes = upper.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, unit, histogram, mean) in zip(all_axes, panels, strict=True):
        edges = histogram["edges"]
        axes.stairs(histogram[unit], edges, fill=True, color="#266cbc", alpha=0.75)
        if mean is not None:
            axes.axvline(mean, color="0.25", linestyle=":", label=f"mean {mean:.1f}")
            axes.legend(frameon=False, fontsize=8)
        axes.set_xlim(edges[0], edges[-1])
        if unit == "clips":
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter("")
        axes.set_xlabel(title)
        axes.set_ylabel(unit)
        axes.spines[["top", "right"]].set_visible(False)
    text = f"{totals['tokens']} tokens in {totals['blocks']} blocks of {totals['clips']} clips"
    all_axes[0].set_title(text, loc="left", fontsize=10)
    write_figure(figure, path)

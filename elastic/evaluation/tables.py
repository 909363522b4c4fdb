"""Evaluations of several models, side by side: tables, JSON and the figure."""

import csv
import itertools
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from elastic.evaluation.records import GROUND_TRUTH, Evaluation, RunResult, fixed_count
from elastic.io import json_file
from elastic.io.atomic import replaced_together
from elastic.report import figures

JSON, FIGURE = "evaluation.json", "evaluation.png"
BLOCKS, SUMMARY, CURVES, SEARCHES = "blocks.csv", "summary.csv", "curves.csv", "searches.csv"
RESULTS = (
    JSON,
    BLOCKS,
    SUMMARY,
    CURVES,
    SEARCHES,
    FIGURE,
)  # every name that an evaluation may write
_INK, _GRID = "0.2", "0.88"
_MARKERS = "sD^vP*X"
_STYLES = ("-", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
# Apart for the colour-blind too (Okabe and Ito), the yellow left out: it is faint on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_SAME = dict(ls=(0, (1, 1.5)), lw=1.2, marker="o", mfc="white", ms=4)
_LEGEND = dict(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, frameon=False, fontsize=9)

Evaluations = Mapping[str, Evaluation]  # by the name of the model
Row = dict[str, Any]


def summary_rows(evaluations: Evaluations) -> list[Row]:
    """A line for each model, run and threshold: a run of one count is held against every threshold."""
    rows = []
    for name, evaluation in evaluations.items():
        for result in evaluation.runs:
            rows += [
                {
                    "model": name,
                    "mask_type": evaluation.model.mask_type,
                    "search": result.run.search,
                    "threshold": threshold,
                    "num_tokens": result.run.num_tokens,
                    "blocks": len(result.blocks),
                    "share_met": None if threshold is None else result.share_met(threshold),
                    **_measured(result),
                }
                for threshold in _thresholds(evaluation, result) or (None,)
            ]
    return rows


def _measured(result: RunResult) -> Row:
    names = "mean_tokens bits_per_pixel psnr psnr_of_clips ssim lpips passes_per_block seconds_per_block"
    return {name: getattr(result, name) for name in names.split()}


def _thresholds(evaluation: Evaluation, result: RunResult) -> tuple[float, ...]:
    """What a run is held against."""
    own = result.run.threshold
    return evaluation.config.thresholds if own is None else (own,)


def block_rows(evaluations: Evaluations) -> list[Row]:
    """A line for each model, run, clip and block."""
    return [
        {
            "model": name,
            "clip": block.clip,
            "block": block.index,
            "search": result.run.search,
            "threshold": result.run.threshold,
            "num_tokens": result.run.num_tokens,
            "kept": block.num_kept,
            "loss": block.loss,
            "met": None if block.met is None else int(block.met),
            "passes": block.passes,
            "seconds": block.seconds,
        }
        for name, evaluation in evaluations.items()
        for result in evaluation.runs
        for block in result.blocks
    ]


def curve_rows(evaluations: Evaluations) -> list[Row]:
    """A line for each model, threshold and cap: what the left half of the figure is drawn from."""
    return [
        {"model": name, "threshold": threshold, **point._asdict()}
        for name, evaluation in evaluations.items()
        for threshold in evaluation.config.thresholds
        for point in evaluation.curve(threshold)
    ]


def search_rows(evaluations: Evaluations) -> list[Row]:
    """A line for each model, threshold and search; [] where only one was run.

    Optimal is what the linear search finds, which tries its counts from the smallest up. Each search makes its own context as it goes,
    as it does in use, so that a difference in one block reaches the later ones.
    """
    rows = []
    for name, evaluation in evaluations.items():
        if len(evaluation.config.searches) < 2 or fixed_count(evaluation.model) is not None:
            continue
        for threshold in evaluation.config.thresholds:
            for search in evaluation.config.searches:
                result = evaluation.under(threshold, search)
                rows.append({
                    "model": name,
                    "threshold": threshold,
                    "search": search,
                    "passes_per_block": result.passes_per_block,
                    "seconds_per_block": result.seconds_per_block,
                    "mean_tokens": result.mean_tokens,
                    "mean_tokens_above_optimum": evaluation.above_optimum(threshold, search),
                    "share_met": result.share_met(threshold),
                })  # fmt: skip
    return rows


def as_json(evaluations: Evaluations) -> dict[str, Any]:
    """Everything that was measured: the settings, for each model its clips, runs, blocks and every count tried, and curves."""
    return {
        "errors": "mean squares, pixels in [-1, 1]; psnr is that of the mean over all pixels",
        "optimum": f"mean_tokens_above_optimum is measured against the {GROUND_TRUTH} search",
        "models": {name: _model_json(evaluation) for name, evaluation in evaluations.items()},
        "curves": curve_rows(evaluations),
        "searches": search_rows(evaluations),
    }


def _model_json(evaluation: Evaluation) -> dict[str, Any]:
    def run(result: RunResult) -> dict[str, Any]:
        held_against = _thresholds(evaluation, result)
        return {
            **result.run._asdict(),
            "share_met": {f"{t:g}": result.share_met(t) for t in held_against},
            **_measured(result),
            "blocks": [
                block._asdict() | {"tried": [list(pair) for pair in block.tried.items()]}
                for block in result.blocks
            ],
        }

    return {
        "model_id": evaluation.model_id,
        "config": evaluation.model.to_json_dict(),
        "settings": vars(evaluation.config),
        "clips": evaluation.clips,
        "skipped": evaluation.skipped,
        "runs": [run(result) for result in evaluation.runs],
    }


def table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Rows for the eye; columns without a value anywhere are left out."""
    shown = [name for name in columns if any(row[name] is not None for row in rows)]
    cells = [[name.replace("_", " ") for name in shown]]
    cells += [[_cell(row[name]) for name in shown] for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(len(shown))]
    return "\n".join(
        "  ".join(cell.rjust(w) if k else cell.ljust(w) for k, (cell, w) in enumerate(pairs))
        for pairs in (list(zip(line, widths, strict=True)) for line in cells)
    )


def describe(evaluations: Evaluations) -> str:
    """The tables that the script prints."""
    columns = "model search threshold num_tokens share_met mean_tokens bits_per_pixel psnr ssim lpips passes_per_block seconds_per_block"
    parts = [table(summary_rows(evaluations), columns.split())]
    if rows := search_rows(evaluations):
        parts.append("Searches:\n" + table(rows, list(rows[0])))
    return "\n\n".join(parts)


def write(folder: str | os.PathLike, evaluations: Evaluations) -> list[Path]:
    """Writes all results into `folder`, all or none; those of an earlier evaluation are replaced.

    Raises:
      ValueError: as `check_folder`.
      OSError: it cannot be written to.
    """
    typed, folder = os.fspath(folder), Path(folder)
    check_folder(folder)
    try:
        with replaced_together(folder, RESULTS) as work:
            json_file.write_json(work / JSON, as_json(evaluations))
            _write_csv(work / BLOCKS, block_rows(evaluations))
            _write_csv(work / SUMMARY, summary_rows(evaluations))
            _write_csv(work / CURVES, curve_rows(evaluations))
            _write_csv(work / SEARCHES, search_rows(evaluations))
            plot(evaluations, work / FIGURE)
            written = [folder / name for name in RESULTS if (work / name).exists()]
    except OSError as error:
        if not error.errno:
            raise
        # The folder that was asked for, not the one beside it that is worked in.
        raise OSError(error.errno, error.strerror, typed) from error
    return written


def check_folder(folder: str | os.PathLike) -> None:
    """Refuses a folder that results cannot go to: asked before anything is measured. Nothing is left behind.

    Raises:
      ValueError: it is a file, it cannot be made or written to, or files lie in it that an evaluation would replace
        but none has written.
    """
    typed, folder = os.fspath(folder), Path(folder)
    present = {name for name in RESULTS if os.path.lexists(folder / name)}
    if foreign := [name for name in RESULTS if name in present - _of_an_evaluation(folder)]:
        raise ValueError(
            f"{typed!r} holds {', '.join(foreign)}, but not as an earlier evaluation left them; name another folder, so "
            "that nothing of yours is replaced."
        )
    places = (folder, *folder.absolute().parents)
    here = next(place for place in places if os.path.lexists(place))
    if not here.is_dir():
        what = "" if here == folder else f"lies below {here}, which "
        raise ValueError(f"{typed!r} {what}is a file; name a folder for the results.")
    try:
        with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=here) as trial:
            # Its own name, too, may be one that the disk does not take.
            Path(trial, folder.absolute().relative_to(here.absolute())).mkdir(
                parents=True, exist_ok=True
            )
    except OSError as error:
        raise ValueError(
            f"No results can be written to the folder {typed!r} ({error.strerror}); name another one."
        ) from error


def _of_an_evaluation(folder: Path) -> set[str]:
    """Names of the files in `folder` that an earlier evaluation wrote, by its evaluation.json; none without one."""
    path = folder / JSON
    try:
        # A pipe of this name would be waited for; and no evaluation writes a folder.
        found = json.loads(path.read_bytes()) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return set()
    if not isinstance(found, dict) or found.keys() != as_json({}).keys():
        return set()
    absent = {name for name, key in ((CURVES, "curves"), (SEARCHES, "searches")) if not found[key]}
    return {name for name in RESULTS if name not in absent and (folder / name).is_file()}


def _write_csv(path: Path, rows: Sequence[Row]) -> None:
    if not rows:  # no threshold, or one search: there is no such table
        return
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    return "" if value is None else str(value)


def plot(evaluations: Evaluations, path: str | os.PathLike) -> None:
    """Draws, as PNG: how many blocks meet a threshold with how many tokens (the paper's Figure 4), and quality against tokens."""
    figure = figures.new_figure(12.5, 5.6)
    left, right = figure.subplots(1, 2)
    _plot_thresholds(left, evaluations)
    second = _plot_quality(right, evaluations)
    largest = max(evaluation.model.max_toks for evaluation in evaluations.values())
    smallest = min(
        min(result.mean_tokens for result in evaluation.runs) for evaluation in evaluations.values()
    )
    ticks = [largest / 2**k for k in range(12, -1, -1) if largest / 2**k >= 0.7 * smallest]
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xlim(smallest / 1.08, largest * 1.08)
        axes.set_xlabel("mean tokens per block")
        axes.grid(color=_GRID)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(axes is right and second)
    _label_bits(right, evaluations, ticks)
    figures.write_figure(figure, path)


def _plot_thresholds(axes: Any, evaluations: Evaluations) -> None:
    """A colour for each threshold, a line style or a marker for each model."""
    thresholds = next(iter(evaluations.values())).config.thresholds
    colours = dict(zip(thresholds, itertools.cycle(_COLOURS), strict=False))
    styles, markers = itertools.cycle(_STYLES), itertools.cycle(_MARKERS)
    for name, evaluation in evaluations.items():
        if fixed_count(evaluation.model) is not None:
            look = dict(marker=next(markers), ls="", ms=9, mec="white", zorder=4)
            for threshold, colour in colours.items():
                (point,) = evaluation.curve(threshold)
                axes.plot(point.mean_tokens, 100 * point.share_met, color=colour, **look)
            kind = evaluation.model.mask_type
            axes.plot(
                [], [], color=_INK, **look, label=name if name == kind else f"{name} ({kind})"
            )
            continue
        style = next(styles)
        runs = evaluation.fixed()
        for threshold, colour in colours.items():
            points = evaluation.curve(threshold)
            x, y = [p.mean_tokens for p in points], [100 * p.share_met for p in points]
            axes.plot(x, y, color=colour, ls=style, lw=2)
            axes.plot(x[-1], y[-1], "o", color=colour, ms=7)  # without a cap
            shares = [100 * result.share_met(threshold) for result in runs]
            axes.plot([r.mean_tokens for r in runs], shares, color=colour, **_SAME)
        axes.plot([], [], color=_INK, ls=style, lw=2, marker="o", label=f"{name}, searched")
        axes.plot([], [], color=_INK, **_SAME, label=f"{name}, the same count for all")
    for threshold, colour in colours.items():
        axes.plot([], [], color=colour, lw=4, label=f"threshold {threshold:g}")
    axes.set_ylim(-4, 104)
    axes.set_ylabel("blocks that meet the threshold, %")
    axes.set_title("What a threshold takes", loc="left", fontsize=12)
    axes.legend(**_LEGEND)


def _plot_quality(axes: Any, evaluations: Evaluations) -> bool:
    """A colour for each model; PSNR on the left, LPIPS (else SSIM) on the right if measured. True: it was."""
    measured = [
        name
        for name in ("lpips", "ssim")
        if any(getattr(r, name) is not None for e in evaluations.values() for r in e.runs)
    ]
    second = axes.twinx() if measured else None
    markers = itertools.cycle(_MARKERS)
    colours = itertools.cycle(_COLOURS)
    for (name, evaluation), colour in zip(evaluations.items(), colours, strict=False):
        model_config = fixed_count(evaluation.model) is None
        look = dict(
            color=colour, marker="o" if model_config else next(markers), ms=6 if model_config else 9
        )
        runs = evaluation.fixed()
        tokens = [result.mean_tokens for result in runs]
        label = f"{name}, the same count for all" if model_config else name
        line = "-" if model_config else ""  # a single point has none in the legend either
        axes.plot(tokens, [r.psnr for r in runs], ls=line, **look, mec="white", lw=2, label=label)
        if second is not None:
            values = [getattr(result, measured[0]) for result in runs]
            second.plot(tokens, values, **look, mfc="white", lw=1.3, ls="--")
        if model_config and evaluation.config.thresholds:
            chosen = [evaluation.under(threshold) for threshold in evaluation.config.thresholds]
            x, y = [r.mean_tokens for r in chosen], [r.psnr for r in chosen]
            axes.plot(x, y, "*", color=colour, ms=13, mec="white", label=f"{name}, searched")
    axes.set_ylabel("PSNR, dB" + (" (solid)" if measured else ""))
    if second is not None:
        better = "less" if measured[0] == "lpips" else "more"
        second.set_ylabel(f"{measured[0].upper()} (dashed; {better} is better)")
        second.spines["top"].set_visible(False)
    axes.legend(**_LEGEND)
    return second is not None


def _label_bits(axes: Any, evaluations: Evaluations, ticks: Sequence[float]) -> None:
    """Bits per pixel along the top, where a token is worth the same in every model."""
    rates = [r.bits_per_pixel / r.mean_tokens for e in evaluations.values() for r in e.runs]
    # A clip's last block may be short: its tokens are spread over fewer pixels.
    if max(rates) > 1.02 * min(rates):
        axes.set_title("Quality that tokens buy", loc="left", fontsize=12)
        return
    top = axes.secondary_xaxis("top")
    top.set_xticks(list(ticks), [f"{tick * float(np.mean(rates)):.3g}" for tick in ticks])
    top.minorticks_off()
    top.set_xlabel("bits per pixel")
    axes.set_title("Quality that tokens buy", loc="left", fontsize=12, pad=34)

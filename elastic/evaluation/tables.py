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

from elastic.evaluation.records import GROUND_TRUTH, ConditionResult, Evaluation, fixed_count
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
    """One row for each model, condition and threshold. A fixed count is compared with every threshold."""
    rows = []
    for name, evaluation in evaluations.items():
        for result in evaluation.results:
            rows += [
                {
                    "model": name,
                    "mask_type": evaluation.model.mask_type,
                    "search": result.condition.search,
                    "threshold": threshold,
                    "num_tokens": result.condition.num_tokens,
                    "blocks": len(result.blocks),
                    "share_met": None if threshold is None else result.share_met(threshold),
                    **_measured(result),
                }
                for threshold in _thresholds(evaluation, result) or (None,)
            ]
    return rows


def _measured(result: ConditionResult) -> Row:
    names = "mean_tokens bits_per_pixel psnr psnr_of_clips ssim lpips passes_per_block seconds_per_block"
    return {name: getattr(result, name) for name in names.split()}


def _thresholds(evaluation: Evaluation, result: ConditionResult) -> tuple[float, ...]:
    """The thresholds that a result is compared with: its own, or for a fixed count all."""
    own = result.condition.threshold
    return evaluation.config.thresholds if own is None else (own,)


def block_rows(evaluations: Evaluations) -> list[Row]:
    """One row for each model, condition, clip and block."""
    return [
        {
            "model": name,
            "clip": block.clip,
            "block": block.index,
            "search": result.condition.search,
            "threshold": result.condition.threshold,
            "num_tokens": result.condition.num_tokens,
            "kept": block.num_kept,
            "loss": block.loss,
            "met": None if block.met is None else int(block.met),
            "passes": block.passes,
            "seconds": block.seconds,
        }
        for name, evaluation in evaluations.items()
        for result in evaluation.results
        for block in result.blocks
    ]


def curve_rows(evaluations: Evaluations) -> list[Row]:
    """One row for each model, threshold and cap; the left half of the figure shows these."""
    return [
        {"model": name, "threshold": threshold, **point._asdict()}
        for name, evaluation in evaluations.items()
        for threshold in evaluation.config.thresholds
        for point in evaluation.curve(threshold)
    ]


def search_rows(evaluations: Evaluations) -> list[Row]:
    """One row for each model, threshold and search; [] if only one search was run.

    The optimum is the result of the linear search, which tries its counts from the smallest up. Each search fills its own cache, as
    in normal use, so that a different count in one block also affects later blocks.
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
    """All measurements: for each model the settings, clips, conditions, blocks and every count tried; then curves and searches."""
    return {
        "errors": "mean squares, pixels in [-1, 1]; psnr is that of the mean over all pixels",
        "optimum": f"mean_tokens_above_optimum is measured against the {GROUND_TRUTH} search",
        "models": {name: _model_json(evaluation) for name, evaluation in evaluations.items()},
        "curves": curve_rows(evaluations),
        "searches": search_rows(evaluations),
    }


def _model_json(evaluation: Evaluation) -> dict[str, Any]:
    def result_json(result: ConditionResult) -> dict[str, Any]:
        thresholds = _thresholds(evaluation, result)
        return {
            **result.condition._asdict(),
            "share_met": {f"{t:g}": result.share_met(t) for t in thresholds},
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
        "runs": [result_json(result) for result in evaluation.results],
    }


def table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Rows as aligned text; a column without any value is left out."""
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
    """Writes all results into `folder`, or none if that fails. Results of an earlier evaluation are replaced.

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
        # Name the folder that the user typed, not the temporary folder beside it.
        raise OSError(error.errno, error.strerror, typed) from error
    return written


def check_folder(folder: str | os.PathLike) -> None:
    """Refuses a folder that results cannot be written to. Called before anything is measured; leaves nothing behind.

    Raises:
      ValueError: the folder is a file, cannot be made or written to, or holds files that an evaluation would replace
        although no evaluation wrote them.
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
            # The folder's own name may be one that the file system refuses, so it is tried too.
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
        # Only a regular file is read: reading a pipe would block.
        found = json.loads(path.read_bytes()) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return set()
    if not isinstance(found, dict) or found.keys() != as_json({}).keys():
        return set()
    absent = {name for name, key in ((CURVES, "curves"), (SEARCHES, "searches")) if not found[key]}
    return {name for name in RESULTS if name not in absent and (folder / name).is_file()}


def _write_csv(path: Path, rows: Sequence[Row]) -> None:
    if not rows:  # without thresholds, or with one search, there is no such table
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
    """Draws the figure as PNG: against tokens, the share of blocks that meet a threshold (the paper's Figure 4), and quality."""
    figure = figures.new_figure(12.5, 5.6)
    left, right = figure.subplots(1, 2)
    _plot_thresholds(left, evaluations)
    second = _plot_quality(right, evaluations)
    largest = max(evaluation.model.max_toks for evaluation in evaluations.values())
    smallest = min(
        min(result.mean_tokens for result in evaluation.results)
        for evaluation in evaluations.values()
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
    """The left half: a colour for each threshold, a line style or a marker for each model."""
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
        fixed = evaluation.fixed()
        for threshold, colour in colours.items():
            points = evaluation.curve(threshold)
            x, y = [p.mean_tokens for p in points], [100 * p.share_met for p in points]
            axes.plot(x, y, color=colour, ls=style, lw=2)
            axes.plot(x[-1], y[-1], "o", color=colour, ms=7)  # the end of the curve: no cap
            shares = [100 * result.share_met(threshold) for result in fixed]
            axes.plot([r.mean_tokens for r in fixed], shares, color=colour, **_SAME)
        axes.plot([], [], color=_INK, ls=style, lw=2, marker="o", label=f"{name}, searched")
        axes.plot([], [], color=_INK, **_SAME, label=f"{name}, the same count for all")
    for threshold, colour in colours.items():
        axes.plot([], [], color=colour, lw=4, label=f"threshold {threshold:g}")
    axes.set_ylim(-4, 104)
    axes.set_ylabel("blocks that meet the threshold, %")
    axes.set_title("What a threshold takes", loc="left", fontsize=12)
    axes.legend(**_LEGEND)


def _plot_quality(axes: Any, evaluations: Evaluations) -> bool:
    """The right half: a colour for each model; PSNR on the left axis, LPIPS (else SSIM) on the right, if measured. True: it was."""
    measured = [
        name
        for name in ("lpips", "ssim")
        if any(getattr(r, name) is not None for e in evaluations.values() for r in e.results)
    ]
    second = axes.twinx() if measured else None
    markers = itertools.cycle(_MARKERS)
    colours = itertools.cycle(_COLOURS)
    for (name, evaluation), colour in zip(evaluations.items(), colours, strict=False):
        is_elastic = fixed_count(evaluation.model) is None
        look = dict(
            color=colour, marker="o" if is_elastic else next(markers), ms=6 if is_elastic else 9
        )
        fixed = evaluation.fixed()
        tokens = [result.mean_tokens for result in fixed]
        label = f"{name}, the same count for all" if is_elastic else name
        line = "-" if is_elastic else ""  # a single point has none in the legend either
        axes.plot(tokens, [r.psnr for r in fixed], ls=line, **look, mec="white", lw=2, label=label)
        if second is not None:
            values = [getattr(result, measured[0]) for result in fixed]
            second.plot(tokens, values, **look, mfc="white", lw=1.3, ls="--")
        if is_elastic and evaluation.config.thresholds:
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
    """Labels the top axis with bits per pixel, if a token has the same number of bits in every model."""
    rates = [r.bits_per_pixel / r.mean_tokens for e in evaluations.values() for r in e.results]
    # 2 % of tolerance: the last block of a clip may be short, and its tokens are then spread over fewer pixels.
    if max(rates) > 1.02 * min(rates):
        axes.set_title("Quality that tokens buy", loc="left", fontsize=12)
        return
    top = axes.secondary_xaxis("top")
    top.set_xticks(list(ticks), [f"{tick * float(np.mean(rates)):.3g}" for tick in ticks])
    top.minorticks_off()
    top.set_xlabel("bits per pixel")
    axes.set_title("Quality that tokens buy", loc="left", fontsize=12, pad=34)

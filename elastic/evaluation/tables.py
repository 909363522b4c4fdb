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

from elastic.evaluation.records import (
    GROUND_TRUTH,
    ConditionResult,
    Evaluation,
    Quality,
    fixed_count,
)
from elastic.io import json_file
from elastic.io.atomic import replaced_together
from elastic.metrics import psnr_of_mse
from elastic.metrics.bjontegaard import bd_psnr, bd_rate
from elastic.report import figures

JSON, FIGURE, LADDER = "evaluation.json", "evaluation.png", "ladder.png"
BLOCKS, SUMMARY, CURVES, SEARCHES = "blocks.csv", "summary.csv", "curves.csv", "searches.csv"
# Every name that an evaluation may write.
RESULTS = (JSON, BLOCKS, SUMMARY, CURVES, SEARCHES, FIGURE, LADDER)
_MARKS = {
    "errors",
    "optimum",
    "models",
    "curves",
    "searches",
}  # keys of every evaluation.json, old ones too
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
    """One row for each model, condition and threshold. A fixed count is compared with every threshold.

    A classical codec has a row for each fixed count of each model: what it gives for the bits of that count.
    """
    rows: list[Row] = []
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
        rows += [
            dict.fromkeys(rows[0]) | {"model": name, "search": result.codec, "num_tokens": result.num_tokens, **_quality(result)}
            for result in evaluation.codecs
        ]  # fmt: skip
    return rows


def _quality(result: Quality) -> Row:
    names = "bits_per_pixel psnr psnr_of_clips ssim lpips dists fvd fid"
    return {name: getattr(result, name) for name in names.split()}


_COSTS = ("passes_per_block", "drafts_per_block", "seconds_per_block")


def _measured(result: ConditionResult) -> Row:
    return (
        {"mean_tokens": result.mean_tokens}
        | _quality(result)
        | {name: getattr(result, name) for name in _COSTS}
    )


def delta_rows(evaluations: Evaluations) -> list[Row]:
    """One row for each model and each other curve: how far its fixed counts are from that curve (Bjontegaard's deltas).

    A model is compared with the first model, and with each codec.
    """
    first, *_ = evaluations
    curves = {name: _rate_curve(evaluation.fixed()) for name, evaluation in evaluations.items()}
    rows = []
    for name, evaluation in evaluations.items():
        others = {} if name == first else {first: curves[first]}
        for codec in evaluation.config.codecs:
            others[codec] = _rate_curve([r for r in evaluation.codecs if r.codec == codec])
        rows += [
            {"model": name, "against": other, "bd_rate_percent": bd_rate(curve, curves[name]), "bd_psnr_db": bd_psnr(curve, curves[name])}
            for other, curve in others.items()
        ]  # fmt: skip
    return rows


def _rate_curve(results: Sequence[Quality]) -> list[tuple[float, float]]:
    return [(result.bits_per_pixel, result.psnr_of_clips) for result in results]


def condition_rows(evaluations: Evaluations) -> list[Row]:
    """One row for each model and condition, and for each codec and count, as people read them.

    Each threshold is a column, in dB as well: the share of blocks that meet it.
    """
    rows: list[Row] = []
    for name, evaluation in evaluations.items():
        thresholds = evaluation.config.thresholds
        met = {t: f"met {t:g} ({psnr_of_mse(t):.1f} dB)" for t in thresholds}
        for result in evaluation.results:
            own = result.condition
            asked = f"{own.num_tokens} tokens" if own.threshold is None else f"{own.threshold:g} ({own.search})"  # fmt: skip
            shares = {met[t]: f"{100 * result.share_met(t):.0f} %" for t in thresholds}
            rows.append({"model": name, "asked": asked, **_measured(result), **shares})
        rows += [
            {"model": result.codec, "asked": f"the bits of {result.num_tokens} tokens of {name}", **_quality(result)}
            for result in evaluation.codecs
        ]  # fmt: skip
    names = list(dict.fromkeys(key for row in rows for key in row))
    return [dict.fromkeys(names) | row for row in rows]


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
            "drafts": block.drafts,
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
                    "drafts_per_block": result.drafts_per_block,
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
        "deltas": delta_rows(evaluations) if evaluations else [],
        "ladders": [
            {
                "model": name,
                "clip": ladder.clip,
                "frame": ladder.index,
                "rungs": [[rung.num_tokens, rung.psnr, rung.lpips] for rung in ladder.rungs],
            }
            for name, evaluation in evaluations.items()
            for ladder in evaluation.ladders
        ],
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
        "codecs": [
            {
                "codec": result.codec,
                "num_tokens": result.num_tokens,
                "clips_within": result.clips_within,
                **_quality(result),
            }
            for result in evaluation.codecs
        ],
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
    rows = condition_rows(evaluations)
    met = [name for name in rows[0] if name.startswith("met ")]
    columns = "model asked mean_tokens bits_per_pixel psnr ssim lpips dists fvd fid".split()
    costs = [name for name in _COSTS if any(row[name] for row in rows)]
    parts = [table(rows, [*columns, *met, *costs])]
    if rows := delta_rows(evaluations):
        parts.append(
            "For the same quality in bits, for the same bits in dB:\n" + table(rows, list(rows[0]))
        )
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
            draw_ladders(evaluations, work / LADDER)
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
    if not isinstance(found, dict) or not found.keys() >= _MARKS:
        return set()
    optional = ((CURVES, "curves"), (SEARCHES, "searches"), (LADDER, "ladders"))
    absent = {name for name, key in optional if not found.get(key)}
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
        point.mean_tokens
        for evaluation in evaluations.values()
        for points in (evaluation.results, *map(evaluation.curve, evaluation.config.thresholds))
        for point in points
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


def draw_ladders(evaluations: Evaluations, path: str | os.PathLike) -> None:
    """Draws a row for each ladder as PNG: the original frame, then its reconstructions from few tokens to many."""
    rows = [(name, ladder) for name, e in evaluations.items() for ladder in e.ladders]
    if not rows:
        return
    columns = 1 + max(len(ladder.rungs) for _, ladder in rows)
    figure = figures.new_figure(1.9 * columns, 2.35 * len(rows))
    for axes, (name, ladder) in zip(figure.subplots(len(rows), columns, squeeze=False), rows, strict=True):  # fmt: skip
        for place in axes:
            place.axis("off")
        lines = [name] if len(evaluations) > 1 else []
        lines += [Path(ladder.clip).name, f"frame {ladder.index}"]
        shown = [("\n".join(map(_shortened, lines)), ladder.original)]
        for rung in ladder.rungs:
            distance = "" if rung.lpips is None else f", LPIPS {rung.lpips:.2f}"
            shown.append((f"{rung.num_tokens} tokens\n{rung.psnr:.1f} dB{distance}", rung.reconstruction))  # fmt: skip
        for place, (title, picture) in zip(axes, shown, strict=False):
            place.imshow(picture, interpolation="nearest")
            place.set_title(title, fontsize=8)
    figures.write_figure(figure, path)


def _shortened(text: str, most: int = 26) -> str:
    """A title that a picture is wide enough for."""
    half = most // 2
    return text if len(text) <= most else f"{text[: half - 1]}\N{HORIZONTAL ELLIPSIS}{text[-half:]}"


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
    # A codec is a line, so only a model with several counts has one beside it.
    num_lines = sum(len(evaluation.fixed()) > 1 for evaluation in evaluations.values())
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
        per_token = fixed[0].bits_per_pixel / fixed[0].mean_tokens
        for codec, style in zip(
            evaluation.config.codecs, itertools.cycle(_STYLES[1:]), strict=False
        ):
            found = [result for result in evaluation.codecs if result.codec == codec]
            if len(found) < 2:
                continue
            x, y = [r.bits_per_pixel / per_token for r in found], [r.psnr for r in found]
            kind = "" if num_lines == 1 else f" at the bits of {name}"
            axes.plot(
                x, y, color=colour if kind else _INK, ls=style, lw=1.5, label=f"{codec}{kind}"
            )
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

"""How good a model is on held-out clips: the tokens that a threshold takes, and the quality that a count buys.

A *run* is one way to choose counts, over every clip: a search under a threshold, or the same count for each block. Each run tokenizes
the clips by itself. Little could be shared: what a block's cache holds depends on the counts chosen for the blocks before it, so that two
runs see the same cache in the first block of a clip alone, and sharing that would spoil the seconds of a search, which are measured here.
What can be had for nothing is: a run of one count is held against every threshold, and every run is measured for quality as it passes.
"""

import functools
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from elastic import media
from elastic.config import ElasticTokConfig
from elastic.evaluation.records import (
    GROUND_TRUTH,
    Block,
    Condition,
    Evaluation,
    EvaluationConfig,
    Picture,
    RunResult,
    fixed_count,
)
from elastic.metrics import load_lpips_weights, psnr_of_mse, ssim
from elastic.metrics.lpips import lpips_of_frames
from elastic.tokenizer import ElasticTokenizer, EncodeOptions

log = logging.getLogger(__name__)

__all__ = ["Evaluation", "EvaluationConfig", "evaluate"]

_CERTAIN = 1e9  # an error that every reconstruction stays under

# Of two arrays of frames, uint8 [n, rows, columns, 3], n values.
_Measure = Callable[[np.ndarray, np.ndarray], np.ndarray]


def evaluate(
    tokenizer: ElasticTokenizer,
    files: Sequence[Path],
    config: EvaluationConfig,
    *,
    lpips_weights: Any = None,
    progress: bool = True,
) -> Evaluation:
    """Measures a model on clips. Clips are read block by block; what is held are numbers, and a few frames.

    To evaluate again and again while training, make one tokenizer and give it weights (`ElasticTokenizer.with_params`): nothing is
    compiled a second time.

    Args:
      files: images and videos. One that cannot be read is named in the log, left out of every number, and listed in `skipped`.
      lpips_weights: for the metric 'lpips', what `load_lpips_weights` gives; None: loaded here.
      progress: show a bar with an estimate.

    Raises:
      ValueError: no file can be read, or the options do not fit the model.
    """
    model = tokenizer.config
    measures = _measures(config.metrics, lpips_weights)
    runs = config.runs(model)
    clips, skipped = _open_clips(files, config, model)
    _warm_up(tokenizer, runs)
    measured: dict[str, list[_Measured]] = {}
    shown: list[Picture] = []
    blocks = {name: -(-clip.num_frames // model.frames_per_block) for name, clip in clips.items()}
    total = sum(blocks.values()) * len(runs)
    with tqdm(total=total, desc="evaluating", unit="block", disable=not progress) as bar:
        for name, clip in clips.items():
            bar.set_postfix_str(name, refresh=False)
            before = bar.n
            try:
                results = [
                    _measure(tokenizer, clip, run, config, measures, bar.update) for run in runs
                ]
            except (media.MediaError, OSError) as error:  # found out only while reading
                skipped[name] = str(error)
                bar.total -= len(runs) * blocks[name] - (bar.n - before)
                continue
            if len(measured) < config.pictures:
                shown += [
                    Picture(f"eval/{name}@{label}", run, name, *result.middle)
                    for run, result in zip(runs, results, strict=True)
                    if (label := _label(run, config, model))
                ]
            measured[name] = results
    for name, message in skipped.items():
        log.warning("Left out of the evaluation: %s: %s", name, message)
    if not measured:
        raise ValueError(
            f"None of {len(files)} files could be read; the first: {next(iter(skipped.values()), 'none was given')}"
        )
    return Evaluation(
        config=config,
        model=model,
        model_id=tokenizer.model_id,
        clips={name: clips[name].num_frames for name in measured},
        skipped=skipped,
        runs=tuple(
            _result(run, [results[k] for results in measured.values()])
            for k, run in enumerate(runs)
        ),
        shown=tuple(shown),
    )


class _Clip(NamedTuple):
    """A file that could be opened."""

    name: str
    path: Path
    rate: float | None  # to read it at
    num_frames: int


class _Measured(NamedTuple):
    """One run over one clip."""

    blocks: list[Block]
    squares: float  # of errors, pixels in [-1, 1], over all numbers
    count: int
    bits: int
    pixels: int
    metrics: dict[str, np.ndarray]  # a value for each frame measured
    middle: tuple[int, np.ndarray, np.ndarray]  # a frame's number, original and reconstruction


def _label(run: Condition, config: EvaluationConfig, model: ElasticTokConfig) -> str:
    """What a picture of this run is called; '' for a run that has none."""
    if fixed_count(model) is not None:
        return str(run.num_tokens)
    return f"{run.threshold:g}" if run.threshold and run.search == config.searches[0] else ""


def _measures(names: Sequence[str], lpips_weights: Any) -> dict[str, _Measure]:
    """The metrics beside PSNR, by name."""
    found: dict[str, _Measure] = {}
    if "ssim" in names:
        found["ssim"] = ssim
    if "lpips" in names:
        weights = load_lpips_weights() if lpips_weights is None else lpips_weights
        found["lpips"] = functools.partial(lpips_of_frames, jax.device_put(weights))
    return found


def _open_clips(
    files: Sequence[Path], config: EvaluationConfig, model: ElasticTokConfig
) -> tuple[dict[str, _Clip], dict[str, str]]:
    """Clips by name, and the files that are none, with the reason."""
    clips: dict[str, _Clip] = {}
    skipped: dict[str, str] = {}
    for name, path in _names(files).items():
        try:
            reader = media.open_clip(
                path,
                resolution=model.resolution,
                rate=config.fps or None,
                max_frames=config.max_frames or None,
            )
        except (media.MediaError, OSError) as error:
            skipped[name] = str(error)
            continue
        # At the rate that it has, so that a video slower than `fps` is reported once and not in every run.
        rate = reader.rate if config.fps and reader.rate else None
        clips[name] = _Clip(name, path, rate, reader.num_frames)
        reader.close()
    return clips, skipped


def _names(files: Sequence[Path]) -> dict[str, Path]:
    """Each file by its path below the folder that holds them all."""
    paths = {Path(file).absolute(): Path(file) for file in files}
    root = os.path.commonpath([path.parent for path in paths]) if paths else ""
    return {str(path.relative_to(root)): file for path, file in paths.items()}


def _warm_up(tokenizer: ElasticTokenizer, runs: Sequence[Condition]) -> None:
    """Compiles what the runs need, so that none of them pays for it: one pass of each kind over black frames."""
    model = tokenizer.config
    black = np.zeros((1, model.resolution, model.resolution, 3), np.uint8)
    tokenizer.encode(black, num_tokens=model.max_toks)
    if tokenizer.search_width > 1 and any(run.threshold is not None for run in runs):
        tokenizer.encode(black, threshold=_CERTAIN, search=GROUND_TRUTH)


def _measure(
    tokenizer: ElasticTokenizer,
    clip: _Clip,
    run: Condition,
    config: EvaluationConfig,
    measures: Mapping[str, _Measure],
    update: Callable[[], Any],
) -> _Measured:
    """One run over one clip."""
    options = EncodeOptions(
        threshold=run.threshold,
        num_tokens=run.num_tokens,
        search=run.search,
        rate=clip.rate,
        max_frames=config.max_frames or None,
        num_counts=config.num_counts or _all_counts(tokenizer.config),
    )
    session = tokenizer.open_session(clip.path, options)
    if run.search not in ("fixed", config.searches[0]):
        measures = {}  # the other searches are there to be timed
    frames, middle = clip.num_frames, (clip.num_frames - 1) // 2
    spread = np.linspace(0, frames - 1, min(config.metric_frames, frames)).round().astype(int)
    wanted = {middle, *spread.tolist()} if measures else {middle}
    held: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    blocks, squares, count, seen = [], 0, 0, 0
    for index, result in enumerate(session):
        tokens = result.tokens
        blocks.append(
            Block(
                clip=clip.name,
                index=index,
                num_kept=tokens.num_kept,
                loss=tokens.loss,
                met=None if run.threshold is None else tokens.met_threshold,
                passes=result.passes,
                seconds=result.seconds,
                tried=result.tried,
            )
        )
        error = result.frames.astype(np.int32) - result.reconstruction
        squares += int(np.sum(np.square(error), dtype=np.int64))
        count += error.size
        for original, reconstruction in zip(result.frames, result.reconstruction, strict=True):
            if seen in wanted:
                held[seen] = (original.copy(), reconstruction.copy())
            seen += 1
        update()
    pair = [np.stack([held[k][side] for k in spread]) for side in (0, 1)] if measures else []
    tokens = session.tokens()
    return _Measured(
        blocks=blocks,
        squares=squares * (2 / 255) ** 2,
        count=count,
        bits=tokens.num_bits,
        pixels=tokens.num_frames * tokens.resolution**2,
        metrics={name: measure(*pair) for name, measure in measures.items()},
        middle=(middle, *held[middle]),
    )


def _all_counts(model: ElasticTokConfig) -> int:
    """How many counts, spread geometrically, leave out none: their steps are at most 1 at the far end."""
    return math.ceil(model.max_toks * math.log(model.max_toks / model.min_toks)) + 2


def _result(run: Condition, measured: Sequence[_Measured]) -> RunResult:
    """A run over all clips, from those over each."""

    def mean(name: str) -> float | None:
        values = [part.metrics[name] for part in measured if name in part.metrics]
        return float(np.mean(np.concatenate(values))) if values else None

    return RunResult(
        run=run,
        blocks=tuple(block for part in measured for block in part.blocks),
        mse=sum(part.squares for part in measured) / sum(part.count for part in measured),
        psnr_of_clips=float(np.mean([psnr_of_mse(m.squares / m.count) for m in measured])),
        bits_per_pixel=sum(part.bits for part in measured) / sum(part.pixels for part in measured),
        ssim=mean("ssim"),
        lpips=mean("lpips"),
    )

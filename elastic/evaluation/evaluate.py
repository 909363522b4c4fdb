"""Measures a model on held-out clips: how many tokens a threshold takes, and what quality a token count gives.

A *condition* is one way to choose token counts: a search under a threshold, or the same count for every block. Each condition
tokenizes all clips on its own. Conditions cannot share work: the KV cache of a block depends on the counts of the blocks before
it. Only the first block of a clip has the same cache under every condition, and sharing that one would distort the seconds of
the searches, which are measured too. Two results come at no extra cost: a fixed count is compared with every threshold, and the
quality of every condition is measured in the same pass that tokenizes the clips.
"""

import functools
import logging
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from elastic import media
from elastic.config import ElasticTokConfig, check_resolution
from elastic.evaluation.codecs import CodecAt
from elastic.evaluation.records import (
    GROUND_TRUTH,
    Block,
    CodecResult,
    Condition,
    ConditionResult,
    Evaluation,
    EvaluationConfig,
    Ladder,
    Picture,
    Rung,
    fixed_count,
)
from elastic.io.progress import hide_bar
from elastic.io.read_options import read_arguments, read_options
from elastic.media.location import Place, is_part
from elastic.metrics import load_lpips_weights, psnr, psnr_of_mse, squared_error, ssim
from elastic.metrics.dists import DistsWeights, dists_of_frames, load_dists_weights
from elastic.metrics.lpips import lpips_of_frames
from elastic.tokenizer import BlockResult, ElasticTokenizer, EncodeOptions
from elastic.tokenizer.result import TileResult

log = logging.getLogger(__name__)

__all__ = ["Evaluation", "EvaluationConfig", "evaluate"]

_ALWAYS_MET = 1e9  # a threshold above the error of every reconstruction

# Takes originals and reconstructions, each uint8 [n, rows, columns, 3]; returns n values.
_Measure = Callable[[np.ndarray, np.ndarray], np.ndarray]


def evaluate(
    tokenizer: ElasticTokenizer,
    files: Sequence[Place] | Mapping[str, Place],
    config: EvaluationConfig,
    *,
    lpips_weights: Any = None,
    dists_weights: DistsWeights | None = None,
    progress: bool = True,
) -> Evaluation:
    """The results of a model on clips. Clips are read block by block, so that memory holds numbers and a few frames only.

    To evaluate repeatedly during training, make one tokenizer and replace its weights with `ElasticTokenizer.with_params`. Then
    nothing is compiled a second time.

    Args:
      tokenizer: the model.
      files: images and videos, or {name: clip}. A file that cannot be read is named in the log and in `skipped`, and counts in no number.
      config: the conditions, the metrics, and which frames are read.
      lpips_weights: weights for the metrics 'lpips' and 'dists', as `load_lpips_weights` returns them. None: they are loaded here.
      dists_weights: weights for the metric 'dists', as `load_dists_weights` returns them. None: likewise.
      progress: show a progress bar with the remaining time.

    Raises:
      ValueError: no file can be read, or the options do not fit the model.
    """
    model = tokenizer.config
    if config.fit != "tile":
        check_resolution(config.resolution or 0, model)
    measures = _measures(config.metrics, lpips_weights, dists_weights)
    conditions = config.conditions(model)
    clips, skipped = _open_clips(files, config, model)
    _warm_up(tokenizer, conditions, config.fit)
    measured: dict[str, list[_Measured]] = {}
    coded: dict[str, dict[tuple[str, int], _CodecMeasured]] = {}
    shown: list[Picture] = []
    ladders: list[Ladder] = []
    fixed = [k for k, condition in enumerate(conditions) if condition.search == "fixed"]
    blocks = {name: -(-clip.num_frames // model.frames_per_block) for name, clip in clips.items()}
    total = sum(blocks.values()) * len(conditions)
    with tqdm(total=total, desc="evaluating", unit="block", disable=hide_bar(progress)) as bar:
        for name, clip in clips.items():
            bar.set_postfix_str(name, refresh=False)
            before = bar.n
            try:
                results = [
                    _measure(tokenizer, clip, condition, config, measures, bar.update)
                    for condition in conditions
                ]
                if config.codecs:
                    budgets = {k: results[k].sums.bits for k in fixed}
                    coded[name] = _measure_codecs(clip, budgets, config, model, measures)
            except (media.MediaError, OSError) as error:  # the file opened, but breaks off
                skipped[name] = str(error)
                bar.total -= len(conditions) * blocks[name] - (bar.n - before)
                continue
            if len(measured) < config.pictures:
                shown += [
                    Picture(f"eval/{name}@{label}", condition, name, *result.middle)
                    for condition, result in zip(conditions, results, strict=True)
                    if (label := _label(condition, config, model))
                ]
                ladders.append(
                    _ladder(name, [(conditions[k], results[k]) for k in fixed], measures)
                )
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
        results=tuple(
            _result(condition, [results[k] for results in measured.values()])
            for k, condition in enumerate(conditions)
        ),
        shown=tuple(shown),
        ladders=tuple(ladders),
        codecs=tuple(
            _codec_result(codec, conditions[k], [coded[name][codec, k] for name in measured])
            for codec in config.codecs
            for k in fixed
        ),
    )


class _Clip(NamedTuple):
    """A file that could be opened."""

    name: str
    path: Place
    rate: float | None  # frames per second to read; None: every frame
    num_frames: int


class _Sums(NamedTuple):
    """The errors and the bits of one clip. They are sums, so that several clips can be added up."""

    squares: float  # of errors, pixels in [-1, 1]
    count: int  # errors in that sum: frames x rows x columns x 3
    bits: int
    pixels: int  # frames x rows x columns
    metrics: dict[str, np.ndarray]  # by name: one value for each measured frame


class _Measured(NamedTuple):
    """One condition on one clip."""

    blocks: list[Block]
    sums: _Sums
    middle: tuple[int, np.ndarray, np.ndarray]  # the middle frame: index, original, reconstruction


class _CodecMeasured(NamedTuple):
    """One codec on one clip at the bits of one condition."""

    within: bool  # whether it took no more bits
    sums: _Sums


def _label(condition: Condition, config: EvaluationConfig, model: ElasticTokConfig) -> str:
    """The part of a picture's name that stands for the condition; '' if the condition gets no picture."""
    if fixed_count(model) is not None:
        return str(condition.num_tokens)
    if condition.threshold and condition.search == config.searches[0]:
        return f"{condition.threshold:g}"
    return ""


def _measures(
    names: Sequence[str], lpips_weights: Any, dists_weights: DistsWeights | None
) -> dict[str, _Measure]:
    """The functions of all metrics except PSNR, by name."""
    found: dict[str, _Measure] = {}
    if "ssim" in names:
        found["ssim"] = ssim
    if "lpips" in names or "dists" in names:
        vgg = jax.device_put(load_lpips_weights() if lpips_weights is None else lpips_weights)
        if "lpips" in names:
            found["lpips"] = functools.partial(lpips_of_frames, vgg)
        if "dists" in names:
            weights = load_dists_weights() if dists_weights is None else dists_weights
            found["dists"] = functools.partial(dists_of_frames, vgg, weights)
    return found


def _open_clips(
    files: Sequence[Place] | Mapping[str, Place], config: EvaluationConfig, model: ElasticTokConfig
) -> tuple[dict[str, _Clip], dict[str, str]]:
    """Clips by name, and by name the reason why a file cannot be read."""
    clips: dict[str, _Clip] = {}
    skipped: dict[str, str] = {}
    for name, path in _names(files).items():
        try:
            reader = media.open_clip(
                path,
                resolution=model.resolution,
                rate=config.fps or None,
                max_frames=config.max_frames or None,
                **read_arguments(config),
            )
        except (media.MediaError, OSError) as error:
            skipped[name] = str(error)
            continue
        # The rate that the reader settled on: a video slower than `fps` is then reported here only, not by every condition.
        rate = reader.rate if config.fps and reader.rate else None
        clips[name] = _Clip(name, path, rate, reader.num_frames)
        reader.close()
    return clips, skipped


def _names(files: Sequence[Place] | Mapping[str, Place]) -> Mapping[str, Place]:
    """{name: clip}; of local files, the name is the path relative to their common folder."""
    if isinstance(files, Mapping):
        return files
    if any(map(is_part, files)):
        return {str(file): file for file in files}
    paths = {Path(str(file)).absolute(): Path(str(file)) for file in files}
    root = os.path.commonpath([path.parent for path in paths]) if paths else ""
    return {str(path.relative_to(root)): file for path, file in paths.items()}


def _warm_up(tokenizer: ElasticTokenizer, conditions: Sequence[Condition], fit: str) -> None:
    """Compiles the programs that the conditions need, so that the measured seconds hold no compilation."""
    model = tokenizer.config
    black = np.zeros((1, model.resolution, model.resolution, 3), np.uint8)
    tokenizer.encode(black, num_tokens=model.max_toks, fit=fit)
    if tokenizer.search_width > 1 and any(c.threshold is not None for c in conditions):
        tokenizer.encode(black, threshold=_ALWAYS_MET, search=GROUND_TRUTH, fit=fit)


def _measure(
    tokenizer: ElasticTokenizer,
    clip: _Clip,
    condition: Condition,
    config: EvaluationConfig,
    measures: Mapping[str, _Measure],
    update: Callable[[], Any],
) -> _Measured:
    """Tokenizes one clip under one condition, and measures errors and metrics as its blocks come.

    Args:
      tokenizer: the model.
      clip: the file.
      condition: how the token counts are chosen.
      config: which frames are read and measured.
      measures: the metrics besides PSNR. They are skipped for all searches but the first, which run for their timing.
      update: called after each block.
    """
    options = EncodeOptions(
        threshold=condition.threshold,
        num_tokens=condition.num_tokens,
        search=condition.search,
        rate=clip.rate,
        max_frames=config.max_frames or None,
        num_counts=config.num_counts or _all_counts(tokenizer.config),
        search_tolerance=config.search_tolerance,
        **read_options(config),
    )
    session = tokenizer.open_session(clip.path, options)
    if condition.search not in ("fixed", config.searches[0]):
        measures = {}
    middle = (clip.num_frames - 1) // 2
    measured_frames = _spread(clip.num_frames, config.metric_frames) if measures else []
    frames = _ChosenFrames({middle, *measured_frames})
    blocks, squares, count = [], 0, 0
    for index, result in enumerate(session):
        blocks += [_block(clip.name, index, part, condition) for part in result.parts]
        squares += result.squares
        count += result.frames.size
        frames.add(result)
        update()
    pair = frames.stacked(measured_frames) if measures else ()
    tokens = session.tokens()
    sums = _Sums(
        squares=squares * (2 / 255) ** 2,
        count=count,
        bits=tokens.num_bits,
        pixels=tokens.num_frames * math.prod(tokens.frame),
        metrics={name: measure(*pair) for name, measure in measures.items()},
    )
    return _Measured(blocks, sums, (middle, *frames.pair(middle)))


def _measure_codecs(
    clip: _Clip,
    budgets: Mapping[int, int],
    config: EvaluationConfig,
    model: ElasticTokConfig,
    measures: Mapping[str, _Measure],
) -> dict[tuple[str, int], _CodecMeasured]:
    """Codes one clip with each classical codec, at the bits that each condition took of it.

    Args:
      clip: the file. All its frames are in memory.
      budgets: {number of the condition: bits}.
      config: the codecs, and which frames are read and measured.
      model: gives the size of the frames.
      measures: the metrics besides PSNR.
    """
    with media.open_clip(
        clip.path,
        resolution=model.resolution,
        rate=clip.rate,
        max_frames=config.max_frames or None,
        **read_arguments(config),
    ) as reader:
        frames, rate = reader.read(), reader.rate
    chosen = _spread(len(frames), config.metric_frames)
    found = {}
    for name in config.codecs:
        codec = CodecAt(name, frames, rate)
        for key, bits in budgets.items():
            coded = codec.within(bits)
            sums = _Sums(
                squares=squared_error(frames, coded.frames) * (2 / 255) ** 2,
                count=frames.size,
                bits=coded.bits,
                pixels=frames.size // 3,
                metrics={
                    metric: measure(frames[chosen], coded.frames[chosen])
                    for metric, measure in measures.items()
                },
            )
            found[name, key] = _CodecMeasured(coded.bits <= bits, sums)
    return found


def _ladder(
    name: str, fixed: Sequence[tuple[Condition, _Measured]], measures: Mapping[str, _Measure]
) -> Ladder:
    """The middle frame of a clip at every fixed count, from the fewest tokens on."""
    index, original, _ = fixed[0][1].middle
    reconstructions = np.stack([measured.middle[2] for _, measured in fixed])
    distances = [None] * len(fixed)
    if "lpips" in measures:
        originals = np.broadcast_to(original, reconstructions.shape)
        distances = measures["lpips"](originals, reconstructions).tolist()
    rungs = [
        Rung(condition.num_tokens or 0, shown, psnr(original, shown), distance)
        for (condition, _), shown, distance in zip(fixed, reconstructions, distances, strict=True)
    ]
    return Ladder(name, index, original, tuple(rungs))


class _ChosenFrames:
    """Originals and reconstructions of a few frames, copied while the blocks of a clip come.

    Args:
      indices: the numbers of these frames in the clip.
    """

    def __init__(self, indices: Collection[int]):
        self._indices = indices
        self._pairs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._next = 0  # the index of the next block's first frame

    def add(self, result: BlockResult) -> None:
        """Copies the chosen frames of the next block."""
        pairs = zip(result.frames, result.reconstruction, strict=True)
        for index, (original, reconstruction) in enumerate(pairs, self._next):
            if index in self._indices:
                self._pairs[index] = (original.copy(), reconstruction.copy())
        self._next += len(result.frames)

    def pair(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Original and reconstruction of one frame, uint8 [rows, columns, 3]."""
        return self._pairs[index]

    def stacked(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Originals and reconstructions of several frames, uint8 [n, rows, columns, 3]."""
        originals, reconstructions = zip(*(self._pairs[index] for index in indices), strict=True)
        return np.stack(originals), np.stack(reconstructions)


def _spread(num_frames: int, count: int) -> list[int]:
    """At most `count` frame indices, evenly spread from the first to the last frame."""
    return np.linspace(0, num_frames - 1, min(count, num_frames)).round().astype(int).tolist()


def _block(clip: str, index: int, result: TileResult, condition: Condition) -> Block:
    """The record of one tokenized block, or of a tile of it."""
    tokens = result.tokens
    return Block(
        clip=clip,
        index=index,
        num_kept=tokens.num_kept,
        loss=tokens.loss,
        met=None if condition.threshold is None else tokens.met_threshold,
        passes=result.passes,
        seconds=result.seconds,
        tried=result.tried,
    )


def _all_counts(model: ElasticTokConfig) -> int:
    """How many geometrically spaced counts cover every whole number: the last and largest step is then at most 1."""
    return math.ceil(model.max_toks * math.log(model.max_toks / model.min_toks)) + 2


def _result(condition: Condition, measured: Sequence[_Measured]) -> ConditionResult:
    """The result of a condition over all clips, from its measurements on each clip."""
    return ConditionResult(
        condition=condition,
        blocks=tuple(block for part in measured for block in part.blocks),
        **_quality([part.sums for part in measured]),
    )


def _codec_result(
    codec: str, condition: Condition, measured: Sequence[_CodecMeasured]
) -> CodecResult:
    """The result of a codec at the bits of a condition, from its measurements on each clip."""
    assert condition.num_tokens is not None
    return CodecResult(
        codec=codec,
        num_tokens=condition.num_tokens,
        clips_within=float(np.mean([part.within for part in measured])),
        **_quality([part.sums for part in measured]),
    )


def _quality(parts: Sequence[_Sums]) -> dict[str, Any]:
    """The fields of `Quality`, from the sums of all clips."""

    def mean(name: str) -> float | None:
        values = [part.metrics[name] for part in parts if name in part.metrics]
        return float(np.mean(np.concatenate(values))) if values else None

    return dict(
        mse=sum(part.squares for part in parts) / sum(part.count for part in parts),
        psnr_of_clips=float(np.mean([psnr_of_mse(part.squares / part.count) for part in parts])),
        bits_per_pixel=sum(part.bits for part in parts) / sum(part.pixels for part in parts),
        ssim=mean("ssim"),
        lpips=mean("lpips"),
        dists=mean("dists"),
    )

"""Measures a model on held-out clips: how many tokens a threshold takes, and what quality a token count gives.

A *condition* is one way to choose token counts: a search under a threshold, or the same count for every block. Each condition
tokenizes all clips on its own. Conditions cannot share work: the KV cache of a block depends on the counts of the blocks before
it. Only the first block of a clip has the same cache under every condition, and sharing that one would distort the seconds of
the searches, which are measured too. Two results come at no extra cost: a fixed count is compared with every threshold, and the
quality of every condition is measured in the same pass that tokenizes the clips.
"""

import dataclasses
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from elastic import media
from elastic.config import ElasticTokConfig, check_resolution
from elastic.evaluation.codecs import CodecAt
from elastic.evaluation.measures import Measures, Sums, quality
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
from elastic.metrics import psnr, squared_error
from elastic.metrics.dists import DistsWeights
from elastic.metrics.frechet import Network
from elastic.tokenizer import ElasticTokenizer, EncodeOptions
from elastic.tokenizer.result import TileResult

log = logging.getLogger(__name__)

__all__ = ["Evaluation", "EvaluationConfig", "evaluate"]

_ALWAYS_MET = 1e9  # a threshold above the error of every reconstruction


def evaluate(
    tokenizer: ElasticTokenizer,
    files: Sequence[Place] | Mapping[str, Place],
    config: EvaluationConfig,
    *,
    lpips_weights: Any = None,
    dists_weights: DistsWeights | None = None,
    networks: Mapping[str, Network] | None = None,
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
      networks: networks for the metrics 'fvd' and 'fid', as `load_network` returns them.
      progress: show a progress bar with the remaining time.

    Raises:
      ValueError: no file can be read, or the options do not fit the model.
    """
    model = tokenizer.config
    if config.fit != "tile":
        check_resolution(config.resolution or 0, model)
    measures = Measures(config, lpips_weights, dists_weights, networks)
    conditions = config.conditions(model)
    clips, skipped = _open_clips(files, config, model)
    _warm_up(tokenizer, conditions, config.fit)
    measured: dict[str, _ClipMeasured] = {}
    blocks = {name: -(-clip.num_frames // model.frames_per_block) for name, clip in clips.items()}
    total = sum(blocks.values()) * len(conditions)
    with tqdm(total=total, desc="evaluating", unit="block", disable=hide_bar(progress)) as bar:
        for name, clip in clips.items():
            bar.set_postfix_str(name, refresh=False)
            before = bar.n
            try:
                measured[name] = _measure_clip(
                    tokenizer, clip, conditions, config, measures, bar.update
                )
            except (media.MediaError, OSError) as error:  # the file opened, but breaks off
                skipped[name] = str(error)
                bar.total -= len(conditions) * blocks[name] - (bar.n - before)
    for name, message in skipped.items():
        log.warning("Left out of the evaluation: %s: %s", name, message)
    if not measured:
        raise ValueError(
            f"None of {len(files)} files could be read; the first: {next(iter(skipped.values()), 'none was given')}"
        )
    shown = list(measured.items())[: config.pictures]
    return Evaluation(
        config=config,
        model=model,
        model_id=tokenizer.model_id,
        clips={name: clips[name].num_frames for name in measured},
        skipped=skipped,
        results=tuple(
            _result(condition, [clip.results[k] for clip in measured.values()])
            for k, condition in enumerate(conditions)
        ),
        shown=tuple(
            Picture(f"eval/{name}@{label}", condition, name, *result.middle)
            for name, clip in shown
            for condition, result in zip(conditions, clip.results, strict=True)
            if (label := _label(condition, config, model))
        ),
        ladders=tuple(
            _ladder(name, [(conditions[k], clip.results[k]) for k in _fixed(conditions)], measures)
            for name, clip in shown
        ),
        codecs=tuple(
            _codec_result(
                codec, conditions[k], [clip.coded[codec, k] for clip in measured.values()]
            )
            for codec in config.codecs
            for k in _fixed(conditions)
        ),
    )


def _fixed(conditions: Sequence[Condition]) -> list[int]:
    """The places of the fixed counts."""
    return [k for k, condition in enumerate(conditions) if condition.search == "fixed"]


class _Clip(NamedTuple):
    """A file that could be opened."""

    name: str
    path: Place
    rate: float | None  # frames per second to read; None: every frame
    num_frames: int


class _Measured(NamedTuple):
    """One condition on one clip."""

    blocks: list[Block]
    sums: Sums
    middle: tuple[int, np.ndarray, np.ndarray]  # the middle frame: index, original, reconstruction


class _CodecMeasured(NamedTuple):
    """One codec on one clip at the bits of one condition."""

    within: bool  # whether it took no more bits
    sums: Sums


class _ClipMeasured(NamedTuple):
    """One clip under every condition."""

    results: list[_Measured]
    coded: dict[tuple[str, int], _CodecMeasured]  # by codec and place of the fixed count


def _label(condition: Condition, config: EvaluationConfig, model: ElasticTokConfig) -> str:
    """The part of a picture's name that stands for the condition; '' if the condition gets no picture."""
    if fixed_count(model) is not None:
        return str(condition.num_tokens)
    if condition.threshold and condition.search == config.searches[0]:
        return f"{condition.threshold:g}"
    return ""


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


def _measure_clip(
    tokenizer: ElasticTokenizer,
    clip: _Clip,
    conditions: Sequence[Condition],
    config: EvaluationConfig,
    measures: Measures,
    update: Callable[[], Any],
) -> _ClipMeasured:
    """Tokenizes one clip under every condition, and codes it with the classical codecs."""
    results = [
        _measure(tokenizer, clip, condition, config, measures, update) for condition in conditions
    ]
    budgets = {k: results[k].sums.bits for k in _fixed(conditions)}
    coded = (
        _measure_codecs(clip, budgets, config, tokenizer.config, measures) if config.codecs else {}
    )
    return _ClipMeasured(results, coded)


def _measure(
    tokenizer: ElasticTokenizer,
    clip: _Clip,
    condition: Condition,
    config: EvaluationConfig,
    measures: Measures,
    update: Callable[[], Any],
) -> _Measured:
    """Tokenizes one clip under one condition, and measures errors and metrics as its blocks come.

    Args:
      tokenizer: the model.
      clip: the file.
      condition: how the token counts are chosen.
      config: which frames are read and measured.
      measures: the metrics besides PSNR. They are skipped for all searches but the first; those run for their timing.
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
        measures = Measures(dataclasses.replace(config, metrics=()))
    middle = (clip.num_frames - 1) // 2
    watch = measures.watch(clip.name, clip.num_frames, also=[middle])
    blocks, squares, count = [], 0, 0
    for index, result in enumerate(session):
        blocks += [_block(clip.name, index, part, condition) for part in result.parts]
        squares += result.squares
        count += result.frames.size
        watch.add(result.frames, result.reconstruction)
        update()
    tokens = session.tokens()
    sums = Sums(
        squares=squares * (2 / 255) ** 2,
        count=count,
        bits=tokens.num_bits,
        pixels=tokens.num_frames * math.prod(tokens.frame),
        **watch.found(),
    )
    return _Measured(blocks, sums, (middle, *watch.pair(middle)))


def _measure_codecs(
    clip: _Clip,
    budgets: Mapping[int, int],
    config: EvaluationConfig,
    model: ElasticTokConfig,
    measures: Measures,
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
    found = {}
    for name in config.codecs:
        codec = CodecAt(name, frames, rate)
        for key, bits in budgets.items():
            coded = codec.within(bits)
            watch = measures.watch(clip.name, len(frames))
            watch.add(frames, coded.frames)
            sums = Sums(
                squares=squared_error(frames, coded.frames) * (2 / 255) ** 2,
                count=frames.size,
                bits=coded.bits,
                pixels=frames.size // 3,
                **watch.found(),
            )
            found[name, key] = _CodecMeasured(coded.bits <= bits, sums)
    return found


def _ladder(name: str, fixed: Sequence[tuple[Condition, _Measured]], measures: Measures) -> Ladder:
    """The middle frame of a clip at every fixed count, from the fewest tokens on."""
    index, original, _ = fixed[0][1].middle
    reconstructions = np.stack([measured.middle[2] for _, measured in fixed])
    found = measures.lpips(np.broadcast_to(original, reconstructions.shape), reconstructions)
    distances = [None] * len(fixed) if found is None else found.tolist()
    rungs = [
        Rung(condition.num_tokens or 0, shown, psnr(original, shown), distance)
        for (condition, _), shown, distance in zip(fixed, reconstructions, distances, strict=True)
    ]
    return Ladder(name, index, original, tuple(rungs))


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
        drafts=result.drafts,
    )


def _all_counts(model: ElasticTokConfig) -> int:
    """How many geometrically spaced counts cover every whole number: the last and largest step is then at most 1."""
    return math.ceil(model.max_toks * math.log(model.max_toks / model.min_toks)) + 2


def _result(condition: Condition, measured: Sequence[_Measured]) -> ConditionResult:
    """The result of a condition over all clips, from its measurements on each clip."""
    return ConditionResult(
        condition=condition,
        blocks=tuple(block for part in measured for block in part.blocks),
        **quality([part.sums for part in measured]),
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
        **quality([part.sums for part in measured]),
    )

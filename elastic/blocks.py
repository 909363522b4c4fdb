"""One block through the codec: its count searched or given, its result as users see it."""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple, SupportsFloat

import jax
import numpy as np
from jaxtyping import Bool, UInt8

from elastic.codec import Codec, Past, Trial
from elastic.config import ElasticTokConfig
from elastic.lpips import lpips_of_frames
from elastic.lpips_weights import load_lpips_weights
from elastic.patches import pad_block, patchify, unpatchify
from elastic.search import Search
from elastic.tokens import BlockTokens

_KEEP_BYTES = 2 << 30  # trials larger than this are not kept: committing then costs one more pass

# What a block's loss is instead of the mean squared error: of original and reconstruction, uint8
# [n, rows, columns, 3], real frames only; 0 or above, less is better.
Metric = Callable[[np.ndarray, np.ndarray], SupportsFloat]


class BlockResult(NamedTuple):
    """One block, tokenized."""

    frames: UInt8[
        np.ndarray, "n rows columns 3"
    ]  # the original at the model's resolution; real frames only
    reconstruction: UInt8[np.ndarray, "n rows columns 3"]
    tokens: BlockTokens
    passes: int  # runs of encoder and decoder over this block
    seconds: float
    tried: dict[int, float]  # every count evaluated, with its loss


def tokenize_block(
    codec: Codec,
    weights: dict[str, Any],
    past: Past,
    frames: np.ndarray,
    search: Search,
    *,
    metric: Metric | None = None,
) -> tuple[Past, BlockResult]:
    """Searches a block's count and commits it; the past given is used up.

    The trial of the count that will be chosen is kept, so that nothing runs twice; only where trials are too large for that, or the
    choice falls back on a count tried long ago, the commit runs its one pass again.
    """
    started = time.perf_counter()
    block = Attempts(codec, weights, past, frames, width=search.options.width, metric=metric)
    keep = codec.trial_bytes(2 * search.options.width) <= _KEEP_BYTES
    held: dict[int, tuple[Trial, int]] = {}
    while (counts := search.propose()) is not None:
        trial, losses = block.attempt(counts, keep=keep)
        search.observe(counts, losses)
        if keep:
            newest = {count: (trial, k) for k, count in enumerate(counts)}
            best = search.best()
            held = (
                {count: kept for count, kept in (held | newest).items() if count == best}
                if best is not None
                else newest
            )
    result = search.result()
    if result.num_kept not in held:
        held[result.num_kept] = (block.attempt([result.num_kept], keep=True)[0], 0)
    trial, k = held[result.num_kept]
    past, committed = codec.commit(past, trial, np.array([k], np.int32))
    pixels = np.asarray(committed.pixels[0])
    pixels = np.asarray(unpatchify(pixels, codec.config.patch_size, *frames.shape[1:3]))
    tokens = np.asarray(committed.tokens[0])[: result.num_kept]
    return past, BlockResult(
        frames=frames,
        reconstruction=pixels[: len(frames)],
        tokens=BlockTokens(
            num_kept=result.num_kept,
            loss=result.loss,
            met_threshold=result.met,
            **{"indices" if codec.config.bottleneck_type == "fsq" else "vectors": tokens},
        ),
        passes=block.passes,
        seconds=time.perf_counter() - started,
        tried=result.tried,
    )


class Attempts:
    """One block against one past: the losses of counts, in calls of `width` counts at most. `metric` None: squared error."""

    def __init__(
        self,
        codec: Codec,
        weights: dict[str, Any],
        past: Past,
        frames: UInt8[np.ndarray, "n rows columns 3"],
        *,
        width: int,
        metric: Metric | None = None,
    ):
        config = codec.config
        self._codec, self._weights, self._past, self._width = codec, weights, past, width
        self._patches = patchify(pad_block(frames, config.frames_per_block), config.patch_size)[
            None
        ]
        self._shown = _shown(config, len(frames))
        self._frames, self._metric = frames, metric
        self.passes = 0

    def attempt(self, counts: list[int], *, keep: bool) -> tuple[Trial, list[float]]:
        """Runs the model once for each count, in one call; the trial and the losses."""
        self.passes += len(counts)
        # One compiled shape.
        padded = np.array([counts + counts[-1:] * (self._width - len(counts))], np.int32)
        trial = self._codec.try_counts(
            self._weights, self._past, self._patches, padded, shown=self._shown, keep=keep
        )
        if self._metric is not None:
            return trial, [self._measure(self._metric, trial.pixels[k]) for k in range(len(counts))]
        # Held against the threshold: the larger of both errors, so that decoded 8-bit frames keep the promise too.
        return trial, np.maximum(trial.losses, trial.pixel_losses)[0, : len(counts)].tolist()

    def _measure(self, metric: Metric, pixels: Any) -> float:
        frames, patch_size = self._frames, self._codec.config.patch_size
        decoded = np.asarray(unpatchify(np.asarray(pixels), patch_size, *frames.shape[1:3]))
        loss = float(metric(frames, decoded[: len(frames)]))
        if loss < 0:
            raise ValueError(
                f"The metric gave {loss}; a loss must be 0 or above, and less must be better."
            )
        return loss


def make_metric(metric: str | Metric) -> tuple[str, Metric | None]:
    """A metric and its name: 'mse' (None: the codec measures it), 'lpips' (the mean of the frames) or a function.

    Raises:
      ValueError: the name is unknown, or there are no LPIPS weights.
    """
    if callable(metric):
        return getattr(metric, "__name__", type(metric).__name__), metric
    if metric == "mse":
        return metric, None
    if metric == "lpips":
        distance = functools.partial(lpips_of_frames, jax.device_put(load_lpips_weights()))
        return metric, lambda a, b: np.mean(distance(a, b))
    raise ValueError(f"metric={metric!r} must be 'mse', 'lpips' or a function of two clips.")


def _shown(config: ElasticTokConfig, num_frames: int) -> Bool[np.ndarray, "l p"]:
    """Which numbers of a block's patches belong to its first `num_frames` frames."""
    real = np.arange(config.frames_per_block) < num_frames
    size = (config.frames_per_block, config.resolution, config.resolution, 3)
    return np.asarray(patchify(np.broadcast_to(real[:, None, None, None], size), config.patch_size))

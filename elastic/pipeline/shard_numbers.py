"""The numbers of all clips in shards: histograms of tokens, of PSNR and of tokens per second, and the worst and the best clips."""

import dataclasses
import heapq
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from elastic.tokens.shards import ClipFacts

_NUM_LISTED = 4  # worst and best clips
_PER_DOUBLING = 4  # bars of tokens per second for each doubling
_MOST_DB = 99.0  # of a block without any error


@dataclasses.dataclass(frozen=True, order=True)
class ListedClip:
    """A clip in the list of the worst or of the best ones. They are ordered by PSNR, then by id.

    Attributes:
      psnr: of its mean loss over the blocks, in dB.
      id: of the clip.
      shard: the name of its file.
      mean_tokens: of a block, or of a tile of a block.
      tokens_per_second: of video; None for an image.
      met: the share of blocks that met the threshold.
    """

    psnr: float
    id: str
    shard: str
    mean_tokens: float
    tokens_per_second: float | None
    met: float


@dataclasses.dataclass(frozen=True)
class ShardNumbers:
    """Histograms over blocks and clips, and the clips at their ends.

    Attributes:
      psnr: {whole dB: blocks of at least that PSNR, and less than the next}.
      tokens_per_second: {step: videos}; step k begins at 2^(k / 4) tokens per second of video.
      seconds, video_tokens: of all videos.
      worst, best: clips with the lowest and the highest PSNR, the extreme one first.
    """

    psnr: Counter[int]
    tokens_per_second: Counter[int]
    seconds: float
    video_tokens: int
    worst: list[ListedClip]
    best: list[ListedClip]

    def to_json(self) -> dict[str, Any]:
        """The part of summary.json that these numbers are."""
        rates = sorted(self.tokens_per_second)
        steps = range(rates[0], rates[-1] + 1) if rates else range(0)
        levels = range(min(self.psnr), max(self.psnr) + 1) if self.psnr else range(0)
        return {
            "psnr_per_block": {
                "edges": [*levels, levels[-1] + 1] if levels else [],
                "blocks": [self.psnr[level] for level in levels],
            },
            "tokens_per_second": {
                "mean": self.video_tokens / self.seconds if self.seconds else math.nan,
                "edges": [edge(step) for step in (*steps, steps[-1] + 1)] if steps else [],
                "clips": [self.tokens_per_second[step] for step in steps],
            },
            "worst_clips": [dataclasses.asdict(clip) for clip in self.worst],
            "best_clips": [dataclasses.asdict(clip) for clip in self.best],
        }


def edge(step: int) -> float:
    """Where a bar of tokens per second begins."""
    return round(2 ** (step / _PER_DOUBLING), 2)


def count_clips(clips: Iterable[ClipFacts], *, mean_square: bool = True) -> ShardNumbers:
    """The numbers of some clips, in memory that does not grow with them.

    Args:
      clips: what shards say of them.
      mean_square: whether a loss is a mean squared error of pixels in [-1, 1]; without that there is no PSNR.
    """
    psnr: Counter[int] = Counter()
    rates: Counter[int] = Counter()
    seconds, video_tokens = 0.0, 0
    worst: list[ListedClip] = []
    best: list[ListedClip] = []
    for clip in clips:
        tokens = int(clip.counts.sum())
        per_second = None
        if not clip.is_image and clip.rate > 0:
            length = clip.num_frames / clip.rate
            per_second = tokens / length
            seconds, video_tokens = seconds + length, video_tokens + tokens
            rates[math.floor(_PER_DOUBLING * math.log2(per_second))] += 1
        losses = clip.losses[np.isfinite(clip.losses)]
        if not (mean_square and len(losses)):
            continue
        psnr.update(np.floor(_decibel(losses)).astype(int).tolist())
        listed = ListedClip(
            psnr=round(float(_decibel(losses.mean())), 2),
            id=clip.id,
            shard=Path(clip.path).stem,
            mean_tokens=round(float(clip.counts.mean()), 1),
            tokens_per_second=None if per_second is None else round(per_second, 1),
            met=round(float(clip.met.mean()), 4),
        )
        worst = heapq.nsmallest(_NUM_LISTED, [*worst, listed])
        best = heapq.nlargest(_NUM_LISTED, [*best, listed])
    worst_ids = {clip.id for clip in worst}
    # Of a few clips, none is among the worst and the best ones.
    best = [clip for clip in best if clip.id not in worst_ids]
    return ShardNumbers(psnr, rates, seconds, video_tokens, worst, best)


def _decibel(loss: np.ndarray) -> np.ndarray:
    """PSNR of mean squared errors of pixels in [-1, 1]."""
    least = 4 * 10 ** (-_MOST_DB / 10)
    return 10 * np.log10(4 / np.maximum(loss, least))

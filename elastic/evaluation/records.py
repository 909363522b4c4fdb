"""What an evaluation measures, and what it found: records, and the numbers that follow from them."""

import dataclasses
import math
from typing import NamedTuple

import numpy as np

from elastic.config import ElasticTokConfig
from elastic.metrics import psnr_of_mse
from elastic.report import strip
from elastic.search import geometric_counts, search_names

METRICS = ("psnr", "ssim", "lpips")
GROUND_TRUTH = "linear"  # the search that assumes nothing: the others are held against it
_NUM_COUNTS = 6  # where no counts are named


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured.

    Attributes:
      thresholds: errors under which a block's tokens are searched for.
      num_tokens: counts given to every block alike; a float up to 1.0 is a share of the block. (): 6 from `min_toks` to all.
      searches: names of searches, each run under every threshold; the first is the one that logs and pictures show.
      num_counts: counts that the linear search spreads over the range; 0: every count.
      metrics: 'psnr' (always measured), 'ssim', 'lpips'.
      metric_frames: frames of a clip, evenly spread, on which SSIM and LPIPS are measured: they are slow on a CPU.
      max_frames: frames read of a clip, its first ones; None: all.
      fps: frames per second taken from a video, at most its own; None: all frames.
      pictures: clips, the first ones, that pictures are made of.

    Raises:
      ValueError: a value is out of its range, or a name is unknown.
    """

    thresholds: tuple[float, ...] = (0.1, 0.05, 0.025)
    num_tokens: tuple[int | float, ...] = ()
    searches: tuple[str, ...] = ("binary",)
    num_counts: int = 100
    metrics: tuple[str, ...] = ("psnr", "ssim")
    metric_frames: int = 4
    max_frames: int | None = None
    fps: float | None = 24.0
    pictures: int = 1

    def __post_init__(self):
        for name in ("thresholds", "num_tokens", "searches", "metrics"):  # each once, in order
            object.__setattr__(self, name, tuple(dict.fromkeys(getattr(self, name))))
        for threshold in self.thresholds:
            if not 0 < threshold < math.inf:
                raise ValueError(f"threshold={threshold} must be a finite error above 0.")
        for count in self.num_tokens:
            if not (0 < count <= 1 if isinstance(count, float) else count >= 1):
                raise ValueError(
                    f"num_tokens={count!r} must be a count of 1 or more, or a share such as 0.5 or 1.0."
                )
        known = [name for name in search_names() if name != "fixed"]
        if unknown := [name for name in self.searches if name not in known]:
            raise ValueError(
                f"searches={unknown} must be among {known}; fixed counts are num_tokens= here."
            )
        if not self.searches:
            raise ValueError(f"searches is empty; name at least one of {known}.")
        if self.num_counts != 0 and self.num_counts < 2:
            raise ValueError(f"num_counts={self.num_counts} must be 2 or more, or 0 for all.")
        if unknown := [name for name in self.metrics if name not in METRICS]:
            raise ValueError(f"metrics={unknown} must be among {list(METRICS)}.")
        if self.metric_frames < 1:
            raise ValueError(f"metric_frames={self.metric_frames} must be 1 or more.")
        if self.pictures < 0:
            raise ValueError(f"pictures={self.pictures} must be 0 or more.")

    def counts(self, model: ElasticTokConfig) -> list[int]:
        """The counts that every block of a model is given alike. A model trained for one share knows its own alone.

        Raises:
          ValueError: a count is larger than the model's block.
        """
        if (fixed := fixed_count(model)) is not None:
            return [fixed]
        if not self.num_tokens:
            return geometric_counts(model.min_toks, model.max_toks, _NUM_COUNTS)
        if too_many := [count for count in self.num_tokens if count > model.max_toks]:
            raise ValueError(
                f"num_tokens={too_many} must be at most the {model.max_toks} tokens of a block of this model; "
                "shares such as 0.5 suit every model."
            )
        return sorted(
            {
                math.ceil(round(count * model.max_toks, 6)) if isinstance(count, float) else count
                for count in self.num_tokens
            }
        )

    def runs(self, model: ElasticTokConfig) -> list["Condition"]:
        """The runs of a model: its counts, then every search under every threshold."""
        runs = [Condition("fixed", num_tokens=count) for count in self.counts(model)]
        if fixed_count(model) is None:
            runs += [
                Condition(name, threshold=t) for name in self.searches for t in self.thresholds
            ]
        return runs


def fixed_count(model: ElasticTokConfig) -> int | None:
    """The tokens that a model of `mask_type='fixed_F'` was trained to keep of every block; None for an elastic one."""
    share = model.keep_fraction
    return None if share is None else max(model.min_toks, round(share * model.max_toks))


class Condition(NamedTuple):
    """One way to choose counts: a search under a threshold, or 'fixed' with a count."""

    search: str
    threshold: float | None = None
    num_tokens: int | None = None


class Block(NamedTuple):
    """One block in one run."""

    clip: str
    index: int
    num_kept: int
    loss: float
    met: bool | None  # None: there was no threshold
    passes: int
    seconds: float
    tried: dict[int, float]  # every count evaluated, with its loss


class CapPoint(NamedTuple):
    """What a cap on the tokens of a block gives: a point of the paper's Figure 4."""

    cap: int
    share_met: float
    mean_tokens: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunResult:
    """One run over all clips.

    Attributes:
      mse: over all pixels of all clips, of 8-bit frames, pixels in [-1, 1].
      psnr_of_clips: the mean of the clips' PSNR in dB; `psnr` is that of `mse`, where poor clips weigh more.
      ssim, lpips: means over the frames they were measured on (`metric_frames` of a clip); None: not measured.
    """

    run: Condition
    blocks: tuple[Block, ...]
    mse: float
    psnr_of_clips: float
    bits_per_pixel: float
    ssim: float | None = None
    lpips: float | None = None

    @property
    def psnr(self) -> float:
        """PSNR in dB of the mean squared error over all pixels."""
        return psnr_of_mse(self.mse)

    @property
    def mean_tokens(self) -> float:
        """Tokens of a block."""
        return float(np.mean([block.num_kept for block in self.blocks]))

    @property
    def passes_per_block(self) -> float:
        """Runs of encoder and decoder over a block."""
        return float(np.mean([block.passes for block in self.blocks]))

    @property
    def seconds_per_block(self) -> float:
        """Seconds of search and commit, without reading the file and without compiling."""
        return float(np.mean([block.seconds for block in self.blocks]))

    def share_met(self, threshold: float) -> float:
        """The share of blocks whose error is at most the threshold."""
        return float(np.mean([block.loss <= threshold for block in self.blocks]))


class Picture(NamedTuple):
    """A frame of which a picture can be drawn."""

    name: str
    run: Condition
    clip: str
    index: int
    original: np.ndarray
    reconstruction: np.ndarray

    def draw(self, evaluation: "Evaluation") -> np.ndarray:
        """The picture, with the strip of the clip's run."""
        result = next(result for result in evaluation.runs if result.run == self.run)
        blocks = [block for block in result.blocks if block.clip == self.clip]
        return strip.strip_frame(
            self.original,
            self.reconstruction,
            index=self.index,
            counts=[block.num_kept for block in blocks],
            tokens_per_block=evaluation.model.tokens_per_block,
            frames_per_block=evaluation.model.frames_per_block,
            losses=[block.loss for block in blocks],
            met=[block.met is not False for block in blocks],
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What one model gave on the clips.

    Attributes:
      clips: their frames, by name.
      skipped: files that could not be read, and why.
      runs: in the order of `EvaluationConfig.runs`.
    """

    config: EvaluationConfig
    model: ElasticTokConfig
    model_id: str
    clips: dict[str, int]
    skipped: dict[str, str]
    runs: tuple[RunResult, ...]
    shown: tuple[Picture, ...] = dataclasses.field(repr=False)

    def fixed(self) -> list[RunResult]:
        """The runs that gave each block the same count."""
        return [result for result in self.runs if result.run.search == "fixed"]

    def under(self, threshold: float, search: str | None = None) -> RunResult:
        """The run of a search (None: the first) under a threshold; a model of one count has the one run for all."""
        if fixed_count(self.model) is not None:
            return self.runs[0]
        run = Condition(search or self.config.searches[0], threshold=threshold)
        return next(result for result in self.runs if result.run == run)

    def curve(self, threshold: float, search: str | None = None) -> list[CapPoint]:
        """The share of blocks that meet a threshold, against mean tokens, as a cap on the tokens of a block rises.

        Follows from the smallest counts m that the search measured: under a cap c a block meets the threshold where m <= c, and takes
        min(m, c) tokens, all of the cap where it cannot meet it. That is what a search with the cap would choose but for one thing: here
        a block's cache holds blocks as they were without a cap. A model of one count gives one point.
        """
        result = self.under(threshold, search)
        if result.run.search == "fixed":
            count = result.blocks[0].num_kept
            return [CapPoint(count, result.share_met(threshold), float(count))]
        needed = np.array([block.num_kept if block.met else np.inf for block in result.blocks])
        caps = {self.model.min_toks, *(int(count) for count in needed if count < np.inf)}
        if np.inf in needed:
            caps.add(self.model.max_toks)
        return [
            CapPoint(cap, float(np.mean(needed <= cap)), float(np.mean(np.minimum(needed, cap))))
            for cap in sorted(caps)
        ]

    def above_optimum(self, threshold: float, search: str) -> float | None:
        """Mean tokens of a search above those of the linear one, each in the context that it made itself; None: no linear run."""
        if GROUND_TRUTH not in self.config.searches or fixed_count(self.model) is not None:
            return None
        return (
            self.under(threshold, search).mean_tokens
            - self.under(threshold, GROUND_TRUTH).mean_tokens
        )

    def scalars(self) -> dict[str, float]:
        """For logs: 'eval/mean_tokens@0.05' and its like for thresholds, 'eval/psnr@512' and its like for counts."""
        found: dict[str, float] = {}
        for threshold in self.config.thresholds:
            result = self.under(threshold)
            found[f"eval/mean_tokens@{threshold:g}"] = result.mean_tokens
            found[f"eval/share_met@{threshold:g}"] = result.share_met(threshold)
            found[f"eval/passes_per_block@{threshold:g}"] = result.passes_per_block
        for result in self.fixed():
            for name in METRICS:
                if (value := getattr(result, name)) is not None:
                    found[f"eval/{name}@{result.run.num_tokens}"] = value
        return found

    def pictures(self) -> dict[str, np.ndarray]:
        """{'eval/CLIP@0.05': uint8 picture}: original, reconstruction and error of a clip's middle frame, with the strip of tokens."""
        return {shown.name: shown.draw(self) for shown in self.shown}

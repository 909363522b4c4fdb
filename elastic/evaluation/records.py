"""Records of an evaluation: its settings, its results, and the numbers computed from them."""

import dataclasses
import math
from typing import NamedTuple

import numpy as np

from elastic.config import ElasticTokConfig
from elastic.evaluation.codecs import CODECS
from elastic.io.options import check_options
from elastic.io.read_options import (
    exact_color_option,
    fit_option,
    reader_option,
    resolution_option,
    tile_overlap_option,
)
from elastic.metrics import psnr_of_mse
from elastic.report import strip
from elastic.search import TOLERANCE, geometric_counts, search_names

METRICS = ("psnr", "ssim", "lpips", "dists", "fvd", "fid")
GROUND_TRUTH = "linear"  # assumes nothing about the loss; the other searches are compared with it
_NUM_COUNTS = 6  # fixed counts, if the config names none


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What an evaluation measures.

    Attributes:
      thresholds: errors (mean squares, pixels in [-1, 1]) that a search keeps each block under.
      num_tokens: fixed counts, the same for every block; a float up to 1.0 is a share of the block. (): 6 counts, geometrically
        spaced from `min_toks` to all tokens.
      searches: names of searches, each run under every threshold; logs and pictures show the first one.
      num_counts: how many counts the linear search tries; 0: every count.
      search_tolerance: share of a clip's tokens that the search 'predict' may keep beyond need.
      metrics: 'psnr' (always measured), 'ssim', 'lpips', 'dists', 'fvd', 'fid'.
      metric_frames: evenly spread frames of a clip on which all metrics but PSNR and FVD are measured; they are slow on a CPU.
      max_frames: the first frames of a clip, which are read; None: all.
      fps: frames per second read from a video, at most its own rate; None: all frames.
      reader: who decodes video.
      exact_color: convert the colours of every video with correct rounding.
      fit, resolution, tile_overlap: what becomes of frames that are not square, as in tokenizing.
      pictures: the number of clips, from the first on, that pictures are drawn of.
      codecs: classical codecs, which code every clip at the bits that each fixed count took (`elastic.evaluation.codecs`).

    Raises:
      ValueError: a value is out of its range, or a name is unknown.
    """

    thresholds: tuple[float, ...] = (0.1, 0.05, 0.025)
    num_tokens: tuple[int | float, ...] = ()
    searches: tuple[str, ...] = ("predict",)
    num_counts: int = 100
    search_tolerance: float = TOLERANCE
    metrics: tuple[str, ...] = ("psnr", "ssim")
    metric_frames: int = 4
    max_frames: int | None = None
    fps: float | None = 24.0
    reader: str = reader_option()
    exact_color: bool = exact_color_option()
    fit: str = fit_option()
    resolution: int | None = resolution_option()
    tile_overlap: int | None = tile_overlap_option()
    pictures: int = 1
    codecs: tuple[str, ...] = ()

    def __post_init__(self):
        check_options(self)
        for name in (
            "thresholds",
            "num_tokens",
            "searches",
            "metrics",
            "codecs",
        ):  # each once, in order
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
        if unknown := [name for name in self.codecs if name not in CODECS]:
            raise ValueError(f"codecs={unknown} must be among {list(CODECS)}.")
        if self.metric_frames < 1:
            raise ValueError(f"metric_frames={self.metric_frames} must be 1 or more.")
        if self.pictures < 0:
            raise ValueError(f"pictures={self.pictures} must be 0 or more.")

    def counts(self, model: ElasticTokConfig) -> list[int]:
        """The fixed counts for a model. A model trained for one count is evaluated at that count only.

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

    def conditions(self, model: ElasticTokConfig) -> list["Condition"]:
        """The conditions for a model: its fixed counts, then every search under every threshold."""
        conditions = [Condition("fixed", num_tokens=count) for count in self.counts(model)]
        if fixed_count(model) is None:
            conditions += [
                Condition(name, threshold=t) for name in self.searches for t in self.thresholds
            ]
        return conditions


def fixed_count(model: ElasticTokConfig) -> int | None:
    """The count that a model with `mask_type='fixed_F'` was trained to keep of every block; None for an elastic model."""
    share = model.keep_fraction
    return None if share is None else max(model.min_toks, round(share * model.max_toks))


class Condition(NamedTuple):
    """One way to choose counts: a search under a threshold, or 'fixed' with a count."""

    search: str
    threshold: float | None = None
    num_tokens: int | None = None


class Block(NamedTuple):
    """One block under one condition, or one tile of a block where frames have several."""

    clip: str
    index: int
    num_kept: int
    loss: float
    met: bool | None  # whether the loss is at most the threshold; None: no threshold
    passes: int
    seconds: float
    tried: dict[int, float]  # {count: loss} of every count that was evaluated
    drafts: int = 0


class CapPoint(NamedTuple):
    """The result of capping the tokens of every block: a point of the paper's Figure 4."""

    cap: int
    share_met: float
    mean_tokens: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quality:
    """How good the reconstructions of all clips are, and the bits that they took.

    Attributes:
      mse: mean squared error over all pixels of all clips, between 8-bit frames scaled to [-1, 1].
      psnr_of_clips: the mean of the clips' PSNRs in dB. `psnr` is computed from `mse` instead, where poor clips weigh more.
      bits_per_pixel: bits of all clips over frames x rows x columns of all clips.
      ssim, lpips, dists: means over the measured frames (`metric_frames` of each clip); None: not measured.
      fvd: Fréchet's distance of all windows of 16 frames; None: not measured, or fewer than two.
      fid: likewise of the measured frames.
    """

    mse: float
    psnr_of_clips: float
    bits_per_pixel: float
    ssim: float | None = None
    lpips: float | None = None
    dists: float | None = None
    fvd: float | None = None
    fid: float | None = None

    @property
    def psnr(self) -> float:
        """PSNR in dB, from the mean squared error over all pixels."""
        return psnr_of_mse(self.mse)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodecResult(Quality):
    """The result of a classical codec over all clips, each at the bits that the model took of it with a fixed count.

    Attributes:
      codec: its name.
      num_tokens: the model's count.
      clips_within: the share of clips that the codec could code in as few bits; the others have its coarsest quality.
    """

    codec: str
    num_tokens: int
    clips_within: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConditionResult(Quality):
    """The result of one condition over all clips."""

    condition: Condition
    blocks: tuple[Block, ...]

    @property
    def mean_tokens(self) -> float:
        """Mean number of tokens kept of a block."""
        return float(np.mean([block.num_kept for block in self.blocks]))

    @property
    def passes_per_block(self) -> float:
        """Mean number of passes through encoder and decoder for a block."""
        return float(np.mean([block.passes for block in self.blocks]))

    @property
    def drafts_per_block(self) -> float:
        """Mean number of drafts of a block, which cost a part of a pass each (elastic/search/README.md)."""
        return float(np.mean([block.drafts for block in self.blocks]))

    @property
    def seconds_per_block(self) -> float:
        """Mean seconds for search and commit of a block, without reading and compiling."""
        return float(np.mean([block.seconds for block in self.blocks]))

    def share_met(self, threshold: float) -> float:
        """The share of blocks whose error is at most the threshold."""
        return float(np.mean([block.loss <= threshold for block in self.blocks]))


class Picture(NamedTuple):
    """One frame and its reconstruction, from which a picture is drawn."""

    name: str
    condition: Condition
    clip: str
    index: int
    original: np.ndarray
    reconstruction: np.ndarray

    def draw(self, evaluation: "Evaluation") -> np.ndarray:
        """The picture, with the strip of the tokens that the clip's blocks kept under the condition."""
        result = evaluation.result(self.condition)
        blocks: list[list[Block]] = []  # the tiles of each block
        for block in result.blocks:
            if block.clip == self.clip:
                blocks += [[]] * (block.index >= len(blocks))
                blocks[block.index] = [*blocks[block.index], block]
        return strip.strip_frame(
            self.original,
            self.reconstruction,
            index=self.index,
            counts=[sum(tile.num_kept for tile in tiles) for tiles in blocks],
            tokens_per_block=evaluation.model.tokens_per_block * len(blocks[0]),
            frames_per_block=evaluation.model.frames_per_block,
            losses=[float(np.mean([tile.loss for tile in tiles])) for tiles in blocks],
            met=[all(tile.met is not False for tile in tiles) for tiles in blocks],
        )


class Rung(NamedTuple):
    """A frame's reconstruction from one count of tokens."""

    num_tokens: int
    reconstruction: np.ndarray
    psnr: float  # dB of this frame alone
    lpips: float | None


class Ladder(NamedTuple):
    """One frame, reconstructed from a rising number of tokens a block."""

    clip: str
    index: int
    original: np.ndarray
    rungs: tuple[Rung, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The results of one model on all clips.

    Attributes:
      clips: {name: number of frames}.
      skipped: {name: reason} of the files that could not be read.
      results: one for each condition, in the order of `EvaluationConfig.conditions`.
      shown: the frames that `pictures` draws.
      ladders: the middle frame of the first clips at every fixed count.
      codecs: for each codec and each fixed count its result.
    """

    config: EvaluationConfig
    model: ElasticTokConfig
    model_id: str
    clips: dict[str, int]
    skipped: dict[str, str]
    results: tuple[ConditionResult, ...]
    shown: tuple[Picture, ...] = dataclasses.field(repr=False)
    ladders: tuple[Ladder, ...] = dataclasses.field(default=(), repr=False)
    codecs: tuple[CodecResult, ...] = ()

    def result(self, condition: Condition) -> ConditionResult:
        """The result of a condition that was measured."""
        return next(result for result in self.results if result.condition == condition)

    def fixed(self) -> list[ConditionResult]:
        """The results of the fixed counts."""
        return [result for result in self.results if result.condition.search == "fixed"]

    def under(self, threshold: float, search: str | None = None) -> ConditionResult:
        """The result of a search (None: the first) under a threshold. A model of one count has one result for all thresholds."""
        if fixed_count(self.model) is not None:
            return self.results[0]
        return self.result(Condition(search or self.config.searches[0], threshold=threshold))

    def curve(self, threshold: float, search: str | None = None) -> list[CapPoint]:
        """The share of blocks that meet a threshold, against mean tokens, as a cap on the tokens of a block rises.

        Computed from the smallest count m that meets the threshold, as the search found it for each block. Under a cap c, a block
        meets the threshold if m <= c, and takes min(m, c) tokens; a block that meets it with no count takes c. A search with this cap
        would choose the same counts if the cache were the same; here the cache holds the earlier blocks as tokenized without a cap.
        A model of one count gives one point.
        """
        result = self.under(threshold, search)
        if result.condition.search == "fixed":
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
        """Mean tokens of a search minus mean tokens of the linear search, each on its own cache; None: linear was not run."""
        if GROUND_TRUTH not in self.config.searches or fixed_count(self.model) is not None:
            return None
        return (
            self.under(threshold, search).mean_tokens
            - self.under(threshold, GROUND_TRUTH).mean_tokens
        )

    def scalars(self) -> dict[str, float]:
        """Numbers for logs, by names such as 'eval/mean_tokens@0.05' (a threshold) and 'eval/psnr@512' (a fixed count)."""
        found: dict[str, float] = {}
        for threshold in self.config.thresholds:
            result = self.under(threshold)
            found[f"eval/mean_tokens@{threshold:g}"] = result.mean_tokens
            found[f"eval/share_met@{threshold:g}"] = result.share_met(threshold)
            found[f"eval/passes_per_block@{threshold:g}"] = result.passes_per_block
        for result in self.fixed():
            for name in METRICS:
                if (value := getattr(result, name)) is not None:
                    found[f"eval/{name}@{result.condition.num_tokens}"] = value
        return found

    def pictures(self) -> dict[str, np.ndarray]:
        """{'eval/CLIP@0.05': uint8 picture}: original, reconstruction and error of a clip's middle frame, with the strip of tokens."""
        return {shown.name: shown.draw(self) for shown in self.shown}

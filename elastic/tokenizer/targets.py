"""`EncodeOptions`: what is asked of a clip's tokens, from the command line to the search of every block."""

import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, SupportsFloat, TypedDict

from elastic.io.names import suggest_arguments
from elastic.io.options import Check, at_least, check_options, option
from elastic.io.read_options import (
    exact_color_option,
    fit_option,
    reader_option,
    resolution_option,
    tile_overlap_option,
)
from elastic.search import TOLERANCE, SearchOptions, search_names

if TYPE_CHECKING:  # so that the flags are made from this file without loading jax
    from elastic.config import ElasticTokConfig

# The loss of a block: of original and reconstruction, uint8 [n, rows, columns, 3].
_Metric = Callable[..., SupportsFloat]

_TARGETS = ("threshold", "psnr", "num_tokens", "avg_tokens", "bitrate")
_SHARE = Check(lambda share: 0 < share <= 1, "must be above 0 and at most 1")


class EncodeArguments(TypedDict, total=False):
    """The fields of `EncodeOptions` as keyword arguments of a function."""

    threshold: float | None
    psnr: float | None
    metric: str | _Metric
    avg_tokens: float | None
    bitrate: float | None
    delay_blocks: int
    budget_counts: int
    num_tokens: int | None
    search: str | None
    rate: float | None
    max_frames: int | None
    reader: str
    exact_color: bool
    fit: str
    resolution: int | None
    tile_overlap: int | None
    max_fraction: float
    fallback_fraction: float
    num_counts: int
    search_tolerance: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodeOptions:
    """What is read of a clip, and how its tokens are chosen.

    Exactly one target is given: `threshold`, `psnr`, `num_tokens`, `avg_tokens` or `bitrate`. The help text of each field
    says what it means; `ElasticTokenizer.stream` documents them too.

    Raises:
      ValueError: there is not exactly one target, a value is out of its range, or two options contradict each other.
      TypeError: an option is unknown; the message suggests a known one.
    """

    threshold: float | None = option(
        None,
        "largest error of a block: mean square, pixels in [-1, 1]; without any target the one that the model recommends, "
        "0.003 for the released models",
        check=Check(
            lambda error: 0 <= error < math.inf,
            "must be a finite number, 0 or above: it is a mean of squared errors",
        ),
    )
    psnr: float | None = option(
        None,
        "the same in dB: every block reaches it, such as 28",
        check=Check(
            lambda psnr: 0 < psnr < math.inf,
            "must be a finite number of decibels above 0, such as 28",
        ),
    )
    metric: str | _Metric = option(
        "mse",
        "the error that the threshold and the budget refer to; lpips is the mean of a block's frames and slow on a CPU",
        choices=("mse", "lpips"),
    )
    avg_tokens: float | None = option(
        None,
        "tokens of a block in the mean, for the whole clip: spent where they lower its error most",
    )
    bitrate: float | None = option(
        None,
        "the same in kbit of tokens per second of video",
        check=Check(
            lambda bitrate: 0 < bitrate < math.inf,
            "must be a finite number of kbit per second above 0",
        ),
    )
    delay_blocks: int = option(
        64,
        "with avg_tokens or bitrate: blocks that are held in memory and share what there is to spend",
        check=at_least(1),
    )
    budget_counts: int = option(
        24,
        "with avg_tokens or bitrate: counts of each block that are measured to decide",
        check=Check(lambda count: count >= 2, "must be 2 or more: both ends"),
    )
    num_tokens: int | None = option(
        None, "tokens of every block, for the fixed search", flag="n_codes"
    )
    search: str | None = option(
        None,
        "how a block's count is found; without it predict, or fixed where n_codes is given",
        choices=search_names(),
        flag="search_alg",
    )
    rate: float | None = option(
        24.0,
        "frames per second to take from a video, at most its own; 0: all frames",
        flag="fps",
        check=Check(
            lambda rate: 0 < rate < math.inf, "must be a positive number of frames/s, or None"
        ),
    )
    max_frames: int | None = option(
        None,
        "take no more frames than this; 0: all",
        check=Check(lambda frames: frames >= 1, "must be at least 1, or None for all"),
    )
    reader: str = reader_option()
    exact_color: bool = exact_color_option()
    fit: str = fit_option()
    resolution: int | None = resolution_option()
    tile_overlap: int | None = tile_overlap_option()
    max_fraction: float = option(
        1.0, "share of a block's tokens that may be tried", flag="max_prop_codes", check=_SHARE
    )
    fallback_fraction: float = option(
        1.0,
        "share of a block's tokens kept where no count meets the threshold",
        flag="default_prop_codes",
        check=_SHARE,
    )
    num_counts: int = option(
        100,
        "how many counts the linear search spaces over the range",
        check=Check(lambda count: count >= 2, "must be at least 2: both ends"),
    )
    search_tolerance: float = option(
        TOLERANCE,
        "share of a clip's tokens that the search predict may keep beyond need, to save passes; 0: none",
        check=Check(
            lambda share: 0 <= share < 1, "must be a share of the tokens, from 0 to below 1"
        ),
    )

    def __post_init__(self):
        self._check_targets()
        # The search and the metric are looked up by name where they are made.
        check_options(self, open_choices=("search", "metric"))
        if self.tile_overlap is not None and self.fit != "tile":
            raise ValueError(
                f"tile_overlap={self.tile_overlap} is for fit='tile', not for fit={self.fit!r}; leave it out."
            )
        if self.psnr is not None and self.metric != "mse":
            raise ValueError(
                f"psnr={self.psnr} is of squared errors; give threshold= with metric={self.metric!r}."
            )

    def _check_targets(self) -> None:
        given = [name for name in _TARGETS if getattr(self, name) is not None]
        for name in given:
            value, whole = getattr(self, name), name == "num_tokens"
            kind = numbers.Integral if whole else numbers.Real
            if isinstance(value, bool) or not isinstance(value, kind):
                what = "whole number of tokens" if whole else "number"
                raise ValueError(f"{name}={value!r} must be a {what}.")
        if not given:
            raise ValueError(
                "Give threshold= (an error to stay under) or psnr=, num_tokens= (the same number for each block), "
                "avg_tokens= (a mean to spend) or bitrate=."
            )
        # Where the search is made, a count beside another search is refused in words of its own.
        fixed = self.search in (None, "fixed") or given != ["threshold", "num_tokens"]
        if len(given) > 1 and fixed:
            raise ValueError(
                f"{' and '.join(f'{name}=' for name in given)} are {len(given)} targets; give one."
            )
        if self.search is not None and self.has_budget:
            raise ValueError(
                f"{given[0]}= does not search for a threshold; leave out search={self.search!r}."
            )

    @property
    def has_budget(self) -> bool:
        """Whether the blocks share a budget of tokens, instead of being searched one by one."""
        return self.avg_tokens is not None or self.bitrate is not None

    @property
    def search_name(self) -> str:
        """The name of the search: as given, else 'fixed' with `num_tokens` and 'predict' without."""
        return self.search or ("predict" if self.num_tokens is None else "fixed")

    @property
    def largest_error(self) -> float | None:
        """The threshold, also where it is given as a PSNR; None where there is none."""
        return self.threshold if self.psnr is None else threshold_of_psnr(self.psnr)

    def search_options(self, config: "ElasticTokConfig", *, width: int) -> SearchOptions:
        """What the search of a block of this model may try.

        Args:
          config: the model.
          width: counts tried in one call of the model.

        Raises:
          ValueError: the model has no block of so many tokens.
        """
        searched = self.num_tokens is None
        return SearchOptions(
            min_kept=config.min_toks if searched else 1,
            max_kept=config.max_toks,
            threshold=self.largest_error,
            num_tokens=self.num_tokens,
            fallback_fraction=self.fallback_fraction,
            max_fraction=self.max_fraction,
            num_counts=self.num_counts,
            tolerance=self.search_tolerance,
            width=width if searched else 1,
        )

    def to_json(self) -> dict[str, Any]:
        """The options as JSON holds them: a metric that is a function by its name."""
        return {
            name: getattr(value, "__name__", repr(value)) if callable(value) else value
            for name, value in vars(self).items()
        }


# A misspelled option gets a suggestion here too, as in `ElasticTokenizer.encode`.
setattr(EncodeOptions, "__init__", suggest_arguments(EncodeOptions.__init__))  # noqa: B010


def threshold_of_psnr(psnr: float) -> float:
    """The mean squared error, pixels in [-1, 1], of a PSNR in dB."""
    from elastic.metrics import mse_of_psnr  # loads jax

    return mse_of_psnr(psnr)


def tokens_of_bitrate(bitrate: float, rate: float, config: "ElasticTokConfig") -> float:
    """Tokens of a block in the mean that a bitrate allows.

    Args:
      bitrate: kbit of tokens per second.
      rate: frames per second of the clip; 0 for an image.
      config: the model.

    Raises:
      ValueError: the clip is an image, which has no rate.
    """
    if not rate > 0:
        raise ValueError(f"bitrate={bitrate} needs a video; for an image give num_tokens=.")
    fsq = config.bottleneck_type == "fsq"
    bits = (
        max(1, (config.codebook_size - 1).bit_length()) if fsq else 32 * config.vae_bottleneck_dim
    )
    return 1000 * bitrate * config.frames_per_block / rate / bits

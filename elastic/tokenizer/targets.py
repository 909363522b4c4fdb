"""What may be asked of a clip's tokens, and its checks."""

import math
import numbers
from collections.abc import Mapping

from elastic.config import ElasticTokConfig
from elastic.metrics import mse_of_psnr


def check_targets(targets: Mapping[str, float | None], search: str | None) -> None:
    """Refuses none and several targets; a threshold beside `num_tokens` only decides what counts as met.

    Raises:
      ValueError: there is not one target, it is no number, or a search is given that it has no use for.
    """
    given = [name for name, value in targets.items() if value is not None]
    for name in given:
        value, kind = targets[name], numbers.Integral if name == "num_tokens" else numbers.Real
        if isinstance(value, bool) or not isinstance(value, kind):
            what = "whole number of tokens" if name == "num_tokens" else "number"
            raise ValueError(f"{name}={value!r} must be a {what}.")
    if not given:
        raise ValueError(
            "Give threshold= (an error to stay under) or psnr=, num_tokens= (the same number for each block), "
            "avg_tokens= (a mean to spend) or bitrate=."
        )
    if len(given) > 1 and given != ["threshold", "num_tokens"]:
        raise ValueError(
            f"{' and '.join(f'{name}=' for name in given)} are {len(given)} targets; give one."
        )
    if search is not None and given[0] in ("avg_tokens", "bitrate"):
        raise ValueError(
            f"{given[0]}= does not search for a threshold; leave out search={search!r}."
        )


def threshold_of_psnr(psnr: float) -> float:
    """The mean squared error, pixels in [-1, 1], of a PSNR in dB.

    Raises:
      ValueError: it is not a finite number of decibels above 0.
    """
    if not 0 < psnr < math.inf:
        raise ValueError(f"psnr={psnr} must be a finite number of decibels above 0, such as 28.")
    return mse_of_psnr(psnr)


def tokens_of_bitrate(bitrate: float, rate: float, config: ElasticTokConfig) -> float:
    """Tokens of a block in the mean, of kbit of tokens per second.

    Args:
      rate: frames per second.

    Raises:
      ValueError: the clip has no rate, as an image, or there is no bit to spend.
    """
    if not rate > 0:
        raise ValueError(f"bitrate={bitrate} needs a video; for an image give num_tokens=.")
    if not 0 < bitrate < math.inf:
        raise ValueError(f"bitrate={bitrate} must be a finite number of kbit per second above 0.")
    fsq = config.bottleneck_type == "fsq"
    bits = (
        max(1, (config.codebook_size - 1).bit_length()) if fsq else 32 * config.vae_bottleneck_dim
    )
    return 1000 * bitrate * config.frames_per_block / rate / bits

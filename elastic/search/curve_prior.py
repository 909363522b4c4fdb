"""Estimates a block's rate curve from its pixels, by a regression that is shipped beside a model's weights.

The first block of a clip has no earlier block to learn from, and after a cut the earlier blocks mislead. The regression maps a few
sums over a block's pixels, and their squares, to its curve (log loss over log count); it was fitted on measured curves of the same
model. The estimate only decides which count is tried first. What a search returns is measured in any case, so a poor estimate costs
passes and nothing else.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from einops import rearrange
from jaxtyping import Float, UInt8

from elastic.io.json_file import read_marked
from elastic.patches import TokenOrder, pad_block, to_unit_range, token_places
from elastic.search.rate_curve import Curve, Point, SearchHistory

FILE_NAME = "curves.json"  # beside config.json and the weights
_FORMAT = {"format": "elastic curve prior", "version": 1}
_FLOOR = (
    1e-3  # added to errors before the logarithm, a tenth of it to details, as frames may be black
)
_BOXES = (1, 2, 4, 8, 16, 32)  # pixels; the detail between two sizes is a feature
_TILE = 16  # pixels a side of what the DCT sees; over time it sees the whole block
_SHARES = tuple(
    2.0**-k for k in range(2, 11)
)  # of the frequencies, which the transform codec keeps
_COLOUR = 3  # a difference of colours counts as a frequency this much higher
_LOW_FLOOR = 1e-5  # added to its errors
# Brightness and two differences of colours, orthonormal.
_COLOURS = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]], np.float32)
_COLOURS /= np.linalg.norm(_COLOURS, axis=1, keepdims=True)
_RIDGE = 1.0  # ridge penalty, in samples; by the curves of clips that it was not fitted on
_LEAST_SPREAD = 0.02
# In deviations: a feature that is farther from its mean, as of a black block, adds no more by its square.
_FARTHEST = 2.5

Patch = tuple[int, int, int]


def features(
    frames: UInt8[np.ndarray, "n rows columns c"],
    patch_size: Patch,
    counts: Sequence[int],
    token_order: TokenOrder = "raster",
) -> Float[np.ndarray, " k"]:
    """Logarithms of a block's motion, of its detail at several scales, and of the errors of two naive decoders and a transform codec.

    Both decoders copy the patches whose tokens are kept. For the other patches the first decoder shows grey, the second the frame
    before, or the mean of the kept patches where there is no frame before. A model does better than both, but loses its last tokens
    in the same places. The transform codec keeps the lowest frequencies of a DCT; how fast its error falls is the best feature, because
    that depends on the same content. The mean of the logarithms of the errors of tiles, beside the logarithm of their mean, tells how
    unlike the tiles are.

    Args:
      frames: the block at the model's resolution, real frames only. The last one is repeated until there are whole tokens, as the model
        sees it: a picture is a clip in which nothing moves.
      patch_size: frames, rows and columns of a token.
      counts: the counts for which the decoders' errors are taken.
      token_order: of the tokens of a slice.
    """
    whole = -(-len(frames) // patch_size[0]) * patch_size[0]
    video = to_unit_range(pad_block(frames, whole))
    motion = float(np.abs(np.diff(video, axis=0)).mean()) if len(video) > 1 else 0.0
    powers = _powers(video)
    details = [a - b for a, b in zip(powers, [*powers[1:], 0.0], strict=True)]
    tails = _tails(video, patch_size, counts, token_order)
    shells = _shells(video)
    return np.concatenate(
        [
            np.log([motion + _FLOOR]),
            np.log(np.maximum(details, 0.0) + 0.1 * _FLOOR),
            np.log(np.array(tails) + _FLOOR),
            np.log(shells.mean(axis=0) + _LOW_FLOOR),
            np.log(shells[:, ::2] + _LOW_FLOOR).mean(axis=0),
        ]
    )


@dataclass(frozen=True, kw_only=True)
class CurvePrior:
    """The map from a block's features to its curve.

    Attributes:
      counts: where the curve is given, ascending.
      patch_size: frames, rows and columns of a token of the model.
      token_order: of the tokens of a slice.
      means: of the features of the blocks it was fitted on. Earlier versions know only the first ones of `features`.
      scales: their deviations; None: an earlier version, which knows no squares.
      weights: [len(counts), 1 + features + squares]. First the log losses of a block that has these means. Then a coefficient for each
        feature less its mean. At last a coefficient for the square of each feature less its mean, in units of its deviation.
      residual: root mean square error of the log losses, over all counts and the blocks fitted.
      spread: usual error of an estimate in log counts: `SearchHistory.spread` of a clip's first block.
    """

    counts: tuple[int, ...]
    patch_size: Patch
    means: Float[np.ndarray, " k"]
    weights: Float[np.ndarray, "counts w"]
    residual: float
    spread: float
    token_order: TokenOrder = "raster"
    scales: Float[np.ndarray, " k"] | None = None

    def __post_init__(self):
        if not self.counts or list(self.counts) != sorted(set(self.counts)) or self.counts[0] < 1:
            raise ValueError(f"counts={self.counts} must be ascending, from 1 up.")
        if len(self.patch_size) != 3 or min(self.patch_size) < 1:
            raise ValueError(f"patch_size={self.patch_size} must be three numbers, from 1 up.")
        if self.token_order not in get_args(TokenOrder):
            raise ValueError(
                f"token_order={self.token_order!r} must be one of {', '.join(get_args(TokenOrder))}."
            )
        earlier = 1 + len(_BOXES) + 2 * len(_probes(self.counts))
        known = earlier + np.array([0, len(_SHARES), len(_SHARES) + len(_SHARES[::2])])
        count, scales = self.means.size, self.scales
        columns = 1 + count if scales is None else 1 + 2 * count
        if (
            count not in known
            or (scales is not None and (scales.shape != self.means.shape or not (scales > 0).all()))
            or self.weights.shape != (len(self.counts), columns)
        ):
            raise ValueError(
                f"means of shape {self.means.shape}, their scales above 0, and weights of shape {self.weights.shape} must be "
                f"of {known[-1]} features and {len(self.counts)} counts."
            )
        numbers = [self.residual, self.spread, *self.means, *self.weights.ravel()]
        if not np.isfinite(numbers).all() or self.residual < 0 or self.spread < 0:
            raise ValueError("its numbers must be finite, the residual and the spread 0 or above.")

    def curve_of(self, frames: UInt8[np.ndarray, "n rows columns c"]) -> Curve:
        """The estimated curve of a block, as if it were the first of its clip."""
        found = features(frames, self.patch_size, _probes(self.counts), self.token_order)
        found = found[: len(self.means)] - self.means
        squares = [] if self.scales is None else _squares(found / self.scales)
        losses = self.weights @ np.concatenate([[1.0], found, squares])
        # More tokens never raise the loss; a falling curve crosses the threshold once.
        losses = np.minimum.accumulate(losses)
        return Curve(
            Point(math.log(count), float(loss))
            for count, loss in zip(self.counts, losses, strict=True)
        )

    def history(self, expected: Curve, before: SearchHistory | None = None) -> SearchHistory:
        """The history to search a block with. It holds for the squared error, not for another metric.

        Args:
          expected: the block's `curve_of`.
          before: the history after the search of the clip's last block; None: this is the first block. Its curve is shifted by the
            difference of the two blocks' estimates, so that a cut does not mislead.
        """
        if before is None or before.curve is None:
            return SearchHistory(curve=expected, spread=self.spread, expected=expected)
        curve, old = before.curve, before.expected
        if old is not None:
            moves = (expected.at(p.x) - old.at(p.x) for p in curve.points)
            curve = Curve(
                Point(p.x, p.y + move) for p, move in zip(curve.points, moves, strict=True)
            )
        return dataclasses.replace(before, curve=curve, expected=expected)

    def to_json(self) -> str:
        """The text that `load` reads; numbers have five digits after the point."""
        values = _FORMAT | {
            "counts": list(self.counts),
            "patch_size": list(self.patch_size),
            "residual": round(self.residual, 4),
            "spread": round(self.spread, 4),
            "means": [round(float(mean), 5) for mean in self.means],
        }
        if self.scales is not None:
            values["scales"] = [round(float(scale), 7) for scale in self.scales]
        if self.token_order != "raster":  # what models of before write stays as it was
            values["token_order"] = self.token_order
        head = json.dumps(values)[:-1]
        rows = ",\n  ".join(str([round(float(w), 5) for w in row]) for row in self.weights)
        return f'{head},\n "weights": [\n  {rows}]}}\n'

    @classmethod
    def load(cls, path: str | os.PathLike) -> "CurvePrior":
        """The prior in a file that `to_json` wrote.

        Raises:
          ValueError: the file is damaged or something else.
          OSError: it cannot be read.
        """
        try:
            values = read_marked(path, _FORMAT)
            frames, rows, columns = values["patch_size"]
            return cls(
                counts=tuple(int(count) for count in values["counts"]),
                patch_size=(int(frames), int(rows), int(columns)),
                token_order=values.get("token_order", "raster"),
                means=np.asarray(values["means"], np.float64),
                scales=np.asarray(values["scales"], np.float64) if "scales" in values else None,
                weights=np.asarray(values["weights"], np.float64),
                residual=float(values["residual"]),
                spread=float(values["spread"]),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{os.fspath(path)!r} is no prior of curves ({error}); delete it, or make it anew with scripts/fit_curves.py."
            ) from error


def load_prior(folder: str | os.PathLike) -> CurvePrior | None:
    """The prior of the model in a folder; None where there is no such folder, or no prior in it.

    Raises:
      ValueError: the file is damaged or something else.
    """
    path = pathlib.Path(folder) / FILE_NAME
    return CurvePrior.load(path) if path.is_file() else None


def fit(
    blocks: Sequence[UInt8[np.ndarray, "n rows columns c"]],
    losses: Float[np.ndarray, "n counts"],
    *,
    counts: Sequence[int],
    patch_size: Patch,
    token_order: TokenOrder = "raster",
) -> CurvePrior:
    """A prior by ridge regression of log losses on features that are scaled to deviation 1, and on their squares.

    Args:
      blocks: frames, each block taken as the first of its clip.
      losses: the loss of every block with every count.
      counts: ascending token counts.
      patch_size: frames, rows and columns of a token.
      token_order: of the tokens of a slice.

    Raises:
      ValueError: there are no blocks, or a loss is not a positive finite number.
    """
    if not len(blocks) or not (np.isfinite(losses).all() and (losses > 0).all()):
        raise ValueError(f"{len(blocks)} blocks: there must be some, their losses above 0.")
    X = np.array([features(block, patch_size, _probes(counts), token_order) for block in blocks])
    Y = np.log(losses)
    means, scales = X.mean(0), X.std(0) + 1e-6
    Z = (X - means) / scales
    Z = np.concatenate([Z, _squares(Z)], axis=1)
    middle, level = Z.mean(0), Y.mean(0)
    Z -= middle
    solved = np.linalg.solve(Z.T @ Z + _RIDGE * np.eye(Z.shape[1]), Z.T @ (Y - level))
    residuals = Y - level - Z @ solved
    # In log counts: by the mean slope of all curves between the ends.
    drop = max(level[0] - level[-1], 1e-6) / max(math.log(counts[-1] / counts[0]), 1e-6)
    residual = float(np.sqrt(np.square(residuals).mean()))
    return CurvePrior(
        counts=tuple(counts),
        patch_size=patch_size,
        token_order=token_order,
        means=means,
        scales=scales,
        weights=np.vstack(
            [
                level - middle @ solved,
                solved[: len(scales)] / scales[:, None],
                solved[len(scales) :],
            ]
        ).T,
        residual=residual,
        spread=float(np.clip(residual / drop, _LEAST_SPREAD, SearchHistory.spread)),
    )


def _squares(deviations: Float[np.ndarray, "*n k"]) -> Float[np.ndarray, "*n k"]:
    return np.square(deviations.clip(-_FARTHEST, _FARTHEST))


def _shells(video: Float[np.ndarray, "n rows columns 3"]) -> Float[np.ndarray, "tiles k"]:
    """Mean squared errors in each tile of a codec that keeps the lowest frequencies of a DCT, for each share of them.

    Frequencies are ordered by the product of those in time, rows and columns, as their mean energy falls in natural pictures.
    """
    from scipy.fft import dctn  # takes a while, and only a search with a prior needs it

    frames, rows, columns = video.shape[:3]
    tall, wide = min(rows, _TILE), min(columns, _TILE)
    whole = video[:, : rows // tall * tall, : columns // wide * wide] @ _COLOURS.T
    tiles = rearrange(whole, "t (h r) (w q) c -> (h w) t r q c", r=tall, q=wide)
    spectrum: Any = dctn(tiles, axes=(1, 2, 3), norm="ortho", overwrite_x=True)
    steps = (1 + np.arange(size) * _TILE / size for size in (frames, tall, wide))
    product = functools.reduce(np.multiply.outer, [*steps, 1.0 + _COLOUR * np.array([0, 1, 1])])
    order = np.argsort(product.reshape(-1), kind="stable")
    energy = np.square(spectrum).reshape(len(tiles), -1)[:, order]
    left = energy[:, ::-1].cumsum(axis=1, dtype=np.float64)[:, ::-1] / order.size
    return left[:, [min(math.ceil(share * order.size), order.size - 1) for share in _SHARES]]


def _probes(counts: Sequence[int]) -> Sequence[int]:
    """Every third count: the errors at neighbouring counts are nearly the same."""
    return counts[::3]


def _powers(video: np.ndarray) -> list[float]:
    """Mean squares of the means over boxes of every size; partial boxes at the edges are left out."""
    found = []
    for size in _BOXES:
        if size > 1:  # boxes of boxes
            tall, wide = (min(n, 2) for n in video.shape[1:3])
            video = _sums(video, tall, wide) / np.float32(tall * wide)
        found.append(float(np.square(video).mean()))
    return found


def _sums(video: np.ndarray, tall: int, wide: int) -> np.ndarray:
    """Sums over boxes of `tall` x `wide` pixels, [n, boxes down, boxes across, c].

    As sums of every `tall`-th row and `wide`-th column: NumPy's own sum over short axes takes five times as long.
    """
    down, across = video.shape[1] // tall, video.shape[2] // wide
    rows = functools.reduce(np.add, [video[:, i : down * tall : tall] for i in range(tall)])
    return functools.reduce(np.add, [rows[:, :, i : across * wide : wide] for i in range(wide)])


def _tails(
    video: np.ndarray, patch_size: Patch, counts: Sequence[int], token_order: TokenOrder
) -> list[float]:
    """Mean squared errors of the first naive decoder for each count, then those of the second.

    A count keeps some groups of frames whole and the first patches of the next group. Errors are summed patch by patch once, for
    all counts.
    """
    pt, ph, pw = patch_size
    num_frames, channels = len(video), video.shape[-1]
    by_place = _sums(video, ph, pw)
    places = token_places(by_place.shape[1], by_place.shape[2], token_order)
    sums = by_place.reshape(num_frames, -1, channels)
    per_group = sums.shape[1]
    if places is not None:
        sums = sums[:, places]

    def energy(x: np.ndarray) -> np.ndarray:
        """Sums of squares, [frames, patches]."""
        found = _sums(np.square(x), ph, pw).sum(-1, dtype=np.float64).reshape(len(x), per_group)
        return found if places is None else found[:, places]

    @functools.cache
    def change(frame: int) -> np.ndarray:
        """The energy of the difference of each later frame from `frame`."""
        return energy(video[frame + 1 :] - video[frame])

    grey = energy(video)
    found: list[tuple[float, float]] = []
    for count in counts:
        group, here = divmod(count, per_group)
        start, end = group * pt, (group + 1) * pt
        if start >= num_frames:
            found.append((0.0, 0.0))
            continue
        if group:
            lost = change(start - 1)
        else:
            kept = sums[:end, :here]
            mean = kept.sum((0, 1)) / max(end * here * ph * pw, 1)
            lost = grey - 2 * sums @ mean + ph * pw * np.square(mean).sum()
        later = change(end - 1)[:, :here] if here else np.zeros(())
        found.append(
            (
                grey[start:end, here:].sum() + grey[end:].sum(),
                lost[:, here:].sum() + later.sum(),
            )
        )
    scale = num_frames * per_group * ph * pw * channels
    first, second = zip(*found, strict=True)
    return [max(float(total), 0.0) / scale for total in (*first, *second)]

"""What a block's pixels tell of its curve before anything of it is measured: a regression, shipped beside a model's weights.

The first block of a clip has no block before it to remember, and a cut makes what is remembered useless. A block's curve (log
loss over log count) is guessed from a few sums over its pixels by a linear map that was fitted on curves of the same model. The
guess only says where to try first: what a search returns is measured all the same, so a poor guess, or one of other weights,
costs passes and nothing else.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8

from elastic.io.json_file import read_marked
from elastic.patches import to_unit_range
from elastic.search.rate_curve import Curve, Point, SearchHistory

FILE_NAME = "curves.json"  # beside config.json and the weights
_FORMAT = {"format": "elastic curve prior", "version": 1}
_FLOOR = 1e-3  # added to errors before the logarithm, to details a tenth: black frames exist
_BOXES = (1, 2, 4, 8, 16, 32)  # pixels; detail between two of them is a feature
_RIDGE = 5.0  # in samples; by cross-validation over clips of the shipped models
_LEAST_SPREAD = 0.02
_TRUST = 0.8  # share of the difference between two blocks' guesses that their curves differ by

Patch = tuple[int, int, int]


def features(
    frames: UInt8[np.ndarray, "n rows columns c"], patch_size: Patch, counts: Sequence[int]
) -> Float[np.ndarray, " k"]:
    """Logarithms of a block's motion, of its detail at several scales, and of the errors of two naive decoders.

    The decoders copy the patches of the tokens that are kept, in their order; for the others the first shows grey, the second
    the frame before (the mean of the kept patches, where that is not there either). A model does better at once, but loses
    its tail in the same places.

    Args:
      frames: the block at the model's resolution, real frames only.
      patch_size: frames, rows and columns of a token.
      counts: the counts for which the decoders' errors are taken.
    """
    video = to_unit_range(frames)
    motion = float(np.abs(np.diff(video, axis=0)).mean()) if len(video) > 1 else 0.0
    powers = _powers(video)
    details = [a - b for a, b in zip(powers, [*powers[1:], 0.0], strict=True)]
    tails = _tails(video, patch_size, counts)
    return np.log(
        [
            motion + _FLOOR,
            *(max(detail, 0.0) + 0.1 * _FLOOR for detail in details),
            *(error + _FLOOR for error in tails),
        ]
    )


@dataclass(frozen=True, kw_only=True)
class CurvePrior:
    """The map from a block's features to its curve.

    Attributes:
      counts: where the curve is given, ascending.
      patch_size: frames, rows and columns of a token of the model.
      means: of the features of the blocks it was fitted on.
      weights: [len(counts), 1 + features]: the mean log losses, and what a feature above its mean adds to them.
      residual: root mean square of log losses less guessed ones, over all counts and the blocks fitted.
      spread: how far off a guess is in log counts: `SearchHistory.spread` of a clip's first block.
    """

    counts: tuple[int, ...]
    patch_size: Patch
    means: Float[np.ndarray, " k"]
    weights: Float[np.ndarray, "counts k+1"]
    residual: float
    spread: float

    def __post_init__(self):
        if not self.counts or list(self.counts) != sorted(set(self.counts)) or self.counts[0] < 1:
            raise ValueError(f"counts={self.counts} must be ascending, from 1 up.")
        if len(self.patch_size) != 3 or min(self.patch_size) < 1:
            raise ValueError(f"patch_size={self.patch_size} must be three numbers, from 1 up.")
        known = 1 + len(_BOXES) + 2 * len(_probes(self.counts))
        if self.means.shape != (known,) or self.weights.shape != (len(self.counts), 1 + known):
            raise ValueError(
                f"means of shape {self.means.shape} and weights of shape {self.weights.shape} must be "
                f"of {known} features and {len(self.counts)} counts."
            )
        numbers = [self.residual, self.spread, *self.means, *self.weights.ravel()]
        if not np.isfinite(numbers).all() or self.residual < 0 or self.spread < 0:
            raise ValueError("its numbers must be finite, the residual and the spread 0 or above.")

    def curve_of(self, frames: UInt8[np.ndarray, "n rows columns c"]) -> Curve:
        """The curve that a block without blocks before it will have."""
        found = features(frames, self.patch_size, _probes(self.counts)) - self.means
        losses = self.weights[:, 0] + self.weights[:, 1:] @ found
        # No token makes it worse: a curve that falls has one crossing, where the regression may ripple.
        losses = np.minimum.accumulate(losses)
        return Curve(
            Point(math.log(count), float(loss))
            for count, loss in zip(self.counts, losses, strict=True)
        )

    def memory(self, expected: Curve, before: SearchHistory | None = None) -> SearchHistory:
        """What to search a block with, in place of `SearchHistory()`: by squared error, not by another metric.

        Args:
          expected: the block's `curve_of`.
          before: the memory that the clip's last block was searched with; None: this is its first. Its curve moves by what
            the pixels of both blocks say of their difference, so that a cut does not mislead.
        """
        if before is None or before.curve is None:
            return SearchHistory(curve=expected, spread=self.spread, expected=expected)
        curve, old = before.curve, before.expected
        if old is not None:
            moves = (_TRUST * (expected.at(p.x) - old.at(p.x)) for p in curve.points)
            curve = Curve(
                Point(p.x, p.y + move) for p, move in zip(curve.points, moves, strict=True)
            )
        return dataclasses.replace(before, curve=curve, expected=expected)

    def to_json(self) -> str:
        """What `load` reads; numbers have five digits after the point."""
        values = _FORMAT | {
            "counts": list(self.counts),
            "patch_size": list(self.patch_size),
            "residual": round(self.residual, 4),
            "spread": round(self.spread, 4),
            "means": [round(float(mean), 5) for mean in self.means],
        }
        head = json.dumps(values)[:-1]
        rows = ",\n  ".join(str([round(float(w), 5) for w in row]) for row in self.weights)
        return f'{head},\n "weights": [\n  {rows}]}}\n'

    @classmethod
    def load(cls, path: str | os.PathLike) -> "CurvePrior":
        """The inverse: what `to_json` gave, from a file.

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
                means=np.asarray(values["means"], np.float64),
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
) -> CurvePrior:
    """Ridge least squares of log losses on features; a feature is weighed by how much it varies.

    Args:
      blocks: of clips, each as the first of its clip.
      losses: of every block with every count.

    Raises:
      ValueError: there are no blocks, or a loss is not a positive finite number.
    """
    if not len(blocks) or not (np.isfinite(losses).all() and (losses > 0).all()):
        raise ValueError(f"{len(blocks)} blocks: there must be some, their losses above 0.")
    X = np.array([features(block, patch_size, _probes(counts)) for block in blocks])
    Y = np.log(losses)
    means, scale, level = X.mean(0), X.std(0) + 1e-6, Y.mean(0)
    Z = (X - means) / scale
    solved = np.linalg.solve(Z.T @ Z + _RIDGE * np.eye(Z.shape[1]), Z.T @ (Y - level))
    residuals = Y - level - Z @ solved
    # In log counts: by the mean slope of all curves between the ends.
    drop = max(level[0] - level[-1], 1e-6) / max(math.log(counts[-1] / counts[0]), 1e-6)
    residual = float(np.sqrt(np.square(residuals).mean()))
    return CurvePrior(
        counts=tuple(counts),
        patch_size=patch_size,
        means=means,
        weights=np.concatenate([level[:, None], (solved / scale[:, None]).T], axis=1),
        residual=residual,
        spread=float(np.clip(residual / drop, _LEAST_SPREAD, SearchHistory.spread)),
    )


def _probes(counts: Sequence[int]) -> Sequence[int]:
    """Every third count: neighbours tell nearly the same."""
    return counts[::3]


def _powers(video: np.ndarray) -> list[float]:
    """Mean squares of means over boxes of every size; what does not fill a box at the edge is left out."""
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


def _tails(video: np.ndarray, patch_size: Patch, counts: Sequence[int]) -> list[float]:
    """Mean squared errors of both naive decoders: of the first for each count, then of the second.

    A count keeps some groups of frames whole and the first patches of the next; what is lost there and after it is summed patch by
    patch, once for all counts.
    """
    pt, ph, pw = patch_size
    num_frames, channels = len(video), video.shape[-1]
    sums = _sums(video, ph, pw).reshape(num_frames, -1, channels)
    per_group = sums.shape[1]

    def energy(x: np.ndarray) -> np.ndarray:
        """Sums of squares, [frames, patches]."""
        return _sums(np.square(x), ph, pw).sum(-1, dtype=np.float64).reshape(len(x), per_group)

    @functools.cache
    def change(frame: int) -> np.ndarray:
        """Of later frames' difference from a frame."""
        return energy(video[frame + 1 :] - video[frame])

    grey = energy(video)
    found: list[tuple[float, float]] = []
    for count in counts:
        group, here = divmod(count, per_group)
        start, end = group * pt, min((group + 1) * pt, num_frames)
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

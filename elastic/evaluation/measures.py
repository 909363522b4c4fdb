"""What an evaluation measures of reconstructions beside their error, collected while the blocks of a clip come."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from elastic.evaluation.records import EvaluationConfig
from elastic.metrics import load_lpips_weights, psnr_of_mse, ssim
from elastic.metrics.dists import DistsWeights, dists_of_frames, load_dists_weights
from elastic.metrics.frechet import WINDOW, Network, frechet_distance
from elastic.metrics.lpips import lpips_of_frames

# Takes originals and reconstructions, each uint8 [n, rows, columns, 3]; returns n values.
_Measure = Callable[[np.ndarray, np.ndarray], np.ndarray]
# Of originals and of reconstructions, [n, d] each.
Features = tuple[np.ndarray, np.ndarray]


class Sums(NamedTuple):
    """The errors and the bits of one clip. They are sums, so that several clips can be added up."""

    squares: float  # of errors, pixels in [-1, 1]
    count: int  # errors in that sum: frames x rows x columns x 3
    bits: int
    pixels: int  # frames x rows x columns
    metrics: Mapping[str, np.ndarray]  # by name: one value for each measured frame
    features: Mapping[str, Features]  # by name: of windows for 'fvd', of measured frames for 'fid'


class Measures:
    """The metrics besides PSNR.

    Args:
      config: names them, and says on how many frames they are measured.
      lpips_weights, dists_weights, networks: as for `evaluate`.

    Raises:
      ValueError: weights cannot be found, or 'fvd' or 'fid' has no network.
    """

    def __init__(
        self,
        config: EvaluationConfig,
        lpips_weights: Any = None,
        dists_weights: DistsWeights | None = None,
        networks: Mapping[str, Network] | None = None,
    ):
        networks = networks or {}
        wanted = [name for name in ("fvd", "fid") if name in config.metrics]
        if missing := [name for name in wanted if name not in networks]:
            raise ValueError(
                f"metrics={missing} look through networks that only you can name: networks={{{missing[0]!r}: "
                f"load_network({missing[0]!r}, FILE)}}, or --{missing[0]}_weights=FILE."
            )
        self._metric_frames = config.metric_frames
        self._of_frames = _of_frames(config.metrics, lpips_weights, dists_weights)
        self._networks = {name: networks[name] for name in wanted}
        self._originals: dict[tuple[str, str, int], np.ndarray] = {}

    def lpips(self, originals: np.ndarray, reconstructions: np.ndarray) -> np.ndarray | None:
        """LPIPS of each pair of frames; None: it is not measured."""
        measure = self._of_frames.get("lpips")
        return measure and measure(originals, reconstructions)

    def watch(self, clip: str, num_frames: int, also: Sequence[int] = ()) -> "Watch":
        """Collects what the metrics need of a clip.

        Args:
          clip: its name. The networks look at its originals once, however many reconstructions there are.
          num_frames: its length.
          also: numbers of frames that are kept besides those that are measured.
        """
        has_frames = self._of_frames or "fid" in self._networks
        measured = _spread(num_frames, self._metric_frames) if has_frames else []
        window = WINDOW if "fvd" in self._networks else 0
        return Watch(self, clip, measured, also, window)

    def frames(self, originals: np.ndarray, reconstructions: np.ndarray) -> dict[str, np.ndarray]:
        """{name: one value a frame} of the metrics that compare frame by frame."""
        return {
            name: measure(originals, reconstructions) for name, measure in self._of_frames.items()
        }

    def features(
        self, name: str, clip: str, first: int, originals: np.ndarray, reconstructions: np.ndarray
    ) -> Features | None:
        """What the network of 'fvd' sees in windows, or that of 'fid' in frames; None: it is not measured."""
        if (network := self._networks.get(name)) is None:
            return None
        key = (name, clip, first)
        if key not in self._originals:
            self._originals[key] = network(originals)
        return self._originals[key], network(reconstructions)


class Watch:
    """Takes the blocks of one clip, keeps a few frames, and shows FVD's network every whole window.

    Args:
      measures: the metrics.
      clip: the clip's name.
      measured: numbers of the frames that are measured.
      also: numbers of further frames that are kept.
      window: frames that are looked at together; 0: none are.
    """

    def __init__(
        self,
        measures: Measures,
        clip: str,
        measured: Sequence[int],
        also: Sequence[int],
        window: int,
    ):
        self._measures, self._clip, self._measured, self._window = measures, clip, measured, window
        self._kept = {*measured, *also}
        self._pairs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []
        self._seen: list[Features] = []
        self._next = 0  # the number of the next block's first frame

    def add(self, originals: np.ndarray, reconstructions: np.ndarray) -> None:
        """The next frames, uint8 [n, rows, columns, 3] each."""
        for number, (original, reconstruction) in enumerate(
            zip(originals, reconstructions, strict=True), self._next
        ):
            if number in self._kept:
                self._pairs[number] = (original.copy(), reconstruction.copy())
            if self._window:
                self._waiting.append((original.copy(), reconstruction.copy()))
                if len(self._waiting) == self._window:
                    self._look(number)
        self._next += len(originals)

    def pair(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Original and reconstruction of one kept frame, uint8 [rows, columns, 3]."""
        return self._pairs[number]

    def found(self) -> dict[str, Any]:
        """The fields `metrics` and `features` of `Sums`."""
        metrics, features = {}, {}
        if self._measured:
            kept = (self._pairs[number] for number in self._measured)
            pair = [np.stack(frames) for frames in zip(*kept, strict=True)]
            metrics = self._measures.frames(*pair)
            if (seen := self._measures.features("fid", self._clip, 0, *pair)) is not None:
                features["fid"] = seen
        if self._seen:
            originals, reconstructions = zip(*self._seen, strict=True)
            features["fvd"] = (np.concatenate(originals), np.concatenate(reconstructions))
        return {"metrics": metrics, "features": features}

    def _look(self, last: int) -> None:
        pair = (np.stack(frames)[None] for frames in zip(*self._waiting, strict=True))
        seen = self._measures.features("fvd", self._clip, last, *pair)
        assert seen is not None  # there is a window only where there is a network
        self._seen.append(seen)
        self._waiting.clear()


def quality(parts: Sequence[Sums]) -> dict[str, Any]:
    """The fields of `Quality`, from the sums of all clips."""

    def mean(name: str) -> float | None:
        values = [part.metrics[name] for part in parts if name in part.metrics]
        return float(np.mean(np.concatenate(values))) if values else None

    def distance(name: str) -> float | None:
        pairs = [part.features[name] for part in parts if name in part.features]
        if not pairs:
            return None
        return frechet_distance(*(np.concatenate(side) for side in zip(*pairs, strict=True)))

    return dict(
        mse=sum(part.squares for part in parts) / sum(part.count for part in parts),
        psnr_of_clips=float(np.mean([psnr_of_mse(part.squares / part.count) for part in parts])),
        bits_per_pixel=sum(part.bits for part in parts) / sum(part.pixels for part in parts),
        ssim=mean("ssim"),
        lpips=mean("lpips"),
        dists=mean("dists"),
        fvd=distance("fvd"),
        fid=distance("fid"),
    )


def _of_frames(
    names: Sequence[str], lpips_weights: Any, dists_weights: DistsWeights | None
) -> dict[str, _Measure]:
    """The metrics that compare frame by frame, by name."""
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


def _spread(num_frames: int, count: int) -> list[int]:
    """At most `count` frame numbers, evenly spread from the first to the last frame."""
    return np.linspace(0, num_frames - 1, min(count, num_frames)).round().astype(int).tolist()

"""Files -> batches for training: a batch is a function of the seed and the step number, so its position is the step."""

import collections
import concurrent.futures
import dataclasses
import logging
import pathlib
import threading
from collections.abc import Iterator

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from elastic import media
from elastic.config import ElasticTokConfig
from elastic.patches import patchify

log = logging.getLogger(__name__)

_MARGIN = 1.25  # videos are held this much larger than a crop, images twice as large: room to move in


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Flags `--train_dataset.vision_dataset.*`."""

    path: str
    batch_size: int = 2  # sequences, over all devices
    seq_length: int = 0  # tokens of a sequence; 0: the model's max_sequence_length
    fps: float = 24.0
    seed: int = 0
    workers: int = 2  # threads that prepare batches
    max_prefetch: int = 4  # batches prepared ahead
    image_share: float = 0.4  # of sequences made from an image by a moving crop, where there are both
    max_frames: int = 240  # per video: what is held in memory


class ClipSampler:
    """Draws sequences of blocks from a folder of images and videos. Every block of a sequence is of one file, in order.

    Decoded files are held in memory at a small size. A file that cannot be read is named in the log once, counted in `num_bad`, and
    replaced by the next one.

    Raises:
      ValueError: the folder holds no media file, or the sequence is not a whole number of blocks.
    """

    def __init__(self, data: DataConfig, model: ElasticTokConfig):
        self.data, self.model = data, model
        length = data.seq_length or model.max_sequence_length
        self.num_blocks, rest = divmod(length, model.tokens_per_block)
        if rest or not self.num_blocks:
            raise ValueError(
                f"seq_length={length} is not a whole number of blocks of {model.tokens_per_block} tokens; "
                f"use {max(1, self.num_blocks) * model.tokens_per_block}."
            )
        if not pathlib.Path(data.path).is_dir():
            raise ValueError(f"train_dataset.vision_dataset.path={data.path!r} is not a folder.")
        files = media.find_media(data.path)
        if not files:
            raise ValueError(f"There is no image or video in {data.path!r} or its folders.")
        self.images = [file for file in files if file.suffix.lower() in media.IMAGE_SUFFIXES]
        self.videos = [file for file in files if file.suffix.lower() not in media.IMAGE_SUFFIXES]
        self.num_bad = 0
        self._frames: dict[pathlib.Path, np.ndarray | None] = {}
        self._locks: dict[pathlib.Path, threading.Lock] = collections.defaultdict(threading.Lock)
        self._lock = threading.Lock()

    def batch(self, step: int) -> UInt8[np.ndarray, "b l p"]:
        """The patches of batch number `step`, always the same."""
        rng = np.random.default_rng((self.data.seed, step))
        return np.stack([self._sequence(rng) for _ in range(self.data.batch_size)])

    def batches(self, first_step: int) -> Iterator[UInt8[np.ndarray, "b l p"]]:
        """Batches from `first_step` on, prepared ahead by threads, in order."""
        pool = concurrent.futures.ThreadPoolExecutor(self.data.workers, thread_name_prefix="data")
        ahead = collections.deque(pool.submit(self.batch, first_step + i) for i in range(self.data.max_prefetch))
        step = first_step + len(ahead)
        try:
            while True:
                batch = ahead.popleft().result()
                ahead.append(pool.submit(self.batch, step))
                step += 1
                yield batch
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _sequence(self, rng: np.random.Generator) -> np.ndarray:
        use_image = bool(self.images) and (not self.videos or rng.random() < self.data.image_share)
        num_frames = self.num_blocks * self.model.frames_per_block
        source = self._pick(rng, self.images if use_image else self.videos)
        frames = _moving_crop(source, num_frames, self.model.resolution, rng, moves=use_image or len(source) == 1)
        if rng.random() < 0.5:
            frames = frames[:, :, ::-1]
        blocks = frames.reshape(self.num_blocks, -1, *frames.shape[1:])
        return patchify(blocks, self.model.patch_size).reshape(-1, self.model.patch_dim)

    def _pick(self, rng: np.random.Generator, files: list[pathlib.Path]) -> np.ndarray:
        first = int(rng.integers(len(files)))
        for offset in range(len(files)):
            frames = self._load(files[(first + offset) % len(files)])
            if frames is not None:
                return frames
        raise ValueError(f"None of the {len(files)} files like {files[0]} can be read; the log says why.")

    def _load(self, file: pathlib.Path) -> np.ndarray | None:
        with self._lock:
            lock = self._locks[file]
        with lock:
            if file not in self._frames:
                size = round(self.model.resolution * (2.0 if file in self.images else _MARGIN))
                try:
                    with media.open_clip(file, resolution=size, rate=self.data.fps, max_frames=self.data.max_frames) as clip:
                        self._frames[file] = clip.read()
                except media.MediaError as error:
                    self._frames[file] = None
                    self.num_bad += 1
                    log.warning("Skipping a file: %s", error)
            return self._frames[file]


def _moving_crop(source: np.ndarray, num_frames: int, size: int, rng: np.random.Generator, *, moves: bool) -> np.ndarray:
    """`num_frames` square crops of a clip or an image. What stands still may be moved: held, panned or zoomed."""
    total, side = source.shape[0], source.shape[1]
    stride = 0 if rng.random() < 0.1 else 1
    start = int(rng.integers(max(1, total - num_frames + 1)))
    index = start + stride * np.arange(num_frames)
    index = np.abs((index + total - 1) % max(1, 2 * total - 2) - (total - 1)) if total > 1 else np.zeros_like(index)  # there and back
    width = side * rng.uniform(size / side, 1.0)
    velocity = np.zeros(2)
    zoom = 0.0
    if moves and rng.random() < 0.75:
        velocity = rng.normal(size=2) * side * 10 ** rng.uniform(-3, -1.3)  # 0.1 % to 5 % of the picture a frame
        zoom = rng.normal() * 0.004
    centre = rng.uniform(width / 2, side - width / 2, size=2)
    out = np.empty((num_frames, size, size, 3), np.uint8)
    for k, i in enumerate(index):
        w = float(np.clip(width * (1 + zoom) ** k, size / 2, side))
        x, y = _reflect(centre + velocity * k, w / 2, side - w / 2) - w / 2
        box = (max(0.0, x), max(0.0, y), min(float(side), x + w), min(float(side), y + w))
        out[k] = np.asarray(Image.fromarray(source[i]).resize((size, size), Image.Resampling.BICUBIC, box=box))
    return out


def _reflect(x: np.ndarray, low: float, high: float) -> np.ndarray:
    """Keeps positions inside [low, high] by turning back at the ends."""
    span = max(high - low, 1e-6)
    folded = np.abs((x - low) % (2 * span))
    return low + np.where(folded > span, 2 * span - folded, folded)

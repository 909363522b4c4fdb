"""Files -> batches for training: a batch is a function of the seed and the step number, so its position is the step."""

import collections
import concurrent.futures
import dataclasses
import logging
import pathlib
import threading
from collections.abc import Generator

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from elastic import media
from elastic.config import ElasticTokConfig
from elastic.patches import patchify

log = logging.getLogger(__name__)

# Videos are held this much larger than a crop, images twice as large: room to move in.
_VIDEO_MARGIN, _IMAGE_MARGIN = 1.25, 2.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Flags `--train_dataset.vision_dataset.*`.

    Attributes:
      path: the folder of images and videos; folders inside it count too.
      ext: endings to take, such as 'mp4' or 'jpg,png'; '' takes all that can be read.
      batch_size: sequences in a step, over all devices.
      seq_length: tokens of a sequence, whole blocks; 0: the model's max_sequence_length.
      fps: frames per second taken from a video.
      seed: draws files, crops and motion.
      workers: threads that prepare batches.
      max_prefetch: batches prepared ahead.
      image_share: share of sequences made from an image by a moving crop, where there are both.
      max_frames: frames used of a video, its first ones.
      cache_gigabytes: memory for decoded files; those used longest ago are dropped first.

    Raises:
      ValueError: an option is out of its range.
    """

    path: str
    ext: str = ""
    batch_size: int = 2
    seq_length: int = 0
    fps: float = 24.0
    seed: int = 0
    workers: int = 2
    max_prefetch: int = 4
    image_share: float = 0.4
    max_frames: int = 240
    cache_gigabytes: float = 4.0

    def __post_init__(self):
        if not self.path:
            raise ValueError("path is empty; name the folder of images and videos.")
        for name in ("batch_size", "workers", "max_prefetch", "max_frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more.")
        for name in ("seq_length", "seed", "cache_gigabytes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more.")
        if not self.fps > 0:
            raise ValueError(f"fps={self.fps} must be above 0.")
        if not 0 <= self.image_share <= 1:
            raise ValueError(f"image_share={self.image_share} must lie in 0 to 1.")


def sequence_length(data: DataConfig, model: ElasticTokConfig) -> int:
    """Tokens of a training sequence.

    Raises:
      ValueError: they are not a whole number of blocks.
    """
    length = data.seq_length or model.max_sequence_length
    num_blocks, rest = divmod(length, model.tokens_per_block)
    if rest:
        raise ValueError(
            f"seq_length={length} is not a whole number of blocks of {model.tokens_per_block} "
            f"tokens; use {max(1, num_blocks) * model.tokens_per_block}."
        )
    return length


class ClipSampler:
    """Draws sequences of blocks from a folder. Every block of a sequence is of one file, in order.

    Decoded files are held in memory at a small size. A file that cannot be read is named in the log
    once, counted in `num_bad`, and replaced by the next one.

    Attributes:
      num_bad: files that could not be read so far.

    Raises:
      ValueError: the folder holds no media file, or the sequence is not a whole number of blocks.
    """

    def __init__(self, data: DataConfig, model: ElasticTokConfig):
        self.data, self.model = data, model
        self.num_blocks = sequence_length(data, model) // model.tokens_per_block
        files = media.find_media(data.path)
        endings = {f".{ending.strip().lstrip('.').lower()}" for ending in data.ext.split(",")}
        if data.ext:
            files = [file for file in files if file.suffix.lower() in endings]
        if not files:
            kind = (
                f"file that ends in {', '.join(sorted(endings))}" if data.ext else "image or video"
            )
            raise ValueError(f"There is no {kind} in {data.path!r} or its folders.")
        self.images = [file for file in files if _is_image(file)]
        self.videos = [file for file in files if not _is_image(file)]
        self.num_bad = 0
        # In the order of use, the newest last; None: a file that cannot be read.
        self._frames: collections.OrderedDict[pathlib.Path, np.ndarray | None]
        self._frames = collections.OrderedDict()
        self._locks: dict[pathlib.Path, threading.Lock] = collections.defaultdict(threading.Lock)
        self._lock = threading.Lock()  # of the two above

    def batch(self, step: int) -> UInt8[np.ndarray, "b l p"]:
        """The patches of batch number `step`, always the same."""
        rng = np.random.default_rng((self.data.seed, step))
        return np.stack([self._sequence(rng) for _ in range(self.data.batch_size)])

    def sample_patches(self, count: int) -> UInt8[np.ndarray, "n p"]:
        """At least `count` patches of drawn sequences, always the same."""
        rng = np.random.default_rng((self.data.seed, 2**31))  # no step's
        per_sequence = min(count, 160)  # many files, few patches of each
        found = []
        while len(found) * per_sequence < count:
            patches = self._sequence(rng)
            found.append(patches[rng.integers(len(patches), size=per_sequence)])
        return np.concatenate(found)

    def batches(self, first_step: int) -> Generator[UInt8[np.ndarray, "b l p"], None, None]:
        """Batches from `first_step` on, prepared ahead by threads, in order. Close it to end them."""
        pool = concurrent.futures.ThreadPoolExecutor(self.data.workers, thread_name_prefix="data")
        try:
            steps = range(first_step, first_step + self.data.max_prefetch)
            ahead = collections.deque(pool.submit(self.batch, step) for step in steps)
            step = steps.stop
            while True:
                batch = ahead.popleft().result()
                ahead.append(pool.submit(self.batch, step))
                step += 1
                yield batch
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _sequence(self, rng: np.random.Generator) -> np.ndarray:
        share = self.data.image_share
        use_image = bool(self.images) and (not self.videos or rng.random() < share)
        num_frames = self.num_blocks * self.model.frames_per_block
        source = self._pick(rng, self.images if use_image else self.videos)
        moves = use_image or len(source) == 1
        frames = _moving_crop(source, num_frames, self.model.resolution, rng, moves=moves)
        if rng.random() < 0.5:
            frames = frames[:, :, ::-1]
        blocks = frames.reshape(self.num_blocks, -1, *frames.shape[1:])
        patches = np.asarray(patchify(blocks, self.model.patch_size))
        return patches.reshape(-1, self.model.patch_dim)

    def _pick(self, rng: np.random.Generator, files: list[pathlib.Path]) -> np.ndarray:
        first = int(rng.integers(len(files)))
        for offset in range(len(files)):
            frames = self._load(files[(first + offset) % len(files)])
            if frames is not None:
                return frames
        raise ValueError(
            f"None of the {len(files)} files like {files[0]} can be read; the log says why."
        )

    def _load(self, file: pathlib.Path) -> np.ndarray | None:
        """The frames of a file, or None if it cannot be read. Each file is decoded by one thread."""
        with self._lock:
            lock = self._locks[file]
        with lock:
            with self._lock:
                if file in self._frames:
                    self._frames.move_to_end(file)
                    return self._frames[file]
            frames = self._decode(file)
            with self._lock:
                self._frames[file] = frames
                self._forget()
            return frames

    def _decode(self, file: pathlib.Path) -> np.ndarray | None:
        margin = _IMAGE_MARGIN if _is_image(file) else _VIDEO_MARGIN
        size = round(self.model.resolution * margin)
        try:
            with media.open_clip(
                file, resolution=size, rate=self.data.fps, max_frames=self.data.max_frames
            ) as clip:
                return clip.read()
        except media.MediaError as error:
            with self._lock:
                self.num_bad += 1
            log.warning("Skipping a file: %s", error)
            return None

    def _forget(self) -> None:
        """Drops the files used longest ago until the rest fits; that a file is bad is remembered."""
        held = [file for file, frames in self._frames.items() if frames is not None]
        total = sum(frames.nbytes for frames in self._frames.values() if frames is not None)
        for file in held[:-1]:  # the newest is in use
            if total <= self.data.cache_gigabytes * 1e9:
                return
            frames = self._frames.pop(file)
            total -= 0 if frames is None else frames.nbytes


def _is_image(file: pathlib.Path) -> bool:
    return file.suffix.lower() in media.IMAGE_SUFFIXES


def _moving_crop(
    source: np.ndarray, num_frames: int, size: int, rng: np.random.Generator, *, moves: bool
) -> np.ndarray:
    """`num_frames` square crops of a clip or an image, uint8 [num_frames, size, size, 3].

    What stands still may be moved (`moves`): held, panned or zoomed.
    """
    total, side = source.shape[0], source.shape[1]
    stride = 0 if rng.random() < 0.1 else 1
    start = int(rng.integers(max(1, total - num_frames + 1)))
    index = start + stride * np.arange(num_frames)
    if total > 1:  # there and back again where the clip is short
        index = np.abs((index + total - 1) % (2 * total - 2) - (total - 1))
    else:
        index = np.zeros_like(index)
    width = side * rng.uniform(size / side, 1.0)
    velocity = np.zeros(2)
    zoom = 0.0
    if moves and rng.random() < 0.75:
        # 0.1 % to 5 % of the picture in a frame.
        velocity = rng.normal(size=2) * side * 10 ** rng.uniform(-3, -1.3)
        zoom = rng.normal() * 0.004
    centre = rng.uniform(width / 2, side - width / 2, size=2)
    out = np.empty((num_frames, size, size, 3), np.uint8)
    for k, i in enumerate(index):
        w = float(np.clip(width * (1 + zoom) ** k, size / 2, side))
        x, y = _reflect(centre + velocity * k, w / 2, side - w / 2) - w / 2
        box = (max(0.0, x), max(0.0, y), min(float(side), x + w), min(float(side), y + w))
        picture = Image.fromarray(source[i])
        out[k] = np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC, box=box))
    return out


def _reflect(x: np.ndarray, low: float, high: float) -> np.ndarray:
    """Keeps positions inside [low, high] by turning back at the ends."""
    span = max(high - low, 1e-6)
    folded = np.abs((x - low) % (2 * span))
    return low + np.where(folded > span, 2 * span - folded, folded)

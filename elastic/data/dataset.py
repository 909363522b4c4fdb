"""Files -> batches for training. Which blocks a batch holds follows from the seed and its number alone.

So the position in the data is a number of batches. It is exact after any interruption, on another
number of hosts and with another number of workers; what else may change is said at `DataPosition`.
`elastic.data_plan` says in which order the blocks come, `elastic.data_read` decodes them.
"""

import concurrent.futures
import dataclasses
import json
import logging
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from elastic.config import ElasticTokConfig
from elastic.data import file_index
from elastic.data.config import DataConfig
from elastic.data.file_index import FileIndex
from elastic.data.packing import PackingPlan, sequence_length
from elastic.data.reader import DecodeSpec, HostBatch, SequenceReader
from elastic.data.workers import BatchIterator
from elastic.io.atomic import atomic_open

__all__ = [
    "BatchIterator",
    "DataConfig",
    "DataPosition",
    "FileIndex",
    "HostBatch",
    "TrainingData",
    "load_index",
    "sequence_length",
]

log = logging.getLogger(__name__)


def load_index(
    data: DataConfig,
    model: ElasticTokConfig,
    *,
    path: str | os.PathLike[str] | None = None,
    without: pathlib.Path | None = None,
) -> FileIndex:
    """The files of the folder as it is now, but for those in the folder `without`.

    The index kept in `path` spares measuring them again.

    Raises:
      ValueError: there is no such folder, no usable file in it, or the options do not fit the model.
    """
    sequence_length(data, model)  # said before a long search, not after
    return file_index.load_or_build(
        data.path, fps=data.fps, ext=data.ext, path=path, without=without
    )


class TrainingData:
    """The sequences of a folder: an endless stream, of which any batch can be had at any time.

    Attributes:
      num_blocks: blocks of a sequence.
      num_sequences: sequences of an epoch.
      blocks_per_epoch: blocks of an epoch, padding not counted.
      frames_per_epoch: frames of an epoch, those that only fill up a block not counted.
      bad_files: files that cannot be used, or not to their end, as far as is known: name -> reason.

    Raises:
      ValueError: the sequence is not a whole number of blocks.
    """

    def __init__(self, data: DataConfig, model: ElasticTokConfig, *, index: FileIndex):
        self.data, self.index = data, index
        self.num_blocks = sequence_length(data, model) // model.tokens_per_block
        is_image = np.array([file.kind == "image" for file in index.files])
        frames = np.array([file.num_frames for file in index.files])
        if data.max_frames:
            frames = np.minimum(frames, data.max_frames)
        frames = np.where(is_image, data.image_blocks * model.frames_per_block, frames)
        self.plan = PackingPlan(
            -(-frames // model.frames_per_block),
            blocks_per_sequence=self.num_blocks,
            chunk_size=data.chunk_size,
            seed=data.seed,
        )
        self.num_sequences = self.plan.num_sequences
        self.blocks_per_epoch = self.plan.num_blocks
        self.frames_per_epoch = int(frames.sum())
        self.bad_files = {str(index.place(name)): bad.reason for name, bad in index.bad.items()}
        self._pictures = DecodeSpec(
            places=[index.place(file.name) for file in index.files],
            num_frames=np.where(is_image, 0, frames),
            fps=data.fps,
            resolution=model.resolution,
            frames_per_block=model.frames_per_block,
            patch_size=model.patch_size,
            image_blocks=data.image_blocks,
            random_crop=data.random_crop,
            seed=data.seed,
            cache_bytes=data.cache_gigabytes * 1e9,
            cache_path=data.cache_path,
            stamps=[file.stamp for file in index.files],
            blocks_per_sequence=self.num_blocks,
        )
        self._reader = SequenceReader(self._pictures, self.plan)
        if data.cache_path:
            size = self._reader.decoded_bytes() / 1e9
            log.info("Decoded frames are kept in %s, %.1f GB in all.", data.cache_path, size)
        self._started: list[BatchIterator] = []

    @property
    def fill(self) -> float:
        """The share of an epoch's places that hold a block; the rest is padding."""
        return self.blocks_per_epoch / (self.num_sequences * self.num_blocks)

    @property
    def wait_seconds(self) -> float:
        """How long `next` of all its batches has taken so far."""
        return sum(batches.wait_seconds for batches in self._started)

    def epoch_of(self, batch: int) -> float:
        """How many epochs have been given out before this batch."""
        return batch * self.data.batch_size / self.num_sequences

    def position(self, batches: int) -> "DataPosition":
        """The position after so many batches."""
        return DataPosition(
            batches=batches,
            batch_size=self.data.batch_size,
            num_sequences=self.num_sequences,
            seed=self.data.seed,
            files=self.index.digest,
            blocks=self.plan.digest,
        )

    def sequence(self, number: int) -> HostBatch:
        """One row: row `number % batch_size` of batch `number // batch_size`, always the same."""
        row = self._reader.read(number, self.data.batch_size)
        self._report(self._reader.take_bad_files())
        return row

    def batches(self, first: int, last: int, rows: Sequence[int] | None = None) -> BatchIterator:
        """Batches `first` to `last` (not included), prepared ahead, in order. Close it to end that.

        Args:
          rows: which rows of the global batch this host wants, in this order; None: all.
        """
        rows = list(range(self.data.batch_size) if rows is None else map(int, rows))
        if not rows or not 0 <= min(rows) <= max(rows) < self.data.batch_size:
            raise ValueError(
                f"{rows=} must be rows of a batch of {self.data.batch_size}, at least one."
            )
        batches = BatchIterator(
            self._reader,
            batch_size=self.data.batch_size,
            rows=rows,
            numbers=range(first, last),
            workers=self.data.workers,
            ahead=self.data.max_prefetch,
            report=self._report,
        )
        self._started.append(batches)
        return batches

    def sample_patches(self, count: int) -> UInt8[np.ndarray, "n p"]:
        """At least `count` patches of drawn sequences, always the same.

        Raises:
          ValueError: nothing can be decoded.
        """
        rng = np.random.default_rng((self.data.seed, 3))
        # Scattered: what stands around a piece would be decoded in vain.
        reader = SequenceReader(self._pictures, self.plan, whole_spans=False)
        per_sequence = min(count, 160)  # many files, few patches of each
        found: list[np.ndarray] = []
        with concurrent.futures.ThreadPoolExecutor(max(1, self.data.workers)) as pool:
            for _ in range(20):  # once, unless there are damaged files
                missing = -(-count // per_sequence) - len(found)
                numbers = rng.integers(self.num_sequences, size=missing).tolist()
                for row in pool.map(lambda n: reader.read(n, self.data.batch_size), numbers):
                    tokens = row.patches.shape[1] // self.num_blocks
                    good = row.patches[0][np.repeat(row.filled[0], tokens)]
                    if len(good):
                        found.append(good[rng.integers(len(good), size=per_sequence)])
                if len(found) * per_sequence >= count:
                    return np.concatenate(found)
        self._report(reader.take_bad_files())
        raise ValueError(f"Nothing in {self.data.path!r} can be decoded; the log says why.")

    def _report(self, bad: Mapping[str, str]) -> None:
        for name, reason in bad.items():
            if name not in self.bad_files:
                self.bad_files[name] = reason
                log.warning("Leaving out what cannot be decoded: %s", reason)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataPosition:
    """How far a run has got in its data, and what that depends on.

    What follows is exact (the same blocks in the same batches) as long as the folder holds the same
    files and fps, frames per block, sequence length, image_blocks, max_frames, chunk_size, seed and
    the global batch size are the same. The number of hosts and devices, workers, max_prefetch and
    cache_gigabytes and cache_path may change. `random_crop` changes what is shown of a block, not which comes when.
    If anything else changes, training goes on at the same fraction of the epoch, with a warning.

    Attributes:
      batches: how many have been given out.
      batch_size: sequences of each, over all hosts.
      num_sequences: sequences of an epoch.
      seed: what drew their order.
      files: names the files and their lengths.
      blocks: names what was made of them.
    """

    batches: int
    batch_size: int
    num_sequences: int
    seed: int
    files: str
    blocks: str

    def after(self, batches: int) -> "DataPosition":
        """The position when so many more batches have been given out."""
        return dataclasses.replace(self, batches=self.batches + batches)

    def for_data(self, data: TrainingData) -> "DataPosition":
        """Where to go on in `data`: here if it is the same data, else near to it, with a warning."""
        same = data.position(self.batches)
        if self == same:
            return self
        reasons = {
            "files": "files were added, removed or changed, or fps was",
            "seed": f"the seed was {self.seed} and is {same.seed}",
            "batch_size": f"the batch size was {self.batch_size} and is {same.batch_size}",
            "blocks": "files or options that cut them into sequences were changed",
        }
        changed = [
            why for name, why in reasons.items() if getattr(self, name) != getattr(same, name)
        ]
        epochs = self.batches * self.batch_size / self.num_sequences
        batches = int(epochs * same.num_sequences / same.batch_size)
        log.warning(
            "The data is not what it was when its position was saved: %s. Training goes on %.2f epochs into it; "
            "in this epoch some blocks may come twice and others not at all.",
            "; ".join(changed),
            epochs,
        )
        return dataclasses.replace(same, batches=batches)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "DataPosition":
        """The inverse of `to_json`.

        Raises:
          ValueError: it is something else.
        """
        kinds = {field.name: field.type for field in dataclasses.fields(cls)}
        if set(values) != set(kinds) or any(
            not isinstance(values[name], kind)
            for name, kind in kinds.items()
            if isinstance(kind, type)
        ):
            raise ValueError(
                f"{dict(values)} is no position in the data; it has {', '.join(kinds)}."
            )
        return cls(**values)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes it as JSON, atomically."""
        with atomic_open(path) as file:
            file.write((json.dumps(self.to_json(), indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "DataPosition":
        """The inverse of `save`.

        Raises:
          ValueError: the file holds something else.
          OSError: it cannot be read.
        """
        try:
            values = json.loads(pathlib.Path(path).read_bytes())
            return cls.from_json(values if isinstance(values, dict) else {})
        except ValueError as error:
            raise ValueError(f"{str(path)!r} is no saved position in the data: {error}") from error

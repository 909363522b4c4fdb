"""Files -> batches for training. The seed and the number of a batch determine its blocks.

So the position in the data is a number of batches. It is exact after any interruption, on another
number of hosts and with another number of workers; `DataPosition` lists what else may change.
`elastic.data.packing` determines the order of the blocks, `elastic.data.reader` decodes them.
"""

import concurrent.futures
import dataclasses
import json
import logging
import math
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
    """The files of the data folder as it is now.

    Args:
      data: names the folder, the endings and the frame rate.
      model: the config of the model, which the length of a sequence must fit.
      path: a file that keeps the index, so that known files are not measured again.
      without: leave out the files in this folder.

    Raises:
      ValueError: there is no such folder, no usable file in it, or the options do not fit the model.
    """
    sequence_length(data, model)  # a wrong length is reported before a long search
    return file_index.load_or_build(
        data.path, fps=data.fps, ext=data.ext, path=path, without=without
    )


class TrainingData:
    """The sequences of a folder: an endless stream with random access to its batches.

    Attributes:
      num_blocks: blocks of a sequence.
      num_sequences: sequences of an epoch.
      blocks_per_epoch: blocks of an epoch, without padding.
      frames_per_epoch: frames of an epoch, without those that fill up a block.
      bad_files: name -> reason, of files known to be unusable or damaged before their end.

    Raises:
      ValueError: the sequence is not a whole number of blocks.
    """

    def __init__(self, data: DataConfig, model: ElasticTokConfig, *, index: FileIndex):
        self.data, self.index = data, index
        self.num_blocks = sequence_length(data, model) // model.tokens_per_block
        if 0 < data.short_side < model.resolution:
            raise ValueError(
                f"short_side={data.short_side} is less than the model's frame of {model.resolution} pixels; no tile of it would fit."
            )
        is_image = np.array([file.kind == "image" for file in index.files])
        frames = np.array([file.num_frames for file in index.files])
        if data.max_frames:
            frames = np.minimum(frames, data.max_frames)
        frames = np.where(is_image, data.image_blocks * model.frames_per_block, frames)
        num_blocks = -(-frames // model.frames_per_block)
        copies = index.copies(num_blocks, data.seed)
        self.plan = PackingPlan(
            num_blocks,
            blocks_per_sequence=self.num_blocks,
            chunk_size=data.chunk_size,
            seed=data.seed,
            copies=copies,
        )
        self.num_sequences = self.plan.num_sequences
        self.blocks_per_epoch = self.plan.num_blocks
        self.frames_per_epoch = int((frames * copies).sum())
        self.bad_files = {str(index.place(name)): bad.reason for name, bad in index.bad.items()}
        self._spec = DecodeSpec(
            places=[index.place(file.name) for file in index.files],
            num_frames=np.where(is_image, 0, frames),
            fps=data.fps,
            reader=data.reader,
            exact_color=data.exact_color,
            short_side=data.short_side,
            fit=data.fit,
            resolution=model.resolution,
            frames_per_block=model.frames_per_block,
            patch_size=model.patch_size,
            token_order=model.token_order,
            image_blocks=data.image_blocks,
            random_crop=data.random_crop,
            seed=data.seed,
            cache_bytes=data.cache_gigabytes * 1e9,
            cache_path=data.cache_path,
            stamps=[file.stamp for file in index.files],
            blocks_per_sequence=self.num_blocks,
        )
        self._reader = SequenceReader(self._spec, self.plan)
        if data.cache_path:
            size = self._reader.decoded_bytes() / 1e9
            log.info("Decoded frames are kept in %s, %.1f GB in all.", data.cache_path, size)
        self._started: list[BatchIterator] = []

    @property
    def fill(self) -> float:
        """The share of an epoch's block positions that hold a block; the rest is padding."""
        return self.blocks_per_epoch / (self.num_sequences * self.num_blocks)

    @property
    def wait_seconds(self) -> float:
        """Seconds that the consumer has waited for batches so far."""
        return sum(batches.wait_seconds for batches in self._started)

    def epoch_of(self, batch: int) -> float:
        """How many epochs have been delivered before this batch."""
        return batch * self.data.batch_size / self.num_sequences

    def position(self, batches: int) -> "DataPosition":
        """The position after this number of batches."""
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
        """Batches `first` to `last` (exclusive) in order, prepared ahead. Close the iterator to end its workers.

        Args:
          first: number of the first batch.
          last: number after the last batch.
          rows: rows of the global batch that this host takes, in this order; None: all.
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

    def sample_patches(
        self, count: int, patch_size: tuple[int, int, int] | None = None
    ) -> UInt8[np.ndarray, "n p"]:
        """At least `count` patches of randomly drawn sequences, the same in every call.

        Args:
          count: how many.
          patch_size: frames, rows and columns of a patch. A block must be a whole number of such patches. None: the
            model's patches.

        Raises:
          ValueError: nothing can be decoded.
        """
        spec = self._spec
        if patch_size is not None:
            spec = dataclasses.replace(spec, patch_size=patch_size, token_order="raster")
        rng = np.random.default_rng((self.data.seed, 3))
        # The sequences are scattered: the rest of a span would be decoded in vain.
        reader = SequenceReader(spec, self.plan, whole_spans=False)
        per_block = spec.frames_per_block * spec.resolution**2 // math.prod(spec.patch_size)
        per_sequence = min(count, 160, per_block)  # so that they come from many files
        found: list[np.ndarray] = []
        with concurrent.futures.ThreadPoolExecutor(max(1, self.data.workers)) as pool:
            for _ in range(20):  # one round is enough unless files are damaged
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

    A run goes on exactly (the same blocks in the same batches) if these have not changed: the files
    of the folder (of other sources, their clips and weights), fps, frames per block, sequence length, image_blocks,
    max_frames, chunk_size, seed and the global batch size. The number of hosts and devices, workers, max_prefetch, cache_gigabytes
    cache_path and reader may change. random_crop, exact_color and fit change the pixels of a block and not the
    order of blocks.
    After any other change training goes on at the same fraction of the epoch, with a warning.

    Attributes:
      batches: batches delivered so far.
      batch_size: sequences of a batch, over all hosts.
      num_sequences: sequences of an epoch.
      seed: seed of their order.
      files: digest of the files and their lengths.
      blocks: digest of the sequences made of them.
    """

    batches: int
    batch_size: int
    num_sequences: int
    seed: int
    files: str
    blocks: str

    def after(self, batches: int) -> "DataPosition":
        """The position after `batches` more."""
        return dataclasses.replace(self, batches=self.batches + batches)

    def for_data(self, data: TrainingData) -> "DataPosition":
        """Where to go on in `data`: here if the data is the same, otherwise nearby, with a warning."""
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

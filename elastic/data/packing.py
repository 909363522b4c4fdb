"""Packing: which blocks make a training sequence, and the order of the sequences.

Files are cut into pieces, and pieces are packed into sequences once, by the seed. An epoch is a
permutation of the sequences, so it shows every block once. The endless sequence of sequences is a
pure function of the files, the seed and the global batch size: number g is number g % N of epoch
g // N. The number of hosts and processes that read it makes no difference.

Sequences that are read near each other share files, so that a decoded file serves several of them
before it leaves the cache: chunks of files are permuted, sequences are shuffled within a chunk, and
the order of an epoch is cut into streams. Successive batches advance along the streams, and each row
of a batch keeps to its own.
"""

import functools
import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from elastic.config import ElasticTokConfig
from elastic.data.config import DataConfig

# A longer file is cut into parts of this many blocks, so that the size of a chunk is bounded.
_PART_BLOCKS = 256
# Sequences of a chunk, at least. Its last ones are seldom full, which then wastes 3 % at most.
_CHUNK_SEQUENCES = 32
# Streams of a small batch, at least: as many processes can decode it.
_STREAMS = 16


def sequence_length(data: DataConfig, model_config: ElasticTokConfig) -> int:
    """Tokens of a training sequence.

    Raises:
      ValueError: they are not a whole number of blocks.
    """
    length = data.seq_length or model_config.max_sequence_length
    num_blocks, rest = divmod(length, model_config.tokens_per_block)
    if rest:
        raise ValueError(
            f"seq_length={length} is not a whole number of blocks of {model_config.tokens_per_block} "
            f"tokens; use {max(1, num_blocks) * model_config.tokens_per_block}."
        )
    return length


class Piece(NamedTuple):
    """Successive blocks of one file."""

    file: int
    first_block: int
    num_blocks: int


def num_streams(batch_size: int) -> int:
    """Number of streams: a multiple of the batch size, so that each row keeps to its own streams."""
    return batch_size * -(-_STREAMS // batch_size)


class PackingPlan:
    """The sequences of a set of files.

    Attributes:
      blocks_per_sequence: blocks of a sequence, at most.
      num_sequences: sequences of an epoch.
      num_blocks: blocks of an epoch, without padding.
    """

    def __init__(
        self,
        num_blocks: Int[np.ndarray, "files"],
        *,
        blocks_per_sequence: int,
        chunk_size: int,
        seed: int,
        copies: Int[np.ndarray, "files"] | None = None,
    ):
        """Packs files into sequences.

        Args:
          num_blocks: blocks of each file.
          blocks_per_sequence: blocks of a sequence, at most.
          chunk_size: files that are shuffled among each other.
          seed: seed of all orders.
          copies: how often each file comes in an epoch; None: once.
        """
        files = np.arange(len(num_blocks)) if copies is None else np.repeat(np.arange(len(copies)), copies)  # fmt: skip
        num_blocks = num_blocks[files]
        self.blocks_per_sequence = blocks_per_sequence
        self.num_blocks = int(num_blocks.sum())
        self._seed = seed
        parts = _cut(num_blocks, blocks_per_sequence * max(1, _PART_BLOCKS // blocks_per_sequence))
        parts[:, 0] = files[parts[:, 0]]
        rng = np.random.default_rng((seed, 0))
        parts = parts[rng.permutation(len(parts))]
        pieces, ends, chunks = [], [], []
        for number, chunk in enumerate(_chunks(parts, blocks_per_sequence, chunk_size)):
            packed = _pack(_pieces(chunk, blocks_per_sequence), blocks_per_sequence)
            pieces += [piece for sequence in packed for piece in sequence]
            ends += [len(sequence) for sequence in packed]
            chunks += [number] * len(packed)
        self._pieces = np.array(pieces, np.int64).reshape(-1, 3)
        self._ends = np.concatenate([[0], np.cumsum(ends)]).astype(np.int64)
        self._chunks = np.array(chunks, np.int64)
        self.num_sequences = len(self._chunks)

    @functools.cached_property
    def digest(self) -> str:
        """16 hex digits that identify the sequences."""
        hasher = hashlib.sha256()
        for array in (self._pieces, self._ends, self._chunks):
            hasher.update(array.tobytes())
        return hasher.hexdigest()[:16]

    def pieces(self, sequence: int) -> list[Piece]:
        """The pieces of a sequence (0 to `num_sequences` - 1), in their order."""
        start, stop = self._ends[sequence : sequence + 2]
        return [Piece(*map(int, piece)) for piece in self._pieces[start:stop]]

    def locate(self, number: int, batch_size: int) -> tuple[int, int]:
        """Epoch and sequence at position `number` of the endless order."""
        epoch, index = divmod(number, self.num_sequences)
        streams = num_streams(batch_size)
        step, stream = divmod(index, streams)
        length, longer = divmod(self.num_sequences, streams)  # the first streams have one more
        return epoch, int(_order(self, epoch)[stream * length + min(stream, longer) + step])

    def order(self, epoch: int) -> Int[np.ndarray, "sequences"]:
        """The sequences of an epoch, chunk by chunk, before they are cut into streams."""
        rng = np.random.default_rng((self._seed, 1, epoch))
        rank = rng.permutation(self._chunks[-1] + 1)
        return np.lexsort((rng.random(self.num_sequences), rank[self._chunks]))


@functools.lru_cache(maxsize=4)  # a batch may hold the end of one epoch and the start of the next
def _order(plan: PackingPlan, epoch: int) -> np.ndarray:
    return plan.order(epoch)


def _cut(num_blocks: np.ndarray, most: int) -> np.ndarray:
    """Rows of (file, first block, blocks), of at most `most` blocks."""
    count = -(-num_blocks // most)
    file = np.repeat(np.arange(len(num_blocks)), count)
    first = most * (np.arange(len(file)) - np.repeat(np.cumsum(count) - count, count))
    return np.stack([file, first, np.minimum(most, num_blocks[file] - first)], axis=1)


def _chunks(parts: np.ndarray, per_sequence: int, chunk_size: int) -> Iterator[np.ndarray]:
    """Cuts the parts into chunks with enough files, and with enough blocks for dense packing."""
    enough = _CHUNK_SEQUENCES * per_sequence
    total = np.concatenate([[0], np.cumsum(parts[:, 2])])
    start = 0
    while start < len(parts):
        stop = max(start + chunk_size, int(np.searchsorted(total, total[start] + enough)))
        # A rest that is too small for a chunk goes to the last one.
        rest_is_small = (
            len(parts) - stop < chunk_size or total[-1] - total[min(stop, len(parts))] < enough
        )
        stop = len(parts) if stop >= len(parts) or rest_is_small else stop
        yield parts[start:stop]
        start = stop


def _pieces(parts: np.ndarray, per_sequence: int) -> np.ndarray:
    pieces = _cut(parts[:, 2], per_sequence)
    part = pieces[:, 0]
    return np.stack([parts[part, 0], parts[part, 1] + pieces[:, 1], pieces[:, 2]], axis=1)


def _pack(pieces: np.ndarray, per_sequence: int) -> list[list[tuple[int, int, int]]]:
    """Best fit, the longest first: each piece goes where it leaves the least space."""
    sequences: list[list[tuple[int, int, int]]] = []
    by_space: list[list[int]] = [[] for _ in range(per_sequence + 1)]
    longest_first = pieces[np.argsort(-pieces[:, 2], kind="stable")]
    for file, first, count in longest_first.tolist():
        space = next((s for s in range(count, per_sequence) if by_space[s]), per_sequence)
        if space == per_sequence:
            sequences.append([])
            found = len(sequences) - 1
        else:
            found = by_space[space].pop()
        sequences[found].append((file, first, count))
        by_space[space - count].append(found)
    return sequences

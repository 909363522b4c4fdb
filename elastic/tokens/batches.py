"""Turns shards into batches of packed sequences, for training a generator on the tokens.

A clip becomes one sequence of ids, in which every block states its token count, so that a generator learns the counts too:

    BEGIN  count tokens...  count tokens...  END

The count makes a separator between blocks unnecessary. The ids are

    0 PAD, 1 BEGIN, 2 CONTINUE, 3 END
    4 ... 3 + tokens_per_block          a count c, as id c + 3
    4 + tokens_per_block ...            FSQ: the token's index, as an id. VAE: one id, `vector`, for every token;
                                        the vectors are an array of their own.

The tiles of a block of a clip with fit='tile' follow each other, each with its count; `tile_ids` and `tile_places` say which tile a
position belongs to, and where it lies in the frame.

A clip longer than a sequence is cut into pieces of whole blocks, or tiles of them. The second and later pieces start with CONTINUE,
and only the last one ends with END. Grain's first-fit packing puts several pieces into each sequence.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import grain.python as grain
import numpy as np
from grain.experimental import FirstFitPackIterDataset
from jaxtyping import Bool, Float, Int

from elastic.io.grain_flags import mark_grain_flags_parsed
from elastic.tokens.clip import BlockTokens, TokenizedClip
from elastic.tokens.shards import TokenShards

PAD, BEGIN, CONTINUE, END = range(4)
_NUM_SPECIAL = 4


class TokenBatch(NamedTuple):
    """Packed sequences. A generator predicts position i from the earlier positions of its segment."""

    tokens: Int[np.ndarray, "b s"]  # ids as above
    segment_ids: Int[
        np.ndarray, "b s"
    ]  # number of the piece in the sequence: 1, 2, ...; 0: padding
    position_ids: Int[np.ndarray, "b s"]  # from the start of the piece
    block_ids: Int[np.ndarray, "b s"]  # number of the block in its clip
    loss_mask: Bool[
        np.ndarray, "b s"
    ]  # True where the loss counts: all but PAD, BEGIN and CONTINUE
    vectors: (
        Float[np.ndarray, "b s d"] | None
    )  # VAE: the token's vector, zeros at other ids; FSQ: None
    tile_ids: Int[
        np.ndarray, "b s"
    ]  # number of the tile in its block; 0 where a frame has one tile
    tile_places: Int[
        np.ndarray, "b s 2"
    ]  # first row and first column of the tile in the frame, in pixels


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What each id means.

    Attributes:
      tokens_per_block: tokens of a full block.
      codebook_size: number of FSQ codes; None for the VAE.
    """

    tokens_per_block: int
    codebook_size: int | None

    @classmethod
    def of(cls, tokens: TokenShards | TokenizedClip) -> "Vocabulary":
        """The vocabulary of shards or of a clip."""
        header = tokens.header if isinstance(tokens, TokenShards) else vars(tokens)
        return cls(header["tokens_per_block"], header["codebook_size"])

    @property
    def first_code(self) -> int:
        """The id of index 0; with the VAE that of every vector."""
        return _NUM_SPECIAL + self.tokens_per_block

    @property
    def size(self) -> int:
        """How many ids there are."""
        return self.first_code + (self.codebook_size or 1)

    def piece(self, clip: TokenizedClip, first: int = 0, stop: int | None = None) -> np.ndarray:
        """The ids of blocks `first` to `stop` (not included; None: to the end), int32."""
        stop = len(clip.blocks) if stop is None else stop
        return self.ids(clip.blocks[first:stop], begins=first == 0, ends=stop == len(clip.blocks))

    def ids(self, blocks: Sequence[BlockTokens], *, begins: bool, ends: bool) -> np.ndarray:
        """The ids of some blocks of a clip: whether its first and its last one are among them."""
        parts: list[np.ndarray] = [np.array([BEGIN if begins else CONTINUE])]
        for block in blocks:
            codes = np.zeros(block.num_kept, np.int64) if block.indices is None else block.indices
            parts += [np.array([_NUM_SPECIAL + block.num_kept - 1]), self.first_code + codes]
        if ends:
            parts.append(np.array([END]))
        return np.concatenate(parts).astype(np.int32)

    def blocks(
        self, ids: Sequence[int] | np.ndarray, vectors: np.ndarray | None = None
    ) -> tuple[BlockTokens, ...]:
        """The blocks that a generated sequence of ids stands for; the inverse of `piece`.

        Args:
          ids: one piece, without padding.
          vectors: for the VAE, float [ids, d].

        Raises:
          ValueError: an id is no count where a count must stand, or fewer tokens follow than the count says.
        """
        ids = np.asarray(ids)
        at, end = int(len(ids) > 0 and ids[0] in (BEGIN, CONTINUE)), len(ids)
        end -= int(end > at and ids[-1] == END)
        found = []
        while at < end:
            count = int(ids[at]) - _NUM_SPECIAL + 1
            codes = ids[at + 1 : min(end, at + 1 + count)] - self.first_code
            if not 1 <= count <= self.tokens_per_block:
                raise ValueError(f"Id {ids[at]} at {at} is no count; a block must start with one.")
            if len(codes) < count or codes.min() < 0 or codes.max() >= self.size - self.first_code:
                raise ValueError(f"The block at {at} must have {count} tokens, as its count says.")
            part = {"indices": codes}
            if self.codebook_size is None:
                if vectors is None:
                    raise ValueError("The ids are a VAE's; give the vectors too.")
                part = {"vectors": vectors[at + 1 : at + 1 + count]}
            found.append(BlockTokens(num_kept=count, loss=np.nan, met_threshold=False, **part))
            at += 1 + count
        return tuple(found)


class Pieces:
    """The clips of shards, cut into pieces that fit a sequence: a random-access source for grain.

    Raises:
      ValueError: a full block does not fit a sequence.
    """

    def __init__(self, shards: TokenShards, sequence_length: int):
        self.vocabulary = Vocabulary.of(shards)
        longest = self.vocabulary.tokens_per_block + 3  # with BEGIN or CONTINUE, the count and END
        if sequence_length < longest:
            raise ValueError(
                f"{sequence_length=} is too short for a full block of {longest - 3} tokens with its special ids; "
                f"use {longest} or more."
            )
        self._shards = shards
        self._starts = shards.tile_starts()
        # int64 [pieces, (clip, first block, stop, blocks of the clip)]
        self._cuts = np.array(
            [
                (number, first, stop, len(counts))
                for number, counts in enumerate(shards.counts())
                for first, stop in _cut(counts, sequence_length)
            ],
            np.int64,
        )

    def __len__(self) -> int:
        return len(self._cuts)

    @property
    def digest(self) -> str:
        """16 hex digits that identify the clips' lengths and how they are cut."""
        return hashlib.sha256(self._cuts.tobytes()).hexdigest()[:16]

    def __repr__(self) -> str:
        return f"Pieces({len(self)} of {self._shards!r})"

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        which, first, stop, num_blocks = map(int, self._cuts[index])
        blocks = self._shards.blocks(which, first, stop)
        tokens = self.vocabulary.ids(blocks, begins=first == 0, ends=stop == num_blocks)
        counts = np.array([block.num_kept for block in blocks])
        # BEGIN belongs to the block after it, END to the one before it.
        numbers = np.repeat(np.arange(first, stop, dtype=np.int32), counts + 1)
        numbers = np.pad(numbers, (1, len(tokens) - len(numbers) - 1), mode="edge")
        rows, columns = self._starts[which]
        places = np.array([(row, column) for row in rows for column in columns], np.int32)
        block_ids, tile_ids = np.divmod(numbers, np.int32(len(places)))
        piece = {"tokens": tokens, "block_ids": block_ids, "tile_ids": tile_ids}
        piece["tile_places"] = places[tile_ids]
        if self.vocabulary.codebook_size is None:
            width = self._shards.header["vector_width"]
            piece["vectors"] = np.zeros((len(tokens), width), np.float32)
            is_vector = tokens == self.vocabulary.first_code
            piece["vectors"][is_vector] = np.concatenate([block.values for block in blocks])
        return piece


def token_batches(
    shards: TokenShards,
    *,
    sequence_length: int,
    batch_size: int,
    seed: int = 0,
    num_epochs: int | None = None,
    packing_bins: int = 64,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
) -> grain.IterDataset[TokenBatch]:
    """Batches of packed sequences, shuffled in a new order in each epoch.

    The iterator's `get_state` and `set_state` save and restore its place. A place is refused where it is not one in these batches:
    it was saved with other clips or other arguments; only `num_epochs` may differ.

    Args:
      shards: the clips.
      sequence_length: ids of a sequence.
      batch_size: sequences of a batch of this process.
      seed: of the order; the same in all processes.
      num_epochs: None repeats without end and gives full batches only; otherwise the last batch may be smaller.
      packing_bins: sequences filled at the same time; more of them waste less padding and take more memory.
      process_index: number of this process; it takes every `process_count`-th piece from there.
      process_count: how many processes share the pieces.
      workers: processes that read and pack ahead, each a part of the pieces; 0: threads of this process. With
        workers, close the iterator at the end.

    Raises:
      ValueError: a block does not fit a sequence, or there are fewer pieces than processes.
    """
    pieces = Pieces(shards, sequence_length)
    if not 0 <= process_index < process_count <= len(pieces):
        raise ValueError(
            f"process_index={process_index} must lie in 0 to process_count={process_count} - 1, and the processes "
            f"have {len(pieces)} pieces to share."
        )
    order = grain.MapDataset.source(pieces).shuffle(seed)[process_index::process_count]
    names = ["tokens", "block_ids", "tile_ids", "tile_places"]
    if pieces.vocabulary.codebook_size is None:
        names.append("vectors")
    packed = FirstFitPackIterDataset(
        order.repeat(num_epochs).to_iter_dataset(),
        length_struct=dict.fromkeys(names, sequence_length),
        num_packing_bins=max(packing_bins, batch_size),
        seed=seed,
    )
    batches = packed.map(_finish).batch(batch_size, drop_remainder=num_epochs is None)
    if workers:
        mark_grain_flags_parsed()
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    made_with = {
        "sequence_length": sequence_length,
        "batch_size": batch_size,
        "seed": seed,
        "packing_bins": packing_bins,
        "process_index": process_index,
        "process_count": process_count,
        "workers": workers,
        "pieces": len(pieces),
        "clips": pieces.digest,
    }
    return _PlacedBatches(batches, made_with)


class _PlacedBatches(grain.IterDataset[TokenBatch]):
    """Batches whose iterator notes in its place what they were made with.

    Args:
      parent: the batches.
      made_with: {argument: value}, and what identifies the clips.
    """

    def __init__(self, parent: grain.IterDataset[TokenBatch], made_with: Mapping[str, Any]):
        super().__init__(parent)
        self._made_with = made_with

    def __iter__(self) -> "_PlacedIterator":
        return _PlacedIterator(iter(self._parent), self._made_with)


class _PlacedIterator(grain.DatasetIterator[TokenBatch]):
    def __init__(self, parent: grain.DatasetIterator[TokenBatch], made_with: Mapping[str, Any]):
        super().__init__(parent)
        self._made_with = made_with

    def __next__(self) -> TokenBatch:
        return next(self._parent)

    def get_state(self) -> dict[str, Any]:
        return {"made_with": dict(self._made_with), "place": self._parent.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from a place that `get_state` gave.

        Raises:
          ValueError: it is a place in other batches.
        """
        if "made_with" not in state:  # saved by an earlier version, which noted nothing
            self._parent.set_state(state)
            return
        then = state["made_with"]
        differing = [
            f"{name}={value} (then {then.get(name)})"
            for name, value in self._made_with.items()
            if then.get(name) != value
        ]
        if differing:
            raise ValueError(
                f"This place is not one in these batches: {', '.join(differing)}. Make the batches as then, or begin at the first one."
            )
        self._parent.set_state(state["place"])


def _finish(packed: dict[str, np.ndarray]) -> TokenBatch:
    """Renames grain's arrays and adds the loss mask."""
    tokens = packed["tokens"]
    return TokenBatch(
        tokens=tokens,
        segment_ids=packed["tokens_segment_ids"],
        position_ids=packed["tokens_positions"],
        block_ids=packed["block_ids"],
        loss_mask=tokens >= END,
        vectors=packed.get("vectors"),
        tile_ids=packed["tile_ids"],
        tile_places=packed["tile_places"],
    )


def _cut(counts: np.ndarray, sequence_length: int) -> list[tuple[int, int]]:
    """Ranges of blocks, each as long as fits into a sequence with BEGIN or CONTINUE, the counts and END."""
    cuts, first, used = [], 0, 2
    for number, count in enumerate(counts.tolist()):
        if used + 1 + count > sequence_length:
            cuts.append((first, number))
            first, used = number, 2
        used += 1 + count
    return [*cuts, (first, len(counts))]

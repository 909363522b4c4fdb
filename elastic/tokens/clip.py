"""The tokens of a clip, and the file that holds them.

NumPy alone reads the file:

    with np.load("tokens.npz", allow_pickle=False) as file:
        header = json.loads(file["header"].tobytes())
        blocks = np.split(file["indices"], np.cumsum(file["counts"])[:-1])  # VAE: "vectors"

`header` is JSON as uint8, with the fields of `TokenizedClip`; `counts` int32, `losses` float64 and
`met` bool have one entry for each block; `indices` uint16 (uint32 above 65,536 codes) or `vectors`
float32 [tokens, d] hold the blocks one after the other. `npz_file.py` adds and checks the checksum.
"""

import dataclasses
import math
import operator
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, SupportsIndex, cast, overload

import numpy as np

from elastic.io import atomic
from elastic.patches import TokenOrder, token_places
from elastic.tiles import Fit, FrameLayout
from elastic.tokens import npz_file
from elastic.tokens.npz_file import (
    CHOICES,
    TokenFileError,
    check_choice,
    pack_header,
    require,
    unpack_header,
)


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockTokens:
    """The kept tokens of one block: exactly one of `indices` and `vectors` is given.

    Attributes:
      num_kept: tokens kept.
      loss: reconstruction error with these tokens; NaN when unknown.
      met_threshold: whether `loss` was measured to meet the threshold.
      indices: int32 [num_kept], the FSQ codes' numbers. Read-only.
      vectors: float32 [num_kept, d], the VAE's vectors. Read-only.

    Raises:
      ValueError: the fields contradict each other, an index is not an integer or below 0, or a
        vector is not finite.
    """

    num_kept: int
    loss: float
    met_threshold: bool
    indices: np.ndarray | None = None
    vectors: np.ndarray | None = None

    def __post_init__(self):
        require(self.num_kept >= 1, f"num_kept={self.num_kept} must be at least 1.")
        require(not self.loss < 0, f"loss={self.loss} must not be below 0.")
        require(
            not (self.met_threshold and not math.isfinite(self.loss)),
            f"loss={self.loss} cannot have met a threshold.",
        )
        require(
            (self.indices is None) != (self.vectors is None),
            "A block has either indices (FSQ) or vectors (VAE).",
        )
        if self.indices is not None:
            indices = np.asarray(self.indices)
            require(
                indices.dtype.kind in "iu",
                f"indices of type {indices.dtype} must be integers; round them first.",
            )
            require(
                indices.shape == (self.num_kept,),
                f"indices of shape {indices.shape} must have shape ({self.num_kept},).",
            )
            limit = np.iinfo(np.int32).max
            require(
                indices.min() >= 0 and int(indices.max()) <= limit,
                f"indices from {indices.min()} to {indices.max()} must lie in 0 to {limit}.",
            )
            object.__setattr__(self, "indices", _read_only(indices, np.int32))
        else:
            vectors = np.asarray(self.vectors)
            require(
                vectors.ndim == 2 and len(vectors) == self.num_kept and vectors.shape[1] > 0,
                f"vectors of shape {vectors.shape} must have shape ({self.num_kept}, d).",
            )
            vectors = _read_only(vectors, np.float32)
            require(bool(np.isfinite(vectors).all()), "vectors must be finite.")
            object.__setattr__(self, "vectors", vectors)

    @property
    def values(self) -> np.ndarray:
        """The tokens themselves: the indices (FSQ) or the vectors (VAE)."""
        return cast(np.ndarray, self.vectors if self.indices is None else self.indices)

    def truncate(self, num_tokens: int) -> "BlockTokens":
        """The first `num_tokens` tokens; the loss measured with more tokens is dropped."""
        require(num_tokens >= 1, f"num_tokens={num_tokens} must be at least 1.")
        if num_tokens >= self.num_kept:
            return self
        return BlockTokens(
            num_kept=num_tokens,
            loss=math.nan,
            met_threshold=False,
            indices=None if self.indices is None else self.indices[:num_tokens],
            vectors=None if self.vectors is None else self.vectors[:num_tokens],
        )

    def __repr__(self) -> str:
        if math.isnan(self.loss):  # tokens of a generator: nothing was measured
            return f"BlockTokens({self.num_kept} tokens)"
        met = "met" if self.met_threshold else "not met"
        return f"BlockTokens({self.num_kept} tokens, loss {self.loss:.6g}, {met})"


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class TokenizedClip:
    """A clip as tokens; together with the model that made them, this is all that decoding needs.

    Attributes:
      blocks: the tokens, block by block. With fit='tile' there is an entry for each tile of a block: a block's tiles stand one after
        the other, in the order of `layout.places`.
      bottleneck_type: 'fsq' or 'vae'.
      codebook_size: number of FSQ codes; None for VAE.
      tokens_per_block: tokens of a full block, of one tile.
      frames_per_block: frames of a full block.
      num_frames: frames of the clip; the last block may be padded beyond them.
      is_image: one picture, which fills one block.
      resolution: rows and columns of a tile, the frames that the model sees, in pixels.
      source: (width, height) of the original as displayed, in square pixels.
      rate: frames per second; 0 for an image.
      model_id: name of the model that made the tokens.
      config_hash: hex digest of that model's configuration.
      threshold: largest error that the search accepted; None when it had none.
      search: name of the search.
      window_blocks: blocks held in one context.
      context: 'carry' if the cache is carried from window to window, 'restart' if each window starts empty.
      weights: fingerprint of that model's weights (`elastic.checkpoints.fingerprint`); () if it is not known.
      pixel_aspect: width and height of the original's pixels as stored, such as (32, 27); (1, 1) if they are square.
      transfer: 'pq' or 'hlg' if the original has high dynamic range, which was tone-mapped to SDR; else 'sdr'.
      fit: what became of frames that are not square: 'crop', 'pad', 'stretch' or 'tile', as in `elastic.tiles.FrameLayout`.
      frame: (width, height) of the decoded frames; with 'crop' the square of `resolution`, whatever is given.
      tile_rows, tile_columns: the first row of each row of tiles in the frame, and the first column of each column of tiles;
        negative where a border is around the frame.
      token_order: the order of a slice's tokens: 'raster', or 'coarse_to_fine'; `raster_places` undoes it. Or 'adaptive', which
        only the model knows.
      patch_size: frames, rows and columns of a token's patch; () if it is not known, which the raster order does not need.

    Raises:
      ValueError: a field is out of range or contradicts the blocks.
    """

    blocks: tuple[BlockTokens, ...]
    bottleneck_type: Literal["fsq", "vae"]
    codebook_size: int | None
    tokens_per_block: int
    frames_per_block: int
    num_frames: int
    is_image: bool
    resolution: int
    source: tuple[int, int]
    rate: float
    model_id: str
    config_hash: str
    threshold: float | None
    search: str
    window_blocks: int
    context: Literal["carry", "restart"]
    weights: tuple[float, ...] = ()
    pixel_aspect: tuple[int, int] = (1, 1)
    transfer: Literal["sdr", "pq", "hlg"] = "sdr"
    fit: Fit = "crop"
    frame: tuple[int, int] | tuple[()] = ()
    tile_rows: tuple[int, ...] = (0,)
    tile_columns: tuple[int, ...] = (0,)
    token_order: TokenOrder = "raster"
    patch_size: tuple[int, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "blocks", tuple(self.blocks))
        object.__setattr__(self, "rate", float(self.rate))
        if self.threshold is not None:
            object.__setattr__(self, "threshold", float(self.threshold))
        for name in ("tokens_per_block", "frames_per_block", "resolution", "window_blocks"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1.")
        for name in CHOICES:
            check_choice(name, getattr(self, name))
        require(
            len(self.source) == 2 and min(self.source) >= 1,
            f"source={self.source} must be (width, height) in pixels.",
        )
        require(
            len(self.pixel_aspect) == 2 and min(self.pixel_aspect) >= 1,
            f"pixel_aspect={self.pixel_aspect} must be the width and height of a pixel, such as (32, 27).",
        )
        require(
            math.isfinite(self.rate) and (self.rate > 0 or (self.is_image and self.rate == 0)),
            f"rate={self.rate} must be a number of frames per second above 0.",
        )
        require(
            self.threshold is None or (math.isfinite(self.threshold) and self.threshold >= 0),
            f"threshold={self.threshold} must be a finite number, 0 or above.",
        )
        require(
            re.fullmatch("[0-9a-f]+", self.config_hash) is not None,
            f"config_hash={self.config_hash!r} must be lower-case hexadecimal digits.",
        )
        self._check_layout()
        self._check_frames()
        self._check_blocks()

    def _check_layout(self) -> None:
        if self.fit == "crop":
            square = {"frame": (self.resolution,) * 2, "tile_rows": (0,), "tile_columns": (0,)}
            for name, value in square.items():
                object.__setattr__(self, name, value)
        for name in ("frame", "tile_rows", "tile_columns", "patch_size"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        require(
            self.num_tiles >= 1, "There is no tile."
        )  # the layout refuses tiles that do not cover the frame
        require(
            self.token_order == "raster" or self._slice_shape is not None,
            f"patch_size={self.patch_size} must divide a block into tokens_per_block={self.tokens_per_block} tokens.",
        )

    @property
    def layout(self) -> FrameLayout:
        """How the frames lie in the tiles that the model sees."""
        return layout_in(vars(self))

    @property
    def num_tiles(self) -> int:
        """Tiles of a frame; each has an entry of `blocks` in every block."""
        return self.layout.num_tiles

    @property
    def num_blocks(self) -> int:
        """Blocks of the clip: entries of `blocks` over tiles of a frame."""
        return len(self.blocks) // self.num_tiles

    @property
    def _slice_shape(self) -> tuple[int, int] | None:
        """Rows and columns of patches; None if the patches are not known, or do not make up a block."""
        if len(self.patch_size) != 3 or min(self.patch_size) < 1:
            return None
        deep, high, wide = self.patch_size
        sizes = (self.frames_per_block, self.resolution, self.resolution)
        if any(size % part for size, part in zip(sizes, self.patch_size, strict=True)):
            return None
        slices, rows, columns = sizes[0] // deep, sizes[1] // high, sizes[2] // wide
        return (rows, columns) if slices * rows * columns == self.tokens_per_block else None

    def _check_frames(self) -> None:
        expected = -(-self.num_frames // self.frames_per_block) * self.num_tiles
        tiles = "" if self.num_tiles == 1 else f" ({self.num_tiles} tiles each)"
        require(
            self.num_frames >= 1 and expected == len(self.blocks),
            f"num_frames={self.num_frames} must fill {len(self.blocks)} blocks{tiles} of "
            f"{self.frames_per_block} frames, the last at least in part.",
        )
        require(
            not self.is_image or self.num_frames == 1,
            f"num_frames={self.num_frames} must be 1 for an image.",
        )

    def _check_blocks(self) -> None:
        fsq = self.bottleneck_type == "fsq"
        require(
            (self.codebook_size is not None and self.codebook_size >= 1)
            if fsq
            else self.codebook_size is None,
            f"codebook_size={self.codebook_size} must be above 0 for FSQ and None for VAE.",
        )
        widths = set()
        for number, block in enumerate(self.blocks):
            require(
                block.num_kept <= self.tokens_per_block,
                f"Block {number} keeps {block.num_kept} of tokens_per_block="
                f"{self.tokens_per_block} tokens.",
            )
            require(
                not block.met_threshold or self.threshold is None or block.loss <= self.threshold,
                f"Block {number} cannot have met threshold={self.threshold} "
                f"with loss={block.loss}.",
            )
            require(
                (block.indices is not None) == fsq,
                f"Block {number} must hold {'indices' if fsq else 'vectors'}: "
                f"bottleneck_type={self.bottleneck_type!r}.",
            )
            if block.indices is not None and self.codebook_size is not None:
                require(
                    int(block.indices.max()) < self.codebook_size,
                    f"Block {number} has index {block.indices.max()}, "
                    f"outside codebook_size={self.codebook_size}.",
                )
            if block.vectors is not None:
                widths.add(block.vectors.shape[1])
        require(len(widths) <= 1, f"vectors of {sorted(widths)} dimensions must have one width.")

    @property
    def counts(self) -> np.ndarray:
        """Tokens kept in each block, int32 [blocks]; with tiles in each tile of each block."""
        return np.array([block.num_kept for block in self.blocks], np.int32)

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole clip."""
        return sum(block.num_kept for block in self.blocks)

    @property
    def mean_tokens(self) -> float:
        """Tokens per block; with tiles per tile of a block."""
        return self.num_tokens / len(self.blocks)

    @property
    def bits_per_token(self) -> int:
        """ceil(log2(codebook size)) for FSQ; 32 for each dimension of a VAE vector."""
        if self.codebook_size is not None:
            return max(1, (self.codebook_size - 1).bit_length())
        vectors = self.blocks[0].vectors
        return 32 * (vectors.shape[1] if vectors is not None else 0)

    @property
    def num_bits(self) -> int:
        """Bits of all tokens, without the file's header and counts."""
        return self.num_tokens * self.bits_per_token

    @property
    def bits_per_pixel(self) -> float:
        """`num_bits` over the pixels of the decoded clip."""
        return self.num_bits / (self.num_frames * math.prod(self.frame))

    @property
    def compression_ratio(self) -> float:
        """Bits of the decoded clip as uint8 RGB, over `num_bits`."""
        return 24 / self.bits_per_pixel

    @property
    def ids(self) -> np.ndarray:
        """The FSQ codes' numbers, block after block, int32 [tokens]; `counts` says where a block ends.

        Raises:
          ValueError: the tokens are vectors.
        """
        require(
            self.bottleneck_type == "fsq",
            "These tokens are vectors (VAE) and have no ids; use tokens.vectors.",
        )
        return self._values

    @property
    def vectors(self) -> np.ndarray:
        """The VAE's vectors, block after block, float32 [tokens, d]; `counts` says where a block ends.

        Raises:
          ValueError: the tokens are ids.
        """
        require(
            self.bottleneck_type == "vae",
            "These tokens are ids (FSQ), not vectors; use tokens.ids.",
        )
        return self._values

    @property
    def _values(self) -> np.ndarray:
        """The tokens of all blocks, one after the other."""
        return np.concatenate([block.values for block in self.blocks])

    def padded(
        self, fill: float = -1, *, blocks: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """All blocks at full length, and which of their tokens are real.

        Args:
          fill: stands where a block has no token.
          blocks: entries of the arrays, for clips of several lengths in one batch; those after the clip's last one have no
            token. None: as many as the clip has.

        Returns:
          The ids, int32 [blocks, tokens_per_block], or vectors, float32 [blocks, tokens_per_block, d]; and a mask, bool
          [blocks, tokens_per_block].

        Raises:
          ValueError: the clip has more blocks.
        """
        tokens = self._values
        missing = 0 if blocks is None else blocks - len(self)
        if missing < 0:
            raise ValueError(
                f"blocks={blocks} is less than the {len(self)} of this clip; shorten it first: tokens[:{blocks}].padded(...)."
            )
        counts = np.pad(self.counts, (0, missing))
        mask = np.arange(self.tokens_per_block) < counts[:, None]
        values = np.full((*mask.shape, *tokens.shape[1:]), fill, tokens.dtype)
        values[mask] = tokens
        return values, mask

    def to_numpy(self) -> dict[str, np.ndarray]:
        """`ids` or `vectors`, and `counts`, `losses` and `met` of each block."""
        name = "ids" if self.bottleneck_type == "fsq" else "vectors"
        return {
            name: getattr(self, name),
            "counts": self.counts,
            "losses": np.array([block.loss for block in self.blocks]),
            "met": np.array([block.met_threshold for block in self.blocks]),
        }

    def __len__(self) -> int:
        """The number of blocks; with tiles that of all tiles of all blocks."""
        return len(self.blocks)

    def __iter__(self) -> Iterator[BlockTokens]:
        return iter(self.blocks)

    @overload
    def __getitem__(self, index: int) -> BlockTokens: ...
    @overload
    def __getitem__(self, index: slice) -> "TokenizedClip": ...
    def __getitem__(self, index: int | slice) -> "BlockTokens | TokenizedClip":
        """A block by its number, or the clip of the first blocks: `tokens[:3]`.

        Raises:
          IndexError: there is no such block.
          ValueError: the blocks do not begin with the first one, without which the others cannot be decoded, or are none.
        """
        if not isinstance(index, slice):
            number = operator.index(index)
            if not -len(self) <= number < len(self):
                raise IndexError(f"There is no block {number}; there are {len(self)}.")
            return self.blocks[number]
        start, stop, step = index.indices(len(self))
        require(
            start == 0 and step == 1 and stop > 0,
            f"Blocks {start}:{stop}:{step} are no clip: a block needs those before it; take the first ones, as in tokens[:3].",
        )
        blocks, rest = divmod(stop, self.num_tiles)
        require(
            rest == 0,
            f"{stop} tiles are no whole blocks of {self.num_tiles} tiles; take tokens[:{max(1, blocks) * self.num_tiles}].",
        )
        frames = min(self.num_frames, blocks * self.frames_per_block)
        return dataclasses.replace(self, blocks=self.blocks[:stop], num_frames=frames)

    def truncate(self, num_tokens: SupportsIndex | Sequence[int] | np.ndarray) -> "TokenizedClip":
        """The same clip with at most `num_tokens` tokens a block: one number for all blocks, or one for each.

        With tiles the numbers are those of a tile: one for each tile of each block, as [blocks x tiles] or [blocks, tiles].
        Blocks that lose tokens have a loss of NaN and no longer meet the threshold.

        Raises:
          ValueError: a number is below 1, or there are more or fewer numbers than blocks.
        """
        given = np.asarray(num_tokens)
        tiled = given.shape == (self.num_blocks, self.num_tiles)
        counts = given.reshape(-1) if tiled else np.atleast_1d(given)
        require(
            counts.dtype.kind in "iu" and counts.ndim == 1,
            f"num_tokens={num_tokens!r} must be a whole number, or one for each block.",
        )
        require(
            given.ndim == 0 or len(counts) == len(self),
            f"num_tokens has {len(counts)} numbers for {len(self)} blocks; give one, or one for each.",
        )
        every = np.broadcast_to(counts, len(self)).tolist()
        blocks = tuple(
            block.truncate(count) for block, count in zip(self.blocks, every, strict=True)
        )
        return dataclasses.replace(self, blocks=blocks)

    def to_bytes(self) -> bytes:
        """The bytes of the token file; equal clips give equal bytes."""
        arrays = {
            "header": pack_header(vars(self)),
            "counts": self.counts.astype("<i4"),
            "losses": np.array([block.loss for block in self.blocks], "<f8"),
            "met": np.array([block.met_threshold for block in self.blocks], bool),
        }
        name, dtype = _payload(self.bottleneck_type, self.codebook_size)
        values = [getattr(block, name) for block in self.blocks]
        arrays[name] = np.concatenate(values).astype(dtype)
        return npz_file.pack(arrays)

    @classmethod
    def from_bytes(cls, data: bytes, *, name: str = "tokens") -> "TokenizedClip":
        """The clip in the bytes of a token file; errors call the file `name`.

        Raises:
          TokenFileError: the content is damaged, foreign, inconsistent or of a newer version.
        """
        arrays = npz_file.unpack(data, name=name)
        try:
            return cls(**_fields(arrays, name))
        except TokenFileError:
            raise
        except (ValueError, RecursionError) as error:  # RecursionError: deeply nested JSON
            raise TokenFileError(
                f"{name} is inconsistent: {str(error).rstrip('.')}. Tokenize the clip again."
            ) from error

    def save(self, path: str | os.PathLike) -> None:
        """Writes the token file atomically: `path` is replaced as a whole or not touched."""
        atomic.atomic_write(path, self.to_bytes())

    @classmethod
    def load(cls, path: str | os.PathLike) -> "TokenizedClip":
        """Reads a token file.

        Raises:
          TokenFileError: the file is damaged, foreign, inconsistent or of a newer version.
          OSError: the file cannot be read.
        """
        return cls.from_bytes(npz_file.read(path), name=str(path))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TokenizedClip):
            return NotImplemented
        return self.to_bytes() == other.to_bytes()

    def __repr__(self) -> str:
        kind = "image" if self.is_image else f"{self.num_frames} frames at {self.rate:g}/s"
        met = sum(block.met_threshold for block in self.blocks)
        tiles = "" if self.num_tiles == 1 else f" of {self.num_tiles} tiles"
        return (
            f"TokenizedClip({self.bottleneck_type}, {kind}, {'x'.join(map(str, self.frame))}, "
            f"{self.num_tokens} tokens in {self.num_blocks} blocks{tiles} of up to "
            f"{self.tokens_per_block}, {met} met)"
        )


def tokens_of_tiles(layout: FrameLayout, tiles: Iterable[BlockTokens]) -> BlockTokens:
    """The tokens of all tiles of a block as one record: one after the other, with the mean of the losses, weighted by the tiles' shares."""
    parts = list(tiles)
    shares = [layout.share(number) for number in range(len(parts))]
    losses = (share * part.loss for share, part in zip(shares, parts, strict=True))
    name = "vectors" if parts[0].indices is None else "indices"
    values: dict[str, Any] = {name: np.concatenate([part.values for part in parts])}
    return BlockTokens(
        num_kept=sum(part.num_kept for part in parts),
        loss=math.fsum(losses) / math.fsum(shares),
        met_threshold=all(part.met_threshold for part in parts),
        **values,
    )


def layout_in(header: Mapping[str, Any]) -> FrameLayout:
    """How the frames lie in tiles, from the header of a token file or of `tokens.part`. Older ones have no such fields.

    Raises:
      ValueError: the fields contradict each other.
    """
    tile, fit = header["resolution"], header.get("fit", "crop")
    if fit == "crop":
        return FrameLayout(fit, tile, (tile, tile))
    fields = (header.get(name, ()) for name in ("frame", "tile_rows", "tile_columns"))
    frame, tops, lefts = (tuple(field) for field in fields)
    return FrameLayout(fit, tile, frame, tops, lefts)


def raster_places(clip: TokenizedClip) -> np.ndarray:
    """The place of every token of a full block in raster order (frame by frame, row by row), int32 [tokens_per_block].

    With `places = raster_places(clip)`, token i of a block shows patch `places[i]`. Token i of a shortened block has the same place.

    Raises:
      ValueError: the order is 'adaptive'. Each block has its own, which follows from its codes.
    """
    if clip.token_order == "adaptive":
        raise ValueError(
            "token_order='adaptive': each block has an order of its own, which follows from its codes; decode the tokens with "
            "their model."
        )
    shape = clip._slice_shape
    places = None if shape is None else token_places(*shape, clip.token_order)
    if places is None:
        return np.arange(clip.tokens_per_block, dtype=np.int32)
    slices = np.arange(clip.tokens_per_block // len(places), dtype=np.int32)
    return (slices[:, None] * len(places) + places).reshape(-1)


def _payload(bottleneck_type: str, codebook_size: int | None) -> tuple[str, np.dtype]:
    """Name and type on disk of the array that holds the tokens."""
    if bottleneck_type == "vae" or codebook_size is None:
        return "vectors", np.dtype("<f4")
    return "indices", np.dtype("<u2" if codebook_size <= 65_536 else "<u4")


def _fields(arrays: dict[str, np.ndarray], file_name: str) -> dict[str, Any]:
    """The fields of a `TokenizedClip` from the arrays of its file."""
    fields = unpack_header(arrays.get("header"), file_name)
    name, dtype = _payload(fields["bottleneck_type"], fields["codebook_size"])
    expected = {"counts": "<i4", "losses": "<f8", "met": "|b1", name: dtype, "header": "|u1"}
    require(
        {key: array.dtype for key, array in arrays.items()}
        == {key: np.dtype(value) for key, value in expected.items()},
        f"the arrays must be {', '.join(expected)} in their types.",
    )
    counts, values = arrays["counts"], arrays[name]
    for key in ("counts", "losses", "met"):
        require(
            arrays[key].shape == (counts.size,) and counts.size > 0,
            f"{key} must have one entry for each block.",
        )
    require(
        values.ndim == (2 if name == "vectors" else 1)
        and counts.min() > 0
        and counts.sum(dtype=np.int64) == len(values),
        f"counts add up to {counts.sum(dtype=np.int64)}, but {name} has shape {values.shape}.",
    )
    parts = np.split(values, np.cumsum(counts, dtype=np.int64)[:-1])
    fields["blocks"] = tuple(
        BlockTokens(num_kept=int(count), loss=float(loss), met_threshold=bool(met), **{name: part})
        for count, loss, met, part in zip(
            counts, arrays["losses"], arrays["met"], parts, strict=True
        )
    )
    return fields


def _read_only(array: np.ndarray, dtype: type) -> np.ndarray:
    copy = np.array(array, dtype)
    copy.setflags(write=False)
    return copy

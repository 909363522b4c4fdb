"""Shards: the tokens of many clips in one Parquet file, one row per clip.

Why Parquet: the usual data libraries read it directly (Hugging Face datasets, Polars, DuckDB, Spark, pandas,
Ray), it has a type for lists of different lengths, and a clip can be read without reading the others.
WebDataset must be read from front to back, and only grain reads ArrayRecord.

Columns: `id` (unique), `num_frames`, `is_image`, `rate`, `width`, `height`, `pixel_aspect` and `transfer` of the source (shards written
before November 2026 lack the last two), `bits` (of all tokens); lists with one entry per block: `counts`, `offsets` (where the block
starts in `tokens`), `losses`, `met`; and `tokens`: uint16 (uint32 above 65,536 codes), or for the VAE float32, `vector_width` numbers
per token.
Where frames are not cropped, the header has `fit`, and a row has `frame_width` and `frame_height` of the decoded frames and the lists
`tile_rows` and `tile_columns`, with the first row of each row of tiles and the first column of each column of tiles in them. Lists
with one entry per block then have one for each tile of a block: a block's tiles one after the other, row after row.
Where the data set says something of its clips, rows have `caption` and `metadata`, a JSON object with everything else; null where nothing
is said. The header then has `"metadata": true`.
Fields that all rows share are JSON in the file's metadata, under the key `elastictok`. Any Parquet reader works:

    table = pyarrow.parquet.read_table("shard-00000.parquet")
    header = json.loads(table.schema.metadata[b"elastictok"])

A clip of more than 2^27 numbers is split at the ends of blocks into several rows, which follow each other and have the same
`id`. Each of these rows describes its own blocks and frames. So no reader meets a row that is too large for it, and writing takes
little memory. (The offsets of an Arrow list column are 32-bit numbers.) The file's metadata lists these rows under the key
`elastictok.parts`.

`TokenShards` gives each row back as the `TokenizedClip` that was written.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import operator
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from cachetools import LRUCache

from elastic.io.atomic import atomic_open
from elastic.io.names import model_name
from elastic.tokens.clip import BlockTokens, TokenizedClip
from elastic.tokens.npz_file import TokenFileError
from elastic.tokens.same_weights import are_apart

FORMAT, VERSION = "elastictok-shard", 1
KEY, DIGEST_KEY = b"elastictok", b"elastictok.sha256"
PARTS_KEY, PARTS_DIGEST_KEY = b"elastictok.parts", b"elastictok.parts.sha256"
# Fields of a clip that all rows of a shard share.
_SHARED = (
    "model_id config_hash bottleneck_type codebook_size tokens_per_block frames_per_block resolution search threshold "
    "window_blocks context"
).split()
# Fields of the header that are equal in all shards that are read together.
_SAME_MODEL = (
    "config_hash model_id bottleneck_type codebook_size tokens_per_block vector_width".split()
)
# Fields that all rows share, and that the header has where they differ from what most clips have.
_UNUSUAL: dict[str, Any] = {"fit": "crop", "token_order": "raster", "patch_size": []}
# Columns of shards whose frames are whole: a field of the clip for each, of two numbers for the first one.
_LAYOUT_COLUMNS = ("frame_width", "frame_height", "tile_rows", "tile_columns")
# Columns that older shards lack: what their clips had was not written down.
_NEWER_COLUMNS: dict[str, pa.DataType] = {
    "pixel_aspect": pa.list_(pa.int32()),
    "transfer": pa.string(),
}
# Columns of data sets that say something of their clips.
_METADATA_COLUMNS = ("caption", "metadata")
_CAPTIONS = ("caption", "text", "txt")  # what a caption may be called; the first one wins
_ROW_NUMBERS = (
    1 << 27
)  # the most in the tokens of a row, 512 MiB of float32; one block may have more
_GROUP_BYTES = 256 * 1024  # of tokens in a row group; one clip is read by reading its row group
_HELD_GROUPS = (
    4  # row groups kept decoded, as neighbouring clips are often read one after the other
)
_ERRORS = (pa.ArrowException, OSError, ValueError, TypeError, KeyError, OverflowError)


def write_shard(
    path: str | os.PathLike,
    rows: Iterable[tuple[str, TokenizedClip]],
    *,
    metadata: Callable[[str], Mapping[str, Any]] | None = None,
) -> int:
    """Writes a shard of (id, clip) atomically: `path` is replaced as a whole or not touched.

    Memory holds one row group at a time. Equal clips give equal bytes.

    Args:
      path: the file.
      rows: ids and clips.
      metadata: gives what is said of the clip with an id, as JSON has it; None: the shard has no columns for it.

    Returns:
      The number of clips.

    Raises:
      ValueError: there is no row, an id occurs twice, or the clips are of several models or searches.
      OSError: the file cannot be written; nothing is left behind.
    """
    rows = iter(rows)
    first = next(rows, None)
    if first is None:
        raise ValueError(f"{path}: a shard needs at least one clip.")
    header = _header_of(first[1])
    told = header if metadata is None else header | {"metadata": True}
    schema = _schema_with_header(told)
    seen: set[str] = set()
    group: list[tuple[str, TokenizedClip]] = []
    waiting, num_rows = 0, 0
    parts: list[tuple[int, int]] = []  # (row, its first block) of the clips of several rows
    with atomic_open(path, make_folders=False) as file:
        # Split streams keep the low and high bytes of tokens apart: a fifth smaller than plain, and as fast.
        writer = pq.ParquetWriter(
            file,
            schema,
            compression="zstd",
            use_dictionary=False,
            column_encoding={"tokens.list.element": "BYTE_STREAM_SPLIT"},
            write_page_checksum=True,
        )

        def write_group() -> None:
            nonlocal waiting
            if group:
                writer.write_table(_table(group, schema, metadata))
            group.clear()
            waiting = 0

        with writer:
            for name, clip in itertools.chain([first], rows):
                if name in seen:
                    raise ValueError(f"{path}: id {name!r} occurs twice; ids must be unique.")
                own = _header_of(clip)
                _check_same(header, own, tuple({**header, **own}), f"{path}: clip {name!r}")
                seen.add(name)
                cuts = _cut(clip)
                for start, stop in cuts:
                    if len(cuts) > 1:
                        write_group()  # a part has a row group of its own
                        parts.append((num_rows, start))
                    row = _part(clip, start, stop) if len(cuts) > 1 else clip
                    group.append((name, row))
                    num_rows += 1
                    waiting += sum(block.values.nbytes for block in row.blocks)
                    if waiting >= _GROUP_BYTES:
                        write_group()
            write_group()
            if parts:
                text = json.dumps(parts).encode()
                digest = hashlib.sha256(text).hexdigest().encode()
                writer.add_key_value_metadata({PARTS_KEY: text, PARTS_DIGEST_KEY: digest})
    return len(seen)


def _cut(clip: TokenizedClip) -> list[tuple[int, int]]:
    """The blocks of each row of a clip: (first, stop)."""
    cuts, first, numbers = [], 0, 0
    tiles = clip.num_tiles
    for number in range(0, len(clip.blocks), tiles):
        size = sum(part.values.size for part in clip.blocks[number : number + tiles])
        if numbers + size > _ROW_NUMBERS and number > first:
            cuts.append((first, number))
            first, numbers = number, 0
        numbers += size
    return [*cuts, (first, len(clip.blocks))]


def _part(clip: TokenizedClip, start: int, stop: int) -> TokenizedClip:
    """The clip that consists of some entries of a clip's blocks, whole blocks of all tiles."""
    frames = [
        min(block // clip.num_tiles * clip.frames_per_block, clip.num_frames)
        for block in (start, stop)
    ]
    return dataclasses.replace(
        clip, blocks=clip.blocks[start:stop], num_frames=frames[1] - frames[0]
    )


class ClipFacts(NamedTuple):
    """What a shard says of a clip, without its tokens.

    Attributes:
      id: of the clip.
      path: the shard.
      num_frames, rate, is_image: of the clip; the rate is in frames per second.
      counts, losses, met: of each block, or of each tile of a block.
    """

    id: str
    path: Path
    num_frames: int
    rate: float
    is_image: bool
    counts: np.ndarray
    losses: np.ndarray
    met: np.ndarray


class _Shard(NamedTuple):
    """One file: its path, its header, and where its row groups and its clips begin."""

    path: Path
    header: dict[str, Any]
    starts: np.ndarray  # the first row of each group, and the number of all rows
    clips: np.ndarray  # the first row of each clip, and the number of all rows
    first_blocks: dict[int, int]  # of the rows of clips of several rows


class TokenShards:
    """The clips of shards as one sequence: a random-access source for grain, PyTorch and plain loops.

    Threads may share one object. A pickled object holds file names and no clip; worker processes open the files themselves.

    Args:
      paths: a folder with `*.parquet`, one shard, or a list of folders and shards, whose clips follow each other.

    Raises:
      ValueError: there is no shard, or a folder has none.
      TokenFileError: a file is foreign, damaged, or of another model than the first; says which.
    """

    def __init__(self, paths: str | os.PathLike | Sequence[str | os.PathLike]):
        places = [paths] if isinstance(paths, str | os.PathLike) else paths
        files = [file for place in places for file in _shards_in(Path(place))]
        if not files:
            raise ValueError("No shard is named.")
        self._shards = [_open(path) for path in files]
        for shard in self._shards[1:]:
            where = f"{shard.path} does not go with {self._shards[0].path}"
            _check_same(self.header, shard.header, _SAME_MODEL, where)
            first, other = (header.get("weights", ()) for header in (self.header, shard.header))
            if first and other and are_apart(first, other):
                raise TokenFileError(
                    f"{where}: other weights of {shard.header['model_id']!r} made these tokens than those before. Keep the "
                    "tokens of each model in a folder of their own."
                )
        self._ends = np.cumsum([len(shard.clips) - 1 for shard in self._shards])
        self._prepare()

    def _prepare(self) -> None:
        self._lock = threading.Lock()
        self._groups: LRUCache[tuple[int, int], pa.Table] = LRUCache(_HELD_GROUPS)

    def __getstate__(self) -> dict[str, Any]:
        return {"_shards": self._shards, "_ends": self._ends}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._prepare()

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files, in the order of their clips."""
        return tuple(shard.path for shard in self._shards)

    @property
    def header(self) -> dict[str, Any]:
        """The shared fields of the first shard; those that describe the model are equal in all shards."""
        return self._shards[0].header

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __repr__(self) -> str:
        header = self.header
        return (
            f"TokenShards({len(self)} clips in {len(self._shards)} shards, {header['bottleneck_type']}, "
            f"model {header['model_id']!r})"
        )

    @functools.cached_property
    def ids(self) -> tuple[str, ...]:
        """The ids of all clips, in order.

        Raises:
          TokenFileError: two clips have the same id, or a shard is damaged.
        """
        found: list[str] = []
        for shard, table in self._columns(["id"]):
            with _named(shard.path):  # older pyarrow finds out only here that ids are missing
                found += table["id"].take(shard.clips[:-1]).to_pylist()
        ids = tuple(found)
        if len(set(ids)) < len(ids):
            name, _ = collections.Counter(ids).most_common(1)[0]
            places = {
                str(self._locate(number)[0].path) for number, id_ in enumerate(ids) if id_ == name
            }
            raise TokenFileError(
                f"Id {name!r} occurs twice, in {' and '.join(sorted(places))}; leave one out."
            )
        return ids

    @functools.cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.ids)}

    def find(self, name: str) -> int:
        """The number of the clip with this id.

        Raises:
          KeyError: there is none.
        """
        if name not in self._numbers:
            raise KeyError(f"No clip has the id {name!r}.")
        return self._numbers[name]

    def counts(self) -> list[np.ndarray]:
        """For each clip, the tokens kept in each block, int32 [blocks]; the tokens themselves are not read."""
        found: list[np.ndarray] = []
        for shard, table in self._columns(["counts"]):
            rows: list[np.ndarray] = []
            for piece in table["counts"].chunks:
                flat = piece.values.to_numpy()
                edges = piece.offsets.to_numpy()
                rows += [flat[start:end] for start, end in itertools.pairwise(edges)]
            found += [
                rows[start] if end == start + 1 else np.concatenate(rows[start:end])
                for start, end in itertools.pairwise(shard.clips)
            ]
        return found

    def facts(self) -> Iterator[ClipFacts]:
        """What the shards say of each clip; the tokens themselves are not read, and memory holds one shard's facts."""
        lists = ("counts", "losses", "met")
        for shard, table in self._columns(["id", "num_frames", "rate", "is_image", *lists]):
            with _named(shard.path):
                columns = {name: table[name].combine_chunks() for name in table.column_names}
                for start, stop in itertools.pairwise(shard.clips.tolist()):
                    first, last = (int(columns["counts"].offsets[n].as_py()) for n in (start, stop))
                    blocks = {
                        name: columns[name].values[first:last].to_numpy(zero_copy_only=False)
                        for name in lists
                    }
                    frames = columns["num_frames"][start:stop].to_numpy().sum()
                    one = {
                        name: columns[name][start].as_py() for name in ("id", "rate", "is_image")
                    }
                    yield ClipFacts(path=shard.path, num_frames=int(frames), **one, **blocks)

    def __iter__(self) -> Iterator[TokenizedClip]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, index: int) -> TokenizedClip:
        """The clip with this number, as it was written; negative numbers count from the end.

        Raises:
          IndexError: the number is out of range.
          TokenFileError: the clip's row group is damaged.
        """
        number = operator.index(index)
        if not -len(self) <= number < len(self):
            raise IndexError(f"There is no clip {number}; there are {len(self)}.")
        shard, which, rows = self._locate(number % len(self))
        parts = [self._row(shard, which, row) for row in rows]
        if len(parts) == 1:
            return parts[0]
        blocks = tuple(block for part in parts for block in part.blocks)
        num_frames = sum(part.num_frames for part in parts)
        return dataclasses.replace(parts[0], blocks=blocks, num_frames=num_frames)

    def tile_starts(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """For each clip, the first row of each row of tiles and the first column of each column of tiles, in pixels."""
        found: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        for shard in self._shards:
            if shard.header.get("fit", "crop") == "crop":
                found += [((0,), (0,))] * (len(shard.clips) - 1)
                continue
            with _named(shard.path), _parquet(shard.path) as file:
                _check_same_rows(file, shard)
                names = list(_LAYOUT_COLUMNS[2:])
                table = file.read(columns=names, use_threads=False).take(shard.clips[:-1])
            rows, columns = (table[name].to_pylist() for name in names)
            found += [(tuple(r), tuple(c)) for r, c in zip(rows, columns, strict=True)]
        return found

    def metadata(self, number: int) -> dict[str, Any]:
        """What the data set said of a clip, the caption under 'caption'; {} if nothing. The tokens are not read.

        Raises:
          TokenFileError: the shard is damaged.
        """
        shard, _, rows = self._locate(number)
        if not shard.header.get("metadata"):
            return {}
        group = int(np.searchsorted(shard.starts, rows.start, side="right")) - 1
        with _named(shard.path), _parquet(shard.path) as file:
            _check_same_rows(file, shard)
            table = file.read_row_group(group, list(_METADATA_COLUMNS), use_threads=False)
            caption, text = (
                column[rows.start - int(shard.starts[group])].as_py() for column in table.columns
            )
        found = json.loads(text) if text else {}
        return found if caption is None else found | {"caption": caption}

    def blocks(self, number: int, first: int, stop: int) -> tuple[BlockTokens, ...]:
        """Blocks `first` to `stop` (not included) of a clip. Of a clip of several rows, only those with these blocks are read.

        Raises:
          TokenFileError: a row group is damaged.
        """
        shard, which, rows = self._locate(number)
        found: list[BlockTokens] = []
        for row in rows:
            start = shard.first_blocks.get(row, 0)
            last = row + 1 == rows.stop
            if start < stop and (last or first < shard.first_blocks[row + 1]):
                blocks = self._row(shard, which, row).blocks
                found += blocks[max(0, first - start) : stop - start]
        return tuple(found)

    def _locate(self, number: int) -> tuple[_Shard, int, range]:
        """The shard of a clip, the shard's number, and the clip's rows in it."""
        which = int(np.searchsorted(self._ends, number, side="right"))
        shard = self._shards[which]
        clip = number - int(self._ends[which]) + len(shard.clips) - 1
        return shard, which, range(int(shard.clips[clip]), int(shard.clips[clip + 1]))

    def _row(self, shard: _Shard, which: int, row: int) -> TokenizedClip:
        """The clip in a row: a whole one, or the part of one that the row holds."""
        group = int(np.searchsorted(shard.starts, row, side="right")) - 1
        with _named(shard.path):
            table = self._group(which, group)
            return _clip(table, row - int(shard.starts[group]), shard.header)

    def _group(self, which: int, group: int) -> pa.Table:
        """A decoded row group; those read last are kept."""
        with self._lock:
            table = self._groups.get((which, group))
        if table is None:
            # The file is opened for each read (0.2 ms), so that threads do not wait for each other and few files are open.
            shard = self._shards[which]
            with _parquet(shard.path) as file:
                _check_same_rows(file, shard)
                table = file.read_row_group(group, use_threads=False)
        with self._lock:
            self._groups[which, group] = table
        return table

    def _columns(self, names: list[str]) -> Iterator[tuple[_Shard, pa.Table]]:
        """Each shard with its named columns."""
        for shard in self._shards:
            with _named(shard.path), _parquet(shard.path) as file:
                _check_same_rows(file, shard)
                yield shard, file.read(columns=names, use_threads=False)


def _shards_in(place: Path) -> list[Path]:
    """The shards of a folder, sorted by name; a file is a shard itself."""
    files = sorted(place.glob("*.parquet")) if place.is_dir() else [place]
    if not files:
        raise ValueError(f"There is no shard (*.parquet) in {str(place)!r}.")
    return files


def _header_of(clip: TokenizedClip) -> dict[str, Any]:
    header: dict[str, Any] = {"format": FORMAT, "version": VERSION}
    header |= {name: getattr(clip, name) for name in _SHARED}
    header["model_id"] = model_name(clip.model_id)
    for name, usual in _UNUSUAL.items():
        value = list(clip.patch_size) if name == "patch_size" else getattr(clip, name)
        if value != usual:
            header[name] = value
    header["weights"] = list(clip.weights)
    vectors = clip.blocks[0].vectors
    return header | {"vector_width": None if vectors is None else vectors.shape[1]}


def _check_same(
    first: dict[str, Any], other: dict[str, Any], names: Sequence[str], where: str
) -> None:
    """Raises `TokenFileError` if two headers differ in one of the fields."""
    for name in names:
        usual = _UNUSUAL.get(name)  # which headers leave out
        same = first.get(name, usual) == other.get(name, usual)
        if name == "model_id":  # which older files have as an absolute path
            same = model_name(first[name]) == model_name(other[name])
        if not same:
            raise TokenFileError(
                f"{where}: {name}={other.get(name, usual)!r}, but {first.get(name, usual)!r} before. Keep the tokens of "
                "each model and search in a folder of their own."
            )


def _schema(header: dict[str, Any], *, old: bool = False) -> pa.Schema:
    """The columns of a shard with this header, or of an older one."""
    if header["bottleneck_type"] == "vae":
        tokens = pa.large_list(pa.float32())
    else:
        tokens = pa.list_(pa.uint16() if header["codebook_size"] <= 65_536 else pa.uint32())
    types = {
        "id": pa.string(),
        "num_frames": pa.int32(),
        "is_image": pa.bool_(),
        "rate": pa.float64(),
        "width": pa.int32(),
        "height": pa.int32(),
        "counts": pa.list_(pa.int32()),
        "offsets": pa.list_(pa.int64()),
        "losses": pa.list_(pa.float64()),
        "met": pa.list_(pa.bool_()),
        "tokens": tokens,
        "bits": pa.int64(),
    }
    if not old:
        types |= _NEWER_COLUMNS
    if header.get("fit", "crop") != "crop":
        kinds = (pa.int32(), pa.int32(), pa.list_(pa.int32()), pa.list_(pa.int32()))
        types |= dict(zip(_LAYOUT_COLUMNS, kinds, strict=True))
    fields = [pa.field(name, kind, nullable=False) for name, kind in types.items()]
    if header.get("metadata"):
        fields += [pa.field(name, pa.string()) for name in _METADATA_COLUMNS]
    return pa.schema(fields)


def _said(values: Mapping[str, Any]) -> dict[str, str | None]:
    """The columns of what is said of a clip."""
    rest = dict(values)
    name = next((name for name in _CAPTIONS if isinstance(rest.get(name), str)), None)
    caption = None if name is None else rest.pop(name)
    text = json.dumps(rest, sort_keys=True, ensure_ascii=False) if rest else None
    return dict(zip(_METADATA_COLUMNS, (caption, text), strict=True))


def row_of(name: str, clip: TokenizedClip) -> dict[str, Any]:
    """The row of a clip in a shard: a value or an array for each column. A clip of several rows would have all its tokens here."""
    counts = clip.counts
    row = dict(
        id=name,
        num_frames=clip.num_frames,
        is_image=clip.is_image,
        rate=clip.rate,
        width=clip.source[0],
        height=clip.source[1],
        counts=counts,
        offsets=np.cumsum(counts, dtype=np.int64) - counts,
        losses=np.array([block.loss for block in clip.blocks]),
        met=np.array([block.met_threshold for block in clip.blocks]),
        tokens=np.concatenate([block.values.reshape(-1) for block in clip.blocks]),
        bits=clip.num_bits,
        pixel_aspect=clip.pixel_aspect,
        transfer=clip.transfer,
    )
    if clip.fit != "crop":
        shape = (*clip.frame, clip.tile_rows, clip.tile_columns)
        row |= dict(zip(_LAYOUT_COLUMNS, shape, strict=True))
    return row


def shard_table(rows: Sequence[tuple[str, TokenizedClip]]) -> pa.Table:
    """A shard's table of (id, clip), with its header in the schema's metadata: what writers of other libraries need for a shard.

    Raises:
      ValueError: there is no row, or the clips are of several models or searches.
    """
    if not rows:
        raise ValueError("A table of tokens needs at least one clip.")
    header = _header_of(rows[0][1])
    for name, clip in rows:
        own = _header_of(clip)
        _check_same(header, own, tuple({**header, **own}), f"clip {name!r}")
    return _table(rows, _schema_with_header(header))


def _schema_with_header(header: dict[str, Any]) -> pa.Schema:
    text = json.dumps(header, allow_nan=False).encode()
    digest = hashlib.sha256(text).hexdigest().encode()
    return _schema(header).with_metadata({KEY: text, DIGEST_KEY: digest})


def _table(
    rows: Sequence[tuple[str, TokenizedClip]],
    schema: pa.Schema,
    metadata: Callable[[str], Mapping[str, Any]] | None = None,
) -> pa.Table:
    """One row group of (id, clip)."""
    columns: dict[str, list[Any]] = {name: [] for name in schema.names if name != "tokens"}
    for name, clip in rows:
        row = row_of(name, clip)
        if metadata is not None:
            row |= _said(metadata(name))
        for key in columns:
            columns[key].append(row[key])
    kind = schema.field("tokens").type
    values = [block.values.reshape(-1) for _, clip in rows for block in clip.blocks]
    sizes = [sum(block.values.size for block in clip.blocks) for _, clip in rows]
    # Not `to_pandas_dtype`, for which older pyarrow needs pandas.
    number_type = np.float32 if kind.value_type == pa.float32() else np.dtype(str(kind.value_type))
    numbers = np.concatenate(values, dtype=number_type, casting="unsafe")
    large = pa.types.is_large_list(kind)
    edges = np.cumsum([0, *sizes], dtype=np.int64 if large else np.int32)
    lists = pa.LargeListArray if large else pa.ListArray
    tokens = lists.from_arrays(pa.array(edges), pa.array(numbers), type=kind)
    arrays = [
        tokens if field.name == "tokens" else pa.array(columns[field.name], field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def _clip(table: pa.Table, row: int, header: dict[str, Any]) -> TokenizedClip:
    """The clip in a row of a row group."""

    def entries(name: str) -> np.ndarray:
        return table[name][row].values.to_numpy(zero_copy_only=False)

    counts, losses, met, values = (entries(name) for name in ("counts", "losses", "met", "tokens"))
    name = "indices"
    if header["bottleneck_type"] == "vae":
        name, values = "vectors", values.reshape(-1, header["vector_width"])
    ends = np.cumsum(counts, dtype=np.int64)
    if (
        not len(counts)
        or not np.array_equal(entries("offsets"), ends - counts)
        or ends[-1] != len(values)
    ):
        raise ValueError(f"counts and offsets of row {row} do not fit {len(values)} tokens")
    blocks = tuple(
        BlockTokens(
            num_kept=int(count), loss=float(loss), met_threshold=bool(is_met), **{name: part}
        )
        for count, loss, is_met, part in zip(
            counts, losses, met, np.split(values, ends[:-1]), strict=True
        )
    )
    one = {
        key: table[key][row].as_py()
        for key in ("num_frames", "is_image", "rate", "width", "height")
    }
    source = (one.pop("width"), one.pop("height"))
    if "transfer" in table.column_names:
        one |= {key: table[key][row].as_py() for key in _NEWER_COLUMNS}
        one["pixel_aspect"] = tuple(one["pixel_aspect"])
    if header.get("fit", "crop") != "crop":
        shape = [table[key][row].as_py() for key in _LAYOUT_COLUMNS]
        one |= {"frame": tuple(shape[:2])}
        one |= dict(zip(_LAYOUT_COLUMNS[2:], map(tuple, shape[2:]), strict=True))
    one |= {key: header[key] for key in _UNUSUAL if key in header}
    one["patch_size"] = tuple(one.get("patch_size", ()))
    return TokenizedClip(
        blocks=blocks,
        source=source,
        weights=tuple(header.get("weights", ())),  # older shards have none
        **one,
        **{key: header[key] for key in _SHARED},
    )


def _open(path: Path) -> _Shard:
    """Reads and checks the metadata at the end of a file."""
    with _named(path):
        with _parquet(path) as file:
            found, facts = file.schema_arrow, file.metadata
            sizes = [facts.row_group(number).num_rows for number in range(facts.num_row_groups)]
        text = (found.metadata or {}).get(KEY, b"{}")
        header = json.loads(text)
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            raise ValueError(f"it does not say {FORMAT!r}")
        if header.get("version") != VERSION:
            raise ValueError(
                f"it is of version {header.get('version')!r}, this package reads {VERSION}"
            )
        # Parquet has checksums for its pages, but not for the metadata.
        if hashlib.sha256(text).hexdigest().encode() != found.metadata.get(DIGEST_KEY):
            raise ValueError("its header is damaged")
        missing = {*_SHARED, "vector_width"} - set(header)
        if missing or not any(found.equals(_schema(header, old=old)) for old in (False, True)):
            raise ValueError(
                f"{', '.join(sorted(missing)) or 'a column'} is missing or of another type"
            )
        starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        if starts[-1] != facts.num_rows or not facts.num_rows:
            raise ValueError("its row groups do not add up")
        first_blocks = _read_parts(facts.metadata or {})
        continued = [row for row, block in first_blocks.items() if block > 0]
        clips = np.delete(np.arange(facts.num_rows + 1), continued)
    return _Shard(path, header, starts, clips, first_blocks)


def _read_parts(metadata: dict[bytes, bytes]) -> dict[int, int]:
    """{row: its first block} of the clips of several rows."""
    text = metadata.get(PARTS_KEY)
    if text is None:
        return {}
    if hashlib.sha256(text).hexdigest().encode() != metadata.get(PARTS_DIGEST_KEY):
        raise ValueError("its list of parts is damaged")
    return {int(row): int(block) for row, block in json.loads(text)}


def _check_same_rows(file: pq.ParquetFile, shard: _Shard) -> None:
    """Raises `TokenFileError` if a file was replaced since it was opened: its rows may lie elsewhere."""
    facts, starts = file.metadata, shard.starts
    if facts.num_rows != starts[-1] or facts.num_row_groups != len(starts) - 1:
        raise TokenFileError(
            f"{shard.path} has been replaced since it was opened; open the shards again."
        )


def _parquet(path: Path) -> pq.ParquetFile:
    return pq.ParquetFile(path, page_checksum_verification=True)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turns errors of pyarrow into one that names the file."""
    if not path.is_file():
        raise TokenFileError(f"{path} is not a file. Give a shard, or a folder of them.")
    try:
        yield
    except TokenFileError:
        raise
    except _ERRORS as error:
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise TokenFileError(
            f"{path} is not a sound shard: {reason}. Copy it again, or remove it and its .json and "
            "run scripts/tokenize_dataset.py again."
        ) from error

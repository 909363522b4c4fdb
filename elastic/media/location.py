"""Where a clip is: a file, a URL, a member of a tar file, a cell of a table, or bytes in memory."""

import dataclasses
import functools
import hashlib
import io
import json
import os
import pathlib
import posixpath
from typing import IO, Any, BinaryIO, Literal

from elastic.media import cells
from elastic.media.files import facts_of, is_url, open_path, open_window

Kind = Literal["file", "url", "tar", "parquet", "hf", "bytes"]
_MOST_JSON = 2**20  # bytes of a file of metadata beside a member


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ClipLocation:
    """Where a clip is, and which part of it. It holds no open file, so that it can be pickled and kept by the million.

    Attributes:
      kind: what `place` is: a local file, a URL, a tar file, a Parquet file, a data set of Hugging Face, or bytes in memory.
      place: the path, the URL, or the name of the data set; of bytes, what messages call them.
      member: the name of a member of a tar file; the name that stands beside a cell of a table, else the number of its row.
      at: of a tar member, its first byte and its size; of a cell, its row group and its row in it.
      column: of a cell, its column.
      start: seconds at which the clip begins in the file.
      end: seconds at which it ends; None: with the file.
      weight: how often training takes the clip, compared with others.
      given: metadata as a JSON object, where a list states them; '' is none.
      beside: files of a tar with the same key: (ending, first byte, size).
      problem: why the clip cannot be read, where that is known before it is opened; '' if nothing is.
      data: the bytes of kind 'bytes'.
    """

    kind: Kind
    place: str
    member: str = ""
    at: tuple[int, int] = (0, 0)
    column: str = ""
    start: float = 0.0
    end: float | None = None
    weight: float = 1.0
    given: str = ""
    beside: tuple[tuple[str, int, int], ...] = ()
    problem: str = ""
    data: bytes = dataclasses.field(default=b"", repr=False)

    def __str__(self) -> str:
        if self.kind == "tar":
            return f"{self.place}/{self.member}"
        if self.kind in ("parquet", "hf"):
            row = f"row {self.at[1]}" + f" of group {self.at[0]}" * (self.kind == "parquet")
            return f"{self.place}/{self.column}/{self.member} ({row})"
        return self.place

    @property
    def name(self) -> str:
        """The last part of the name, as of a path."""
        return posixpath.basename(self.member or self.place)

    @property
    def suffix(self) -> str:
        """The ending of the name with its dot; '' if it has none."""
        return posixpath.splitext(self.name)[1]

    @property
    def identity(self) -> str:
        """What tells this clip from the others in the same place: where it stands in it, its range and its metadata."""
        told: list[Any] = [self.kind, self.at if self.kind == "tar" else (self.column, *self.at)]
        if self.kind in ("file", "url", "bytes"):
            told = [self.kind]
        if self.kind == "bytes":
            told.append(hashlib.blake2b(self.data, digest_size=16).hexdigest())
        if self.has_more:
            told.append((self.start, self.end, self.weight, self.given, self.beside))
        return json.dumps(told)

    @property
    def has_more(self) -> bool:
        """Whether a range, a weight or metadata are stated, other than the columns of a table."""
        ranged = self.start > 0 or self.end is not None
        return bool(ranged or self.weight != 1 or self.given or self.beside)

    @property
    def facts(self) -> tuple[int, int | str]:
        """Size and version of the file that holds the clip.

        Raises:
          OSError: it is not there.
        """
        if self.kind == "bytes":
            return len(self.data), ""
        if self.kind == "hf":
            rows = cells.hub_rows(self.place)
            return len(rows), str(getattr(rows, "_fingerprint", ""))
        return facts_of(self.place)

    def open(self) -> BinaryIO:
        """The clip's bytes as a seekable file. A tar member is read where it lies; a cell is in memory.

        Raises:
          OSError: they cannot be read.
        """
        if self.problem:
            raise OSError(self.problem)
        if self.kind == "bytes":
            return io.BytesIO(self.data)
        if self.kind == "tar":
            return open_window(self.place, *self.at)
        if self.kind in ("file", "url"):
            return open_path(self.place)
        read = _parquet_cell if self.kind == "parquet" else _hub_cell
        cell = read(self)
        if not cell.is_null:
            return io.BytesIO(cell.to_bytes())
        if cell.path is None:
            raise OSError(f"the cell of column {self.column!r} is null")
        return self._open_beside(cell.path)

    def _open_beside(self, path: str) -> BinaryIO:
        """Opens what a cell names in the place of bytes: a URL, or a file in the folder of the table."""
        if is_url(path):
            return open_path(path)
        if self.kind == "hf" and os.path.isabs(path):  # in the cache of `datasets`
            return open_path(path)
        whole = posixpath.normpath(path)
        if whole.startswith(("/", "..")):
            raise OSError(f"the cell has no bytes, and its path {path!r} leads out of the folder")
        return open_path(f"{os.path.dirname(self.place) or '.'}/{whole}")

    def metadata(self) -> dict[str, Any]:
        """The clip's metadata: other columns of its row, files beside it in a tar, columns of its list. {} if there is none.

        Raises:
          OSError: it cannot be read.
        """
        found: dict[str, Any] = {}
        if self.kind == "parquet":
            found = cells.read_row(self.place, self.column, *self.at)
        elif self.kind == "hf":
            found = cells.read_hub_row(self.place, self.column, self.at[1])
        for ending, offset, size in self.beside:
            with open_window(self.place, offset, size) as file:
                found |= _beside(ending, file.read(_MOST_JSON + 1))
        if self.given:
            found |= json.loads(self.given)
        ranged = {"start": self.start or None, "end": self.end}
        ranged["weight"] = None if self.weight == 1 else self.weight
        return found | {name: value for name, value in ranged.items() if value is not None}

    @property
    def has_columns(self) -> bool:
        """Whether the table has columns that say something of its clips."""
        if self.kind == "parquet":
            return bool(cells.plain_columns(self.place, self.column))
        return self.kind == "hf" and bool(cells.plain_hub_columns(self.place, self.column))


Place = pathlib.Path | str | ClipLocation  # a string is a URL
ClipFile = str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes] | ClipLocation


def _parquet_cell(location: ClipLocation) -> cells.Cell:
    return cells.read_cell(location.place, location.column, *location.at)


def _hub_cell(location: ClipLocation) -> cells.Cell:
    return cells.read_hub_cell(location.place, location.column, location.at[1])


def _beside(ending: str, data: bytes) -> dict[str, Any]:
    """The metadata in a file beside a clip; what cannot be read is kept as text."""
    if len(data) > _MOST_JSON:
        raise OSError(f"the .{ending} beside it has more than {_MOST_JSON} bytes")
    text = data.decode("utf-8", "replace").strip()
    if ending == "json":
        try:
            values = json.loads(text)
        except ValueError:
            return {"json": text}
        return values if isinstance(values, dict) else {"json": values}
    return {"caption": text}


def open_file(place: Place) -> BinaryIO:
    """Opens the bytes of a clip for reading: seekable, from the first byte on."""
    return place.open() if isinstance(place, ClipLocation) else open_path(place)


def is_part(place: Place) -> bool:
    """Whether a clip is no whole local file, so that its path does not name it."""
    return not isinstance(place, pathlib.Path)


def name_of(place: Place) -> str:
    """The last part of a clip's name."""
    return posixpath.basename(place) if isinstance(place, str) else place.name


def local_path(place: Place) -> pathlib.Path | None:
    """The path of a clip that is a file of this machine; None: it is elsewhere, or a part of a file."""
    if isinstance(place, ClipLocation):
        return pathlib.Path(place.place) if place.kind == "file" and not place.problem else None
    return place if isinstance(place, pathlib.Path) else None


def place_of(source: Any) -> Place:
    """The place of what people call a clip: a path, a URL, a location, bytes, or a file that is open for reading.

    A file object is read from where it stands to its end, into memory.

    Raises:
      ValueError: it is something else.
    """
    if isinstance(source, ClipLocation):
        return source
    if is_url(source):
        return source
    if isinstance(source, str | os.PathLike):
        return pathlib.Path(source)
    if isinstance(source, bytes | bytearray | memoryview):
        return _in_memory(bytes(source), f"<{len(source)} bytes>")
    if _is_open_file(source):
        data = source.read()
        if not isinstance(data, bytes):
            raise ValueError(
                f"The file object gives {type(data).__name__}, no bytes; open it with mode 'rb'."
            )
        name = getattr(source, "name", None)
        return _in_memory(data, name if isinstance(name, str) else f"<{len(data)} bytes>")
    raise ValueError(
        f"A clip of type {type(source).__name__} cannot be opened; give a path, a URL, bytes, or a file object."
    )


def _in_memory(data: bytes, name: str) -> ClipLocation:
    return ClipLocation(kind="bytes", place=name, data=data)


def is_place(source: object) -> bool:
    """Whether `place_of` takes it, other than an array or frames."""
    known = str | os.PathLike | bytes | bytearray | memoryview | ClipLocation
    return isinstance(source, known) or _is_open_file(source)


def _is_open_file(source: object) -> bool:
    return hasattr(source, "read") and (hasattr(source, "readable") or hasattr(source, "seek"))


@functools.lru_cache(maxsize=1024)
def location_of(place: Place) -> ClipLocation:
    """A path or URL as a location."""
    if isinstance(place, ClipLocation):
        return place
    return ClipLocation(kind="url" if is_url(place) else "file", place=str(place))

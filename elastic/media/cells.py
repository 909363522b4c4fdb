"""Cells of tables: the bytes of one cell of a Parquet file or of a Hugging Face data set, and the other values of its row.

pyarrow reads Parquet, `datasets` reads the Hub: both are what the field writes these files with.
"""

import contextlib
import functools
import importlib
import importlib.util
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from cachetools import LRUCache

from elastic.media.files import facts_of, open_path

# Columns of row groups are kept up to this size, so that rows read one after the other cost one read. A larger one is kept alone: pyarrow
# writes 1024 rows into a page, and a page is read whole, so that reading a row alone would cost as much memory, and much more time.
_HELD_BYTES = 256 * 2**20
_STREAM_BYTES = (
    2**20
)  # read at a time; otherwise pyarrow reads a whole column of a row group before its first page
_groups: LRUCache[tuple[Any, ...], Any] = LRUCache(
    _HELD_BYTES, getsizeof=lambda column: min(column.nbytes, _HELD_BYTES)
)
_rows: LRUCache[tuple[Any, ...], Any] = LRUCache(8)  # columns of metadata, which are small
_lock = threading.Lock()


class Cell:
    """A cell of a column of bytes: the bytes, or the path that stands in their place, or neither."""

    def __init__(self, data: Any, path: str | None):
        self._data, self.path = data, path

    @property
    def is_null(self) -> bool:
        """Whether the cell has no bytes."""
        return self._data is None

    def to_bytes(self) -> bytes:
        """The bytes."""
        return bytes(self._data)


def read_cell(place: str, column: str, group: int, row: int) -> Cell:
    """A cell of a Parquet file. Memory holds a column of its row group.

    Args:
      place: path or URL of the file.
      column: of bytes, or of structs {bytes, path}.
      group: the row group.
      row: the row in it.

    Raises:
      OSError: the file cannot be read, or has no such cell.
    """
    key = (place, *facts_of(place), column, group)
    with _lock:
        held = _groups.get(key)
    if held is None:
        with opened(place) as file:
            if _uncompressed_size(file, column, group) > _HELD_BYTES / 2:
                with _lock:  # before another one is read
                    _groups.clear()
            held = _read(lambda: file.read_row_group(group, [column])).column(0)
        with _lock:
            _groups[key] = held
    if row >= len(held):
        raise OSError(f"{place} has been replaced: row group {group} has {len(held)} rows")
    return _cell(held, row)


def _cell(column: Any, row: int) -> Cell:
    import pyarrow as pa

    value = column[row]
    if not value.is_valid:
        return Cell(None, None)
    if pa.types.is_struct(value.type):
        data, named = value["bytes"], value.type.get_field_index("path") >= 0
        path = value["path"].as_py() if named else None
        return Cell(data.as_buffer() if data.is_valid else None, path)
    return Cell(value.as_buffer(), None)


def _uncompressed_size(file: Any, column: str, group: int) -> int:
    facts = file.metadata.row_group(group)
    return sum(
        facts.column(k).total_uncompressed_size
        for k in range(facts.num_columns)
        if facts.column(k).path_in_schema.split(".")[0] == column
    )


def read_row(place: str, column: str, group: int, row: int) -> dict[str, Any]:
    """The values of a row besides one column, as JSON has them; columns of bytes are left out."""
    names = plain_columns(place, column)
    if not names:
        return {}
    key = (place, *facts_of(place), names, group)
    with _lock:
        held = _rows.get(key)
    if held is None:
        with opened(place) as file:
            held = _read(lambda: file.read_row_group(group, list(names)))
        with _lock:
            _rows[key] = held
    return _plain({name: held.column(name)[row].as_py() for name in names})


@functools.lru_cache(maxsize=64)
def _schema(place: str, *_: Any) -> Any:
    with opened(place) as file:
        return file.schema_arrow


def plain_columns(place: str, column: str) -> tuple[str, ...]:
    """The metadata columns of a Parquet file. The given column and the columns of bytes are left out."""
    schema = _schema(place, *facts_of(place))
    return tuple(f.name for f in schema if f.name != column and not holds_bytes(f.type))


def holds_bytes(kind: Any) -> bool:
    """Whether a type of pyarrow is one of bytes, or has one in it."""
    import pyarrow as pa

    if any(test(kind) for test in (pa.types.is_binary, pa.types.is_large_binary)):
        return True
    return any(holds_bytes(kind.field(k).type) for k in range(kind.num_fields))


@contextlib.contextmanager
def opened(place: str) -> Iterator[Any]:
    """A Parquet file, open while the `with` runs.

    Raises:
      OSError: it cannot be read.
    """
    import pyarrow.parquet as pq

    with open_path(place) as file:
        yield _read(lambda: pq.ParquetFile(file, buffer_size=_STREAM_BYTES))


def _read(read: Callable[[], Any]) -> Any:
    """What `read` gives; errors of pyarrow become one that a caller expects of a file."""
    import pyarrow as pa

    try:
        return read()
    except (pa.ArrowException, ValueError, KeyError) as error:
        text = " ".join(str(error).split())[:200]
        raise OSError(f"no sound Parquet: {text}") from error


def require_datasets() -> Any:
    """The package `datasets`.

    Raises:
      ValueError: it is not installed.
    """
    if importlib.util.find_spec("datasets") is None:
        raise ValueError(
            "hf_dataset:: and hf_stream:: need the package datasets: pip install datasets, or give the Parquet files themselves."
        )
    return importlib.import_module("datasets")


@functools.lru_cache(maxsize=4)
def hub_rows(place: str) -> Any:
    """The rows of a data set, `NAME` or `NAME::SPLIT`, in datasets' own cache; its media stay encoded.

    Raises:
      ValueError: `datasets` is missing, or cannot load it.
    """
    datasets = require_datasets()
    name, _, split = place.partition("::")
    with _loading("hf_dataset::", place):
        try:
            rows = datasets.load_from_disk(name)
            if isinstance(rows, dict):
                rows = rows[split or "train"]
        except FileNotFoundError:
            rows = datasets.load_dataset(name, split=split or "train")
    for column, feature in rows.features.items():
        if type(feature).__name__ in ("Video", "Image", "Audio"):
            rows = rows.cast_column(column, type(feature)(decode=False))
    return rows


@contextlib.contextmanager
def _loading(prefix: str, place: str) -> Iterator[None]:
    """Errors of `datasets` become one line that names the data set."""
    try:
        yield
    except (ValueError, OSError, KeyError, RuntimeError) as error:
        text = " ".join(str(error).split())[:300]
        name = place.partition("::")[0]
        raise ValueError(
            f"{prefix}{place} cannot be loaded: {type(error).__name__}: {text}. Check the name, or name a split: "
            f"{prefix}{name}::SPLIT."
        ) from error


class HubFiles(NamedTuple):
    """The files of a split of a data set.

    Attributes:
      files: paths or URLs, in the order of the rows. URLs of the Hub name one commit.
      schema: pyarrow's schema of the rows, where the data set's card tells it.
    """

    files: list[str]
    schema: Any


def hub_files(place: str) -> HubFiles:
    """The files that hold a data set, `NAME` or `NAME::SPLIT`, as `datasets` finds them. Nothing is downloaded.

    Raises:
      ValueError: `datasets` is missing, or does not find them.
    """
    datasets = require_datasets()
    name, _, split = place.partition("::")
    with _loading("hf_stream::", place):
        builder = datasets.load_dataset_builder(name)
        files = builder.config.data_files or {}
        if (split or "train") not in files:
            raise ValueError(
                f"it has no split {split or 'train'!r} among {sorted(map(str, files))}"
            )
        features = builder.info.features
        return HubFiles(
            list(files[split or "train"]), None if features is None else features.arrow_schema
        )


def read_hub_cell(place: str, column: str, row: int) -> Cell:
    """A cell of a data set."""
    rows = hub_rows(place)
    if row >= len(rows):
        raise OSError(f"hf_dataset::{place} has {len(rows)} rows")
    value = rows.select_columns(column)[row][column]
    if isinstance(value, Mapping):
        return Cell(value.get("bytes"), value.get("path"))
    return Cell(value, None)


def read_hub_row(place: str, column: str, row: int) -> dict[str, Any]:
    """The values of a row besides one column, as JSON has them."""
    names = list(plain_hub_columns(place, column))
    return _plain(hub_rows(place).select_columns(names)[row]) if names else {}


def plain_hub_columns(place: str, column: str) -> tuple[str, ...]:
    """The metadata columns of a data set. The given column and the columns of bytes are left out."""
    kinds = hub_rows(place).features.arrow_schema
    return tuple(f.name for f in kinds if f.name != column and not holds_bytes(f.type))


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as JSON has them: times and decimals become text; nulls are left out."""
    kept = {name: value for name, value in values.items() if value is not None}
    return json.loads(json.dumps(kept, default=str))


def paths_of(file: Any, column: str, *, has_path: bool) -> Iterator[list[str | None]]:
    """For each row group, the path that stands beside the bytes of each row; no bytes are read."""
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        if not has_path:
            yield [None] * count
            continue
        table = file.read_row_group(group, [f"{column}.path"])
        yield [None if value is None else value["path"] for value in table.column(0).to_pylist()]

"""Tokens block by block, in a file that grows: it lets a run resume, and can be decoded while it is written.

The file is a sequence of records. A record is its length (4 bytes, little-endian), the CRC-32 of its content (4 bytes), and the content
as msgpack. The first record is the header, a mapping; then each block has one record; the last is `{"end": number of blocks}`. A record
is written in one call when its block is done. An incomplete last record is not an error: the file then ends before it.
"""

import dataclasses
import os
import pathlib
import struct
import time
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, Self

import msgpack
import numpy as np

from elastic.tokens.clip import BlockTokens
from elastic.tokens.npz_file import TokenFileError

FORMAT, VERSION = "elastictok-token-stream", 1
_FRAME = struct.Struct("<II")
_MOST_BYTES = 1 << 30  # of one record; a larger length is a sign of damage
_POLL_SECONDS = 0.05


@dataclasses.dataclass(frozen=True, eq=False)
class Recorded:
    """One block of the file.

    Attributes:
      tokens: the tokens of the block.
      num_frames: its frames, without padding.
      about: further values of the writer, such as `passes`, `seconds` and `memory` (the history of the search).
    """

    tokens: BlockTokens
    num_frames: int
    about: dict[str, Any]


class TokenStreamWriter:
    """Appends blocks to a new file, or to an unfinished one.

    Args:
      path: the file.
      header: for a new file, the values that readers need, of JSON types.
      keep: for an unfinished file, the number of blocks to keep; later ones are cut off. None starts a new file.

    Raises:
      OSError: the file cannot be written, or `keep` is None and the file exists.
    """

    def __init__(self, path: str | os.PathLike, header: dict[str, Any], *, keep: int | None = None):
        self._path = pathlib.Path(path)
        self.num_blocks = keep or 0
        if keep is None:
            self._file: BinaryIO = open(path, "xb")  # noqa: SIM115 (open as long as the clip takes)
            self._write({"format": FORMAT, "version": VERSION, **header})
            return
        end = _ends(self._path)[keep]
        self._file = open(path, "r+b")  # noqa: SIM115
        self._file.truncate(end)
        self._file.seek(end)

    def append(self, tokens: BlockTokens, num_frames: int, **about: Any) -> None:
        """Adds one block; once this returns, the block survives the end of the process."""
        fsq = tokens.indices is not None
        values = tokens.values.astype("<u4" if fsq else "<f4")
        record = {
            "num_kept": tokens.num_kept,
            "loss": tokens.loss,
            "met": tokens.met_threshold,
            "num_frames": num_frames,
            "indices" if fsq else "vectors": values.tobytes(),
            "about": about,
        }
        self._write(record)
        self.num_blocks += 1

    def sync(self) -> None:
        """Waits until everything written survives a power cut, too."""
        os.fsync(self._file.fileno())

    def finish(self) -> None:
        """Writes the last record, which tells readers that no block follows, and closes the file."""
        self._write({"end": self.num_blocks})
        self.close()

    def close(self) -> None:
        """Closes the file as it is."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(_packed(record))
        self._file.flush()


def read_token_stream(
    path: str | os.PathLike, *, follow: bool = False, patience: float | None = None
) -> tuple[dict[str, Any], Iterator[Recorded]]:
    """The header of a file, and an iterator over its blocks.

    Args:
      path: the file.
      follow: wait for further blocks until the writer has finished.
      patience: seconds to wait for one block; None: no limit.

    Raises:
      TokenFileError: it is not a token stream, or a record is damaged. With `follow`, no block came in time.
      OSError: the file cannot be read.
    """
    records = _records(pathlib.Path(path), follow=follow, patience=patience)
    header = next(records, ({}, 0))[0]
    if header.get("format") != FORMAT:
        raise TokenFileError(f"{path} is not a token stream. Give the tokens.part of a run.")
    if header.get("version") != VERSION:
        raise TokenFileError(
            f"{path} is a token stream of version {header.get('version')!r}; this package reads {VERSION}."
        )
    return header, _blocks(records, path)


def _blocks(records: Iterator[tuple[dict[str, Any], int]], path: Any) -> Iterator[Recorded]:
    for record, _ in records:
        if "end" in record:
            return
        try:
            yield _recorded(record)
        except (KeyError, TypeError, ValueError) as error:
            raise TokenFileError(f"{path} holds a record that is not a block: {error}") from error


def _recorded(record: dict[str, Any]) -> Recorded:
    num_kept = record["num_kept"]
    values: dict[str, Any]
    if "indices" in record:
        values = {"indices": np.frombuffer(record["indices"], "<u4")}
    else:
        vectors = np.frombuffer(record["vectors"], "<f4").reshape(num_kept, -1)
        values = {"vectors": vectors}
    tokens = BlockTokens(
        num_kept=num_kept, loss=record["loss"], met_threshold=record["met"], **values
    )
    return Recorded(tokens, record["num_frames"], record["about"])


def _packed(record: dict[str, Any]) -> bytes:
    content: Any = msgpack.packb(record)
    return _FRAME.pack(len(content), zlib.crc32(content)) + content


def _ends(path: pathlib.Path) -> list[int]:
    """The positions at which the header and each block end."""
    return [end for record, end in _records(path) if "end" not in record]


def _records(
    path: pathlib.Path, *, follow: bool = False, patience: float | None = None
) -> Iterator[tuple[dict[str, Any], int]]:
    """The complete records, each with the position of its end."""
    position = 0
    with open(path, "rb") as file:
        waited = time.monotonic()
        while True:
            content = _next_content(file, position, path)
            if content is None:
                if not follow:
                    return
                if patience is not None and time.monotonic() - waited > patience:
                    raise TokenFileError(
                        f"{path} has not grown for {patience:g} s; its writer seems to have stopped."
                    )
                time.sleep(_POLL_SECONDS)
                continue
            position += _FRAME.size + len(content)
            record = _unpacked(content, path)
            yield record, position
            waited = time.monotonic()
            if "end" in record:
                return


def _next_content(file: BinaryIO, position: int, path: pathlib.Path) -> bytes | None:
    """The content of the record at a position; None if it is incomplete."""
    file.seek(position)
    frame = file.read(_FRAME.size)
    if len(frame) < _FRAME.size:
        return None
    length, checksum = _FRAME.unpack(frame)
    if length > _MOST_BYTES:
        raise TokenFileError(f"{path} is not a token stream, or is damaged at byte {position}.")
    content = file.read(length)
    if len(content) < length:
        return None
    if zlib.crc32(content) != checksum:
        raise TokenFileError(
            f"{path} is not a token stream, or is damaged at byte {position}: the checksum differs."
        )
    return content


def _unpacked(content: bytes, path: pathlib.Path) -> dict[str, Any]:
    try:
        record = msgpack.unpackb(content)
    except (ValueError, msgpack.UnpackException) as error:
        raise TokenFileError(f"{path} holds a record that cannot be read: {error}") from error
    if not isinstance(record, dict):
        raise TokenFileError(f"{path} holds a record that is no mapping.")
    return record

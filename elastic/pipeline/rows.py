"""Clips to rows of a shard, for jobs of Ray Data, Spark, Beam and others, which have their own plans, restarts and writers.

The rows are those of `tokenize_dataset`, to the bit.
"""

import os
from collections.abc import Iterable
from typing import Any, NamedTuple

import pyarrow as pa

from elastic.media import MediaError
from elastic.pipeline.dataset_plan import printable
from elastic.tokenizer import ElasticTokenizer, EncodeOptions
from elastic.tokenizer.clip_source import ClipLike
from elastic.tokens import TokenizedClip
from elastic.tokens.shards import row_of, shard_table


class ClipTable(NamedTuple):
    """The rows of some clips.

    Attributes:
      table: has the columns of a shard, and its header in the schema's metadata; None: no clip could be read.
      bad: (id, reason) of each clip that could not be read.
    """

    table: pa.Table | None
    bad: list[tuple[str, str]]


def clip_row(
    tokenizer: ElasticTokenizer, source: ClipLike, options: EncodeOptions, *, name: str = ""
) -> dict[str, Any]:
    """The row of one clip: a value or an array of NumPy for each column of a shard, none more.

    Args:
      tokenizer: the model.
      source: the clip, as for `ElasticTokenizer.encode`.
      options: which frames are read, and how the token counts are chosen.
      name: the id of the row; '': the source, if it is a path.

    Raises:
      MediaError: the clip cannot be read.
    """
    ((_, found),) = tokenizer.encode_each([source], options)
    if isinstance(found, MediaError):
        raise found
    if not name and isinstance(source, str | os.PathLike):
        name = printable(os.fspath(source))
    return row_of(name, found)


def clip_table(
    tokenizer: ElasticTokenizer,
    clips: Iterable[tuple[str, ClipLike]],
    options: EncodeOptions,
    *,
    batch: int = 1,
) -> ClipTable:
    """The rows of some clips as a table, in their order. Written as Parquet, it is a shard for `TokenShards`.

    Args:
      tokenizer: the model.
      clips: (id, clip) of each.
      options: which frames are read, and how the token counts are chosen.
      batch: clips that go through the model together.
    """
    names, sources = [], []
    for name, source in clips:
        names.append(name)
        sources.append(source)
    rows: list[tuple[str, TokenizedClip]] = []
    bad: list[tuple[str, str]] = []
    for which, found in sorted(
        tokenizer.encode_each(sources, options, batch=batch), key=lambda pair: pair[0]
    ):
        if isinstance(found, MediaError):
            bad.append((names[which], printable(str(found))))
        else:
            rows.append((names[which], found))
    return ClipTable(shard_table(rows) if rows else None, bad)

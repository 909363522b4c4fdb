"""The tokens of a clip: in memory, in files, in shards. Loads no jax.

Shards are imported when they are first used: only they need pyarrow.
"""

from typing import TYPE_CHECKING

from elastic.io.lazy import lazy_names
from elastic.tokens.clip import (
    BlockTokens,
    TokenizedClip,
    layout_in,
    raster_places,
    tokens_of_tiles,
)
from elastic.tokens.npz_file import TokenFileError
from elastic.tokens.stream_file import read_token_stream

if TYPE_CHECKING:
    from elastic.tokens.shards import TokenShards, write_shard

__all__ = [
    "BlockTokens",
    "TokenFileError",
    "TokenShards",
    "TokenizedClip",
    "layout_in",
    "raster_places",
    "read_token_stream",
    "tokens_of_tiles",
    "write_shard",
]

__getattr__ = lazy_names(__name__, {"TokenShards": ".shards", "write_shard": ".shards"})

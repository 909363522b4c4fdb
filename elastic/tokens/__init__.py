"""The tokens of a clip: in memory, in files, in shards. Loads no jax."""

from elastic.tokens.clip import BlockTokens, TokenizedClip
from elastic.tokens.npz_file import TokenFileError
from elastic.tokens.shards import TokenShards, write_shard
from elastic.tokens.stream_file import read_token_stream

__all__ = [
    "BlockTokens",
    "TokenFileError",
    "TokenShards",
    "TokenizedClip",
    "read_token_stream",
    "write_shard",
]

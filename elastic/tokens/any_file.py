"""Any file that holds tokens of one clip: `tokens.npz`, a growing `tokens.part`, a shard of one clip."""

import os
from pathlib import Path

from elastic.tokens.clip import TokenizedClip
from elastic.tokens.npz_file import TokenFileError, is_sealed


def kind_of(path: str | os.PathLike) -> str:
    """'npz', 'part' or 'shard': which file of tokens this is, by its content.

    Raises:
      TokenFileError: it is none.
      OSError: it cannot be read.
    """
    if Path(path).is_dir():
        raise TokenFileError(
            f"{path} is a folder; give a token file, or read its shards with TokenShards({str(path)!r})."
        )
    if is_sealed(path):
        return "npz"
    with open(path, "rb") as file:
        head = file.read(64)
    if head.startswith(b"PAR1"):
        return "shard"
    if b"elastictok-token-stream" in head:
        return "part"
    raise TokenFileError(
        f"{path} is no file of tokens (tokens.npz, tokens.part or a shard), or its end is missing. Copy it again, or tokenize the "
        "clip again."
    )


def load_clip(path: str | os.PathLike) -> TokenizedClip | None:
    """The clip in `tokens.npz` or in a shard of one clip; None for `tokens.part`, which is read block by block.

    Raises:
      TokenFileError: the file is damaged or foreign, or a shard has several clips.
      OSError: it cannot be read.
    """
    kind = kind_of(path)
    if kind == "npz":
        return TokenizedClip.load(path)
    if kind == "part":
        return None
    from elastic.tokens.shards import TokenShards  # pyarrow

    shards = TokenShards(path)
    if len(shards) != 1:
        raise TokenFileError(
            f"{path} holds {len(shards)} clips; choose one: tokenizer.decode(TokenShards({str(path)!r})[0])."
        )
    return shards[0]

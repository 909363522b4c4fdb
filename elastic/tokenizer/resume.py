"""The files from which an interrupted tokenization resumes after its last whole block.

There are two files. A token stream receives every block when it is done. A second file holds a snapshot of the KV cache, which is renewed
from time to time. To resume, the cache is loaded from the snapshot, and the blocks that the stream received after it go through the
model once, each with its known token count. The cache is then the same as without the interruption, and so are the results.
"""

import logging
import os
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from elastic.io.atomic import atomic_open
from elastic.io.safetensors_file import index_safetensors, write_safetensors
from elastic.io.tensors import read_into
from elastic.io.tree import CheckpointError
from elastic.tokenizer.block_codec import Codec, CodecCache
from elastic.tokens import BlockTokens, TokenFileError, read_token_stream
from elastic.tokens.stream_file import Recorded, TokenStreamWriter

log = logging.getLogger(__name__)

_COPY_SECONDS = 30.0  # the shortest time between two copies
_COPY_SHARE = 20  # that time is also at least 20 times as long as writing a copy takes
# A larger cache is not copied. Then every block of the stream goes through the model once when the run is resumed.
_MAX_COPY_BYTES = 4 << 30


class ResumeError(ValueError):
    """A resume file belongs to another run; the message names the file and the difference."""


def remove_resume_log(path: str | os.PathLike) -> None:
    """Removes the token stream and the copy of the cache, if they exist."""
    for file in _paths(pathlib.Path(path)):
        file.unlink(missing_ok=True)


class ResumeLog:
    """The token stream and the copy of the cache of one tokenization.

    Args:
      path: the file of the token stream; the copy of the cache is a file beside it.
      about: everything that the result depends on, as JSON values. A stream that was written with other values is refused.
      header: further values for readers of the stream.
      tiles: records of a block.

    Attributes:
      blocks: the records of the whole blocks that an earlier run recorded.

    Raises:
      ResumeError: the file exists and belongs to another run, or is damaged.
      OSError: the files cannot be read or written.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        about: dict[str, Any],
        header: dict[str, Any],
        *,
        tiles: int = 1,
    ):
        self.path = pathlib.Path(path)
        _, self._cache_path = _paths(self.path)
        self.blocks: list[Recorded] = []
        self._last_copy, self._copy_interval = time.monotonic(), _COPY_SECONDS
        if not self.path.exists() or not self.path.stat().st_size:
            self.path.unlink(missing_ok=True)
            self._writer = TokenStreamWriter(self.path, header | {"run": about})
            return
        try:
            stored_header, blocks = read_token_stream(self.path)
            self.blocks = list(blocks)
            del self.blocks[len(self.blocks) // tiles * tiles :]
        except TokenFileError as error:
            raise ResumeError(f"{error} Remove it to begin anew.") from error
        earlier = stored_header.get("run")
        if not isinstance(earlier, dict) or earlier != about:
            names = sorted(
                name
                for name in about.keys() | (earlier or {}).keys()
                if about.get(name) != (earlier or {}).get(name)
            )
            raise ResumeError(
                f"{self.path} was begun with another {' and '.join(names)}; remove it to begin anew, or run what began it."
            )
        self._writer = TokenStreamWriter(self.path, {}, keep=len(self.blocks))

    def load_cache(self, codec: Codec) -> tuple[int, CodecCache] | None:
        """(number of blocks in the cache, cache) from the copy; None: there is no copy that fits the model and the stream."""
        try:
            tensors = index_safetensors(self._cache_path)
            with open(self._cache_path, "rb") as file:
                found = {}
                for tensor in tensors:
                    name = ".".join(tensor.path)
                    values = np.empty(tensor.shape, tensor.dtype)
                    read_into(file, tensor, values)
                    found[name] = values
            number = int(found.pop("committed")[0])
            cached_blocks = found["encoder_keys"].shape[3] // codec.config.tokens_per_block
            empty = codec.new_cache(num_blocks=cached_blocks + 1)
            named = _named(empty)
            if number > len(self.blocks) or found.keys() != named.keys():
                return None
            cache = [
                jax.device_put(found[name].astype(leaf.dtype).reshape(leaf.shape), leaf.sharding)
                for name, leaf in named.items()
            ]
        except FileNotFoundError:
            return None
        except (CheckpointError, KeyError, ValueError, IndexError, OSError) as error:
            log.warning("The copy of the cache beside %s cannot be used: %s", self.path, error)
            return None
        return number, jax.tree.unflatten(jax.tree.structure(empty), cache)

    def tokens(self) -> Iterator[BlockTokens]:
        """The tokens of all blocks recorded so far."""
        return (block.tokens for block in read_token_stream(self.path)[1])

    def append(self, tokens: BlockTokens, num_frames: int, **about: Any) -> None:
        """Appends one block to the stream.

        Args:
          tokens: the block's tokens.
          num_frames: the number of its frames.
          about: further values of the block, which `blocks` gives back when the run is resumed.
        """
        self._writer.append(tokens, num_frames, **about)

    def copy_cache(self, cache: CodecCache) -> None:
        """Writes a copy of the cache if the last one is old enough. A failure is only logged; resuming then takes longer."""
        started = time.monotonic()
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
        if size > _MAX_COPY_BYTES or started - self._last_copy <= self._copy_interval:
            return
        try:
            self._writer.sync()
            tree = {name: np.asarray(leaf) for name, leaf in _named(cache).items()}
            with atomic_open(self._cache_path, make_folders=False) as file:
                write_safetensors(file, tree | {"committed": np.array([self._writer.num_blocks])})
        except OSError as error:
            log.warning("The cache could not be copied beside %s: %s", self.path, error)
        self._last_copy = time.monotonic()
        self._copy_interval = max(_COPY_SECONDS, _COPY_SHARE * (self._last_copy - started))

    def finish(self) -> None:
        """Marks the stream as complete for its readers."""
        self._writer.finish()

    def close(self) -> None:
        """Closes the stream. The files stay for a later run."""
        self._writer.close()


def _paths(path: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """The paths of the token stream and of the copy of the cache."""
    return path, path.with_name(path.name + ".cache")


def _named(cache: CodecCache) -> dict[str, Any]:
    """{name: array} of the cache, as the copy stores it."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="_"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(cache)
    }

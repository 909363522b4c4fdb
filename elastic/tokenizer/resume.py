"""What a tokenization leaves on disk while it runs, so that an interrupted one goes on at the last whole block.

Two files: a token stream, to which every block is appended when it is done, and now and then a copy of the cache. What a block's numbers
depend on is the cache; it is taken from the copy, and the blocks recorded since go through the model once, with the count that is known.
So the result is that of an unbroken run.
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

_COPY_SECONDS = 30.0  # between two copies, at least
_COPY_SHARE = 20  # and so many times as long as a copy takes
_MOST_COPY_BYTES = (
    4 << 30
)  # a cache larger than this is not copied: a run that goes on repeats one pass for every block


class ResumeError(ValueError):
    """A recording that does not belong to this run; says which and why."""


def remove_resume_log(path: str | os.PathLike) -> None:
    """Removes the files of a recording, where there are any."""
    for file in _files(pathlib.Path(path)):
        file.unlink(missing_ok=True)


class ResumeLog:
    """The files of one tokenization.

    Args:
      path: of the token stream; the copy of the cache lies beside it.
      about: what the result depends on, as JSON knows it: a recording of other things is refused.
      header: more for readers of the stream.

    Attributes:
      blocks: what an earlier run recorded.

    Raises:
      ResumeError: there is one already, of another run.
      OSError: the files cannot be read or written.
    """

    def __init__(self, path: str | os.PathLike, about: dict[str, Any], header: dict[str, Any]):
        self.path = pathlib.Path(path)
        _, self._cache_path = _files(self.path)
        self.blocks: list[Recorded] = []
        self._copied, self._wait = time.monotonic(), _COPY_SECONDS
        if not self.path.exists() or not self.path.stat().st_size:
            self.path.unlink(missing_ok=True)
            self._writer = TokenStreamWriter(self.path, header | {"run": about})
            return
        try:
            found, blocks = read_token_stream(self.path)
            self.blocks = list(blocks)
        except TokenFileError as error:
            raise ResumeError(f"{error} Remove it to begin anew.") from error
        earlier = found.get("run")
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
        """The copy of the cache and the number of blocks it was made after, if there is one that fits what is recorded."""
        try:
            tensors = index_safetensors(self._cache_path)
            empty = codec.new_cache()
            named = _named(empty)
            with open(self._cache_path, "rb") as file:
                found = {}
                for tensor in tensors:
                    name = ".".join(tensor.path)
                    values = np.empty(tensor.shape, tensor.dtype)
                    read_into(file, tensor, values)
                    found[name] = values
            number = int(found.pop("committed")[0])
            if number > len(self.blocks) or found.keys() != named.keys():
                return None
            cache = [
                jax.device_put(found[name].astype(leaf.dtype).reshape(leaf.shape), leaf.sharding)
                for name, leaf in named.items()
            ]
        except FileNotFoundError:
            return None
        except (CheckpointError, KeyError, ValueError, IndexError, OSError) as error:
            log.warning("The copy of the cache beside %s is of no use: %s", self.path, error)
            return None
        return number, jax.tree.unflatten(jax.tree.structure(empty), cache)

    def tokens(self) -> Iterator[BlockTokens]:
        """The tokens of every block so far."""
        return (block.tokens for block in read_token_stream(self.path)[1])

    def append(self, tokens: BlockTokens, num_frames: int, **about: Any) -> None:
        """Records one block more."""
        self._writer.append(tokens, num_frames, **about)

    def copy_cache(self, cache: CodecCache) -> None:
        """Copies the cache if it is time to. Where it cannot be written the log says so: going on then takes longer."""
        started = time.monotonic()
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
        if size > _MOST_COPY_BYTES or started - self._copied <= self._wait:
            return
        try:
            self._writer.sync()
            tree = {name: np.asarray(leaf) for name, leaf in _named(cache).items()}
            with atomic_open(self._cache_path, make_folders=False) as file:
                write_safetensors(file, tree | {"committed": np.array([self._writer.num_blocks])})
        except OSError as error:
            log.warning("The cache could not be copied beside %s: %s", self.path, error)
        self._copied = time.monotonic()
        self._wait = max(_COPY_SECONDS, _COPY_SHARE * (self._copied - started))

    def finish(self) -> None:
        """Tells readers that all blocks are there."""
        self._writer.finish()

    def close(self) -> None:
        """Leaves the files for a later run."""
        self._writer.close()


def _files(path: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """The token stream, and the copy of the cache."""
    return path, path.with_name(path.name + ".cache")


def _named(cache: CodecCache) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="_"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(cache)
    }

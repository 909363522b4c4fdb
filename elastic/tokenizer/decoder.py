"""Tokens to frames. Tokens of another model, or of other weights, are refused."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import UInt8

from elastic.config import ElasticTokConfig
from elastic.patches import unpatchify
from elastic.tiles import FrameLayout
from elastic.tokenizer.block_codec import Codec, CodecCache
from elastic.tokenizer.frame_tiles import TileGatherer
from elastic.tokens import BlockTokens, TokenizedClip
from elastic.tokens.same_weights import are_apart

# A block and the number of its real frames: the last block of a clip may be short.
BlockAndLength = tuple[BlockTokens, int]


def blocks_of(tokens: TokenizedClip) -> Iterator[BlockAndLength]:
    """The blocks of a token record, all tiles of one after the other, each with its number of real frames."""
    for number, block in enumerate(tokens.blocks):
        left = tokens.num_frames - number // tokens.num_tiles * tokens.frames_per_block
        yield block, min(tokens.frames_per_block, left)


def decode_blocks(
    codec: Codec,
    weights: dict[str, Any],
    blocks: Iterable[BlockAndLength],
    *,
    window_blocks: int,
    context: str,
    num_blocks: int | None = None,
    layout: FrameLayout | None = None,
    batch: int = 1,
) -> Iterator[UInt8[np.ndarray, "n rows columns 3"]]:
    """The frames of one block after the other, each trimmed to its real frames.

    Args:
      codec: the programs of the model. Those of another window are compiled anew.
      weights: the parameters as `Codec.stored` gives them.
      blocks: the tokens of a clip from its first block on, all tiles of a block one after the other. A block whose last tiles are
        missing is left out.
      window_blocks: blocks in one context when the tokens were made.
      context: 'restart' empties the context whenever the window is full, 'carry' does not.
      num_blocks: how many blocks there are; None: not known.
      layout: how the frames lie in tiles; None: they are the only one.
      batch: tiles of a block that go through the model at once.

    Raises:
      ValueError: a block holds tokens that the model does not have.
    """
    config = codec.config
    if window_blocks != codec.window_blocks:
        codec = Codec(config, dtype=codec.dtype, mesh=codec.mesh, window_blocks=window_blocks)
    if layout is None:
        layout = FrameLayout("crop", config.resolution, (config.resolution, config.resolution))
    tiles = layout.num_tiles
    batch = min(batch, tiles)
    groups = [range(first, min(tiles, first + batch)) for first in range(0, tiles, batch)]
    caches: dict[int, CodecCache] = {}
    entries = iter(blocks)
    for number in itertools.count():
        block = list(itertools.islice(entries, tiles))
        if len(block) < tiles:
            return
        if context == "restart" and number % window_blocks == 0:
            caches.clear()
        gathered = TileGatherer(layout)
        for which, group in enumerate(groups):
            parts = [block[tile][0] for tile in group]
            for tile, part in zip(group, parts, strict=True):
                check_values(part, number * tiles + tile, config)
            cache = caches.pop(which, None)
            if cache is None:
                cache = codec.new_decoder_cache(batch, num_blocks=num_blocks)
            cache, decoded = _decoded(codec, weights, cache, parts, rounded=tiles == 1)
            if num_blocks != 1:
                caches[which] = cache
            for tile, frames in zip(group, decoded, strict=False):  # the last group may be short
                gathered.add(tile, frames[: block[tile][1]])
        yield gathered.frames


def _decoded(
    codec: Codec,
    weights: dict[str, Any],
    cache: CodecCache,
    parts: list[BlockTokens],
    *,
    rounded: bool,
) -> tuple[CodecCache, np.ndarray]:
    """The cache after a block of some tiles, and their frames [batch, frames, rows, columns, 3].

    Args:
      codec: the programs of the model.
      weights: the parameters as `Codec.stored` gives them.
      cache: of the blocks before; of a batch of as many tiles, or more.
      parts: the tokens of the tiles.
      rounded: whether the frames are 8-bit; otherwise they are float32 levels, to be blended.
    """
    config, batch = codec.config, len(cache.num_blocks)
    shape = (batch, config.tokens_per_block, *parts[0].values.shape[1:])
    padded, num_kept = np.zeros(shape, parts[0].values.dtype), np.ones(batch, np.int32)
    for k, part in enumerate(parts):
        padded[k, : part.num_kept], num_kept[k] = part.values, part.num_kept
    cache, pixels = codec.decode(weights, cache, padded, num_kept, rounded=rounded)
    size = (config.resolution, config.resolution)
    return cache, np.asarray(
        unpatchify(np.asarray(pixels), config.patch_size, *size, config.token_order)
    )


def check_maker(
    header: Mapping[str, Any],
    config: ElasticTokConfig,
    *,
    model_id: str,
    fingerprint: tuple[float, ...],
) -> None:
    """Refuses tokens of another model, or of other weights.

    Args:
      header: the fields of the `TokenizedClip`.
      config: the model that is to decode them.
      model_id: what messages call it.
      fingerprint: numbers that tell its weights from others.

    Raises:
      ValueError: the tokens were made by another model.
    """
    maker = f"These tokens were made by {header.get('model_id')!r}"
    if header.get("config_hash") != config.config_hash():
        raise ValueError(
            f"{maker} (config {header.get('config_hash')}), this model is "
            f"{model_id!r} (config {config.config_hash()}); load the model that made them."
        )
    weights = header.get("weights")
    if weights and are_apart(weights, fingerprint):
        raise ValueError(
            f"{maker}, whose weights differ from those of {model_id!r} as it is now; load the model that made them."
        )
    for name in ("resolution", "tokens_per_block", "frames_per_block", "bottleneck_type"):
        if header.get(name) != getattr(config, name):
            raise ValueError(
                f"These tokens say {name}={header.get(name)!r}, but their model has {getattr(config, name)!r}; "
                "tokenize the clip again."
            )


def check_values(block: BlockTokens, number: int, config: ElasticTokConfig) -> None:
    """Refuses tokens that the model does not have: vectors of another width, or indices beyond its codebook.

    Raises:
      ValueError: names the block.
    """
    width = block.values.shape[1:]
    if width and width != (config.code_dim,):
        raise ValueError(
            f"Block {number} holds vectors of {width[0]} numbers; the model's have {config.code_dim}."
        )
    largest = None if block.indices is None else block.indices.max()
    if largest is not None and largest >= config.codebook_size:
        raise ValueError(
            f"Block {number} holds index {largest}; the model's codes end at {config.codebook_size - 1}."
        )

"""Tokens to frames. Tokens of another model, or of other weights, are refused."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import UInt8

from elastic.config import ElasticTokConfig
from elastic.patches import unpatchify
from elastic.tiles import FrameLayout
from elastic.tokenizer.block_codec import Codec
from elastic.tokenizer.frame_tiles import from_tile
from elastic.tokens import BlockTokens, TokenizedClip
from elastic.tokens.same_weights import are_apart

# A block and the number of its real frames: the last block of a clip may be short.
BlockAndLength = tuple[BlockTokens, int]


def blocks_of(tokens: TokenizedClip) -> Iterator[BlockAndLength]:
    """The blocks of a token record, each with its number of real frames."""
    left = tokens.num_frames
    for block in tokens.blocks:
        yield block, min(tokens.frames_per_block, left)
        left -= tokens.frames_per_block


def decode_blocks(
    codec: Codec,
    weights: dict[str, Any],
    blocks: Iterable[BlockAndLength],
    *,
    window_blocks: int,
    context: str,
    num_blocks: int | None = None,
    layout: FrameLayout | None = None,
) -> Iterator[UInt8[np.ndarray, "n rows columns 3"]]:
    """The frames of one block after the other, each trimmed to its real frames.

    Args:
      codec: the programs of the model. Those of another window are compiled anew.
      weights: the parameters as `Codec.stored` gives them.
      blocks: the tokens of a clip from its first block on.
      window_blocks: blocks in one context when the tokens were made.
      context: 'restart' empties the context whenever the window is full, 'carry' does not.
      num_blocks: how many blocks there are; None: not known.
      layout: how the frames lie in the tile; None: they are the tile.

    Raises:
      ValueError: a block holds tokens that the model does not have.
    """
    config = codec.config
    if window_blocks != codec.window_blocks:
        codec = Codec(config, dtype=codec.dtype, mesh=codec.mesh, window_blocks=window_blocks)
    cache = codec.new_decoder_cache(num_blocks=num_blocks)
    for number, (block, num_frames) in enumerate(blocks):
        if context == "restart" and number % window_blocks == 0:
            cache = codec.new_decoder_cache(num_blocks=num_blocks)
        check_values(block, number, config)
        shape = (1, config.tokens_per_block, *block.values.shape[1:])
        padded = np.zeros(shape, block.values.dtype)
        padded[0, : block.num_kept] = block.values
        num_kept = np.array([block.num_kept], np.int32)
        cache, pixels = codec.decode(weights, cache, padded, num_kept)
        size = (config.resolution, config.resolution)
        frames = np.asarray(
            unpatchify(np.asarray(pixels[0]), config.patch_size, *size, config.token_order)
        )
        frames = frames[:num_frames]
        yield frames if layout is None or layout.fit == "crop" else from_tile(layout, frames)


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

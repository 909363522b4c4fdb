"""Batches of clips of one length as arrays of fixed shapes, as a training loop under `jax.jit` takes them."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from elastic.config import ElasticTokConfig
from elastic.patches import unpatchify
from elastic.tokenizer.arrays import as_frames, to_numpy
from elastic.tokenizer.block_codec import Codec
from elastic.tokens import TokenizedClip


class TokenBatch(NamedTuple):
    """The tokens of a batch. The shapes depend on the batch, the clips' length and the model, not on the counts.

    Attributes:
      ids: int32 [clips, blocks, tokens_per_block] (FSQ), -1 where there is no token; or float32 vectors
        [clips, blocks, tokens_per_block, d] (VAE), 0 there.
      mask: bool [clips, blocks, tokens_per_block], which tokens are real.
      counts: int32 [clips, blocks], the tokens of each block.
    """

    ids: np.ndarray
    mask: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, clips: list[TokenizedClip]) -> "TokenBatch":
        """The batch of clips of one length."""
        fill = -1 if clips[0].bottleneck_type == "fsq" else 0
        ids, masks = zip(*(clip.padded(fill) for clip in clips), strict=True)
        return cls(np.stack(ids), np.stack(masks), np.stack([clip.counts for clip in clips]))


def clips_of(
    videos: Any, *, value_range: tuple[float, float] | None, layout: str | None
) -> list[np.ndarray]:
    """The clips of an array with a batch axis, or of a list of arrays of one length.

    Raises:
      ValueError: there is no batch axis, or the clips differ in length.
    """
    if not isinstance(videos, list | tuple):
        videos = to_numpy(videos)
        if videos.ndim != 5:
            raise ValueError(
                f"A batch of shape {videos.shape} must have five axes, [clips, frames, height, width, 3]; for one clip give "
                "frames[None], or call encode."
            )
    if layout is not None:
        layout = layout.removeprefix("B")
    clips = [as_frames(video, value_range=value_range, layout=layout) for video in videos]
    lengths = sorted({len(clip) if clip.ndim == 4 else 1 for clip in clips})
    if not clips:
        raise ValueError("A batch of no clips cannot be tokenized.")
    if len(lengths) > 1:
        raise ValueError(
            f"Clips of {' and '.join(map(str, lengths))} frames make no array; give clips of one length, or call encode_many."
        )
    return clips


def decode_batch(
    codec: Codec,
    weights: dict[str, Any],
    ids: Any,
    counts: Any,
    *,
    num_frames: int | None,
) -> UInt8[np.ndarray, "clips frames rows columns 3"]:
    """The frames of a batch of tokens.

    Args:
      codec: the programs of the model.
      weights: the parameters as `Codec.stored` gives them.
      ids: as in `TokenBatch`; of a block, only the first `counts` tokens are read.
      counts: int32 [clips, blocks].
      num_frames: frames of each clip; None: whole blocks.

    Raises:
      ValueError: the arrays do not fit each other or the model.
    """
    config, ids, counts = codec.config, to_numpy(ids), to_numpy(counts)
    _check(ids, counts, config)
    num_clips, num_blocks = counts.shape
    whole = num_blocks * config.frames_per_block
    num_frames = whole if num_frames is None else num_frames
    if not whole - config.frames_per_block < num_frames <= whole:
        raise ValueError(
            f"{num_frames=} must fill {num_blocks} blocks of {config.frames_per_block} frames, the last at least in part."
        )
    kept = np.arange(config.tokens_per_block) < counts[..., None]
    values = np.where(kept.reshape(*kept.shape, *(1,) * (ids.ndim - 3)), ids, 0)
    values = values.astype(np.int32 if config.bottleneck_type == "fsq" else np.float32)
    largest = values.max() if config.bottleneck_type == "fsq" else 0
    least = values.min() if config.bottleneck_type == "fsq" else 0
    if largest >= config.codebook_size or least < 0:
        raise ValueError(
            f"ids from {least} to {largest} must lie in 0 to {config.codebook_size - 1}, the model's codes."
        )
    cache = codec.new_decoder_cache(num_clips, num_blocks=num_blocks)
    blocks = []
    for block in range(num_blocks):
        cache, pixels = codec.decode(
            weights, cache, values[:, block], counts[:, block].astype(np.int32)
        )
        size = (config.resolution, config.resolution)
        blocks.append(
            np.asarray(unpatchify(np.asarray(pixels), config.patch_size, *size, config.token_order))
        )
    return np.concatenate(blocks, axis=1)[:, :num_frames]


def _check(ids: np.ndarray, counts: np.ndarray, config: ElasticTokConfig) -> None:
    expected = (config.tokens_per_block,)
    if config.bottleneck_type == "vae":
        expected = (*expected, config.code_dim)
    if counts.ndim != 2 or ids.shape != (*counts.shape, *expected) or 0 in counts.shape:
        raise ValueError(
            f"ids of shape {ids.shape} and counts of shape {counts.shape} must have shapes [clips, blocks, "
            f"{', '.join(map(str, expected))}] and [clips, blocks]; of one clip give ids[None] and counts[None]."
        )
    kind = "iu" if config.bottleneck_type == "fsq" else "f"
    if ids.dtype.kind not in kind or counts.dtype.kind not in "iu":
        raise ValueError(
            f"ids of type {ids.dtype} and counts of type {counts.dtype} must be "
            f"{'integers' if kind == 'iu' else 'float32 vectors'} and integers."
        )
    if counts.min() < 1 or counts.max() > config.tokens_per_block:
        raise ValueError(
            f"counts from {counts.min()} to {counts.max()} must lie in 1 to {config.tokens_per_block}, the tokens of a block."
        )

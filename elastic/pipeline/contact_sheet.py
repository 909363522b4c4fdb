"""Pictures of clips of a data set: a frame of the original beside the frame that its tokens decode to."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from elastic.io.read_options import read_arguments
from elastic.media import MediaError
from elastic.media.location import Place
from elastic.pipeline.shard_numbers import ListedClip
from elastic.tokenizer import ElasticTokenizer, EncodeOptions
from elastic.tokenizer.clip_source import open_clip
from elastic.tokens import TokenShards

log = logging.getLogger(__name__)

_COLUMNS = 4
_MOST_LETTERS = 34  # of an id


class Sample(NamedTuple):
    """A clip in the picture: what is listed of it, and its first frame, uint8 [rows, columns, 3] each."""

    clip: ListedClip
    original: np.ndarray
    reconstruction: np.ndarray


Draw = Callable[[Path, Sequence[ListedClip]], list[Sample]]


def sample_clips(
    tokenizer: ElasticTokenizer,
    inputs: Mapping[str, Place],
    options: EncodeOptions,
    folder: Path,
    clips: Sequence[ListedClip],
) -> list[Sample]:
    """The first frames of clips, as far as their originals are there and can be read.

    Args:
      tokenizer: the model that made the tokens.
      inputs: {id: file} of the data set.
      options: which frames are read.
      folder: has the shards.
      clips: the clips.
    """
    found = []
    for clip in clips:
        if clip.id not in inputs:
            continue
        shards = TokenShards(folder / f"{clip.shard}.parquet")
        tokens = shards[shards.find(clip.id)]
        try:
            opened = open_clip(
                inputs[clip.id],
                tokenizer.config.resolution,
                rate=options.rate,
                max_frames=1,
                **read_arguments(options),
            )
            original = next(opened.blocks(1))[0]
        except (MediaError, StopIteration) as error:
            log.debug("%s is not drawn: %s", clip.id, error)
            continue
        first_block = tokens[: tokens.num_tiles]
        found.append(Sample(clip, original, tokenizer.decode(first_block)[0]))
    return found


def num_rows(samples: Sequence[Sample]) -> int:
    """The rows of the picture."""
    return -(-len(samples) // _COLUMNS)


def draw_samples(figure: Any, samples: Sequence[Sample]) -> None:
    """Draws the samples into a figure of matplotlib, four in a row."""
    grid = figure.subplots(num_rows(samples), _COLUMNS, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, sample in zip(grid.flat, samples, strict=False):
        clip = sample.clip
        if sample.original.shape == sample.reconstruction.shape:
            axes.imshow(np.concatenate([sample.original, sample.reconstruction], axis=1))
        else:
            axes.imshow(sample.reconstruction)
        name = clip.id if len(clip.id) <= _MOST_LETTERS else f"...{clip.id[3 - _MOST_LETTERS :]}"
        axes.set_title(
            f"{name}\n{clip.psnr:.1f} dB, {clip.mean_tokens:g} tokens a block",
            fontsize=7,
            loc="left",
        )

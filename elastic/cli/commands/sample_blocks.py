"""Blocks of clips to fit something on: flags, and reading."""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import UInt8

from elastic.cli import app
from elastic.cli.flags import INFERENCE
from elastic.cli.script import Flag
from elastic.config import ElasticTokConfig

_SHARED = {flag.name: flag for flag in INFERENCE.flags}
INPUT = (
    Flag("input_path", "", "a folder of images and videos that nothing will be measured on", required=True),
    _SHARED["fps"],
    Flag("max_frames", 96, "take no more frames of a video than this; 0: all"),
)  # fmt: skip
BLOCKS_PER_CLIP = Flag(
    "blocks_per_clip", 3, "blocks taken of a video, from its first to its last whole one"
)

Block = UInt8[np.ndarray, "n rows columns 3"]


def sampled_blocks(flags: app.Values, config: ElasticTokConfig) -> Iterator[list[Block]]:
    """The blocks of one clip after another, with a progress bar. What cannot be read is left out, with a warning.

    Args:
      flags: with those above.
      config: the model that the blocks are for.

    Raises:
      ValueError: nothing could be read.
    """
    from tqdm import tqdm

    from elastic import media
    from elastic.pipeline import tokenize_files

    files = list(tokenize_files.find_inputs(flags["input_path"]))
    bad = []
    for file in tqdm(files, desc="measuring", unit="clip", disable=None):
        try:
            with media.open_clip(
                file,
                resolution=config.resolution,
                rate=flags["fps"] or None,
                max_frames=flags["max_frames"] or None,
            ) as reader:
                blocks = list(reader.blocks(config.frames_per_block))
                chosen = spread(blocks, flags["blocks_per_clip"])
        except (media.MediaError, OSError) as error:
            app.log.warning("Left out: %s", error)
            bad.append(file)
            continue
        yield chosen
    if len(bad) == len(files):
        raise ValueError(
            f"--input_path={flags['input_path']}: none of {len(files)} files could be read, the first is {bad[0]}; give a "
            "folder of images or videos."
        )


def spread(blocks: Sequence[Block], most: int) -> list[Block]:
    """Up to `most` blocks at equal distances; a short last block is used only where it is the only one."""
    whole = [block for block in blocks if len(block) == len(blocks[0])]
    most = min(most, len(whole))
    places = {round(i * (len(whole) - 1) / max(most - 1, 1)) for i in range(most)}
    return [whole[place] for place in sorted(places)]


def check_at_least(flags: app.Values, name: str, least: int, why: str) -> None:
    """Refuses a flag below its least value.

    Raises:
      ValueError: it is below.
    """
    if flags[name] < least:
        raise ValueError(f"--{name}={flags[name]} must be at least {least}: {why}.")

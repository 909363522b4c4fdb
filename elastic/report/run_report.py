"""report.json: what was asked, what was tokenized, with which model, and what it cost.

`report.schema.json` (JSON Schema) describes every key.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from elastic.tokens import BlockTokens, TokenizedClip, tokens_of_tiles

FORMAT = {"format": "elastictok-report", "version": 1}


def build_report(
    clip: TokenizedClip,
    *,
    per_block: Sequence[Mapping[str, Any]],
    totals: Mapping[str, Any],
    asked: Mapping[str, Any] | None = None,
    file: Mapping[str, Any] | None = None,
    run: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The report of one run, ready for `write_json`.

    With tiles, an entry of `blocks` has the tokens of all of them, the mean of their losses weighted by their shares of the frame
    (the error of the frame is at most that), and `tiles`: the same of each tile, row after row.

    Args:
      clip: the tokens, with counts, losses and `met`.
      per_block: further values of each block, such as `passes`, `seconds` and `psnr` in dB.
      totals: further values of the whole run, such as `seconds` and `psnr` in dB.
      asked: the options of the run, as `EncodeOptions.to_json` gives them.
      file: the original: `name`, and `rate` in frames per second.
      run: what ran: versions, date, devices and dtype.

    Returns:
      The format mark, `asked`, `file`, `run`, `clip` (what was tokenized and how), `totals` and `blocks`.

    Raises:
      ValueError: `per_block` has more or fewer entries than there are blocks.
    """
    if len(per_block) != clip.num_blocks:
        raise ValueError(f"{len(per_block)} entries for {clip.num_blocks} blocks; give one each.")
    tiles = clip.num_tiles
    blocks = [
        {**measured, **_block(clip, clip.blocks[number * tiles : (number + 1) * tiles])}
        for number, measured in enumerate(per_block)
    ]
    counts = clip.counts
    met = sum(block["met"] for block in blocks)
    sums: dict[str, Any] = {
        "frames": clip.num_frames,
        "blocks": len(blocks),
        "blocks_met": met,
        "blocks_not_met": len(blocks) - met,
        "tokens": clip.num_tokens,
        "mean_tokens": clip.mean_tokens,
        "min_tokens": int(counts.min()),
        "max_tokens": int(counts.max()),
        "share_of_tokens": clip.mean_tokens / clip.tokens_per_block,
        "bits": clip.num_bits,
        "bits_per_pixel": clip.bits_per_pixel,
        "compression_ratio": clip.compression_ratio,
        "kbit_per_second": clip.num_bits * clip.rate / clip.num_frames / 1000
        if clip.rate
        else None,
        "mean_loss": float(np.mean([block["loss"] for block in blocks])),
    }
    if all("psnr" in block for block in blocks):
        sums["worst_block"] = int(np.argmin([block["psnr"] for block in blocks]))
        sums["worst_block_psnr"] = blocks[sums["worst_block"]]["psnr"]
    if all("passes" in block for block in blocks):
        sums["passes"] = sum(block["passes"] for block in blocks)
        sums["passes_per_block"] = sums["passes"] / len(clip.blocks)
    if tiles > 1:
        sums["tiles"] = tiles
        sums["tiles_met"] = sum(block.met_threshold for block in clip.blocks)
    seconds = totals.get("seconds")
    if seconds:
        sums["frames_per_second"] = clip.num_frames / seconds
    about = {
        name: getattr(clip, name)
        for name in (
            "model_id config_hash bottleneck_type codebook_size resolution source pixel_aspect transfer rate is_image "
            "frames_per_block tokens_per_block threshold search window_blocks context"
        ).split()
    }
    if clip.fit != "crop":
        about |= {
            name: list(getattr(clip, name)) for name in ("frame", "tile_rows", "tile_columns")
        }
        about["fit"] = clip.fit
    given = {"asked": asked, "file": file, "run": run}
    return {
        **FORMAT,
        **{name: dict(value) for name, value in given.items() if value is not None},
        "clip": about,
        "totals": {**totals, **sums},
        "blocks": blocks,
    }


def _block(clip: TokenizedClip, tiles: Sequence[BlockTokens]) -> dict[str, Any]:
    """The entry of a block, from the tokens of its tiles."""
    if len(tiles) == 1:
        return _entry(tiles[0])
    whole = tokens_of_tiles(clip.layout, tiles)
    return _entry(whole) | {"tiles": [_entry(tile) for tile in tiles]}


def _entry(tokens: BlockTokens) -> dict[str, Any]:
    return {"kept": tokens.num_kept, "loss": tokens.loss, "met": tokens.met_threshold}

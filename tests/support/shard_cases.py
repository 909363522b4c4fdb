"""Rows of shards with clips of many lengths."""

import numpy as np

from elastic.tokens import BlockTokens, TokenizedClip

FULL, WIDTH = 24, 3  # tokens of a block, numbers of a vector
SIZES = {"fsq": 64_000, "large fsq": 100_000, "vae": None}  # codebooks: 2 and 4 bytes an index


def make_clip(number, counts, size, rng, **changes):
    """A clip whose block b says in its first two numbers which clip and block it is."""
    blocks = []
    for b, count in enumerate(counts):
        if size is None:
            values = {"vectors": rng.normal(size=(count, WIDTH)).astype(np.float32)}
        else:
            values = {"indices": rng.integers(0, size, count)}
        next(iter(values.values()))[:2].flat[:2] = (number, b)
        loss = float("nan") if rng.random() < 0.2 else rng.random()
        blocks.append(BlockTokens(num_kept=count, loss=loss, met_threshold=loss < 0.5, **values))
    is_image = len(counts) == 1 and number % 2 == 0
    fields = dict(
        bottleneck_type="vae" if size is None else "fsq", codebook_size=size, tokens_per_block=FULL,
        frames_per_block=4, num_frames=1 if is_image else 4 * len(counts) - number % 4, is_image=is_image, resolution=64,
        source=(640 + number, 480), rate=0.0 if is_image else 24 / 1.001, model_id="a model", config_hash="0123abcd",
        threshold=0.5, search="binary", window_blocks=4, context="carry", weights=(0.5, -1.0),
    )  # fmt: skip
    return TokenizedClip(blocks=tuple(blocks), **(fields | changes))


def make_rows(size, *, clips=40, first=0, **changes):
    rng = np.random.default_rng(first)
    return [
        (f"folder/{number}.mp4", make_clip(number, rng.integers(2, FULL + 1, rng.integers(1, 12)).tolist(), size, rng, **changes))
        for number in range(first, first + clips)
    ]  # fmt: skip


def make_tiled_rows(size, *, first=0):
    """Rows of clips whose frames have several sizes, and lie in one to six tiles."""
    rng = np.random.default_rng(first)
    layouts = [
        ((100, 64), (0,), (0, 36)),
        ((64, 64), (0,), (0,)),
        ((150, 120), (0, 56), (0, 43, 86)),
    ]
    rows = []
    for number, (frame, tile_rows, tile_columns) in enumerate(layouts, first):
        counts = rng.integers(2, FULL + 1, 2 * len(tile_rows) * len(tile_columns)).tolist()
        clip = make_clip(
            number, counts, size, rng, is_image=False, rate=24.0, num_frames=7, fit="tile",
            frame=frame, source=frame, tile_rows=tile_rows, tile_columns=tile_columns,
        )  # fmt: skip
        rows.append((f"tiles/{number}.mp4", clip))
    return rows

"""Tokenized clips to be written and read."""

import numpy as np

from elastic.tokens import BlockTokens, TokenizedClip


def example(bottleneck_type="fsq", counts=(3, 8, 5)) -> TokenizedClip:
    rng = np.random.default_rng(0)
    fsq = bottleneck_type == "fsq"
    return TokenizedClip(
        blocks=tuple(
            BlockTokens(
                num_kept=n,
                loss=0.001 * n,
                met_threshold=n < 8,
                indices=rng.integers(0, 64_000, n) if fsq else None,
                vectors=None if fsq else rng.normal(size=(n, 4)),
            )
            for n in counts
        ),
        bottleneck_type=bottleneck_type,
        codebook_size=64_000 if fsq else None,
        tokens_per_block=8,
        frames_per_block=4,
        num_frames=4 * len(counts) - 1,
        is_image=False,
        resolution=16,
        source=(320, 240),
        rate=24.0,
        model_id="small",
        config_hash="0a1b2c",
        threshold=0.006,
        search="binary",
        window_blocks=4,
        context="carry",
    )

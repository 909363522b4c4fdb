"""Makes a small model that is a linear transform codec of the data, to train from or to look at: no step is taken.

    python3 scripts/tools/linear_start.py --input_path=TRAIN --load_elastic_config=small-fsq --output_folder=outputs/start

`--init=linear` of training does the same from the pieces that it trains on. This tool looks at whole frames as
tokenizing sees them, and at quiet blocks more often: PSNR is a logarithm, so where little happens a small error counts as much as
a large one elsewhere. That was worth 0.1 dB to `small-fsq`.
"""

import argparse
import math
import pathlib
import sys

import jax
import numpy as np
from jaxtyping import UInt8

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from elastic.checkpoints.params import save_pretrained
from elastic.config import ElasticTokConfig, load_config, update_config
from elastic.data.config import DataConfig
from elastic.data.dataset import TrainingData, load_index
from elastic.model import init_params
from elastic.model.linear_init import linear_init, sample_size
from elastic.patches import unpatchify

_FLOOR = 5.0  # of the mean squared difference of neighbours, in levels: below, all blocks are quiet


def squares_of(
    data: TrainingData, config: ElasticTokConfig, *, blocks: int, count: int
) -> UInt8[np.ndarray, "n s"]:
    """Squares for `linear_init`, drawn from random blocks by the inverse of how much happens in these.

    Args:
      data: whole frames.
      config: the model.
      blocks: blocks to look at.
      count: squares to draw.
    """
    rng = np.random.default_rng(0)
    found, busy = [], []
    for number in rng.integers(data.num_sequences, size=blocks):
        row = data.sequence(int(number))
        good = np.flatnonzero(row.filled[0])
        if not len(good):
            continue
        patches = row.patches.reshape(data.num_blocks, config.tokens_per_block, -1)
        side = config.resolution
        frames = unpatchify(
            patches[rng.choice(good)], config.patch_size, side, side, config.token_order
        )
        x = frames.astype(np.float32)
        in_time, down, right = (np.square(np.diff(x, axis=axis)).mean() for axis in (0, 1, 2))
        found.append(frames)
        busy.append((2 * in_time + down + right) / 4)
    chance = 1 / (np.array(busy) + _FLOOR)
    time, rows, columns = sample_size(config)
    squares = np.empty((count, time * rows * columns * 3), np.uint8)
    for number, block in enumerate(rng.choice(len(found), size=count, p=chance / chance.sum())):
        frames = found[block]
        first = rng.integers(len(frames) // time) * time
        # Anywhere in the frame, and every second one mirrored: the more different squares, the better.
        top, left = (
            rng.integers(size - part + 1)
            for size, part in zip(frames.shape[1:], (rows, columns), strict=False)
        )
        square = frames[first : first + time, top : top + rows, left : left + columns]
        squares[number] = square[:, :, :: -1 if number % 2 else 1].reshape(-1)
    return squares


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--input_path", required=True, help="images and videos, as in training")
    parser.add_argument("--load_elastic_config", default="small-fsq", help="a preset or a folder")
    parser.add_argument("--update_elastic_config", default="", help='"dict(hidden_size=256)"')
    parser.add_argument("--output_folder", type=pathlib.Path, required=True, help="a new folder")
    parser.add_argument("--blocks", type=int, default=1500, help="blocks to draw squares from")
    parser.add_argument(
        "--squares", type=int, default=30_000, help="squares to compute it from; 60,000 took 14 GB"
    )
    options = parser.parse_args()
    if (options.output_folder / "model.safetensors").exists():
        parser.error(f"--output_folder={options.output_folder} holds a model; name a new folder.")
    config = update_config(load_config(options.load_elastic_config), options.update_elastic_config)
    data_config = DataConfig(path=options.input_path, image_blocks=2, workers=0)
    data = TrainingData(data_config, config, index=load_index(data_config, config))
    blocks = min(options.blocks, 2 * data.num_sequences)
    squares = squares_of(data, config, blocks=blocks, count=options.squares)
    drawn = jax.jit(lambda: init_params(config, jax.random.key(0)))()
    save_pretrained(options.output_folder, config, linear_init(drawn, config, squares))
    print(f"{options.output_folder}: a linear codec of {math.prod(squares.shape):,} numbers.")


if __name__ == "__main__":
    main()

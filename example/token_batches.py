"""Batches for training a generator, from the shards that scripts/tokenize_dataset.py wrote.

    python3 example/token_batches.py FOLDER

Prints a few batches, and shows that an iterator goes on where another one was saved.
"""

import json
import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from elastic.tokens import TokenShards
from elastic.tokens.batches import Vocabulary, token_batches


def main(folder: str) -> None:
    """Reads a few batches of the folder's shards."""
    shards = TokenShards(folder)
    vocabulary = Vocabulary.of(shards)
    print(shards)
    print(f"{vocabulary.size} ids: 4 signs, {vocabulary.tokens_per_block} counts, then the codes")

    # On several hosts: process_index=jax.process_index(), process_count=jax.process_count().
    length = 2 * (vocabulary.tokens_per_block + 3)
    batches = iter(token_batches(shards, sequence_length=length, batch_size=4, seed=1))
    for _ in range(3):
        batch = next(batches)
        filled = (batch.segment_ids > 0).mean()
        print(
            f"tokens {batch.tokens.shape}, {batch.segment_ids.max(1).tolist()} pieces, {filled:.0%} filled"
        )

    place = json.dumps(batches.get_state())  # goes into the generator's checkpoint
    expected = next(batches)
    again = iter(token_batches(shards, sequence_length=length, batch_size=4, seed=1))
    again.set_state(json.loads(place))
    print("goes on with the same batch:", np.array_equal(next(again).tokens, expected.tokens))

    # What a generator wrote becomes blocks again; a TokenizedClip of them is decoded by the model.
    first = batch.segment_ids[0] == 1
    vectors = None if batch.vectors is None else batch.vectors[0][first]
    print("the first piece:", vocabulary.blocks(batch.tokens[0][first], vectors))


if __name__ == "__main__":
    main(sys.argv[1])

"""Tokenizes clips in a job of Ray Data, and reads the tokens back in batches. Needs `pip install 'elastictok[ray]'`.

    python3 example/ray_data.py CLIPS OUTPUT_FOLDER [MODEL]

`python3 scripts/tokenize_dataset.py --engine=ray` does more: it resumes after a kill, notices changed files and lists bad ones.
This is for a job that does other things with the clips too.
"""

import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy as np
import pyarrow as pa
import ray
import ray.data

from elastic import ElasticTokenizer
from elastic.media import find_media
from elastic.pipeline.rows import clip_table
from elastic.tokenizer import EncodeOptions


class Tokenize:
    """An actor of the pool: it loads the model once."""

    def __init__(self, model: str, options: EncodeOptions):
        self._tokenizer, self._options = ElasticTokenizer.from_pretrained(model), options

    def __call__(self, batch: dict[str, np.ndarray]) -> pa.Table | dict[str, Any]:
        """A batch of paths -> a table with the columns of a shard."""
        clips = [(str(path), str(path)) for path in batch["path"]]
        table, bad = clip_table(self._tokenizer, clips, self._options)
        for name, reason in bad:
            print(f"{name}: {reason}", file=sys.stderr)
        return {} if table is None else table


def main(clips: str, folder: str, model: str = "small-fsq") -> None:
    """Tokenizes the clips of a folder, 16 frames of each, and reads the first batch back."""
    paths = ray.data.from_items([{"path": str(path)} for path in find_media(pathlib.Path(clips))])
    tokens = paths.repartition(2).map_batches(
        Tokenize,
        fn_constructor_args=(model, EncodeOptions(threshold=0.03, max_frames=16)),
        batch_size=4,
        compute=ray.data.ActorPoolStrategy(size=1),  # one for each accelerator, with num_gpus=1
        num_cpus=1,
    )
    tokens.write_parquet(folder)

    # What a generator reads: rows of several clips, of which only the columns it needs are loaded.
    rows = ray.data.read_parquet(folder, columns=["id", "counts", "tokens"])
    for batch in rows.iter_batches(batch_size=4, batch_format="numpy"):
        for name, counts, ids in zip(batch["id"], batch["counts"], batch["tokens"], strict=True):
            print(f"{name}: {len(counts)} blocks of {counts.tolist()} tokens, first ids {ids[:4]}")
        break


if __name__ == "__main__":
    main(*sys.argv[1:])

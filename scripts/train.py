"""Trains a tokenizer on a folder of images and videos; `--help` lists the flags."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from elastic import cli
from elastic.cli_flags_train import TRAIN


def train(flags: cli.Values) -> int:
    """Builds the configuration of a run and trains. A run that a signal stopped exits with 128 + its number."""
    from elastic import mesh

    hosts = mesh.Hosts(**flags.under("jax_distributed"))
    mesh.set_up_cpu()
    mesh.join_hosts(hosts)

    from elastic import train as training
    from elastic import train_flags

    elastic = train_flags.model_of(flags)
    finished = training.train(train_flags.run_of(flags, elastic), elastic)
    return 0 if finished.signal is None else 128 + finished.signal


if __name__ == "__main__":
    sys.exit(cli.run(TRAIN, train))

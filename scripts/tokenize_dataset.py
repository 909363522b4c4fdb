"""Tokenizes a data set into shards, in one process or many; `--help` lists the flags."""

import pathlib
import sys

# So that the documented command runs wherever the requirements are installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from elastic.cli import app
from elastic.cli.commands.tokenize_dataset import tokenize
from elastic.cli.flags import DATASET

if __name__ == "__main__":
    sys.exit(app.run(DATASET, tokenize))

"""Fits the order of a block's tokens to a model, so that groups that have more to say send more; `--help` lists the flags."""

import pathlib
import sys

# So that the documented command runs wherever the requirements are installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from elastic.cli import app
from elastic.cli.commands.fit_order import FIT_ORDER, fit_order

if __name__ == "__main__":
    sys.exit(app.run(FIT_ORDER, fit_order))

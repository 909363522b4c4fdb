"""Fits curves.json, from which the search takes its first guess of a block's token count; `--help` lists the flags."""

import pathlib
import sys

# So that the documented command runs wherever the requirements are installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from elastic.cli import app
from elastic.cli.commands.fit_curves import FIT_CURVES, fit_curves

if __name__ == "__main__":
    sys.exit(app.run(FIT_CURVES, fit_curves))

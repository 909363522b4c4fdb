"""Compiles training and inference for hardware one does not have; `--help` lists the flags."""

import pathlib
import sys

# So that the documented command runs wherever the requirements are installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from elastic.cli import app
from elastic.cli.commands.check_compile import CHECK, check_compile

if __name__ == "__main__":
    sys.exit(app.run(CHECK, check_compile))

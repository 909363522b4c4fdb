"""Takes the parameters out of a training state; `--help` lists the flags."""

import pathlib
import sys

# So that the documented command runs wherever the requirements are installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from elastic.cli import app
from elastic.cli.commands.params_only import CONVERT, convert

if __name__ == "__main__":
    sys.exit(app.run(CONVERT, convert))

"""Writes the flag tables of scripts/README.md anew, from the flags themselves."""

import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from elastic.cli.flag_tables import update_tables  # noqa: E402

README = ROOT / "scripts" / "README.md"

if __name__ == "__main__":
    README.write_text(update_tables(README.read_text(encoding="utf-8")), encoding="utf-8")

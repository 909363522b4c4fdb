"""Options that say how media files are read. Tokenizing, evaluation and training have them in records of their own."""

import importlib.util
from typing import Any

from elastic.io.options import Check, option

READERS = ("pyav", "decord")
FITS = ("crop", "pad", "stretch")  # those of `elastic.tiles` that a command offers
# Keyword arguments of `elastic.media.open_clip` and their defaults. The defaults give the frames of the released code.
READ_DEFAULTS = {"reader": "pyav", "exact_color": False, "fit": "crop"}


def _is_installed(reader: str) -> bool:
    return reader != "decord" or importlib.util.find_spec("decord") is not None


def reader_option() -> str:
    """The option `reader`."""
    return option(
        "pyav",
        "who decodes video: pyav, or decord (pip install decord), which gives the same frames; pyav reads what it shows otherwise",
        choices=READERS,
        check=Check(_is_installed, "is not installed here: pip install decord, or use pyav"),
    )


def exact_color_option() -> bool:
    """The option `exact_color`."""
    return option(
        False,
        "round the colours of 8-bit 4:2:0 video correctly, too; else they are up to 1.5 levels darker, as the released models saw them",
    )


def fit_option() -> str:
    """The option `fit`."""
    return option(
        "crop",
        "what becomes of a frame that is not square: crop takes its middle; pad takes all of it, with its border repeated around "
        "it; stretch squeezes all of it into a square. Decoding undoes pad and stretch",
        choices=FITS,
    )


def read_arguments(record: Any) -> dict[str, Any]:
    """The keyword arguments of `elastic.media.open_clip`, besides rate and number of frames, that a record of options holds."""
    return {name: getattr(record, name) for name in READ_DEFAULTS}

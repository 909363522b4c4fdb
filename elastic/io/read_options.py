"""Options that say how media files are read. Tokenizing, evaluation and training have them in records of their own."""

import importlib.util
from typing import Any

from elastic.io.options import Check, at_least, option

# What may be given as input, in the help of its flag; `elastic.media.inputs` reads it.
INPUTS = (
    "an image, a video, a folder or bucket of them; tar shards (clips-{000..009}.tar), Parquet files, "
    "hf_dataset::OWNER/NAME (hf_stream:: does not download it first), or a list (.txt, .csv, .jsonl)"
)
READERS = ("pyav", "decord")
# The same as `elastic.tiles.FITS`, whose module loads numpy, which --help does without.
FITS = ("crop", "pad", "stretch", "tile")
# Options of a record and their defaults, which give the frames of the released code.
READ_DEFAULTS: dict[str, Any] = {
    "reader": "pyav",
    "exact_color": False,
    "fit": "crop",
    "resolution": None,
    "tile_overlap": None,
}
# Options whose argument of `elastic.media.open_clip` has another name. Its `resolution` is that of a tile.
_ARGUMENTS = {"resolution": "short_side", "tile_overlap": "overlap"}


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
        "it; stretch squeezes all of it into a square; tile covers all of it with squares, each a clip of its own. Decoding gives "
        "the shape back",
        choices=FITS,
    )


def resolution_option() -> int | None:
    """The option `resolution`."""
    return option(
        None,
        "with fit=tile: the short side in pixels that frames are scaled to, 0: the file's own, without it the model's; else only "
        "checked: the model decides",
        check=at_least(0),
    )


def tile_overlap_option() -> int | None:
    """The option `tile_overlap`."""
    return option(
        None,
        "with fit=tile: pixels that neighbouring tiles share at least, blended by a linear ramp; without it an eighth of a tile",
        check=at_least(0),
    )


def read_arguments(record: Any) -> dict[str, Any]:
    """The keyword arguments of `elastic.media.open_clip`, besides rate and number of frames, that a record of options holds."""
    return {_ARGUMENTS.get(name, name): getattr(record, name) for name in READ_DEFAULTS}


def read_options(record: Any) -> dict[str, Any]:
    """The same options by their own names, for another record."""
    return {name: getattr(record, name) for name in READ_DEFAULTS}

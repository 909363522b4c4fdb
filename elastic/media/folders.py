"""Which files of a folder are media: by the endings of their names."""

import logging
import os
import pathlib
from collections.abc import Collection

from elastic.media.errors import MediaError

log = logging.getLogger(__name__)

# fmt: off
IMAGE_SUFFIXES = frozenset((
    ".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".ppm", ".pgm",
    ".pnm", ".jp2", ".avif", ".avifs", ".heic", ".heif", ".hif", ".qoi",
))
VIDEO_SUFFIXES = frozenset((
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".m2ts", ".mts",
    ".flv", ".wmv", ".3gp", ".ogv", ".mxf", ".gif", ".apng",
))
# fmt: on

# Files that stand together in a folder of results: of a tokenized file, of a data set, of an evaluation.
_SIGNATURES = (
    {"tokens.npz", "report.json"},
    {"plan.json", "summary.json"},
    {"evaluation.json", "summary.csv"},
)
# The media that are written there, and, without its ending, what a token file is decoded to.
_RESULTS = frozenset(("viz.mp4", "viz.png", "plot.png", "summary.png", "evaluation.png"))
_DECODED = "decoded"
# A training run and its folder of pictures.
_TRAINED, _PICTURES = {"config.json", "metrics.jsonl"}, "eval"


def results_among(names: Collection[str]) -> set[str]:
    """The media files that an earlier run wrote, among the names in one folder; none unless it is a folder of results."""
    if not any(signature <= set(names) for signature in _SIGNATURES):
        return set()
    return {
        name
        for name in names
        if name in _RESULTS or (is_media(name) and pathlib.PurePath(name).stem == _DECODED)
    }


def is_media(path: str | os.PathLike[str]) -> bool:
    """Whether the name ends like an image or a video, in any case. Opening decides by content."""
    return pathlib.Path(path).suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES


def find_media(
    folder: str | os.PathLike[str], *, without: str | os.PathLike[str] | None = None
) -> list[pathlib.Path]:
    """All files below `folder` that `is_media` knows, sorted; links are followed, each folder once.

    Left out are names that start with a dot (unfinished or system files), what lies in the folder `without`, and results of
    earlier runs (`results_among`), which the log tells.

    Raises:
      MediaError: `folder` is not a folder that can be read.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise MediaError(
            f"{str(folder)!r} is not a folder; give the folder that holds the media files."
        )
    found, seen = [], set()
    results: list[pathlib.Path] = []

    def unreadable(error: OSError) -> None:
        log.warning("Leaving out a folder: %s", error)

    for root, folders, files in os.walk(folder, followlinks=True, onerror=unreadable):
        here = os.stat(root)
        if (here.st_dev, here.st_ino) in seen:  # reached again through a link
            folders.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if set(files) >= _TRAINED and _PICTURES in folders:
            folders.remove(_PICTURES)
        ours = results_among(files)
        results += [pathlib.Path(root, name) for name in ours]
        found += [
            pathlib.Path(root, name)
            for name in files
            if not name.startswith(".") and is_media(name) and name not in ours
        ]
    if without is not None:
        apart = pathlib.Path(without).resolve()
        found, results = (
            [file for file in files if apart not in file.resolve().parents]
            for files in (found, results)
        )
    tell_results(results)
    return sorted(found)


def tell_results(results: Collection[str | os.PathLike[str]]) -> None:
    """Tells in one line which results of earlier runs are left out."""
    if results:
        log.info(
            "Results of earlier runs are left out: %d files, such as %s.",
            len(results),
            min(str(result) for result in results),
        )

"""Which files of a folder are media: by the endings of their names."""

import logging
import os
import pathlib

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


def is_media(path: str | os.PathLike[str]) -> bool:
    """Whether the name ends like an image or a video, in any case. Opening decides by content."""
    return pathlib.Path(path).suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES


def find_media(
    folder: str | os.PathLike[str], *, without: str | os.PathLike[str] | None = None
) -> list[pathlib.Path]:
    """All files below `folder` that `is_media` knows, sorted; links are followed, each folder once.

    Left out are names that start with a dot (unfinished or system files), and what lies in the folder
    `without`, such as results.

    Raises:
      MediaError: `folder` is not a folder that can be read.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise MediaError(
            f"{str(folder)!r} is not a folder; give the folder that holds the media files."
        )
    found, seen = [], set()

    def unreadable(error: OSError) -> None:
        log.warning("Leaving out a folder: %s", error)

    for root, folders, files in os.walk(folder, followlinks=True, onerror=unreadable):
        here = os.stat(root)
        if (here.st_dev, here.st_ino) in seen:  # reached again through a link
            folders.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [
            pathlib.Path(root, name)
            for name in files
            if not name.startswith(".") and is_media(name)
        ]
    if without is not None:
        apart = pathlib.Path(without).resolve()
        found = [file for file in found if apart not in file.resolve().parents]
    return sorted(found)

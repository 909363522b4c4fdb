"""How a media file is refused, and how the log warns of one."""

import logging

from elastic.media.location import Place

log = logging.getLogger(__name__)

MAX_PIXELS = 89_478_485  # per frame: 268 MB as RGB, and Pillow's own limit for unannounced pictures
_warned: set[tuple[str, str]] = set()


class MediaError(ValueError):
    """A picture or video that cannot be read or written; the text names file, reason, way out."""


def reason(error: Exception) -> str:
    """What went wrong, without numbers and names that the message has already."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def damaged(path: Place, error: Exception) -> MediaError:
    """The error of a file whose bytes cannot be decoded."""
    return MediaError(
        f"{str(path)!r} is damaged or truncated ({error}); copy or download it again."
    )


def check_size(path: Place, width: int, height: int) -> None:
    """Refuses a frame without pixels or with more than memory should hold.

    Raises:
      MediaError: `width * height` is 0 or above `MAX_PIXELS`.
    """
    if not 0 < width * height <= MAX_PIXELS:
        raise MediaError(
            f"{str(path)!r} has {width} x {height} pixels, outside 1 to {MAX_PIXELS:,}; "
            "scale it down first."
        )


def warn_once(path: Place, message: str, *values: object) -> None:
    """Warns of a file once in a process, although a file is opened again for each part that is read.

    Args:
      path: the file.
      message: a format for `logging`, whose first `%s` stands for the path.
      values: what else the message names.
    """
    if (str(path), message) not in _warned:
        _warned.add((str(path), message))
        log.warning(message, path, *values)

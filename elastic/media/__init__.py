"""Files to frames and back.

What decodes is imported when it is first used: the tokenizer takes arrays as well, and PyAV is not small.
"""

from typing import TYPE_CHECKING

from elastic.io.lazy import lazy_names
from elastic.media.errors import MediaError
from elastic.media.folders import find_media, is_media
from elastic.media.location import ClipLocation
from elastic.media.source import MediaInfo

if TYPE_CHECKING:
    from elastic.media.reader import ClipReader, fit_frame, open_clip, probe, scale_frame
    from elastic.media.writer import VideoWriter, write_image, write_video

__all__ = [
    "ClipLocation",
    "ClipReader",
    "MediaError",
    "MediaInfo",
    "VideoWriter",
    "find_media",
    "fit_frame",
    "is_media",
    "open_clip",
    "probe",
    "scale_frame",
    "write_image",
    "write_video",
]

__getattr__ = lazy_names(
    __name__,
    {
        "ClipReader": ".reader",
        "VideoWriter": ".writer",
        "fit_frame": ".reader",
        "open_clip": ".reader",
        "probe": ".reader",
        "scale_frame": ".reader",
        "write_image": ".writer",
        "write_video": ".writer",
    },
)

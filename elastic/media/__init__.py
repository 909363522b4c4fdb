"""Files to frames and back."""

from elastic.media.errors import MediaError
from elastic.media.folders import find_media, is_media
from elastic.media.reader import ClipReader, fit_frame, open_clip, probe
from elastic.media.source import MediaInfo
from elastic.media.writer import VideoWriter, write_image, write_video

__all__ = [
    "ClipReader",
    "MediaError",
    "MediaInfo",
    "VideoWriter",
    "find_media",
    "fit_frame",
    "is_media",
    "open_clip",
    "probe",
    "write_image",
    "write_video",
]

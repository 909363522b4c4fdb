"""Files to frames and back."""

from elastic.media.reader import ClipReader, find_media, fit_frame, is_media, open_clip, probe
from elastic.media.source import MediaError, MediaInfo
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

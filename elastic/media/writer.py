"""Writes frames to files: pictures through Pillow, H.264 video through PyAV.

A file appears under its name only when it is complete: it is written beside that name, synced and renamed.
"""

import contextlib
import functools
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from typing import NamedTuple, Self

import av
import av.container
import av.error
import numpy as np
from av.video.frame import PictureType
from av.video.reformatter import Interpolation
from jaxtyping import UInt8
from PIL import Image

from elastic.media.errors import MediaError

WRITABLE_VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".mkv"})
_ACCURATE_RND = 0x40000  # a flag of ffmpeg's scaler, which PyAV 17 does not name
_SCALING = int(Interpolation.BICUBIC) | _ACCURATE_RND  # RGB -> YUV with halved colour planes
_ERRORS = (av.error.FFmpegError, OSError)  # PyAV has errors of both kinds


class _Encoder(NamedTuple):
    """An open file and the stream that is encoded into it."""

    container: av.container.OutputContainer
    stream: av.VideoStream
    scratch: pathlib.Path
    shape: tuple[int, ...]  # of every frame


@functools.cache
def repeatable_x264() -> Mapping[str, str]:
    """Options with which libx264 makes the same file of the same frames.

    Its code for AVX-512 does not: 40 runs made ten different files of the same small frames. A processor that has AVX-512
    has AVX2 too, and with that code 60 of 60 files were equal.
    """
    try:
        has_avx512 = "avx512" in pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # not Linux
        return {}
    return {"x264-params": "asm=avx2"} if has_avx512 else {}


class VideoWriter:
    """Writes H.264 video frame by frame; `path` appears when the `with` block ends without error.

    The first frame sets the size. H.264 with halved colour planes needs even sizes, so an odd size gets
    one more row or column that repeats the edge; nothing is cropped.

    Args:
      path: .mp4, .m4v, .mov or .mkv; its folder is made when missing.
      rate: frames per second.
      crf: x264's constant rate factor, 0 (lossless) to 51; 18 is visually transparent.
        None leaves the quality to `codec_options`.
      codec_options: further options of ffmpeg's libx264 encoder, such as {"preset": "slow"}.

    Raises:
      MediaError: no frame came, a frame has another size, the encoder refused an option or failed, or the
        place cannot be written to. Nothing is left behind then.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        rate: float | int | Fraction,
        *,
        crf: int | None = 18,
        codec_options: Mapping[str, str] | None = None,
    ):
        self.path = pathlib.Path(path)
        if self.path.suffix.lower() not in WRITABLE_VIDEO_SUFFIXES:
            raise MediaError(
                f"Cannot write video as {str(path)!r}: "
                f"use one of {sorted(WRITABLE_VIDEO_SUFFIXES)}."
            )
        if not 0 < rate < 100_000:
            raise MediaError(
                f"Cannot write {str(path)!r} at {rate=} frames/s; it must be positive."
            )
        # 29.97 and its kin are ratios over 1001; anything else is near enough to one.
        self._rate = Fraction(rate).limit_denominator(1001) or Fraction(rate)
        quality = {} if crf is None else {"crf": str(crf)}
        self._options = {**repeatable_x264(), **quality, **(codec_options or {})}
        self._encoder: _Encoder | None = None  # started by the first frame
        self._num_frames = 0

    def __enter__(self) -> Self:
        return self

    def write(self, frame: UInt8[np.ndarray, "rows columns 3"], *, keyframe: bool = False) -> None:
        """Appends one frame; `keyframe`: it can be decoded without the frames before it."""
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or frame.size == 0:
            raise MediaError(
                f"A frame of {str(self.path)!r} must be uint8 [rows, columns, 3], "
                f"not {frame.dtype} {list(frame.shape)}."
            )
        if self._encoder is None:
            self._encoder = self._start(frame.shape)
        if frame.shape != self._encoder.shape:
            raise MediaError(
                f"All frames of {str(self.path)!r} must have the size of its first, "
                f"{self._encoder.shape}; this one has {frame.shape}."
            )
        rows, columns = frame.shape[:2]
        padded = np.pad(frame, ((0, rows % 2), (0, columns % 2), (0, 0)), mode="edge")
        rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(padded), format="rgb24")
        picture = rgb.reformat(format="yuv420p", interpolation=_SCALING)
        picture.pts, picture.time_base = self._num_frames, 1 / self._rate
        if keyframe:
            picture.pict_type = PictureType.I
        self._num_frames += 1
        with _one_error(self.path):
            self._encoder.container.mux(self._encoder.stream.encode(picture))

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._discard()

    def _start(self, shape: tuple[int, ...]) -> _Encoder:
        scratch = _scratch_path(self.path)
        # The index stands in front, where players that load a file over a network want it.
        muxing = {"fflags": "+bitexact"}
        if self.path.suffix.lower() != ".mkv":
            muxing["movflags"] = "+faststart"
        container = None
        try:
            with _one_error(self.path):
                container = av.open(f"file:{scratch}", "w", container_options=muxing)
                stream = container.add_stream("libx264", self._rate, options=dict(self._options))
                stream.height, stream.width = (size + size % 2 for size in shape[:2])
                stream.pix_fmt = "yuv420p"
                stream.thread_type = "AUTO"  # slices, the default, make larger files
                container.start_encoding()
            unknown = sorted(stream.codec_context.options)
            if unknown:
                raise MediaError(
                    f"Cannot write {str(self.path)!r}: the encoder libx264 has no option "
                    f"{unknown[0]!r}; leave it out."
                )
        except MediaError:
            if container is not None:
                _close(container)
            scratch.unlink(missing_ok=True)
            raise
        return _Encoder(container, stream, scratch, shape)

    def _finish(self) -> None:
        encoder = self._encoder
        if encoder is None:
            raise MediaError(
                f"No frames to write to {str(self.path)!r}; a video needs at least one."
            )
        with _one_error(self.path):
            encoder.container.mux(
                encoder.stream.encode(None)
            )  # the frames that the encoder holds back
            encoder.container.close()
        _publish(encoder.scratch, self.path)

    def _discard(self) -> None:
        """Ends the encoder and removes what is not published; harmless after success."""
        if self._encoder is not None:
            _close(self._encoder.container)
            self._encoder.scratch.unlink(missing_ok=True)


def _close(container: av.container.OutputContainer) -> None:
    """Closes a file that is thrown away; what cannot be written of it any more does not matter."""
    with contextlib.suppress(*_ERRORS):
        container.close()


def write_video(
    path: str | os.PathLike[str],
    frames: Iterable[UInt8[np.ndarray, "rows columns 3"]],
    rate: float | int | Fraction,
    *,
    crf: int = 18,
) -> None:
    """Writes `frames` (any one size) as H.264 video at `rate` frames/s; see `VideoWriter`."""
    with VideoWriter(path, rate, crf=crf) as writer:
        for frame in frames:
            writer.write(frame)


def write_image(path: str | os.PathLike[str], frame: UInt8[np.ndarray, "rows columns 3"]) -> None:
    """Writes one frame as a picture in the format that the name's ending says (.png, .jpg, …).

    Raises:
      MediaError: the ending is unknown, or the place cannot be written to.
    """
    path = pathlib.Path(path)
    known = Image.registered_extensions()
    if known.get(path.suffix.lower()) not in Image.SAVE:
        raise MediaError(f"Cannot write a picture as {str(path)!r}: use .png, .jpg or .webp.")
    scratch = _scratch_path(path)
    try:
        with _one_error(path):
            Image.fromarray(frame).save(scratch)
        _publish(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def _scratch_path(path: pathlib.Path) -> pathlib.Path:
    """An unused name beside `path`, with the same ending (the ending chooses the format)."""
    with _one_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(
            suffix=path.suffix, prefix=f".{path.stem}-", dir=path.parent
        )
        os.close(handle)
        # mkstemp makes it private; the finished file gets the rights any new file would.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
    return pathlib.Path(name)


def _publish(scratch: pathlib.Path, path: pathlib.Path) -> None:
    with _one_error(path):
        with open(scratch, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(scratch, path)


@contextlib.contextmanager
def _one_error(path: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except _ERRORS as error:
        free = shutil.disk_usage(path.parent).free if path.parent.exists() else None
        hint = "" if free is None or free > 1 << 20 else " The disk is full."
        raise MediaError(f"Cannot write {str(path)!r}: {error.strerror or error}.{hint}") from error

"""Frames -> files: pictures through Pillow, video through the ffmpeg that imageio-ffmpeg brings.

A file appears under its name only when it is complete: it is written beside, synced and renamed.
`elastic.media` re-exports everything here.
"""

import contextlib
import os
import pathlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import IO, NamedTuple, Self, cast

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from elastic.media.source import MediaError

WRITABLE_VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".mkv"})


class _Encoder(NamedTuple):
    """A running ffmpeg."""

    process: subprocess.Popen[bytes]
    input: IO[bytes]
    messages: IO[bytes]
    scratch: pathlib.Path
    shape: tuple[int, ...]  # of every frame


class VideoWriter:
    """Writes H.264 video frame by frame; `path` appears when the `with` block ends without error.

    Args:
      path: .mp4, .m4v, .mov or .mkv; its folder is made when missing.
      rate: frames per second.
      crf: x264's constant rate factor, 0 (lossless) to 51; 18 is visually transparent.
        None leaves the quality to `output_options`.
      output_options: further options of ffmpeg for the output, such as ("-threads", "1").

    The first frame sets the size. H.264 with halved colour wants even sizes, so an odd size gets
    one more row or column that repeats the edge; nothing is cropped.

    Raises:
      MediaError: no frame came, a frame has another size, ffmpeg is missing or failed, or the place
        cannot be written to. Nothing is left behind then.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        rate: float | int | Fraction,
        *,
        crf: int | None = 18,
        output_options: tuple[str, ...] = (),
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
        quality = () if crf is None else ("-crf", str(crf))
        self._options = (*quality, *output_options)
        self._encoder: _Encoder | None = None  # started by the first frame

    def __enter__(self) -> Self:
        return self

    def write(self, frame: UInt8[np.ndarray, "rows columns 3"]) -> None:
        """Appends one frame."""
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
        try:
            self._encoder.input.write(np.ascontiguousarray(padded).data)
        except OSError:  # ffmpeg has ended early; its own words say why
            raise self._failure(self._encoder) from None

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._discard()

    def _start(self, shape: tuple[int, ...]) -> _Encoder:
        import imageio_ffmpeg

        try:
            ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
        except RuntimeError as error:
            raise MediaError(
                f"Cannot write {str(self.path)!r}: no ffmpeg ({error}). pip install imageio-ffmpeg."
            ) from error
        rows, columns = (size + size % 2 for size in shape[:2])
        scratch = _scratch_path(self.path)
        # A file, as a pipe that nobody empties would block ffmpeg; `_discard` closes it.
        messages = tempfile.TemporaryFile()  # noqa: SIM115
        command = [ffmpeg, "-hide_banner", "-loglevel", "error", "-y", "-f", "rawvideo"]
        command += [
            "-pix_fmt",
            "rgb24",
            "-s",
            f"{columns}x{rows}",
            "-r",
            str(self._rate),
            "-i",
            "-",
        ]
        command += ["-an", "-c:v", "libx264", "-pix_fmt", "yuv420p", *self._options]
        if self.path.suffix.lower() != ".mkv":
            command += ["-movflags", "+faststart"]
        command += [f"file:{scratch}"]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=messages
        )
        return _Encoder(process, cast(IO[bytes], process.stdin), messages, scratch, shape)

    def _finish(self) -> None:
        encoder = self._encoder
        if encoder is None:
            raise MediaError(
                f"No frames to write to {str(self.path)!r}; a video needs at least one."
            )
        try:
            encoder.input.close()
        except OSError:
            raise self._failure(encoder) from None
        if encoder.process.wait() != 0:
            raise self._failure(encoder)
        _publish(encoder.scratch, self.path)

    def _failure(self, encoder: _Encoder) -> MediaError:
        code = encoder.process.wait()
        encoder.messages.seek(0)
        words = encoder.messages.read().decode(errors="replace").strip().splitlines()
        return MediaError(
            f"Cannot write {str(self.path)!r}: ffmpeg ended with status {code} "
            f"({words[-1] if words else 'no message'}). "
            "Check the free space and the folder's rights."
        )

    def _discard(self) -> None:
        """Ends ffmpeg and removes what is not published; harmless after success."""
        if self._encoder is None:
            return
        if self._encoder.process.poll() is None:
            self._encoder.process.kill()
            self._encoder.process.wait()
        with contextlib.suppress(OSError):  # bytes that the dead process no longer takes
            self._encoder.input.close()
        self._encoder.messages.close()
        self._encoder.scratch.unlink(missing_ok=True)


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
    except OSError as error:
        free = shutil.disk_usage(path.parent).free if path.parent.exists() else None
        hint = "" if free is None or free > 1 << 20 else " The disk is full."
        raise MediaError(f"Cannot write {str(path)!r}: {error.strerror or error}.{hint}") from error

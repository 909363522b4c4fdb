"""Classical codecs at the bits that a model took, for comparison.

A codec knows a scale of qualities, not of bits. Here it takes the finest quality whose payload is no larger than the
model's bits: the packets alone are counted, without a container. Video codecs run through PyAV, JPEG through Pillow.
"""

import contextlib
import functools
import io
import os
import sys
import threading
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from elastic.media.errors import MediaError
from elastic.media.writer import repeatable_x264


class _Encoder(NamedTuple):
    """How ffmpeg's encoder of a codec is asked for: slow and thorough, as comparisons are made."""

    encoder: str
    decoder: str
    pixels: str
    quality: str  # the name of the option
    coarsest: int
    finest: int
    options: Mapping[str, str] = {}
    comments: frozenset[int] = (
        frozenset()
    )  # first bytes of units that tell the encoder's settings and no picture


# Colour planes are whole where the encoder can: a model's are, too.
_ENCODERS = {
    "x264": _Encoder("libx264", "h264", "yuv444p", "crf", 51, 0, {"preset": "slow"}, frozenset({0x06})),
    "x265": _Encoder(
        "libx265", "hevc", "yuv444p", "crf", 51, 0,
        {"preset": "slow", "x265-params": "log-level=none:pools=1:frame-threads=1"},
        frozenset({0x4E}),
    ),
    "av1": _Encoder("libsvtav1", "libdav1d", "yuv420p", "crf", 63, 1, {"preset": "5", "svtav1-params": "lp=1"}),
}  # fmt: skip
CODECS = (*_ENCODERS, "jpeg")
_SCALING = 0x4 | 0x40000 | 0x2000  # of ffmpeg's scaler: bicubic, accurate_rnd, full_chroma_int


class Coded(NamedTuple):
    """A clip after a codec."""

    quality: int  # on the codec's own scale
    bits: int  # of the payload
    frames: UInt8[np.ndarray, "t rows columns 3"]


class CodecAt:
    """A codec on one clip; what was encoded once is not encoded again.

    Args:
      name: one of `CODECS`.
      frames: the clip, uint8 [t, rows, columns, 3].
      rate: frames per second, which some encoders look at; None: 24.
    """

    def __init__(
        self, name: str, frames: UInt8[np.ndarray, "t rows columns 3"], rate: float | None
    ):
        jpeg = name == "jpeg"
        first, last = (1, 95) if jpeg else (_ENCODERS[name].coarsest, _ENCODERS[name].finest)
        step = 1 if last > first else -1
        self._qualities = range(first, last + step, step)  # from coarse to fine
        code = functools.partial(_code_jpeg, frames) if jpeg else functools.partial(_code_video, name, frames, rate or 24)  # fmt: skip
        self._code = functools.cache(code)

    def within(self, bits: int) -> Coded:
        """The finest quality of at most `bits`; the coarsest there is where even that takes more."""
        low, high = (
            0,
            len(self._qualities) - 1,
        )  # the answer lies in low..high; bits rise with quality
        while low < high:
            middle = (low + high + 1) // 2
            if self._code(self._qualities[middle]).bits <= bits:
                low = middle
            else:
                high = middle - 1
        return self._code(self._qualities[low])


def _code_jpeg(frames: np.ndarray, quality: int) -> Coded:
    """Every frame as a JPEG of its own, with whole colour planes and Huffman tables made for it."""
    bits, decoded = 0, []
    for frame in frames:
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, "JPEG", quality=quality, subsampling=0, optimize=True)
        bits += 8 * buffer.tell()
        decoded.append(np.asarray(Image.open(buffer).convert("RGB")))
    return Coded(quality, bits, np.stack(decoded))


def _comment_bytes(packet: bytes, first_bytes: frozenset[int]) -> int:
    """The bytes of a packet's comments: x264 spends 600 on naming its settings, which a short clip would pay for."""
    if not first_bytes:
        return 0
    units = packet.split(b"\0\0\1")[1:]
    return sum(len(unit) + 3 for unit in units if unit[:1] and unit[0] in first_bytes)


def _open(encoder: Any) -> None:
    """Opens an encoder, and gives its threads the priority that others have.

    Where it may, as root, SVT-AV1 gives its threads, and the one that opens it, real-time priority: before all other work of the
    machine, for good, and programs started later inherit it.
    """
    if sys.platform != "linux":
        encoder.open(strict=False)
        return
    policy, priority = os.sched_getscheduler(0), os.sched_getparam(0)
    before = _threads()
    encoder.open(strict=False)
    for thread in (_threads() - before) | {threading.get_native_id()}:
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.sched_setscheduler(thread, policy, priority)


def _threads() -> set[int]:
    return {int(name) for name in os.listdir("/proc/self/task")}


def _code_video(name: str, frames: np.ndarray, rate: float, quality: int) -> Coded:
    import av  # not small, and only this function needs it
    import av.error

    codec = _ENCODERS[name]
    try:
        os.environ.setdefault("SVT_LOG", "1")  # errors alone; SVT-AV1 has no other switch
        encoder: Any = av.CodecContext.create(codec.encoder, "w")
        decoder: Any = av.CodecContext.create(codec.decoder, "r")
        encoder.height, encoder.width = frames.shape[1:3]
        encoder.pix_fmt = codec.pixels
        encoder.framerate = Fraction(rate).limit_denominator(1001)
        encoder.time_base = 1 / encoder.framerate
        repeatable = repeatable_x264() if codec.encoder == "libx264" else {}
        encoder.options = {codec.quality: str(quality), **codec.options, **repeatable}
        _open(encoder)
        bits, decoded = 0, []
        for index in range(len(frames) + 1):
            picture = None  # the end: the encoder gives what it holds back
            if index < len(frames):
                rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(frames[index]), "rgb24")
                picture = rgb.reformat(format=codec.pixels, interpolation=_SCALING)
                picture.pts, picture.time_base = index, encoder.time_base
            for packet in encoder.encode(picture):
                bits += 8 * (packet.size - _comment_bytes(bytes(packet), codec.comments))
                decoded += decoder.decode(packet)
        decoded += decoder.decode(None)
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise MediaError(
            f"{name} ({codec.encoder}) cannot code {frames.shape[2]} x {frames.shape[1]} pixels: {error}; leave it out of --codec."
        ) from error
    if len(decoded) != len(frames):
        raise MediaError(f"{name} gave {len(decoded)} frames for {len(frames)}.")
    shown = [
        frame.reformat(format="rgb24", interpolation=_SCALING).to_ndarray() for frame in decoded
    ]
    return Coded(quality, bits, np.stack(shown))

"""Pixels of any kind -> 8-bit RGB: pictures, decoded video frames, high dynamic range."""

import functools
import itertools

import av
import av.filter
import numpy as np
from jaxtyping import UInt8, UInt16
from PIL import Image

from elastic.media.errors import MediaError
from elastic.media.location import Place


def to_rgb(path: Place, image: Image.Image) -> Image.Image:
    """A picture of any mode as RGB: composited over white, 16 bits scaled to 8 and rounded.

    Raises:
      MediaError: the pixels are of a type whose range is not known.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "F":
        raise MediaError(
            f"{str(path)!r} holds floating-point pixels of no known range; save it as 8 bits."
        )
    if image.mode.startswith("I"):  # Pillow's convert would clip them to white
        gray = np.asarray(image)
        if gray.size and not 0 <= gray.min() <= gray.max() <= 65535:
            raise MediaError(
                f"{str(path)!r} holds 32-bit pixels beyond 65535; save it as 8 or 16 bits."
            )
        return Image.fromarray(((gray.astype(np.uint32) + 128) // 257).astype(np.uint8)).convert(
            "RGB"
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")


# ffmpeg's scaler rounds exactly, interpolates both colour planes, and treats the fields of interlaced frames apart.
_SCALING = "flags=bicubic+accurate_rnd+full_chroma_int:interl=-1"
TRANSFERS = {
    16: "pq",
    18: "hlg",
}  # ffmpeg's numbers of the transfer functions of high dynamic range
_WHITE = 203.0  # cd/m2 of diffuse white in HDR video (ITU-R BT.2408); it becomes white in RGB
_PQ_PEAK, _HLG_PEAK = 10_000.0, 1_000.0  # cd/m2
_HLG_GAMMA = 1.2  # of a display with that peak (ITU-R BT.2100)
_BT2020, _FULL_RANGE = 9, 2  # ffmpeg's numbers
_TO_BT709 = np.array(  # linear RGB with the primaries of BT.2020 -> those of BT.709 (ITU-R BT.2087)
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]],
    np.float32,
)
_BT2020_LUMA = np.array([0.2627, 0.6780, 0.0593], np.float32)
_STEPS = 4096  # of the table from linear light to sRGB, evenly spaced in its square root


class FrameConverter:
    """Converts decoded video frames to RGB by the colour matrix and range that each frame states.

    Args:
      exact: round every frame exactly. False: frames of 8 bits with halved colour planes and limited range, which
        most videos have, keep the released code's faster conversion, which is 0.5 to 1.5 levels darker.
      threads: of the scaler; 0: one per core.
    """

    def __init__(self, *, exact: bool, threads: int):
        self._exact, self._threads = exact, threads
        self._graph: av.filter.Graph | None = None
        self._kind: tuple | None = None

    def __call__(self, frame: av.VideoFrame) -> Image.Image:
        """The frame's pixels as mode RGB, or RGBA if it has transparency."""
        layout = frame.format
        alpha = layout.has_palette or any(part.is_alpha for part in layout.components)
        if TRANSFERS.get(int(frame.color_trc)) and not alpha:
            return Image.fromarray(tone_map(self._scaled(frame, "rgb48le"), int(frame.color_trc)))
        wanted = "rgba" if alpha else "rgb24"
        deep = any(part.bits > 8 for part in layout.components)
        if layout.has_palette or (layout.is_rgb and not deep) or self._is_released(frame):
            return Image.fromarray(frame.to_ndarray(format=wanted))
        return Image.fromarray(self._scaled(frame, wanted))

    def _is_released(self, frame: av.VideoFrame) -> bool:
        limited = int(frame.color_range) != _FULL_RANGE
        plain = frame.format.name == "yuv420p" and limited and not frame.interlaced_frame
        return plain and not self._exact

    def _scaled(self, frame: av.VideoFrame, wanted: str) -> np.ndarray:
        space, extent = int(frame.colorspace), int(frame.color_range)
        kind = (frame.width, frame.height, frame.format.name, space, extent, wanted)
        if self._graph is None or self._kind != kind:
            self._graph, self._kind = self._new_graph(*kind), kind
        self._graph.push(frame)
        return self._graph.pull().to_ndarray()

    def _new_graph(
        self, width: int, height: int, layout: str, space: int, extent: int, wanted: str
    ) -> av.filter.Graph:
        graph = av.filter.Graph()
        if hasattr(graph, "threads") and self._threads:
            graph.threads = self._threads
        source = graph.add(
            "buffer",
            f"video_size={width}x{height}:pix_fmt={layout}:time_base=1/1000:colorspace={space}:range={extent}",
        )
        parts = [
            source,
            graph.add("scale", _SCALING),
            graph.add("format", wanted),
            graph.add("buffersink"),
        ]
        for one, other in itertools.pairwise(parts):
            one.link_to(other)
        graph.configure()
        return graph


def tone_map(
    frame: UInt16[np.ndarray, "rows columns 3"], transfer: int
) -> UInt8[np.ndarray, "rows columns 3"]:
    """High dynamic range with the primaries of BT.2020 -> sRGB.

    Diffuse white, 203 cd/m2, becomes white, and brighter light is clipped. Below white, light is kept linearly.

    Args:
      frame: non-linear RGB of full range.
      transfer: ffmpeg's number of the transfer function, 16 (PQ) or 18 (HLG).
    """
    light = _linear_light(transfer)[frame]  # cd/m2 / 203
    if TRANSFERS[transfer] == "hlg":  # the display's gamma acts on luminance
        luma = (light @ _BT2020_LUMA)[..., None]
        light = (
            light
            * np.power(np.maximum(luma, 1e-6), np.float32(_HLG_GAMMA - 1))
            * np.float32(_HLG_PEAK / _WHITE)
        )
    light = np.clip(light @ _TO_BT709.T, 0, 1)
    return _srgb_levels()[np.rint(np.sqrt(light) * (_STEPS - 1)).astype(np.uint16)]


@functools.cache
def _linear_light(transfer: int) -> np.ndarray:
    """Linear light of every 16-bit level: PQ in units of diffuse white, HLG from 0 to 1 of the scene."""
    x = np.arange(65_536) / 65_535
    if TRANSFERS[transfer] == "pq":  # SMPTE ST 2084
        m1, m2 = 2610 / 16384, 2523 / 4096 * 128
        c1, c2, c3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
        power = x ** (1 / m2)
        light = (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1) * _PQ_PEAK / _WHITE
    else:  # ARIB STD-B67
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        light = np.where(x <= 0.5, x**2 / 3, (np.exp((x - c) / a) + b) / 12)
    return light.astype(np.float32)


@functools.cache
def _srgb_levels() -> np.ndarray:
    """The sRGB level of linear light (i / (_STEPS - 1))**2."""
    light = (np.arange(_STEPS) / (_STEPS - 1)) ** 2
    curve = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.rint(255 * curve).astype(np.uint8)

"""Renders example/video.mp4 and example/video.json: a short film whose need for tokens changes.

    python3 scripts/tools/make_example_clip.py

Still shots, a slow pan, fast motion, a cut, fine texture, moving text and a fade, drawn with NumPy and
Pillow alone from fixed seeds. Shots begin at multiples of 16 frames, so that no block of the models in
example/ straddles a cut, and the frames of a still shot are identical, before and after compression.
"""

import argparse
import functools
import json
import pathlib
import sys
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from elastic.media import VideoWriter

SIZE, RATE = 256, 24
# Constant quantizers, the first frame of a shot finer than the rest. One thread and no dates: the
# same bytes every time.
X264 = "ipratio=2:subme=9:trellis=2:aq-mode=0:psy=0:mbtree=0:scenecut=0:keyint=1000:bframes=0:threads=1"


def noise(rows: int, columns: int, cell: float, seed: int) -> np.ndarray:
    """Smooth noise in [0, 1]: random heights on a grid of `cell` pixels, joined by cubic splines."""
    grid_shape = (int(rows / cell) + 4, int(columns / cell) + 4)
    grid = np.random.default_rng(seed).random(grid_shape).astype(np.float32)
    box = (1.5, 1.5, 1.5 + columns / cell, 1.5 + rows / cell)
    image = Image.fromarray(grid).resize((columns, rows), Image.Resampling.BICUBIC, box=box)
    return np.clip(np.asarray(image), 0, 1)


def fractal(rows: int, columns: int, cell: float, seed: int, octaves: int = 5) -> np.ndarray:
    """Octaves of `noise`, each half as wide and half as high: clouds, hills, soil. In [0, 1]."""
    layers = [noise(rows, columns, cell / 2**k, seed + k) / 2**k for k in range(octaves)]
    total = np.sum(layers, axis=0)
    return (total - total.min()) / np.ptp(total)


def mix(a, b, share: np.ndarray) -> np.ndarray:
    """Colour `a` where `share` is 0, `b` where it is 1; colours or whole pictures."""
    share = np.clip(share, 0, 1)[..., None]
    return np.asarray(a, np.float32) * (1 - share) + np.asarray(b, np.float32) * share


def smooth(x: np.ndarray, low: float, high: float) -> np.ndarray:
    """0 below `low`, 1 above `high`, a soft step between."""
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def grid(rows: int = SIZE, columns: int = SIZE) -> tuple[np.ndarray, np.ndarray]:
    y, x = np.mgrid[:rows, :columns].astype(np.float32)
    return y, x


def light_from_the_left(height: np.ndarray, strength: float) -> np.ndarray:
    """Brightness of a relief whose light comes from the upper left."""
    down, right = np.gradient(height)
    return np.clip(1 - strength * (down + right), 0.45, 1.5)[..., None]


def valley() -> np.ndarray:
    """Three ranges of hills under a cloudy sky, a meadow in front."""
    y, x = grid()
    picture = mix((96, 148, 206), (224, 226, 218), y / 150)
    clouds = smooth(fractal(SIZE, SIZE, 90, seed=11), 0.5, 0.85) * (1 - y / 190)
    picture = mix(picture, (250, 248, 244), 0.85 * clouds)
    sun = np.exp(-((x - 190) ** 2 + (y - 52) ** 2) / 900)
    picture = mix(picture, (255, 240, 200), 0.9 * sun)
    for layer, colour in enumerate([(138, 158, 178), (98, 124, 120), (66, 94, 62)]):
        ridge = (
            105 + 28 * layer - 46 * (fractal(1, SIZE, 110 - 20 * layer, 31 + 10 * layer)[0] - 0.5)
        )
        relief = fractal(SIZE, SIZE, 42, seed=60 + 10 * layer)
        slope = np.asarray(colour) * light_from_the_left(relief, 3.5)
        picture = mix(picture, slope, smooth(y - ridge, -0.8, 0.8))
    meadow = mix((86, 118, 48), (168, 160, 78), fractal(SIZE, SIZE, 30, seed=95))
    meadow = meadow * (0.72 + 0.5 * noise(SIZE, SIZE, 4, seed=99))[..., None]
    edge = 196 + 12 * np.sin(x / 41) + 5 * np.sin(x / 13)
    return mix(picture, meadow, smooth(y - edge, -2, 6))


@functools.cache
def country_from_above(rows: int, columns: int) -> np.ndarray:
    """Woods, fields, sand and a river, seen from a plane."""
    height = fractal(rows, columns, 120, seed=200, octaves=6)
    fields = mix((146, 150, 84), (198, 178, 118), fractal(rows, columns, 50, seed=220))
    woods = np.asarray((54, 84, 46)) * (0.6 + 0.75 * noise(rows, columns, 5, seed=230))[..., None]
    picture = mix(fields, woods, smooth(fractal(rows, columns, 70, seed=240), 0.48, 0.56))
    picture = picture * light_from_the_left(height * 40, 0.35)
    y, x = grid(rows, columns)
    bank = np.abs(y - rows * 0.52 - 34 * np.sin(x / 62) - 30 * (height - 0.5))
    picture = mix(picture, (206, 190, 150), 1 - smooth(bank, 15, 21))
    return mix(picture, mix((52, 96, 118), (84, 134, 146), height), 1 - smooth(bank, 11, 15))


def pan(frame: int) -> np.ndarray:
    """Half a pixel to the right and a quarter of one down per frame."""
    wide = Image.fromarray(to_uint8(country_from_above(SIZE + 40, SIZE + 60)))
    left, top = 4 + frame / 2, 4 + frame / 4
    box = (left, top, left + SIZE, top + SIZE)
    return np.asarray(wide.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box))


# Radius, start (x, y), pixels per frame (x, y), two colours, width of the pattern.
BALLS = [
    (38, (60, 70), (3.1, 2.0), (204, 78, 54), (242, 196, 120), 0.9),
    (30, (180, 60), (-3.9, 2.8), (44, 96, 160), (196, 222, 232), 0.8),
    (24, (120, 170), (4.4, -3.6), (60, 128, 76), (226, 220, 150), 0.7),
    (19, (210, 190), (-3.0, -4.8), (120, 70, 140), (240, 200, 214), 0.7),
]


def bounce(start: float, speed: float, frame: int, radius: float) -> float:
    """The place of a ball that runs between two walls."""
    span = SIZE - 2 * radius - 8
    way = (start - radius - 4 + speed * frame) % (2 * span)
    return radius + 4 + min(way, 2 * span - way)


def balls(frame: int) -> np.ndarray:
    """Four spinning patterned balls that roll over sand, with soft shadows."""
    picture = mix((196, 176, 136), (226, 208, 166), fractal(SIZE, SIZE, 40, seed=150, octaves=4))
    places = [
        (bounce(start[0], speed[0], frame, radius), bounce(start[1], speed[1], frame, radius))
        for radius, start, speed, *_ in BALLS
    ]
    for (radius, *_), (cx, cy) in zip(BALLS, places, strict=True):
        picture = picture * shadow(cx, cy, radius)
    for (radius, _, speed, dark, bright, width), (cx, cy) in zip(BALLS, places, strict=True):
        u, v, w, cover = sphere(cx, cy, radius)
        turn = frame * speed[0] / radius  # rolls as it moves
        across, depth = u * np.cos(turn) + w * np.sin(turn), w * np.cos(turn) - u * np.sin(turn)
        pattern = np.sin(across / width * 3) * np.sin(v / width * 3)
        pattern = pattern + 0.5 * np.sin(depth / width * 4)
        surface = mix(dark, bright, smooth(pattern, -0.15, 0.15))
        picture = mix(picture, lit(surface, u, v, w), cover)
    return picture


def sphere(cx: float, cy: float, radius: float) -> tuple[np.ndarray, ...]:
    """The surface direction (u, v, w) of a ball at each pixel, and how much the ball covers it."""
    y, x = grid()
    u, v = (x - cx) / radius, (y - cy) / radius
    inside = u * u + v * v
    return u, v, np.sqrt(np.clip(1 - inside, 0, 1)), (1 - np.sqrt(inside)) * radius + 0.5


def lit(surface: np.ndarray, u: np.ndarray, v: np.ndarray, w: np.ndarray) -> np.ndarray:
    """A glossy surface under a lamp at the upper left."""
    light = np.clip(0.3 + 0.85 * (w * 0.7 - u * 0.45 - v * 0.55), 0.18, 1.1)
    shine = np.exp(-((u + 0.35) ** 2 + (v + 0.42) ** 2) / 0.02)
    return mix(surface * light[..., None], (255, 255, 255), 0.7 * shine)


def shadow(cx: float, cy: float, radius: float) -> np.ndarray:
    """What is left of the light below a ball."""
    y, x = grid()
    far = np.hypot(x - cx - 0.45 * radius, y - cy - 0.55 * radius) / radius
    return (0.62 + 0.38 * smooth(far, 0.7, 1.25))[..., None]


def fruit() -> np.ndarray:
    """Three fruits on a table before a wall: soft shapes that stand still."""
    y, x = grid()
    wall = mix((150, 168, 164), (196, 202, 186), (x + y) / 420)
    table = mix((150, 112, 82), (186, 146, 108), fractal(SIZE, SIZE, 90, seed=300, octaves=3))
    picture = mix(wall, table * (1.1 - 0.0012 * y)[..., None], smooth(y, 148, 152))
    for cx, cy, radius, colour in [
        (92, 138, 44, (206, 74, 48)),
        (176, 152, 36, (222, 150, 48)),
        (128, 182, 30, (146, 168, 62)),
    ]:
        picture = picture * shadow(cx, cy, radius)
        u, v, w, cover = sphere(cx, cy, radius)
        blush = mix(colour, (236, 196, 96), 0.5 * fractal(SIZE, SIZE, 70, seed=320 + cx, octaves=2))
        picture = mix(picture, lit(blush, u, v, w), cover)
    return picture


@functools.cache
def pebbles(rows: int, columns: int) -> np.ndarray:
    """A bed of small round stones: fine texture."""
    y, x = grid(rows, columns)
    random = np.random.default_rng(400)
    stones = np.mgrid[: rows // 14 + 2, : columns // 14 + 2].reshape(2, -1) * 14.0
    stones += random.uniform(-6, 6, stones.shape)
    colours = mix((112, 106, 102), (206, 190, 168), random.random(stones.shape[1]))
    colours = colours * random.uniform(0.75, 1.1, (stones.shape[1], 1))
    first, second = np.full((2, rows, columns), np.inf)  # distances to the two nearest stones
    nearest = np.zeros((rows, columns), int)
    for number, (stone_y, stone_x) in enumerate(stones.T):
        distance = np.hypot(y - stone_y, x - stone_x)
        second = np.minimum(second, np.maximum(first, distance))
        nearest[distance < first] = number
        first = np.minimum(first, distance)
    dome = smooth(second - first, 0, 9)
    lean = (stones[0][nearest] - y + stones[1][nearest] - x) / 14
    light = (0.32 + 0.62 * dome) * (1 + 0.4 * lean * dome)
    speckle = 0.9 + 0.2 * noise(rows, columns, 3, seed=410)
    return colours[nearest] * (light * speckle)[..., None]


def drift(frame: int) -> np.ndarray:
    """Stones that slide by, half a pixel per frame."""
    wide = Image.fromarray(to_uint8(pebbles(SIZE, SIZE + 20)))
    box = (4 + frame / 2, 0, 4 + frame / 2 + SIZE, SIZE)
    return np.asarray(wide.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box))


LINES = (
    "few tokens where little",
    "happens, many where",
    "much does. A block of",
    "frames keeps a prefix of",
    "its tokens and drops the",
    "tail. A still wall is cheap;",
)


def text(frame: int) -> np.ndarray:
    """A printed page that scrolls, and a counter."""
    paper = mix((236, 230, 214), (246, 242, 232), fractal(SIZE, SIZE, 60, seed=500))
    image = Image.fromarray(to_uint8(paper))
    draw = ImageDraw.Draw(image)
    for row, line in enumerate(LINES):
        place = (18, 92 + 32 * row - frame // 2)
        draw.text(place, line, fill=(128, 114, 102), font=ImageFont.load_default(22))
    draw.rectangle((0, 0, SIZE, 76), fill=(44, 62, 80))
    draw.rectangle((0, 76, SIZE, 79), fill=(26, 36, 48))
    number = f"{100 + frame // 8:04d}"
    draw.text(
        (SIZE // 2, 38), number, fill=(244, 208, 110), font=ImageFont.load_default(56), anchor="mm"
    )
    return np.asarray(image)


def moonlight() -> np.ndarray:
    """A moon over a calm sea: hardly any detail."""
    y, x = grid()
    picture = mix((24, 32, 66), (120, 112, 140), y / 170)
    # A faint haze: in a bare gradient the encoder cannot tell rest from motion along it.
    picture = picture + 14 * (fractal(SIZE, SIZE, 60, seed=600, octaves=4) - 0.5)[..., None]
    moon = np.hypot(x - 150, y - 72)
    picture = mix(picture, (200, 200, 210), 0.5 * np.exp(-((moon / 46) ** 2)))
    picture = mix(picture, (246, 240, 222), 1 - smooth(moon, 22, 24))
    sea = mix((56, 62, 96), (18, 24, 46), (y - 170) / 86)
    sea = sea + 12 * (noise(SIZE, SIZE // 8, 5, seed=610).repeat(8, axis=1) - 0.5)[..., None]
    glitter = np.exp(-(((x - 150) / (12 + 0.3 * (y - 170).clip(0))) ** 2))
    sea = mix(sea, (196, 192, 190), 0.55 * glitter * (0.7 + 0.3 * np.sin(y / 2.2)))
    return mix(picture, sea, smooth(y, 169, 171))


def fade(frame: int) -> np.ndarray:
    """The last page of `text` dissolves into `moonlight`."""
    return mix(text(31), moonlight(), np.full((SIZE, SIZE), (frame + 1) / 17))


# name, number of frames (multiples of 16), motion, frame number in the shot -> picture
SHOTS: list[tuple[str, int, str, Callable[[int], np.ndarray]]] = [
    ("valley", 32, "still", lambda frame: valley()),
    ("country from above", 32, "slow", pan),
    ("balls on sand", 32, "fast", balls),
    ("fruit", 32, "still", lambda frame: fruit()),
    ("stones", 16, "slow", drift),
    ("scrolling text", 32, "medium", text),
    ("fade", 16, "fade", fade),
    ("moonlight", 32, "still", lambda frame: moonlight()),
]


def to_uint8(picture: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    folder = pathlib.Path(__file__).parents[2] / "example"
    parser.add_argument("--output", type=pathlib.Path, default=folder / "video.mp4")
    parser.add_argument("--quantizer", type=int, default=23, help="x264's: higher is smaller")
    options = parser.parse_args()

    shots, first = [], 0
    for name, num_frames, motion, _ in SHOTS:
        last = first + num_frames - 1
        shots.append({"name": name, "first_frame": first, "last_frame": last, "motion": motion})
        first = last + 1
    # After the first frame of a still shot nothing is worth a bit at so coarse a quantizer: the frames
    # are skipped, not refined, and stay identical.
    still = "/".join(
        f"{shot['first_frame'] + 1},{shot['last_frame']},q=40"
        for shot in shots
        if shot["motion"] == "still"
    )
    encoding = {"preset": "slow", "qp": str(options.quantizer), "flags": "+bitexact"}
    encoding |= {"x264-params": f"{X264}:zones={still}"}
    with VideoWriter(options.output, RATE, crf=None, codec_options=encoding) as writer:
        for _, num_frames, motion, render in SHOTS:
            picture = to_uint8(render(0))
            for frame in range(num_frames):
                if frame and motion != "still":
                    picture = to_uint8(render(frame))
                writer.write(picture, keyframe=frame == 0)
    facts = {"frames": first, "rate": RATE, "size": SIZE, "shots": shots}
    options.output.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")
    print(f"{options.output}: {first} frames, {options.output.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()

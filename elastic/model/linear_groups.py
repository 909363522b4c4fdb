"""The linear start of a model with groups of patches: each stage codes components of the whole group.

A component describes a whole group. Stage 0 codes the strongest components. Every later stage codes the components whose
error is then largest: new ones, and earlier ones where the levels of FSQ were too coarse. With `haar_groups` every band
has its own components. They are sums of the components of groups.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import scipy.linalg
from einops import rearrange
from jaxtyping import Float, Int, UInt8

from elastic.config import ElasticTokConfig
from elastic.model import groups, lapped, lapped_filter
from elastic.model import linear_parts as parts
from elastic.model.bottleneck import FSQ, make_bottleneck
from elastic.patches import to_unit_range

_SIGNAL = 0.004  # as in linear_init; smaller, because the weak components of a group are coded too
FOR_STAGES = 32  # channels of the residual stream that tell a token's stage and hold no component
_STAGE = 0.25  # the deviation of those
_LEAST = 1e-3  # the deviation of a component that counts as one; an eighth of a level
_AT_ONCE = (
    500  # squares that become floats together: a whole sample of large ones would fill the memory
)
_STEPS = 12  # of the fit through tanh
# The Haar transform of `groups.to_bands`, for groups in raster order.
_HAAR = groups.BANDS_OF_GROUPS[:, [0, 2, 3, 1]]
# The ridge of that fit, for numbers of variance 1. A filtered input has a true inverse, which the fit is to keep near.
_RIDGE, _RIDGE_OF_INVERSE = 0.3, 10.0
_RIDGE_OF_GAIN = 0.01  # per sample, of the regression of gains


class Stage(NamedTuple):
    """What one stage codes, for each channel of its code.

    Attributes:
      component: the number of a component of the stage's band.
      gain: what that is multiplied by before the bottleneck.
      slope: what the number that the code stands for is multiplied by after it.
      cube: FSQ: as in `groups.Steps`.
      log_gain: FSQ: from `groups.gain_features` and one to the logarithm of the adaptive gain.
    """

    component: Int[np.ndarray, "c"]
    gain: Float[np.ndarray, "c"]
    slope: Float[np.ndarray, "c"]
    cube: Float[np.ndarray, "c"]
    log_gain: Float[np.ndarray, "e c"]


def write_groups(
    params: dict[str, Any], config: ElasticTokConfig, squares: UInt8[np.ndarray, "n w"]
) -> None:
    """Writes the linear codec of groups of patches into `params`.

    Args:
      params: float32 NumPy arrays with stacked layers.
      config: the model.
      squares: pixels of two by two groups in the order of one large patch; or of four by four, of which the middle ones
        are coded.
    """
    width = config.hidden_size
    pixels, numbers = _in_groups(config, squares)
    signals = min(width - 2 - FOR_STAGES, pixels.shape[1])
    components = parts.principal_components(numbers, signals)
    components = _as_painted(config, components)
    coded = (numbers - components.mean) @ components.basis
    exchange = _exchange(config, coded)
    bands, rotations = _in_bands(config, coded, exchange)
    colours = _colours(config, components, bands, rotations, exchange)
    stages, rebuilt = _plan(config, bands, colours)
    rebuilt = _in_parts(rebuilt, rotations, exchange)
    if exchange is not None:
        params["encoder"]["exchange"], params["decoder"]["exchange"] = exchange, exchange.T
    rng = np.random.default_rng(0)
    marks = np.zeros((config.num_stages, width), np.float32)
    marks[:, signals : width - 2] = _STAGE * rng.normal(size=(len(marks), width - 2 - signals))
    energy = _STAGE**2 * (width - 2 - signals)
    _write_encoder(params["encoder"], config, components, stages, rotations, marks, energy)
    _write_decoder(
        params["decoder"], config, components, pixels, rebuilt, stages, rotations, marks, energy
    )


def _exchange(
    config: ElasticTokConfig, components: Float[np.ndarray, "g c"]
) -> Float[np.ndarray, "e e"] | None:
    """The principal axes of the strongest components of four bands, dealt out to the four; None without `haar_groups`."""
    if not config.haar_groups:
        return None
    strongest = components[:, : groups.num_exchanged(config)]
    bands = np.einsum("qp,npc->nqc", _HAAR, strongest.reshape(-1, 4, strongest.shape[1]))
    axes = parts.principal_axes(bands.reshape(len(bands), -1))
    # The first code gets the strongest axes, where it may be all that a block sends. FSQ: some channels of a code have many
    # levels and some have few, so where every band sends a code, each gets strong and weak axes, one in turn.
    every_band = config.tokens_per_block // config.patch_group
    in_turn = config.bottleneck_type == "fsq" and config.min_toks >= every_band
    at_once = 1 if in_turn else min(config.code_dim, len(axes) // 4)
    turns = np.arange(len(axes)).reshape(-1, 4, at_once)
    return axes[:, turns.swapaxes(0, 1).reshape(-1)]


def _in_bands(
    config: ElasticTokConfig,
    components: Float[np.ndarray, "g c"],
    exchange: Float[np.ndarray, "e e"] | None,
) -> tuple[list[Float[np.ndarray, "n c"]], list[Float[np.ndarray, "c c"]]]:
    """The components of each band, and the matrices from its channels to them; without `haar_groups` all are one band."""
    if exchange is None:
        return [components], [np.eye(components.shape[1], dtype=np.float32)]
    squares = components.reshape(-1, 4, components.shape[1])
    bands = np.asarray(groups.exchanged(np.einsum("qp,npc->qnc", _HAAR, squares), exchange))
    rotations = [parts.principal_axes(band) for band in bands]
    return [band @ axes for band, axes in zip(bands, rotations, strict=True)], rotations


def _in_parts(
    bands: list[Float[np.ndarray, "n c"]],
    rotations: list[Float[np.ndarray, "c c"]],
    exchange: Float[np.ndarray, "e e"] | None,
) -> Float[np.ndarray, "g c"]:
    """The inverse of `_in_bands`."""
    rotated = [band @ axes.T for band, axes in zip(bands, rotations, strict=True)]
    if exchange is None:
        return rotated[0]
    unmixed = np.asarray(groups.exchanged(np.stack(rotated), exchange.T))
    squares = np.einsum("qp,qnc->npc", _HAAR, unmixed)
    return squares.reshape(-1, squares.shape[-1])


def _in_groups(
    config: ElasticTokConfig, squares: UInt8[np.ndarray, "n s"]
) -> tuple[Float[np.ndarray, "g w"], Float[np.ndarray, "g w"]]:
    """The pixels of two by two groups of each square, in [-1, 1], and what is coded of them: with `lapped_input` filtered ones."""
    frames, rows, columns = config.group_size
    side = math.isqrt(squares.shape[1] // math.prod((frames, rows, columns, 3)))
    squares = squares.reshape(-1, frames, side * rows, side * columns, 3)
    if not config.lapped_input:
        pixels = _split(to_unit_range(squares), config)
        return pixels, pixels
    down, right = (_prefilter_of_two(size).astype(np.float32) for size in (rows, columns))
    pixels = np.empty((4 * len(squares), config.patch_group * config.patch_dim), np.float32)
    filtered = np.empty_like(pixels)
    for first in range(0, len(squares), _AT_ONCE):
        frame = to_unit_range(squares[first : first + _AT_ONCE])
        if side == 2:  # beyond the square is a mirror, as at the edge of a frame
            margin = ((0, 0), (0, 0), (rows, rows), (columns, columns), (0, 0))
            frame = np.pad(frame, margin, mode="symmetric")
        part = slice(4 * first, 4 * (first + len(frame)))
        pixels[part] = _split(frame[:, :, rows:-rows, columns:-columns], config)
        filtered[part] = _split(
            np.einsum("rR,cC,ntRCx->ntrcx", down, right, frame, optimize=True), config
        )
    return pixels, filtered


def _split(
    frame: Float[np.ndarray, "n t h w c"], config: ElasticTokConfig
) -> Float[np.ndarray, "g w"]:
    _, rows, columns = config.group_size
    return rearrange(frame, "n t (a h) (b w) c -> (n a b) (t h w c)", h=rows, w=columns)


def _prefilter_of_two(size: int) -> Float[np.ndarray, "p w"]:
    """From four groups in a row to the filtered pixels of the middle two."""
    matrix = np.zeros((2 * size, 4 * size))
    for first in (0, size):
        window = slice(first + size // 2, first + size // 2 + 2 * size)
        matrix[first : first + size, window] = lapped_filter.prefilter(size)
    return matrix


def _painted(
    config: ElasticTokConfig, components: parts.Components
) -> Float[np.ndarray, "k t h w 3"]:
    """What a unit of each component paints in a group's window: the inverse of the encoder."""
    _, rows, columns = config.group_size
    basis = components.basis / np.square(components.basis).sum(axis=0)
    if not config.lapped_input:
        window = lapped.ignore_border(basis, config.group_size)
        return rearrange(window, "(t h w c) k -> k t h w c", h=2 * rows, w=2 * columns, c=3)
    painted = rearrange(basis, "(t h w c) k -> k t h w c", h=rows, w=columns, c=3)
    down, right = lapped_filter.postfilter(rows), lapped_filter.postfilter(columns)
    return np.einsum("Hh,Ww,kthwc->ktHWc", down, right, painted, optimize=True)


def _as_painted(config: ElasticTokConfig, components: parts.Components) -> parts.Components:
    """The components, scaled so that a unit of each is as much in the picture."""
    norm = np.sqrt(np.square(_painted(config, components)).sum(axis=(1, 2, 3, 4)))
    mean, variance, basis = components
    return parts.Components(mean, variance * norm**2, (basis * norm).astype(np.float32))


def _plan(
    config: ElasticTokConfig,
    bands: list[Float[np.ndarray, "n c"]],
    first: list[list[int]],
) -> tuple[list[Stage], list[Float[np.ndarray, "n c"]]]:
    """The stages, and what they make of each band's components together. Its first stage has those that come `first`."""
    bottleneck = make_bottleneck(config)
    rebuilt = [np.zeros_like(band) for band in bands]
    stages: list[Stage] = []
    sizes = np.zeros((len(bands[0]), config.num_stages, config.code_dim), np.float32)  # of FSQ
    for number in range(config.num_stages):
        band = number % len(bands)
        left = bands[band] - rebuilt[band]
        strength = left.var(axis=0)
        wanted = strength.copy()
        if number < len(bands):
            wanted[first[band]] = np.inf
        chosen = np.argsort(-wanted)[: config.code_dim]
        # The first channels of a code have the most levels.
        chosen = chosen[np.argsort(-strength[chosen])]
        values, adaptive = left[:, chosen], np.ones((1, len(chosen)), np.float32)
        cube = np.zeros(len(chosen))
        log_gain = np.zeros((groups.num_gain_features(config) + 1, len(chosen)))
        if isinstance(bottleneck, FSQ):
            if number > 0:
                known = groups.gain_features(sizes, number, config)
                known = np.concatenate([known, np.ones((len(known), 1), np.float32)], axis=1)
                log_gain = _log_gain(known, values)
                adaptive = np.exp(known @ log_gain)
            gain, slope, cube, codes = _levels(bottleneck, values / adaptive, adaptive**2)
            sizes[:, number] = np.abs(codes)
        else:
            slope = values.std(axis=0).clip(_LEAST)
            gain, codes = 1 / slope, values / slope
        rebuilt[band][:, chosen] += slope * (codes + cube * codes**3) * adaptive
        stages.append(Stage(chosen, gain, slope, cube, log_gain))
    return stages, rebuilt


def _colours(
    config: ElasticTokConfig,
    components: parts.Components,
    bands: list[Float[np.ndarray, "n c"]],
    rotations: list[Float[np.ndarray, "c c"]],
    exchange: Float[np.ndarray, "e e"] | None,
) -> list[list[int]]:
    """For each band its share of the two components that say most of the mean colour, apart from its brightness.

    They are weak in most pictures and all there is to see in some, such as a purple flower; so first stages code them.
    They may take a quarter of a code: grey pictures have no use for them.
    """
    painted = components.basis / np.square(components.basis).sum(axis=0)
    mean = painted.reshape(-1, 3, painted.shape[1]).mean(axis=0)
    mean -= mean.mean(axis=0)
    means = np.zeros((len(bands), *mean.shape), np.float32)
    means[0] = mean  # differences of groups have no mean
    if exchange is not None:
        means = np.asarray(groups.exchanged(means, exchange))
    power = [
        np.square(of_band @ axes).sum(axis=0) * band.var(axis=0)
        for of_band, axes, band in zip(means, rotations, bands, strict=True)
    ]
    found: list[list[int]] = [[] for _ in bands]
    count = min(2, config.code_dim // 4)
    for place in np.argsort(-np.concatenate(power))[:count]:
        band, component = divmod(int(place), len(power[0]))
        found[band].append(component)
    return found


def _log_gain(
    before: Float[np.ndarray, "n e"], values: Float[np.ndarray, "n c"]
) -> Float[np.ndarray, "e c"]:
    """By regression: how large the values are, as far as what was coded before tells. The gains' mean square is one."""
    deviation = values.std(axis=0).clip(_LEAST)
    size = np.log(np.abs(values) / deviation + 0.05)
    normal = before.T @ before
    normal[np.diag_indices_from(normal)] += _RIDGE_OF_GAIN * len(before)
    found = np.linalg.solve(normal, before.T @ size)
    found[-1] -= np.log(np.mean(np.exp(2 * before @ found), axis=0)) / 2
    return found


def _levels(
    fsq: FSQ, values: Float[np.ndarray, "n c"], weight: Float[np.ndarray, "n c"]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """For each channel the gain before FSQ, the slope and the cube after it with the least squared error; the codes."""
    deviation, channels = values.std(axis=0).clip(_LEAST), np.arange(values.shape[1])
    scaled = (values / deviation).astype(np.float32)
    tried = np.geomspace(0.1, 4.0, 30)
    codes = np.stack([np.asarray(fsq.quantize(jnp.asarray(gain * scaled))) for gain in tried])
    # Weighted least squares with two numbers, the code and its cube.
    one, cubed, both, third = (
        (weight * codes**power * (values if power % 2 else 1)).sum(axis=1) for power in (1, 3, 2, 4)
    )
    sixth = (weight * codes**6).sum(axis=1)
    ridge = 1e-3 * both + 1e-9
    determinant = (both + ridge) * (sixth + ridge) - third**2
    slopes = ((sixth + ridge) * one - third * cubed) / determinant
    cubes = ((both + ridge) * cubed - third * one) / determinant
    error = (weight * (slopes[:, None] * codes + cubes[:, None] * codes**3 - values) ** 2).mean(
        axis=1
    )
    best = error.argmin(axis=0)
    slope, cube = slopes[best, channels], cubes[best, channels]
    slope = np.where(np.abs(slope) < 1e-9, 1e-9, slope)
    return tried[best] / deviation, slope, cube / slope, codes[best, :, channels].T


def _write_encoder(
    encoder: dict[str, Any],
    config: ElasticTokConfig,
    components: parts.Components,
    stages: list[Stage],
    rotations: list[np.ndarray],
    marks: np.ndarray,
    energy: float,
) -> None:
    channels = components.basis.shape[1]
    scale, square = parts.write_encoder_layers(
        encoder, config, components, signal=_signal(config), channels=channels, energy=energy
    )
    encoder["stage_embed"] = marks.copy()
    if config.haar_groups:
        # Tokens see bands, so the mean of pictures is taken off in each of them.
        mean = components.mean @ encoder["in_proj"]["kernel"]
        for name in ("is_kept_embed", "is_masked_embed"):
            encoder[name] += mean
        means = np.zeros((4, 1, len(mean)), np.float32)
        means[0] = 2 * mean  # the sum of four groups over two; differences of groups have no mean
        for number, of_band in enumerate(groups.exchanged(means, encoder["exchange"])):
            encoder["stage_embed"][number::4] -= np.asarray(of_band)
    if not config.condition_encoder:
        encoder["stage_embed"] += encoder.pop("is_kept_embed")
        del encoder["is_masked_embed"]
    if config.lapped_input:
        kernel = encoder["in_proj"]["kernel"]
        encoder["in_proj"]["kernel"] = lapped_filter.see_prefiltered(kernel, config.group_size)
    code_dim, constant = config.code_dim, config.hidden_size - 1
    kernel = np.zeros_like(encoder["pre_quant"]["kernel"])
    for number, stage in enumerate(stages):
        axes = rotations[number % len(rotations)][:, stage.component]
        kernel[number, :channels, :code_dim] = axes * stage.gain * np.sqrt(square) / scale
        kernel[number, constant, code_dim:] = parts.LOGVAR * np.sqrt(square) / parts.CONSTANT
    encoder["pre_quant"]["kernel"] = kernel
    if "correction" in encoder:
        correction = np.zeros_like(encoder["correction"])
        for number, stage in enumerate(stages):
            for place, before in enumerate(range(number % len(rotations), number, len(rotations))):
                earlier = stages[before]
                same = earlier.component[:, None] == stage.component[None]
                rows = slice(place * code_dim, (place + 1) * code_dim)
                correction[number, rows] = np.where(same, -earlier.slope[:, None] * stage.gain, 0.0)
        encoder["correction"] = correction
        _write_steps(encoder, stages)


def _signal(config: ElasticTokConfig) -> float:
    """With `haar_groups` the first band has up to four times the energy of the others."""
    return _SIGNAL / 4 if config.haar_groups else _SIGNAL


def _write_decoder(
    decoder: dict[str, Any],
    config: ElasticTokConfig,
    components: parts.Components,
    pixels: np.ndarray,
    rebuilt: np.ndarray,
    stages: list[Stage],
    rotations: list[np.ndarray],
    marks: np.ndarray,
    energy: float,
) -> None:
    constant, signal = config.hidden_size - 1, _signal(config)
    scale = float(parts.CONSTANT * np.sqrt(signal / np.sum(rebuilt**2, axis=1).mean()))
    layers = decoder["decoder_blocks"]["scan_decoder"]
    parts.silence(layers)
    square = parts.write_kept_marks(decoder, config, signal, energy)
    kernel = np.zeros_like(decoder["post_quant"]["kernel"])
    for number, stage in enumerate(stages):
        axes = rotations[number % len(rotations)][:, stage.component]
        kernel[number, :, : len(axes)] = (axes * (scale * stage.slope)).T
    decoder["post_quant"]["kernel"] = kernel
    if "gain" in decoder:
        _write_steps(decoder, stages)
    decoder["stage_embed"] = marks
    # The constant is counted once in the sum over stages; the mean of other groups has it too.
    decoder["stage_scale"][:] = 1.0
    decoder["stage_scale"][1:-1, constant] = 0.0
    told = _told_by_neighbours(rebuilt)
    if config.haar_groups:  # of four groups, whose neighbours are twice as far
        decoder["stage_scale"][0, constant] = 2.0
        told = told**2
    decoder["stage_scale"][-1, : rebuilt.shape[1]] = told
    used = np.flatnonzero(rebuilt.any(axis=0))
    constants = np.full((len(rebuilt), 1), parts.CONSTANT)
    seen = np.concatenate([rebuilt[:, used] * scale, constants], axis=1) / np.sqrt(square)
    deviation = seen[:, :-1].std(axis=0).clip(1e-4)
    parts.write_norms(layers, used, deviation, square)
    if config.num_group_layers:
        refining = decoder["group_blocks"]["scan_decoder"]
        parts.silence(refining)
        parts.write_norms(refining, used, deviation, square)
    # A component in the residual stream is this large after the norm.
    painted = _painted(config, components)[used] * (np.sqrt(square) / scale)
    if not config.lapped_output:
        _, rows, columns = config.group_size
        inside = slice(rows // 2, rows // 2 + rows), slice(columns // 2, columns // 2 + columns)
        painted = painted[:, :, *inside]
    solution = _fit_windows(config, seen, pixels, painted)
    out = np.zeros_like(decoder["out_proj"]["kernel"])
    out[used], out[constant] = solution[:-1], solution[-1]
    decoder["out_proj"]["kernel"] = out


def _told_by_neighbours(rebuilt: Float[np.ndarray, "g c"]) -> Float[np.ndarray, "c"]:
    """By regression: for each component the factor of the mean of two neighbours with which it is nearest to a group's own."""
    # The groups 0 and 3 are neighbours of 1 and 2.
    square = rebuilt.reshape(-1, 4, rebuilt.shape[1])
    own = square[:, [0, 1]]
    mean = np.stack([square[:, [1, 2]].mean(axis=1), square[:, [0, 3]].mean(axis=1)], axis=1)
    return ((own * mean).sum(axis=(0, 1)) / (mean**2).sum(axis=(0, 1)).clip(1e-9)).clip(0, 1)


def _write_steps(coder: dict[str, Any], stages: list[Stage]) -> None:
    coder["gain"] = np.stack([stage.log_gain for stage in stages]).astype(np.float32)
    coder["cube"] = np.stack([stage.cube for stage in stages]).astype(np.float32)


def _fit_windows(
    config: ElasticTokConfig,
    seen: Float[np.ndarray, "g c"],
    pixels: Float[np.ndarray, "g w"],
    painted: Float[np.ndarray, "k t h w 3"],
) -> Float[np.ndarray, "c w"]:
    """The matrix from a group's numbers to its pixels, or to its window, with which the picture is nearest.

    A pixel between four groups is a sum over what they paint there, or the tanh of that sum. What all four paint is fitted
    together by ridge regression, which begins at the inverse of the encoder.

    Args:
      config: the model.
      seen: the numbers of groups; the last one is constant. Four after one another meet in a corner.
      pixels: of the same groups.
      painted: what a unit of each number but the constant paints if nothing is fitted.
    """
    frames, rows, columns = config.group_size
    # Groups along rows, and along columns, that share a pixel.
    meeting = 2 if config.lapped_output else 1
    constant, seen = float(seen[0, -1]), seen[:, :-1]
    count, deviation = seen.shape[1], seen.std(axis=0).clip(1e-6)
    numbers = (seen / deviation).astype(np.float32).reshape(-1, meeting**2 * count)
    middle = rearrange(
        pixels,
        "(n a b) (t h w c) -> n t (a h) (b w) c",
        a=meeting, b=meeting, t=frames, h=rows, w=columns,
    )  # fmt: skip
    weight = np.ones((rows, columns))
    if config.lapped_output:
        middle = middle[:, :, rows // 2 : -(rows // 2), columns // 2 : -(columns // 2)]
        weight = np.outer(lapped.raised_cosine(rows), lapped.raised_cosine(columns))
    base = parts.before_output(middle, config).mean(axis=(0, 1, 2, 3))
    # Of the four groups around a corner the first one paints the last quarter of its window there.
    start = rearrange(
        painted * deviation[:, None, None, None, None],
        "k t (a h) (b w) c -> a b k (t h w c)",
        a=meeting, b=meeting,
    )[::-1, ::-1]  # fmt: skip
    fitted = _fit(
        config,
        numbers,
        middle.reshape(len(middle), -1),
        np.tile(base, frames * rows * columns),
        start.reshape(len(numbers[0]), -1).astype(np.float32),
    )
    fitted = rearrange(
        fitted.reshape(meeting, meeting, count, -1)[::-1, ::-1],
        "a b k (t h w c) -> k t (a h) (b w) c",
        t=frames, h=rows, w=columns,
    )  # fmt: skip
    window = np.broadcast_to(base / constant, (count + 1, *fitted.shape[1:])).copy()
    window[:-1] = fitted / deviation[:, None, None, None, None] / weight[..., None]
    return window.reshape(count + 1, -1)


def _fit(
    config: ElasticTokConfig,
    numbers: Float[np.ndarray, "n c"],
    target: Float[np.ndarray, "n t"],
    base: Float[np.ndarray, "t"],
    start: Float[np.ndarray, "c t"],
) -> Float[np.ndarray, "c t"]:
    """The matrix B near `start`, by ridge regression, for which numbers @ B + base, or its tanh, is near `target`.

    Args:
      config: the model, which says whether there is a tanh.
      numbers: of variance 1.
      target: pixels.
      base: for numbers that are zero.
      start: what the regression is drawn to.
    """
    ridge = (_RIDGE_OF_INVERSE if config.lapped_input else _RIDGE) * len(numbers)
    normal = numbers.T @ numbers
    normal[np.diag_indices_from(normal)] += ridge
    factor = scipy.linalg.cho_factor(normal)
    error = parts.before_output(target, config) - base - numbers @ start
    change = scipy.linalg.cho_solve(factor, numbers.T @ error)
    for _ in range(_STEPS if config.bounded_output else 0):
        out = np.tanh(numbers @ (start + change) + base)
        gradient = numbers.T @ ((target - out) * (1 - out**2))
        change += scipy.linalg.cho_solve(factor, gradient - ridge * change)
    return start + change

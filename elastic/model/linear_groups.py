"""The linear start of a model with groups of patches: each stage codes components of the whole group.

A component describes a whole group. Stage 0 codes the strongest components. Every later stage codes the components whose
error is then largest: new ones, and earlier ones where the levels of FSQ were too coarse.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import scipy.linalg
from einops import rearrange
from jaxtyping import Float, Int

from elastic.config import ElasticTokConfig
from elastic.model import linear_parts as parts
from elastic.model.bottleneck import FSQ, make_bottleneck
from elastic.model.lapped import raised_cosine

_SIGNAL = 0.01  # as in linear_init; smaller, because the weak components of a group are coded too
_FOR_STAGES = 32  # channels of the residual stream that tell a token's stage and hold no component
_STAGE = 0.25  # the deviation of those
_LEAST = 1e-3  # the deviation of a component that counts as one; an eighth of a level
_STEPS = 12  # of the fit through tanh
_RIDGE = 3e-3  # of that fit, for numbers of variance 1


class Stage(NamedTuple):
    """What one stage codes, for each channel of its code.

    Attributes:
      component: the number of a component.
      gain: what that is multiplied by before the bottleneck.
      slope: what the number that the code stands for is multiplied by after it.
      cube: FSQ: as in `groups.Steps`.
      log_gain: FSQ: from the absolute codes of the stages before, and one, to the logarithm of the adaptive gain.
    """

    component: Int[np.ndarray, "c"]
    gain: Float[np.ndarray, "c"]
    slope: Float[np.ndarray, "c"]
    cube: Float[np.ndarray, "c"]
    log_gain: Float[np.ndarray, "e c"]


def write_groups(
    params: dict[str, Any], config: ElasticTokConfig, squares: Float[np.ndarray, "n w"]
) -> None:
    """Writes the linear codec of groups of patches into `params`.

    Args:
      params: float32 NumPy arrays with stacked layers.
      config: the model.
      squares: of two by two groups, pixels in [-1, 1] in the order of one large patch.
    """
    width = config.hidden_size
    pixels = rearrange(
        squares,
        "n (t a h b w c) -> (n a b) (t h w c)",
        a=2, b=2, c=3, t=config.group_size[0], h=config.group_size[1], w=config.group_size[2],
    )  # fmt: skip
    signals = min(width - 2 - _FOR_STAGES, pixels.shape[1])
    components = parts.principal_components(pixels, signals)
    stages, rebuilt = _plan(config, (pixels - components.mean) @ components.basis)
    rng = np.random.default_rng(0)
    marks = np.zeros((config.patch_group, width), np.float32)
    marks[:, signals : width - 2] = _STAGE * rng.normal(size=(len(marks), width - 2 - signals))
    energy = _STAGE**2 * (width - 2 - signals)
    _write_encoder(params["encoder"], config, components, stages, marks, energy)
    _write_decoder(params["decoder"], config, pixels, rebuilt, stages, marks, energy)


def _plan(
    config: ElasticTokConfig, components: Float[np.ndarray, "n s"]
) -> tuple[list[Stage], Float[np.ndarray, "n s"]]:
    """The stages, and what they make of the components together."""
    bottleneck = make_bottleneck(config)
    rebuilt, stages = np.zeros_like(components), []
    before = np.ones((len(components), 1), np.float32)
    for _ in range(config.patch_group):
        left = components - rebuilt
        chosen = np.argsort(-left.var(axis=0))[: config.code_dim]
        values, adaptive = left[:, chosen], np.ones((1, len(chosen)), np.float32)
        log_gain, cube = np.zeros((before.shape[1], len(chosen))), np.zeros(len(chosen))
        if isinstance(bottleneck, FSQ):
            if len(stages) > 0:
                log_gain = _log_gain(before, values)
                adaptive = np.exp(before @ log_gain)
            gain, slope, cube, codes = _levels(bottleneck, values / adaptive, adaptive**2)
            # The constant comes last.
            before = np.concatenate([before[:, :-1], np.abs(codes), before[:, -1:]], axis=1)
        else:
            slope = values.std(axis=0).clip(_LEAST)
            gain, codes = 1 / slope, values / slope
        rebuilt[:, chosen] += slope * (codes + cube * codes**3) * adaptive
        stages.append(Stage(chosen, gain, slope, cube, log_gain))
    return stages, rebuilt


def _log_gain(
    before: Float[np.ndarray, "n e"], values: Float[np.ndarray, "n c"]
) -> Float[np.ndarray, "e c"]:
    """By regression: how large the values are, as far as what was coded before tells. The gains' mean square is one."""
    deviation = values.std(axis=0).clip(_LEAST)
    size = np.log(np.abs(values) / deviation + 0.05)
    normal = before.T @ before + np.eye(before.shape[1], dtype=before.dtype)
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
    marks: np.ndarray,
    energy: float,
) -> None:
    channels = components.basis.shape[1]
    scale, square = parts.write_encoder_layers(
        encoder, config, components, signal=_SIGNAL, channels=channels, energy=energy
    )
    encoder["stage_embed"] = marks
    code_dim, constant = config.code_dim, config.hidden_size - 1
    kernel = np.zeros_like(encoder["pre_quant"]["kernel"])
    channel = np.arange(code_dim)
    for number, stage in enumerate(stages):
        kernel[number, stage.component, channel] = stage.gain * np.sqrt(square) / scale
        kernel[number, constant, code_dim:] = parts.LOGVAR * np.sqrt(square) / parts.CONSTANT
    encoder["pre_quant"]["kernel"] = kernel
    if "correction" in encoder:
        correction = np.zeros_like(encoder["correction"])
        for number, stage in enumerate(stages):
            for before, earlier in enumerate(stages[:number]):
                same = earlier.component[:, None] == stage.component[None]
                rows = slice(before * code_dim, (before + 1) * code_dim)
                correction[number, rows] = np.where(same, -earlier.slope[:, None] * stage.gain, 0.0)
        encoder["correction"] = correction
        _write_steps(encoder, stages)


def _write_decoder(
    decoder: dict[str, Any],
    config: ElasticTokConfig,
    pixels: np.ndarray,
    rebuilt: np.ndarray,
    stages: list[Stage],
    marks: np.ndarray,
    energy: float,
) -> None:
    constant = config.hidden_size - 1
    scale = float(parts.CONSTANT * np.sqrt(_SIGNAL / np.sum(rebuilt**2, axis=1).mean()))
    layers = decoder["decoder_blocks"]["scan_decoder"]
    parts.silence(layers)
    square = parts.write_kept_marks(decoder, config, _SIGNAL, energy)
    kernel = np.zeros_like(decoder["post_quant"]["kernel"])
    for number, stage in enumerate(stages):
        kernel[number, np.arange(config.code_dim), stage.component] = scale * stage.slope
    decoder["post_quant"]["kernel"] = kernel
    if "gain" in decoder:
        _write_steps(decoder, stages)
    decoder["stage_embed"] = marks
    # The constant is counted once in the sum over stages; the mean of other groups has it too.
    decoder["stage_scale"][:] = 1.0
    decoder["stage_scale"][1:, constant] = 0.0
    used = np.unique(np.concatenate([stage.component for stage in stages]))
    constants = np.full((len(rebuilt), 1), parts.CONSTANT)
    seen = np.concatenate([rebuilt[:, used] * scale, constants], axis=1) / np.sqrt(square)
    deviation = seen[:, :-1].std(axis=0).clip(1e-4)
    parts.write_norms(layers, used, deviation, square)
    solution = _fit_windows(config, seen, pixels)
    out = np.zeros_like(decoder["out_proj"]["kernel"])
    out[used], out[constant] = solution[:-1], solution[-1]
    decoder["out_proj"]["kernel"] = out


def _write_steps(coder: dict[str, Any], stages: list[Stage]) -> None:
    gain, cube = np.zeros_like(coder["gain"]), np.zeros_like(coder["cube"])
    for number, stage in enumerate(stages):
        gain[number, : len(stage.log_gain) - 1] = stage.log_gain[:-1]
        gain[number, -1], cube[number] = stage.log_gain[-1], stage.cube
    coder["gain"], coder["cube"] = gain, cube


def _fit_windows(
    config: ElasticTokConfig, seen: Float[np.ndarray, "g c"], pixels: Float[np.ndarray, "g w"]
) -> Float[np.ndarray, "c w"]:
    """The matrix from a group's numbers to its pixels, or to its window, with which the picture is nearest.

    A pixel between four groups is a sum over them of weight * numbers @ column of the window, or the tanh of that sum.
    The four columns are fitted together by least squares; then come steps that take a tanh into account.

    Args:
      config: the model.
      seen: the numbers of groups; the last one is constant. Four after one another meet in a corner.
      pixels: of the same groups.
    """
    frames, rows, columns = config.group_size
    # Groups along rows, and along columns, that share a pixel.
    meeting = 2 if config.lapped_output else 1
    constant, seen = float(seen[0, -1]), seen[:, :-1]
    count, deviation = seen.shape[1], seen.std(axis=0).clip(1e-6)
    numbers = (seen / deviation).astype(np.float32).reshape(-1, meeting**2, count)
    middle = rearrange(
        pixels,
        "(n a b) (t h w c) -> n t (a h) (b w) c",
        a=meeting, b=meeting, t=frames, h=rows, w=columns,
    )  # fmt: skip
    down, right = np.ones(rows), np.ones(columns)
    if config.lapped_output:
        middle = middle[:, :, rows // 2 : -(rows // 2), columns // 2 : -(columns // 2)]
        down, right = raised_cosine(rows), raised_cosine(columns)
    base = parts.before_output(middle, config).mean(axis=(0, 1, 2, 3))
    window = np.zeros((count + 1, frames, len(down), len(right), 3), np.float32)
    window[-1] = base / constant
    gram = np.einsum("nic,njd->icjd", numbers, numbers, optimize=True)
    flat = numbers.reshape(len(numbers), -1)
    for row, column in np.ndindex(rows, columns):
        places = [
            (row + a * rows, column + b * columns)
            for a in reversed(range(meeting))
            for b in reversed(range(meeting))
        ]
        weight = np.array([down[i] * right[j] for i, j in places], np.float32)
        normal = (gram * weight[:, None, None, None] * weight[:, None]).reshape(flat.shape[1], -1)
        target = middle[:, :, row, column].reshape(len(numbers), -1)  # frames and colours
        solution = _fit_pixel(
            config, flat, np.repeat(weight, count), normal, target, np.tile(base, frames)
        )
        for number, (i, j) in enumerate(places):
            part = solution[number * count : (number + 1) * count]
            window[:-1, :, i, j] = (part / deviation[:, None]).reshape(count, frames, 3)
    return window.reshape(count + 1, -1)


def _fit_pixel(
    config: ElasticTokConfig,
    numbers: Float[np.ndarray, "n c"],
    weight: Float[np.ndarray, "c"],
    normal: Float[np.ndarray, "c c"],
    target: Float[np.ndarray, "n t"],
    base: Float[np.ndarray, "t"],
) -> Float[np.ndarray, "c t"]:
    """The matrix B, by ridge regression, for which (weight * numbers) @ B + base, or its tanh, is near `target`.

    Args:
      config: the model, which says whether there is a tanh.
      numbers: of variance 1.
      weight: of each number.
      normal: (weight * numbers)^T (weight * numbers).
      target: pixels of one place, of several frames and colours.
      base: for numbers that are zero.
    """
    ridge = _RIDGE * len(numbers)
    factor = scipy.linalg.cho_factor(normal + ridge * np.eye(len(normal), dtype=normal.dtype))
    error = parts.before_output(target, config) - base
    solution = scipy.linalg.cho_solve(factor, weight[:, None] * (numbers.T @ error))
    for _ in range(_STEPS if config.bounded_output else 0):
        out = np.tanh(numbers @ (weight[:, None] * solution) + base)
        gradient = weight[:, None] * (numbers.T @ ((target - out) * (1 - out**2)))
        solution += scipy.linalg.cho_solve(factor, gradient - ridge * solution)
    return solution

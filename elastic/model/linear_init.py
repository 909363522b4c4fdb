"""Initial parameters that make the model a linear transform codec: principal components of patches, quantized.

A randomly initialized model spends its first thousands of steps on learning the mean brightness of patches. Small
models that must train in an hour start here instead. Their layers then learn what a fixed transform of single patches
cannot do.

How a network without biases between two RMSNorms becomes linear: one channel of the residual stream holds a constant
that is large against all others, so that the norm divides by nearly a constant. The encoder gets the constant from its
embeddings. The decoder, whose only input is codes, computes it in one layer's MLP: silu(b u) u + silu(-b u)(-u) = b u^2
exactly, and the squares of a normalized vector sum to its width.

Where a block has several slices in time, one head of the decoder's last layer also copies: a dropped token gets the
values of the token at the same place in the last earlier slice that kept it. A still shot then needs one slice only.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from elastic.config import ElasticTokConfig
from elastic.model.bottleneck import FSQ, make_bottleneck
from elastic.model.lapped import repeat_border
from elastic.model.linear_groups import FOR_STAGES, write_groups
from elastic.model.linear_parts import (
    CONSTANT,
    LOGVAR,
    MASKED,
    Components,
    principal_components,
    silence,
    write_encoder_layers,
    write_kept_marks,
)
from elastic.patches import to_unit_range

_SIGNAL = 0.04  # energy of the other channels, as a fraction of the constant's energy
_IN_TIME, _IN_SPACE = 0.4, 1.0  # logits per pair of channels of the interpolating head
_SHARP = 4.0  # logits of a kept token's query, as a multiple of a dropped token's
_COPIED = 3.0  # what the interpolating head adds, as a multiple of what a token holds


def sample_size(config: ElasticTokConfig) -> tuple[int, int, int]:
    """Frames, rows and columns of the patches that `linear_init` takes.

    With groups of patches these are two by two groups. With `lapped_input` there are groups around them, if the
    frame divides into four by four.
    """
    frames, rows, columns = config.group_size
    side = 1 if config.patch_group == 1 else 2
    if config.lapped_input and all(size % 4 == 0 for size in config.grid_shape):
        side *= 2
    return frames, side * rows, side * columns


def linear_init(
    params: dict[str, Any], config: ElasticTokConfig, patches: UInt8[np.ndarray, "n p"]
) -> dict[str, Any]:
    """`params` with the linear codec of `patches` written into them, as float32 NumPy arrays.

    Args:
      params: randomly initialized parameters with stacked layers.
      config: the model.
      patches: a sample of training patches of `sample_size` [n, p], uint8 pixels; some ten thousand.

    Raises:
      ValueError: the layers are numbered, the model is too narrow, or there are too few patches.
    """
    code_dim, width = config.code_dim, config.hidden_size
    if not config.scan_layers:
        raise ValueError("A linear start needs scan_layers=True.")
    if config.lapped_input and config.patch_group == 1:
        raise ValueError("A linear start with lapped_input=True needs patch_group above 1.")
    if not config.condition_encoder and config.patch_group == 1:
        raise ValueError(
            "A linear start without groups of patches needs condition_encoder=True: the embeddings of kept tokens carry its "
            "constant."
        )
    needed = code_dim + 2 + (FOR_STAGES if config.patch_group > 1 else 0)
    if width < needed or config.intermediate_size < 2 * code_dim:
        raise ValueError(
            f"A linear start of {code_dim} code channels needs hidden_size of {needed} and intermediate_size of "
            f"{2 * code_dim} or more, not {width} and {config.intermediate_size}."
        )
    # A square of two by two groups holds four samples of as many numbers as a quarter of it.
    numbers = config.patch_group * config.patch_dim
    enough = numbers if config.patch_group > 1 else 4 * numbers
    if len(patches) < enough:
        raise ValueError(
            f"{len(patches)} patches are too few for components of {numbers} numbers; use {enough} or more."
        )
    params = jax.tree.map(lambda x: np.array(x, np.float32), params)
    if config.patch_group > 1:
        write_groups(params, config, patches)
        return params
    pixels = to_unit_range(patches)
    components = principal_components(pixels, pixels.shape[1])
    gain, codes = _codes_of(config, (pixels - components.mean) @ components.basis[:, :code_dim])
    _write_encoder(params["encoder"], config, components, gain)
    _write_decoder(params["decoder"], config, pixels, codes)
    return params


def _codes_of(
    config: ElasticTokConfig, components: Float[np.ndarray, "n c"]
) -> tuple[Float[np.ndarray, "c"], Float[np.ndarray, "n c"]]:
    """For each component the gain before the bottleneck with the least squared error, and the codes that it gives."""
    bottleneck = make_bottleneck(config)
    deviation = components.std(axis=0)
    scaled = (components / deviation).astype(np.float32)
    if not isinstance(bottleneck, FSQ):
        return 1 / deviation, scaled
    tried = np.geomspace(0.15, 2.5, 24)
    codes = np.stack(
        [np.asarray(bottleneck.quantize(jnp.asarray(gain * scaled))) for gain in tried]
    )
    centred = codes - codes.mean(axis=1, keepdims=True)
    slope = (centred * components).sum(axis=1) / (centred**2).sum(axis=1).clip(1e-9)
    error = ((slope[:, None] * centred - components) ** 2).mean(axis=1)
    best = error.argmin(axis=0)
    channel = np.arange(len(deviation))
    return tried[best] / deviation, codes[best, :, channel].T


def _write_encoder(
    encoder: dict[str, Any], config: ElasticTokConfig, components: Components, gain: np.ndarray
) -> None:
    scale, square = write_encoder_layers(
        encoder, config, components, signal=_SIGNAL, channels=config.hidden_size - 2
    )
    latents = np.zeros_like(encoder["pre_quant"]["kernel"])
    channel = np.arange(len(gain))
    latents[channel, channel] = gain * np.sqrt(square) / scale
    latents[config.hidden_size - 1, len(gain) :] = (
        LOGVAR * np.sqrt(square) / CONSTANT
    )  # an empty slice for FSQ
    encoder["pre_quant"]["kernel"] = latents


def _write_decoder(
    decoder: dict[str, Any], config: ElasticTokConfig, pixels: np.ndarray, codes: np.ndarray
) -> None:
    width, num_codes = config.hidden_size, codes.shape[1]
    constant = width - 1
    energy = float(np.sum(codes**2, axis=1).mean())
    scale = float(CONSTANT * np.sqrt(_SIGNAL / energy))
    projection = np.zeros((num_codes, width), np.float32)
    channel = np.arange(num_codes)
    projection[channel, channel] = scale
    decoder["post_quant"]["kernel"] = projection
    layers = decoder["decoder_blocks"]["scan_decoder"]
    silence(layers)
    square = CONSTANT**2 * (1 + _SIGNAL) / width
    if config.condition_decoder:
        square = write_kept_marks(decoder, config, _SIGNAL)
        if config.rope == "3d" and config.head_dim > num_codes:
            _write_interpolating(layers["attention"], config, num_codes, square)
            # All but the mark has grown by the same factor.
            square -= MASKED**2 * (1 - (1 + _COPIED) ** -2) / width
    else:
        _write_constant(layers["feed_forward"], num_codes)
        slices = config.slices_per_block
        has_layers = config.num_decoder_layers > 2 and config.head_dim > num_codes
        if slices > 1 and has_layers and config.rope == "1d":
            _write_copying(layers["attention"], config, slices, num_codes)
    seen = np.concatenate([codes * scale, np.full((len(codes), 1), CONSTANT)], axis=1)
    seen = (seen / np.sqrt(square)).astype(np.float32)
    if config.bounded_output:
        solution = _fit_through_tanh(seen, pixels)
    else:
        solution = np.linalg.lstsq(seen, pixels, rcond=None)[0]
    if config.lapped_output:
        solution = repeat_border(solution, config.patch_size)
    out = np.zeros_like(decoder["out_proj"]["kernel"])
    out[channel], out[constant] = solution[:-1], solution[-1]
    decoder["out_proj"]["kernel"] = out


def _write_constant(weights: dict[str, Any], num_codes: int) -> None:
    """Writes the first layer's SwiGLU: it gives the tokens that have codes, the kept ones, their constant."""
    channel = np.arange(num_codes)
    for name in ("w1", "w3"):
        kernel = weights[name]["kernel"][0]
        kernel[:, : 2 * num_codes] = 0.0
        kernel[channel, 2 * channel], kernel[channel, 2 * channel + 1] = 1.0, -1.0
    kernel = weights["w2"]["kernel"][0]
    kernel[: 2 * num_codes, -1] = CONSTANT / kernel.shape[1]


def _write_interpolating(
    attention: dict[str, Any],
    config: ElasticTokConfig,
    num_codes: int,
    square: float,
) -> None:
    """Writes the first head of the decoder's last layer: dropped tokens become a mean of kept ones, by distance.

    The logit of a query and a key that are `d` apart along an axis is the sum of cos(frequency * d) over the pairs of
    the axis. Frequencies are a geometric sequence, so the sum falls as -log d: the weights of the mean are powers of
    distance, as in inverse distance weighting (Shepard 1968), whatever the density of kept tokens. The keys of dropped
    tokens have the opposite sign, which hides them. The queries of kept tokens are larger, so that these attend to
    themselves.
    """
    dim, constant, masked = config.head_dim, config.hidden_size - 1, config.hidden_size - 2
    # After a norm the constant and the mark are these.
    root = np.sqrt(square)
    one, mark = root / CONSTANT, root / MASKED
    query, key, value, out = (attention[name]["kernel"][-1] for name in ("wq", "wk", "wv", "wo"))
    query[:, :dim] = key[:, :dim] = value[:, :dim] = out[:dim] = 0.0
    time, rows, columns = config.rope_pairs
    # The logit's weight of each pair, before the division by the root of head_dim.
    weight = np.repeat([_IN_TIME, _IN_SPACE, _IN_SPACE], [time, rows, columns]) * np.sqrt(dim)
    key[masked, 0:dim:2] = mark
    query[constant, 0:dim:2] = weight * one * (_SHARP + 1) / 2
    query[masked, 0:dim:2] = weight * mark * (_SHARP - 1) / 2
    channel = np.arange(num_codes)
    value[channel, channel] = 1.0
    out[channel, channel] = _COPIED * root
    value[constant, num_codes], out[num_codes, constant] = 1.0, _COPIED * root


def _write_copying(
    attention: dict[str, Any], config: ElasticTokConfig, slices: int, num_codes: int
) -> None:
    """Writes the first head of the last two layers of the decoder.

    Dropped tokens enter as zeros, so they have nothing to make a query from. In the second-to-last layer every token
    gets a small flag: the mean of the constants of kept tokens. In the last layer a dropped token, which holds only the
    flag, makes from it a query for its place in earlier slices. A kept token makes from its constant a query for
    itself, which doubles it; a norm removes that factor.
    """
    distance = config.tokens_per_block // slices
    dim, constant, flag = config.head_dim, config.hidden_size - 1, config.hidden_size - 2
    one = 1 / np.sqrt(config.hidden_size)  # the inverse of a single nonzero channel after a norm
    query, key, value, out = (attention[name]["kernel"] for name in ("wq", "wk", "wv", "wo"))
    for kernel in (query, key, value):
        kernel[-2:, :, :dim] = 0.0
    value[-2, constant, 0], out[-2, 0, flag] = one, 1.0
    # RoPE rotates pairs of channels by position * frequency. A query rotated back by a distance matches the key there.
    frequency = config.theta ** (-np.arange(0, dim, 2) / dim)
    size = one * np.sqrt(2 * np.sqrt(dim))  # the neighbours of the wanted place get weight e^-4
    key[-1, constant, 0:dim:2] = query[-1, constant, 0:dim:2] = size
    for m in range(
        1, slices + 1
    ):  # prefers the nearest slice that kept the token, up to a block ago
        rotation = m * distance * frequency
        query[-1, flag, 0:dim:2] += (1 - 0.04 * (m - 1)) * size * np.cos(rotation)
        query[-1, flag, 1:dim:2] -= (1 - 0.04 * (m - 1)) * size * np.sin(rotation)
    channel = np.arange(num_codes)
    value[-1, channel, channel] = out[-1, channel, channel] = 1.0
    value[-1, constant, num_codes] = out[-1, num_codes, constant] = 1.0


def _fit_through_tanh(
    seen: Float[np.ndarray, "n c"], pixels: Float[np.ndarray, "n p"]
) -> Float[np.ndarray, "c p"]:
    """The matrix B that minimizes |tanh(seen @ B) - pixels|^2: least squares before the tanh, then Gauss-Newton steps."""
    matrix = np.linalg.lstsq(seen, np.arctanh(pixels.clip(-0.95, 0.95)), rcond=None)[0]
    for _ in range(6):
        out = np.tanh(seen @ matrix)
        error, slope = pixels - out, 1 - out**2
        for column in range(pixels.shape[1]):
            jacobian = seen * slope[:, column, None]
            normal = jacobian.T @ jacobian
            normal[np.diag_indices_from(normal)] += 1e-3 * normal.diagonal().mean()
            matrix[:, column] += np.linalg.solve(normal, jacobian.T @ error[:, column])
    return matrix

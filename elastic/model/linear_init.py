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
from elastic.patches import to_unit_range

_CONSTANT = 16.0  # the constant channel's value
_SIGNAL = 0.04  # energy of the other channels, as a fraction of the constant's energy
_MASKED = 4.0  # the value that marks the encoder's kept tokens (+) and dropped tokens (-)
_IN_TIME, _IN_SPACE = 0.4, 1.0  # logits per pair of channels of the interpolating head
_SHARP = 4.0  # logits of a kept token's query, as a multiple of a dropped token's
_COPIED = 3.0  # what the interpolating head adds, as a multiple of what a token holds
_LOGVAR = -5.0  # log variance of the VAE's samples; its means have variance 1


def linear_init(
    params: dict[str, Any], config: ElasticTokConfig, patches: UInt8[np.ndarray, "n p"]
) -> dict[str, Any]:
    """`params` with the linear codec of `patches` written into them, as float32 NumPy arrays.

    Args:
      params: randomly initialized parameters with stacked layers.
      config: the model.
      patches: a sample of training patches [n, p], uint8 pixels; some ten thousand.

    Raises:
      ValueError: the layers are numbered, the model is too narrow, or there are too few patches.
    """
    code_dim, width = config.code_dim, config.hidden_size
    if not config.scan_layers:
        raise ValueError("A linear start needs scan_layers=True.")
    if not config.condition_encoder:
        raise ValueError(
            "A linear start needs condition_encoder=True: the embeddings of kept tokens carry its constant."
        )
    if width < code_dim + 2 or config.intermediate_size < 2 * code_dim:
        raise ValueError(
            f"A linear start of {code_dim} code channels needs hidden_size of {code_dim + 2} and intermediate_size of "
            f"{2 * code_dim} or more, not {width} and {config.intermediate_size}."
        )
    if len(patches) < 4 * config.patch_dim:
        raise ValueError(
            f"{len(patches)} patches are too few for components of {config.patch_dim} numbers; "
            f"use {4 * config.patch_dim} or more."
        )
    params = jax.tree.map(lambda x: np.array(x, np.float32), params)
    pixels = to_unit_range(patches)
    mean = pixels.mean(axis=0)
    variance, basis = np.linalg.eigh(np.cov((pixels - mean).T))
    variance, basis = variance[::-1].clip(1e-8), basis[:, ::-1]
    components = (pixels - mean) @ basis[:, :code_dim]
    gain, codes = _codes_of(config, components)
    scale = float(_CONSTANT * np.sqrt(_SIGNAL / variance.sum()))
    _write_encoder(params["encoder"], config, mean, variance, basis, gain, scale)
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
    encoder: dict[str, Any],
    config: ElasticTokConfig,
    mean: np.ndarray,
    variance: np.ndarray,
    basis: np.ndarray,
    gain: np.ndarray,
    scale: float,
) -> None:
    width = config.hidden_size
    constant, masked, signals = width - 1, width - 2, min(width - 2, config.patch_dim)
    projection = np.zeros((config.patch_dim, width), np.float32)
    projection[:, :signals] = scale * basis[:, :signals]
    encoder["in_proj"]["kernel"] = projection
    for name, sign in (("is_kept_embed", 1), ("is_masked_embed", -1)):
        embedding = -mean @ projection
        embedding[constant], embedding[masked] = _CONSTANT, sign * _MASKED
        encoder[name] = embedding[None].astype(np.float32)
    # The mean square of the residual stream, by whose root a norm divides; tokens differ from it a little.
    square = (_CONSTANT**2 * (1 + _SIGNAL) + _MASKED**2) / width
    deviation = scale * np.sqrt(variance[:signals] / square)
    layers = encoder["encoder_blocks"]["scan_decoder"]
    for name in ("attention_norm", "ffn_norm"):
        # Layers see every component. The weights reduce the dominance of the strong components.
        weight = layers[name]["kernel"]
        weight[:, :signals] = (deviation / deviation[0]) ** 0.5 / deviation
        weight[:, constant] = np.sqrt(square) / _CONSTANT
        weight[:, masked] = np.sqrt(square) / _MASKED
    _silence(layers)
    latents = np.zeros_like(encoder["pre_quant"]["kernel"])
    channel = np.arange(len(gain))
    latents[channel, channel] = gain * np.sqrt(square) / scale
    latents[constant, len(gain) :] = _LOGVAR * np.sqrt(square) / _CONSTANT  # an empty slice for FSQ
    encoder["pre_quant"]["kernel"] = latents


def _write_decoder(
    decoder: dict[str, Any], config: ElasticTokConfig, pixels: np.ndarray, codes: np.ndarray
) -> None:
    width, num_codes = config.hidden_size, codes.shape[1]
    constant = width - 1
    energy = float(np.sum(codes**2, axis=1).mean())
    scale = float(_CONSTANT * np.sqrt(_SIGNAL / energy))
    projection = np.zeros((num_codes, width), np.float32)
    channel = np.arange(num_codes)
    projection[channel, channel] = scale
    decoder["post_quant"]["kernel"] = projection
    layers = decoder["decoder_blocks"]["scan_decoder"]
    _silence(layers)
    square = _CONSTANT**2 * (1 + _SIGNAL) / width
    if config.condition_decoder:
        for name, sign in (("is_kept_embed", 1), ("is_masked_embed", -1)):
            decoder[name][:] = 0.0
            decoder[name][0, constant], decoder[name][0, constant - 1] = _CONSTANT, sign * _MASKED
        mark = _MASKED
        if config.rope == "3d" and config.head_dim > num_codes:
            _write_interpolating(layers["attention"], config, num_codes)
            mark /= 1 + _COPIED  # all else has grown by this factor
        square += mark**2 / width
    else:
        _write_constant(layers["feed_forward"], num_codes)
        slices = config.slices_per_block
        has_layers = config.num_decoder_layers > 2 and config.head_dim > num_codes
        if slices > 1 and has_layers and config.rope == "1d":
            _write_copying(layers["attention"], config, slices, num_codes)
    seen = np.concatenate([codes * scale, np.full((len(codes), 1), _CONSTANT)], axis=1)
    solution = _fit_through_tanh((seen / np.sqrt(square)).astype(np.float32), pixels)
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
    kernel[: 2 * num_codes, -1] = _CONSTANT / kernel.shape[1]


def _write_interpolating(
    attention: dict[str, Any], config: ElasticTokConfig, num_codes: int
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
    root = np.sqrt((_CONSTANT**2 * (1 + _SIGNAL) + _MASKED**2) / config.hidden_size)
    one, mark = root / _CONSTANT, root / _MASKED
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


def _silence(layers: dict[str, Any]) -> None:
    """Makes layers add nothing to the residual stream: random ones cost 5 dB, and hundreds of steps to regain it."""
    for part, name in (("attention", "wo"), ("feed_forward", "w2")):
        layers[part][name]["kernel"][:] = 0.0


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

"""What the linear starts of a model with and without groups of patches share; `linear_init` explains both."""

from typing import Any

import numpy as np
import scipy.linalg
from jaxtyping import Float, Int

from elastic.config import ElasticTokConfig

CONSTANT = 16.0  # the constant channel's value
MASKED = 4.0  # the value that marks the encoder's kept tokens (+) and dropped tokens (-)
LOGVAR = -5.0  # log variance of the VAE's samples; its means have variance 1
_IN_TIME, _IN_SPACE = 0.4, 1.0  # logits per pair of channels of the interpolating head


def principal_components(
    pixels: Float[np.ndarray, "n p"], count: int
) -> tuple[Float[np.ndarray, "p"], Float[np.ndarray, "c"], Float[np.ndarray, "p c"]]:
    """Mean, variances and components of patches, the strongest first; at most `count` of them."""
    mean = pixels.mean(axis=0)
    size = pixels.shape[1]
    variance, basis = scipy.linalg.eigh(
        np.cov((pixels - mean).T), subset_by_index=(size - min(count, size), size - 1)
    )
    return mean, variance[::-1].clip(1e-8), basis[:, ::-1]


def encoder_scale(signal: float, variance: Float[np.ndarray, "c"]) -> float:
    """The factor that gives components of this variance the energy `signal`, as a fraction of the constant's."""
    return float(CONSTANT * np.sqrt(signal / variance.sum()))


def write_encoder_layers(
    encoder: dict[str, Any],
    config: ElasticTokConfig,
    mean: Float[np.ndarray, "p"],
    variance: Float[np.ndarray, "c"],
    basis: Float[np.ndarray, "p c"],
    scale: float,
    energy: float = 0.0,
) -> float:
    """Writes all of the encoder but its last projection: channel i of the residual stream holds component i.

    Args:
      encoder: its parameters.
      config: the model.
      mean: of the patches.
      variance: of the components, all of them.
      basis: of those components that get a channel.
      scale: of the components in the residual stream.
      energy: of further channels, which the caller writes.

    Returns:
      The mean square of the residual stream, by whose root a norm divides; tokens differ from it a little.
    """
    width, signals = config.hidden_size, basis.shape[1]
    constant, masked = width - 1, width - 2
    projection = np.zeros((len(mean), width), np.float32)
    projection[:, :signals] = scale * basis
    encoder["in_proj"]["kernel"] = projection
    for name, sign in (("is_kept_embed", 1), ("is_masked_embed", -1)):
        embedding = -mean @ projection
        embedding[constant], embedding[masked] = CONSTANT, sign * MASKED
        encoder[name] = embedding[None].astype(np.float32)
    signal = scale**2 * variance.sum() / CONSTANT**2
    square = (CONSTANT**2 * (1 + signal) + MASKED**2 + energy) / width
    deviation = scale * np.sqrt(variance[:signals] / square)
    layers = encoder["encoder_blocks"]["scan_decoder"]
    for name in ("attention_norm", "ffn_norm"):
        # Layers see every component. The weights reduce the dominance of the strong components.
        weight = layers[name]["kernel"]
        weight[:, :signals] = (deviation / deviation[0]) ** 0.5 / deviation
        weight[:, constant] = np.sqrt(square) / CONSTANT
        weight[:, masked] = np.sqrt(square) / MASKED
    silence(layers)
    return square


def write_kept_marks(
    decoder: dict[str, Any], config: ElasticTokConfig, signal: float, energy: float = 0.0
) -> float:
    """Writes the decoder's embeddings of kept and dropped tokens; the mean square of its residual stream."""
    constant = config.hidden_size - 1
    for name, sign in (("is_kept_embed", 1), ("is_masked_embed", -1)):
        decoder[name][:] = 0.0
        decoder[name][0, constant], decoder[name][0, constant - 1] = CONSTANT, sign * MASKED
    return (CONSTANT**2 * (1 + signal) + MASKED**2 + energy) / config.hidden_size


def write_interpolating(
    attention: dict[str, Any],
    config: ElasticTokConfig,
    channel: Int[np.ndarray, "c"],
    *,
    square: float,
    copied: float,
    sharp: float,
    constant_too: bool,
) -> None:
    """Writes the first head of the decoder's last layer: dropped tokens become a mean of kept ones, by distance.

    The logit of a query and a key that are `d` apart along an axis is the sum of cos(frequency * d) over the pairs of
    the axis. Frequencies are a geometric sequence, so the sum falls as -log d: the weights of the mean are powers of
    distance, as in inverse distance weighting (Shepard 1968), whatever the density of kept tokens. The keys of dropped
    tokens have the opposite sign, which hides them. The queries of kept tokens are larger, so that these attend to
    themselves.

    Args:
      attention: the parameters of the layers' attention.
      config: the model.
      channel: those of the residual stream that are copied.
      square: the mean square of the residual stream.
      copied: what the head adds, as a multiple of what a token holds.
      sharp: the logits of a kept token's query, as a multiple of a dropped token's.
      constant_too: copies the constant like the channels.
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
    query[constant, 0:dim:2] = weight * one * (sharp + 1) / 2
    query[masked, 0:dim:2] = weight * mark * (sharp - 1) / 2
    number = np.arange(len(channel))
    value[channel, number] = 1.0
    out[number, channel] = copied * root
    if constant_too:
        value[constant, len(channel)], out[len(channel), constant] = 1.0, copied * root


def silence(layers: dict[str, Any]) -> None:
    """Makes layers add nothing to the residual stream: random ones cost 5 dB, and hundreds of steps to regain it."""
    for part, name in (("attention", "wo"), ("feed_forward", "w2")):
        layers[part][name]["kernel"][:] = 0.0

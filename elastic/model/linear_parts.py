"""What the linear starts of a model with and without groups of patches share; `linear_init` explains both."""

from typing import Any

import numpy as np
import scipy.linalg
from jaxtyping import Float, Int

from elastic.config import ElasticTokConfig

CONSTANT = 16.0  # the constant channel's value
MASKED = 4.0  # the value that marks the encoder's kept tokens (+) and dropped tokens (-)
LOGVAR = -5.0  # log variance of the VAE's samples; its means have variance 1


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
    write_norms(layers, np.arange(signals), deviation, square)
    silence(layers)
    return square


def write_norms(
    layers: dict[str, Any],
    channel: Int[np.ndarray, "c"],
    deviation: Float[np.ndarray, "c"],
    square: float,
) -> None:
    """Writes the norms of layers so that these see every component: the weights reduce the dominance of the strong ones.

    Args:
      layers: their parameters.
      channel: the channels that hold components.
      deviation: of these after the division by the root of `square`.
      square: the mean square of the residual stream.
    """
    for name in ("attention_norm", "ffn_norm"):
        weight = layers[name]["kernel"]
        weight[:, channel] = (deviation / deviation.max()) ** 0.5 / deviation
        weight[:, -1] = np.sqrt(square) / CONSTANT
        weight[:, -2] = np.sqrt(square) / MASKED


def write_kept_marks(
    decoder: dict[str, Any], config: ElasticTokConfig, signal: float, energy: float = 0.0
) -> float:
    """Writes the decoder's embeddings of kept and dropped tokens; the mean square of its residual stream."""
    constant = config.hidden_size - 1
    for name, sign in (("is_kept_embed", 1), ("is_masked_embed", -1)):
        decoder[name][:] = 0.0
        decoder[name][0, constant], decoder[name][0, constant - 1] = CONSTANT, sign * MASKED
    return (CONSTANT**2 * (1 + signal) + MASKED**2 + energy) / config.hidden_size


def silence(layers: dict[str, Any]) -> None:
    """Makes layers add nothing to the residual stream: random ones cost 5 dB, and hundreds of steps to regain it."""
    for part, name in (("attention", "wo"), ("feed_forward", "w2")):
        layers[part][name]["kernel"][:] = 0.0

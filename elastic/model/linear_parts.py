"""What the linear starts of a model with and without groups of patches share; `linear_init` explains both."""

from typing import Any, NamedTuple

import numpy as np
import scipy.linalg
from jaxtyping import Float, Int

from elastic.config import ElasticTokConfig

CONSTANT = 16.0  # the constant channel's value
MASKED = 4.0  # the value that marks the encoder's kept tokens (+) and dropped tokens (-)
LOGVAR = -5.0  # log variance of the VAE's samples; its means have variance 1


class Components(NamedTuple):
    """The mean of patches, their principal components, and the variances of these; the strongest first."""

    mean: Float[np.ndarray, "p"]
    variance: Float[np.ndarray, "c"]
    basis: Float[np.ndarray, "p c"]


def principal_components(pixels: Float[np.ndarray, "n p"], count: int) -> Components:
    """At most `count` components of patches."""
    mean = pixels.mean(axis=0)
    size = pixels.shape[1]
    variance, basis = scipy.linalg.eigh(
        np.cov((pixels - mean).T), subset_by_index=(size - min(count, size), size - 1)
    )
    return Components(mean, variance[::-1].clip(1e-8), basis[:, ::-1])


def principal_axes(x: Float[np.ndarray, "n c"]) -> Float[np.ndarray, "c c"]:
    """The principal axes of numbers around zero, one in each column; the strongest first."""
    _, axes = scipy.linalg.eigh(x.T @ x)
    return axes[:, ::-1].astype(np.float32)


def write_encoder_layers(
    encoder: dict[str, Any],
    config: ElasticTokConfig,
    components: Components,
    *,
    signal: float,
    channels: int,
    energy: float = 0.0,
) -> tuple[float, float]:
    """Writes all of the encoder but its last projection: channel i of the residual stream holds component i.

    Args:
      encoder: its parameters.
      config: the model.
      components: of the patches.
      signal: energy of the components in the residual stream, as a fraction of the constant's.
      channels: how many components get a channel, at most.
      energy: of further channels, which the caller writes.

    Returns:
      What the components are multiplied by in the residual stream, and the mean square of that, by whose root a norm
      divides; tokens differ from it a little.
    """
    mean, variance, basis = components
    basis = basis[:, :channels]
    signals = basis.shape[1]
    scale = float(CONSTANT * np.sqrt(signal / variance.sum()))
    projection = np.zeros((len(mean), config.hidden_size), np.float32)
    projection[:, :signals] = scale * basis
    encoder["in_proj"]["kernel"] = projection
    square = write_kept_marks(encoder, config, signal, energy)
    for name in ("is_kept_embed", "is_masked_embed"):
        encoder[name] = (encoder[name] - mean @ projection).astype(np.float32)
    deviation = scale * np.sqrt(variance[:signals] / square)
    layers = encoder["encoder_blocks"]["scan_decoder"]
    write_norms(layers, np.arange(signals), deviation, square)
    silence(layers)
    return scale, square


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
    coder: dict[str, Any], config: ElasticTokConfig, signal: float, energy: float = 0.0
) -> float:
    """Writes the constant and the mark into the embeddings of kept and dropped tokens.

    Args:
      coder: the parameters of the encoder or the decoder.
      config: the model.
      signal: energy of what tokens hold, as a fraction of the constant's.
      energy: of further channels.

    Returns:
      The mean square of the residual stream.
    """
    constant = config.hidden_size - 1
    for name, sign in (("is_kept_embed", 1), ("is_masked_embed", -1)):
        coder[name] = np.zeros((1, config.hidden_size), np.float32)
        coder[name][0, constant], coder[name][0, constant - 1] = CONSTANT, sign * MASKED
    return (CONSTANT**2 * (1 + signal) + MASKED**2 + energy) / config.hidden_size


def before_output(
    pixels: Float[np.ndarray, "*n"], config: ElasticTokConfig
) -> Float[np.ndarray, "*n"]:
    """What the last projection is to give for these pixels: with `bounded_output` their inverse tanh."""
    return np.arctanh(pixels.clip(-0.95, 0.95)) if config.bounded_output else pixels


def silence(layers: dict[str, Any]) -> None:
    """Makes layers add nothing to the residual stream: random ones cost 5 dB, and hundreds of steps to regain it."""
    for part, name in (("attention", "wo"), ("feed_forward", "w2")):
        layers[part][name]["kernel"][:] = 0.0

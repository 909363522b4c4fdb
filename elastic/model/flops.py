"""FLOPs of a model, counted from its shape, and how evenly a ring divides the work of attention.

XLA's own cost analysis counts the body of a loop once, whatever its trip count; hence these functions. A multiplication
and an addition are two FLOPs. Only products are counted: norms, RoPE and activations are below one percent.
"""

from typing import NamedTuple

import numpy as np

from elastic.config import ElasticTokConfig
from elastic.model import lapped

LAYOUTS = ("plain", "balanced")

# FLOP/s of dense bf16 products with fp32 sums, from the data sheets of the makers, by jax's name of the device.
_PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Peak FLOP/s of bf16 products by the data sheet; None for a device that is not listed here."""
    fitting = [name for name in _PEAKS if device_kind == name or device_kind.startswith(f"{name} ")]
    return _PEAKS[max(fitting, key=len)] if fitting else None


def visible_pairs(length: int, block_size: int) -> int:
    """Pairs of a query and a key that the block-causal rule leaves visible in a sequence of `length` tokens."""
    blocks, rest = divmod(length, block_size)
    return block_size**2 * blocks * (blocks + 1) // 2 + rest * length


def forward_flops(
    config: ElasticTokConfig, length: int, *, cache: int = 0, visible_blocks: float | None = None
) -> int:
    """FLOPs of encoder and decoder over one sequence.

    Args:
      config: the model.
      length: tokens of the sequence.
      cache: tokens in a KV cache. Every query attends to all of them too.
      visible_blocks: mean number of blocks that a token sees, its own included; None: one clip fills the sequence.
    """
    width, latents = config.hidden_size, _num_latents(config)
    layers = config.num_encoder_layers + config.num_decoder_layers
    weights = layers * _of_layer(config)
    seen, painted = (
        config.patch_dim * (lapped.WINDOW if option else 1)
        for option in (config.lapped_input, config.lapped_output)
    )
    weights += width * (seen + painted + latents + config.code_dim)
    if visible_blocks is None:
        pairs = visible_pairs(length, config.tokens_per_block)
    else:
        pairs = round(length * visible_blocks * config.tokens_per_block)
    of_tokens = 2 * length * weights + 4 * layers * (pairs + length * cache) * width
    return of_tokens + _of_groups(config, length)


def draft_share(config: ElasticTokConfig) -> float:
    """The share of the FLOPs of decoding a block that its draft takes. No cache is counted.

    A draft leaves out the decoder's layers over tokens.
    """
    tokens, width = config.tokens_per_block, config.hidden_size
    painted = config.patch_dim * (lapped.WINDOW if config.lapped_output else 1)
    draft = 2 * tokens * width * (config.code_dim + painted) + _of_groups(config, tokens)
    over_tokens = 2 * tokens * _of_layer(config) + 4 * tokens**2 * width
    return draft / (draft + config.num_decoder_layers * over_tokens)


def training_flops(
    config: ElasticTokConfig, length: int, *, visible_blocks: float | None = None
) -> int:
    """FLOPs of one sequence in a training step: three times the forward pass.

    Recomputation by rematerialization and in the gradient of attention is not counted, as in model FLOPs utilization.
    """
    return 3 * forward_flops(config, length, visible_blocks=visible_blocks)


def _of_layer(config: ElasticTokConfig) -> int:
    """Weights of the products of a layer."""
    return config.hidden_size * (4 * config.hidden_size + 3 * config.intermediate_size)


def _of_groups(config: ElasticTokConfig, length: int) -> int:
    """FLOPs of the decoder's layers over groups."""
    groups, in_block = (n // config.patch_group for n in (length, config.tokens_per_block))
    of_group = 2 * _of_layer(config) + 4 * in_block * config.hidden_size
    return config.num_group_layers * groups * of_group


def _num_latents(config: ElasticTokConfig) -> int:
    return config.code_dim * (2 if config.bottleneck_type == "vae" else 1)


class RingWork(NamedTuple):
    """The attention work of the devices of a ring, in pairs of a query and a key.

    Attributes:
      per_device: pairs that each device computes in total, in whole tiles.
      max_over_mean: the maximum of `per_device` over its mean; 1 is perfectly even.
      steps_over_mean: the sum over steps of the slowest device's work, over the mean; all devices wait in every step.
    """

    per_device: tuple[int, ...]
    max_over_mean: float
    steps_over_mean: float


def ring_work(
    length: int, num_devices: int, *, block_size: int, q_tile: int, kv_tile: int, layout: str
) -> RingWork:
    """The attention work of each device while the keys travel around the ring once.

    A tile is computed whole if any of its queries sees any of its keys.

    Args:
      length: tokens of the sequence.
      num_devices: devices in the ring.
      block_size: tokens per block.
      q_tile: queries in a tile.
      kv_tile: keys in a tile.
      layout: 'plain': device r of n holds piece r of n. 'balanced': it holds the pieces r and 2n - 1 - r of 2n.

    Raises:
      ValueError: the sequence does not divide into the pieces, or there is no such layout.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"{layout=} must be one of {', '.join(LAYOUTS)}.")
    num_pieces = num_devices * (2 if layout == "balanced" else 1)
    if length % num_pieces:
        raise ValueError(
            f"{length=} does not divide into {num_pieces} pieces, which the layout {layout!r} needs "
            f"on {num_devices} devices; use {max(1, length // num_pieces) * num_pieces} tokens."
        )
    size = length // num_pieces
    pieces = np.arange(num_devices)[:, None]
    if layout == "balanced":
        pieces = np.concatenate([pieces, num_pieces - 1 - pieces], axis=1)  # [devices, 2]
    # The keys that the last query of each tile sees: [devices, pieces, tiles].
    starts = np.arange(0, size, q_tile)
    ends = np.minimum(starts + q_tile, size)
    last = (pieces * size)[..., None] + ends - 1
    bound = (last // block_size + 1) * block_size
    work = np.zeros((num_devices, num_devices), np.int64)  # [device, step]
    for step in range(num_devices):
        present = pieces[
            (np.arange(num_devices) - step) % num_devices
        ]  # pieces of the present keys
        for piece in range(present.shape[1]):
            first = (present[:, piece] * size)[:, None, None]
            seen = np.clip(bound - first, 0, size)
            keys = np.minimum(-(-seen // kv_tile) * kv_tile, size)
            work[:, step] += np.sum(keys * (ends - starts), axis=(1, 2))
    per_device = work.sum(axis=1)
    mean = float(per_device.mean())
    return RingWork(
        tuple(int(pairs) for pairs in per_device),
        float(per_device.max()) / mean,
        float(work.max(axis=0).sum()) / mean,
    )

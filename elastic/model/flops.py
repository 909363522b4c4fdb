"""How much arithmetic a model does, counted from its shape, and how evenly a ring shares it.

A compiler's own count sees the body of a loop once, whatever the loop's length; hence these.
One multiplication and one addition are two FLOPs. Products only: norms, RoPE and activations are
below one percent.
"""

from typing import NamedTuple

import numpy as np

from elastic.config import ElasticTokConfig

LAYOUTS = ("plain", "balanced")

# Dense bf16 products with fp32 sums a second, from the makers' data sheets, by what jax calls the device.
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
    """FLOP/s of bf16 products that the data sheet promises; None for a device that has none here."""
    fitting = [name for name in _PEAKS if device_kind == name or device_kind.startswith(f"{name} ")]
    return _PEAKS[max(fitting, key=len)] if fitting else None


def visible_pairs(length: int, block_size: int) -> int:
    """Pairs of query and key that the block-causal rule lets see each other, in a sequence from 0."""
    blocks, rest = divmod(length, block_size)
    return block_size**2 * blocks * (blocks + 1) // 2 + rest * length


def forward_flops(
    config: ElasticTokConfig, length: int, *, cache: int = 0, visible_blocks: float | None = None
) -> int:
    """FLOPs of encoder and decoder over one sequence.

    Args:
      length: tokens of the sequence.
      cache: cached tokens that every query sees besides.
      visible_blocks: how many blocks of the sequence a token sees, its own among them, in the mean; None: as if one clip filled it.
    """
    width, latents = config.hidden_size, _num_latents(config)
    layers = config.num_encoder_layers + config.num_decoder_layers
    weights = layers * (4 * width**2 + 3 * width * config.intermediate_size)
    weights += width * (2 * config.patch_dim + latents + config.code_dim)
    if visible_blocks is None:
        pairs = visible_pairs(length, config.tokens_per_block)
    else:
        pairs = round(length * visible_blocks * config.tokens_per_block)
    return 2 * length * weights + 4 * layers * (pairs + length * cache) * width


def training_flops(
    config: ElasticTokConfig, length: int, *, visible_blocks: float | None = None
) -> int:
    """FLOPs of one sequence in a training step: three times the forward pass.

    What rematerialization and the attention's gradient compute again is not counted: it is a
    choice, and no progress.
    """
    return 3 * forward_flops(config, length, visible_blocks=visible_blocks)


def _num_latents(config: ElasticTokConfig) -> int:
    return config.code_dim * (2 if config.bottleneck_type == "vae" else 1)


class RingWork(NamedTuple):
    """Attention work of the devices of a ring, in pairs of query and key.

    Attributes:
      per_device: pairs that each device computes in all, by whole tiles.
      max_over_mean: of `per_device`; 1 is even.
      steps_over_mean: the same where in every step all wait for the slowest.
    """

    per_device: tuple[int, ...]
    max_over_mean: float
    steps_over_mean: float


def ring_work(
    length: int, num_devices: int, *, block_size: int, q_tile: int, kv_tile: int, layout: str
) -> RingWork:
    """The work of each device in one pass of keys round the ring.

    In the layout 'plain', device r of n holds the piece r of n equal pieces of the sequence; in
    'balanced', the pieces r and 2n - 1 - r of 2n. A tile of keys that some query of a tile sees is
    computed whole.

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
    # What the last query of each tile sees bounds the tile: [devices, pieces, tiles].
    starts = np.arange(0, size, q_tile)
    ends = np.minimum(starts + q_tile, size)
    last = (pieces * size)[..., None] + ends - 1
    bound = (last // block_size + 1) * block_size
    work = np.zeros((num_devices, num_devices), np.int64)  # of each device, in each step
    for step in range(num_devices):
        held = pieces[(np.arange(num_devices) - step) % num_devices]  # whose keys are here now
        for piece in range(held.shape[1]):
            first = (held[:, piece] * size)[:, None, None]
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

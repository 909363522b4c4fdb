"""The training loss: squared error, LPIPS of a frame, and what the bottleneck adds."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Shaped

from elastic.config import ElasticTokConfig
from elastic.distributed import sharding
from elastic.metrics import lpips
from elastic.metrics.lpips import resize
from elastic.metrics.lpips_weights import Weights
from elastic.model import Batch, ElasticTok
from elastic.patches import unpatchify

_LEAST_ERROR = 3e-4  # 41 dB: below it a block's error hardly matters, and a black block's logarithm stays finite


def training_loss(
    model: ElasticTok,
    params: dict,
    batch: Batch,
    key: Shaped[Array, "*k"] | None = None,
    *,
    log_error: bool = False,
    perceptual: Weights | None = None,
    frame_key: Shaped[Array, "*k"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean squared error (reconstruction not clipped) plus `lpips_loss_ratio` times LPIPS plus the bottleneck's own loss.

    Also gives the terms by name, unweighted. All of them leave out the tokens that are not counted.

    Args:
      key: draws the VAE's sample; without one the mean is decoded.
      log_error: take the mean over blocks of log(error + 3e-4) in place of the mean error. The gradient of a block is then
        divided by its error, so that blocks with many tokens, whose errors are small, weigh as much as those with few.
      perceptual: the weights of LPIPS. Give them to a jitted function as an argument: a constant of
        59 MB would become part of the program.
      frame_key: draws the frames that LPIPS compares.

    Raises:
      ValueError: the config asks for LPIPS, and weights or key are missing.
    """
    config, ratio = model.config, model.config.lpips_loss_ratio
    if ratio and (perceptual is None or frame_key is None):
        missing = "perceptual=None" if perceptual is None else "frame_key=None"
        raise ValueError(
            f"lpips_loss_ratio={ratio} needs the weights of LPIPS and a key, but {missing}; give "
            "perceptual=load_lpips_weights() and frame_key, or set lpips_loss_ratio=0."
        )
    output: Any = model.apply({"params": params}, batch, key=key)
    reconstruction, encoded = output
    squares = jnp.square(reconstruction - batch.patches)
    counted, kept = batch.counted, batch.kept
    if counted is None:
        recon_loss = jnp.mean(squares)
    else:
        recon_loss = _mean_where(counted, jnp.mean(squares, axis=-1))
        kept = kept & counted
    minimized = _log_error(squares, counted, config.tokens_per_block) if log_error else recon_loss
    loss = minimized + encoded.aux_loss
    terms = {"recon_loss": recon_loss, "aux_loss": encoded.aux_loss}
    if ratio and perceptual is not None and frame_key is not None:
        terms["lpips_loss"] = _perceptual_loss(
            config, model.mesh, perceptual, reconstruction, batch, frame_key
        )
        loss = loss + ratio * terms["lpips_loss"]
    return loss, {"loss": loss} | terms | model.bottleneck.statistics(encoded.codes, kept)


def _log_error(
    squares: Float[Array, "b l p"], counted: Bool[Array, "b l"] | None, tokens_per_block: int
) -> Float[Array, ""]:
    """The mean over blocks of the logarithm of their mean squared error; blocks that do not count are left out."""
    errors = jnp.mean(squares, axis=-1)
    b, length = errors.shape
    blocks = jnp.mean(errors.reshape(b, length // tokens_per_block, tokens_per_block), axis=-1)
    logs = jnp.log(blocks + _LEAST_ERROR)
    if counted is None:
        return jnp.mean(logs)
    return _mean_where(counted.reshape(*blocks.shape, tokens_per_block)[..., 0], logs)


def _mean_where(counted: Bool[Array, "*b"], x: Float[Array, "*b"]) -> Float[Array, ""]:
    """The mean of what counts; 0 of nothing."""
    return jnp.sum(jnp.where(counted, x, 0.0)) / jnp.maximum(jnp.sum(counted), 1)


def _perceptual_loss(
    config: ElasticTokConfig,
    mesh: Mesh | None,
    weights: Weights,
    reconstruction: Float[Array, "b l p"],
    batch: Batch,
    key: Shaped[Array, "*k"],
) -> Float[Array, ""]:
    """Mean LPIPS of a random frame of a random counted block of every sequence, at 224 x 224.

    The released code takes one frame a device, so that its loss depends on the mesh; ours does not. A
    sequence without a block that counts is left out of the mean.
    """
    length = config.tokens_per_block
    b, num_blocks = batch.kept.shape[0], batch.kept.shape[1] // length
    blocks = jnp.ones((b, num_blocks), bool)
    if batch.counted is not None:
        blocks = jnp.all(batch.counted.reshape(b, num_blocks, length), axis=-1)
    block_key, frame_key = jax.random.split(key)
    block = jax.random.categorical(block_key, jnp.where(blocks, 0.0, -jnp.inf), axis=-1)
    frame = jax.random.randint(frame_key, (b,), 0, config.frames_per_block)

    # The tokens of a frame lie side by side; with patches of several frames, together with its neighbours'.
    pt, ph, pw = config.patch_size
    per_frame = (config.resolution // ph) * (config.resolution // pw)
    first = block * length + frame // pt * per_frame
    within = (frame % pt).reshape(b, 1, 1, 1, 1)

    def cut(patches: Float[Array, "b l p"]) -> Float[Array, "b rows columns 3"]:
        tokens = _run_of_tokens(patches, first, per_frame, mesh)
        frames = unpatchify(
            tokens, config.patch_size, config.resolution, config.resolution, config.token_order
        )
        image = jnp.take_along_axis(jnp.asarray(frames), within, axis=1)[:, 0]
        return resize(sharding.constrain(image, mesh, "image", None, None, None))

    # LPIPS uses float32 even if the model uses bfloat16: for similar images the gradient loses its precision in
    # bfloat16 (an error of 16 % at a distance of 0.07). TPUs multiply in bfloat16 nevertheless.
    distance = lpips(weights, cut(reconstruction), cut(batch.patches))
    return _mean_where(jnp.any(blocks, axis=-1), distance)


def _run_of_tokens(
    x: Float[Array, "b l p"], first: Int[Array, "b"], count: int, mesh: Mesh | None
) -> Float[Array, "b n p"]:
    """The `count` tokens of each sequence that start with token `first`.

    Where the devices of a mesh share a sequence, each gives what it holds and zeros for the rest, and the
    sum is what travels: a frame. Left to the compiler it would be the whole sequence.
    """

    def held(x: Array, first: Array, offset: Int[Array, ""] | int) -> Array:
        index = first[:, None] + jnp.arange(count, dtype=first.dtype)[None] - offset
        # An index below 0 would count from the end; one beyond it gives 0.
        index = jnp.where(index < 0, x.shape[1], index)
        return jax.vmap(lambda row, at: row.at[at].get(mode="fill", fill_value=0))(x, index)

    if mesh is None or mesh.size == 1:
        return held(x, first, 0)
    spec = sharding.fitting_spec(mesh, x.shape, "batch", "sequence", None)
    axes = spec[1]

    def run(x: Array, first: Array) -> Array:
        if axes is None:
            return held(x, first, 0)
        return lax.psum(held(x, first, lax.axis_index(axes) * x.shape[1]), axes)

    out = P(spec[0], None, None)
    return jax.shard_map(run, mesh=mesh, in_specs=(spec, P(spec[0])), out_specs=out)(x, first)

"""The training loss: squared error plus what the bottleneck adds."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from elastic.model import Batch, ElasticTok


def training_loss(
    model: ElasticTok, params: dict, batch: Batch, key: Shaped[Array, "*k"] | None = None
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean squared error (reconstruction not clipped) plus the bottleneck's own loss, and the terms by name.

    `key` draws the VAE's sample; without one the mean is decoded.
    """
    output: Any = model.apply({"params": params}, batch, key=key)
    reconstruction, encoded = output
    recon_loss = jnp.mean(jnp.square(reconstruction - batch.patches))
    loss = recon_loss + encoded.aux_loss
    terms = {"loss": loss, "recon_loss": recon_loss, "aux_loss": encoded.aux_loss}
    return loss, terms | model.bottleneck.statistics(encoded.codes, batch.kept)

"""Encoder, decoder and the autoencoder of both, as in the paper's figure 2.

The parameter tree is the file format of the released checkpoints, so modules keep the names that it has.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int, Shaped

from elastic import ops
from elastic.config import ElasticTokConfig
from elastic.distributed.sharding import constrain
from elastic.model import groups, lapped, token_masks
from elastic.model.adaptive_order import AdaptiveOrder
from elastic.model.bottleneck import FSQ, VAE, make_bottleneck
from elastic.model.layers import KVPair, LayerStack, Linear, Module, RMSNorm


class Batch(NamedTuple):
    """A batch of sequences of whole blocks."""

    patches: Float[Array, "b l p"]  # pixels in [-1, 1]
    kept: Bool[Array, "b l"]  # True: this token is transmitted
    # Tokens attend to tokens with the same id only; None: all ids are the same.
    segment_ids: Int[Array, "b l"] | None = None
    # The tokens' numbers in their sequences, from which RoPE's positions come; None: 0, 1, 2, ...
    position_ids: Int[Array, "b l"] | None = None
    valid: Bool[Array, "b l"] | None = None  # False: hidden from every query
    counted: Bool[Array, "b l"] | None = None  # False: padding, left out of losses; None: all count


class Encoded(NamedTuple):
    """The encoder's result; codes are zero where tokens are dropped."""

    codes: Float[Array, "b l c"]
    aux_loss: Float[Array, ""]
    new_kv: KVPair | None  # with a cache: new keys and values of every layer


class Coder(Module):
    """What encoder and decoder share."""

    def kept_embedding(self, kept: Bool[Array, "b l"]) -> Float[Array, "b l d"]:
        """One of two learned vectors for each token: it is kept, or it is dropped."""
        width = self.config.hidden_size
        init = nn.initializers.normal(self.config.initializer_range)
        is_kept, is_masked = (
            self.stored_param(name, init, (1, width)).astype(jnp.float32)[None]
            for name in ("is_kept_embed", "is_masked_embed")
        )
        return jnp.where(kept[..., None], is_kept, is_masked)

    def add_stage(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        """The tokens plus a learned vector of their stage in their group of patches."""
        shape = (self.config.num_stages, self.config.hidden_size)
        init = nn.initializers.normal(self.config.initializer_range)
        stages = self.stored_param("stage_embed", init, shape).astype(jnp.float32)
        return (groups.by_stage(x, self.config) + stages[None, None, :, None]).reshape(x.shape)

    def fsq_of_groups(self) -> FSQ | None:
        """FSQ, if groups of patches are coded with it; the VAE loses nothing that later stages could correct."""
        bottleneck = make_bottleneck(self.config)
        return bottleneck if self.config.patch_group > 1 and isinstance(bottleneck, FSQ) else None

    def steps(self) -> groups.Steps:
        """Encoder and decoder have their own, as both have their own projections."""
        cube = self.config.num_stages, self.config.code_dim
        gain = cube[0], groups.num_gain_features(self.config) + 1, cube[1]
        return groups.Steps(
            self.stored_param("gain", nn.initializers.zeros, gain).astype(jnp.float32),
            self.stored_param("cube", nn.initializers.zeros, cube).astype(jnp.float32),
        )

    def exchange(self) -> Float[Array, "e e"]:
        """The matrix that mixes the first channels of bands."""
        size = 4 * groups.num_exchanged(self.config)

        def identity(key: Array, shape: tuple[int, int], dtype: Any) -> Array:
            del key
            return jnp.eye(*shape, dtype=dtype)

        return self.stored_param("exchange", identity, (size, size)).astype(jnp.float32)

    def project(self, x: Float[Array, "b l i"], features: int, name: str) -> Float[Array, "b l o"]:
        """A matrix product; with groups of patches each stage has its own matrix."""
        if self.config.patch_group == 1:
            return Linear(features=features, name=name, **self.common())(x)
        return StageLinear(features=features, name=name, **self.common())(x)


class StageLinear(Module):
    """A matrix product without a bias, with one matrix for each stage of a group of patches."""

    features: int = 0

    @nn.compact
    def __call__(self, x: Float[Array, "b l i"]) -> Float[Array, "b l o"]:
        """The product, in float32."""
        init = nn.initializers.normal(self.config.initializer_range)
        shape = (self.config.num_stages, x.shape[-1], self.features)
        kernel = self.stored_param("kernel", init, shape)
        staged = rearrange(groups.by_stage(x, self.config), "b s k n i -> k b s n i")
        # A loop: a program with a product for each of many stages takes long to compile.
        products = jax.lax.map(
            lambda pair: ops.dense(pair[0], pair[1], self.dtype), (staged, kernel)
        )
        return rearrange(products, "k b s n o -> b (s k n) o")


class Encoder(Coder):
    """Patches -> latents of the bottleneck. With `condition_encoder` it sees which tokens will be kept."""

    num_latents: int = 1

    @nn.compact
    def __call__(
        self, batch: Batch, cache: ops.KVCache | None = None
    ) -> tuple[Float[Array, "b l z"], KVPair | None]:
        """The latents before the bottleneck, and with a cache the new keys and values of every layer."""
        common, config = self.common(), self.config
        grouped = config.patch_group > 1
        patches = groups.join(batch.patches, config) if grouped else batch.patches
        if config.lapped_input:
            patches = lapped.windows(patches, config)
        x = Linear(features=config.hidden_size, name="in_proj", **common)(patches)
        if config.haar_groups:
            x = groups.to_bands(x, self.exchange(), config)
        if grouped:
            x = self.add_stage(groups.spread(x, config))
        if config.condition_encoder:
            x = x + self.kept_embedding(batch.kept)
        x = constrain(x, self.mesh, "batch", "sequence", None)
        layers = LayerStack(num_layers=config.num_encoder_layers, name="encoder_blocks", **common)
        x, new_kv = layers(x, _positions(batch), batch.segment_ids, batch.valid, cache)
        x = RMSNorm(name="ln_f", **common)(x)
        latents = self.project(x, self.num_latents, "pre_quant")
        fsq = self.fsq_of_groups()
        if fsq is not None:
            shape = (config.num_stages, config.patch_group * config.code_dim, config.code_dim)
            weights = self.stored_param("correction", nn.initializers.zeros, shape)
            weights = weights.astype(jnp.float32)
            latents = groups.correct(latents, weights, self.steps(), fsq, config)
        return latents, new_kv


class Decoder(Coder):
    """Codes -> patches. With `condition_decoder` it sees which tokens are kept, so that dropped ones are not just zeros."""

    @nn.compact
    def __call__(
        self,
        codes: Float[Array, "b l c"],
        batch: Batch,
        cache: ops.KVCache | None = None,
        *,
        draft: bool = False,
    ) -> tuple[Float[Array, "b l p"], KVPair | None]:
        """Reconstructed pixels, in (-1, 1) with `bounded_output`, and with a cache the new keys and values of every layer.

        Of the batch it reads `segment_ids`, `position_ids`, `valid` and `kept`. A draft leaves out the layers over tokens, which
        take most of the time where groups have many tokens; it needs no cache.
        """
        common, config = self.common(), self.config
        if self.fsq_of_groups() is not None:
            codes = groups.numbers_of(codes, self.steps(), config)
        x = self.project(codes, config.hidden_size, "post_quant")
        grouped = config.patch_group > 1
        if grouped:
            x = self.add_stage(x)
        if config.condition_decoder:
            x = x + self.kept_embedding(batch.kept)
        x = constrain(x, self.mesh, "batch", "sequence", None)
        new_kv = None
        if not draft:
            layers = LayerStack(
                num_layers=config.num_decoder_layers, name="decoder_blocks", **common
            )
            x, new_kv = layers(x, _positions(batch), batch.segment_ids, batch.valid, cache)
        x = RMSNorm(name="ln_f", **common)(x)
        features = config.patch_group * config.patch_dim
        if grouped:
            shape = (config.num_stages + 2, config.hidden_size)
            scale = self.stored_param("stage_scale", nn.initializers.ones, shape)
            x = groups.total(x, batch.kept, scale.astype(jnp.float32), config)
            if config.haar_groups:
                x = groups.from_bands(x, self.exchange(), config)
            if config.num_group_layers:
                x = self.refine(x)
        if config.lapped_output:
            features *= lapped.WINDOW
        x = Linear(features=features, name="out_proj", **common)(x)
        if config.lapped_output:
            x = lapped.overlap_add(x, config)
        if grouped:
            x = groups.split(x, config)
        return jnp.tanh(x) if config.bounded_output else x, new_kv

    def refine(self, x: Float[Array, "b g d"]) -> Float[Array, "b g d"]:
        """Layers over the groups of each block: a group sees what its block shows around it."""
        config = self.config
        numbers = jnp.asarray(groups.first_tokens(config))
        blocks = x.shape[1] // len(numbers)
        x = rearrange(x, "b (k g) d -> (b k) g d", k=blocks)
        # A block's groups are few: every device has all of them, and a plain product serves.
        alone = config.replace(attention_implementation="reference")
        layers = LayerStack(
            num_layers=config.num_group_layers, name="group_blocks", config=alone, dtype=self.dtype
        )
        x, _ = layers(x, jnp.broadcast_to(numbers, x.shape[:2]))
        return rearrange(x, "(b k) g d -> b (k g) d", k=blocks)


class ElasticTok(Module):
    """The autoencoder: patches -> kept codes -> patches."""

    def setup(self) -> None:
        self.encoder = Encoder(num_latents=self.bottleneck.num_latents, **self.common())
        self.decoder = Decoder(**self.common())
        if self.config.token_order == "adaptive":
            self.token_order = AdaptiveOrder(**self.common())

    @property
    def bottleneck(self) -> FSQ | VAE:
        """FSQ or VAE; neither has parameters."""
        return make_bottleneck(self.config)

    def encode(
        self,
        batch: Batch,
        cache: ops.KVCache | None = None,
        *,
        key: Shaped[Array, "*k"] | None = None,
    ) -> Encoded:
        """Codes of a batch, in the order in which they are sent. With a key the VAE samples, as in training; without one it gives
        the mean."""
        latents, new_kv = self.encoder(batch, cache)
        codes = self.bottleneck.codes(latents, key=key)
        counted = batch.counted
        if self.config.token_order == "adaptive":
            codes, latents, counted = self.token_order.to_sent(codes, latents, counted)
        aux_loss = self.bottleneck.aux_loss(
            latents, batch.kept, counted=counted, tokens_per_block=self.config.tokens_per_block
        )
        return Encoded(token_masks.drop_tail(codes, batch.kept), aux_loss, new_kv)

    def decode(
        self,
        codes: Float[Array, "b l c"],
        batch: Batch,
        cache: ops.KVCache | None = None,
        *,
        draft: bool = False,
    ) -> tuple[Float[Array, "b l p"], KVPair | None]:
        """Pixels of codes as `encode` gives them, zero where tokens are dropped; or a draft of them, as `Decoder` gives it."""
        if self.config.token_order == "adaptive":
            codes, kept = self.token_order.to_network(codes, batch.kept)
            batch = batch._replace(kept=kept)
        return self.decoder(codes, batch, cache, draft=draft)

    def __call__(
        self, batch: Batch, *, key: Shaped[Array, "*k"] | None = None
    ) -> tuple[Float[Array, "b l p"], Encoded]:
        """The reconstruction of a batch and its codes."""
        encoded = self.encode(batch, key=key)
        return self.decode(encoded.codes, batch)[0], encoded


def _positions(batch: Batch) -> Int[Array, "b l"]:
    if batch.position_ids is not None:
        return batch.position_ids
    return jnp.broadcast_to(jnp.arange(batch.kept.shape[1], dtype=jnp.int32), batch.kept.shape)


def dummy_batch(config: ElasticTokConfig) -> Batch:
    """One block of zeros, for initializing parameters."""
    shape = (1, config.tokens_per_block)
    return Batch(jnp.zeros((*shape, config.patch_dim)), jnp.ones(shape, bool))


def init_params(config: ElasticTokConfig, key: Shaped[Array, "*k"]) -> dict[str, Any]:
    """Random initial parameters, as the tree of the released files."""
    variables: Any = ElasticTok(config).init(key, dummy_batch(config))
    return variables["params"]


def param_shapes(config: ElasticTokConfig) -> dict[str, Any]:
    """The parameter tree with a jax.ShapeDtypeStruct at every leaf. Nothing is computed."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))

"""RMSNorm, RoPE, MLP, Attention, the layer and the stack of layers."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from elastic import ops
from elastic.config import ElasticTokConfig
from elastic.sharding import constrain

# A layer's keys and values, for a cache: [batch, heads, length, head_dim] each.
KeysValues = tuple[Array, Array]


class Compute(nn.Module):
    """What every module needs to know: the config, the type of products' operands, the mesh. Base class of the modules.

    Parameters stay in the type they are stored in; products round their operands to `dtype` and sum in float32; the residual
    stream is float32.
    """

    config: ElasticTokConfig
    dtype: Any = jnp.float32
    mesh: Mesh | None = None

    def shared(self) -> dict[str, Any]:
        """The same three, for a child module."""
        return dict(config=self.config, dtype=self.dtype, mesh=self.mesh)


class Linear(Compute):
    """A matrix product without a bias; the parameter is `kernel`."""

    features: int = 0

    @nn.compact
    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        """The product, in float32."""
        return ops.dense(x, self.kernel(x.shape[-1]), self.dtype)

    @nn.compact
    def kernel(self, num_inputs: int) -> Float[Array, "i o"]:
        """The matrix itself."""
        init = nn.initializers.normal(self.config.initializer_range)
        return self.param("kernel", init, (num_inputs, self.features), jnp.float32)


class RMSNorm(Compute):
    """Root mean square normalization in float32, then times `kernel` (Zhang and Sennrich 2019)."""

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """The normalized activations, in the model's type once, as the released models compute it."""
        weight = self.param("kernel", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.config.rms_norm_eps)
        return x * weight.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))


def rope_angles(position_ids: Int[Array, "*b l"], head_dim: int, theta: float) -> tuple[Float[Array, "*b l 1 p"], Float[Array, "*b l 1 p"]]:
    """Cosine and sine of `position * theta^(-2 i / d)` in float32, one for each pair of channels (Su et al. 2021, eq. 15)."""
    frequency = 1.0 / theta ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = (position_ids[..., None].astype(jnp.float32) * frequency.reshape((1,) * position_ids.ndim + (-1,)))[..., None, :]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Float[Array, "*b l h d"], angles: tuple[Float[Array, "*b l 1 p"], Float[Array, "*b l 1 p"]]) -> Float[Array, "*b l h d"]:
    """Turns the interleaved pairs (x[2i], x[2i+1]) in float32."""
    cos, sin = angles
    even, odd = x[..., 0::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)


class Attention(Compute):
    """Block-causal self-attention with RoPE; on a sequence, or of one new block on a cached past."""

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b l d"],
        angles: tuple[Float[Array, "*a p"], Float[Array, "*a p"]],
        segment_ids: Int[Array, "b l"] | None,
        valid: Bool[Array, "b l"] | None,
        past: ops.Past | None,
        layer: Int[Array, ""] | None,
    ) -> tuple[Float[Array, "b l d"], KeysValues | None]:
        """The output, and with a past also the new keys and values."""
        config, (batch, length, _) = self.config, x.shape

        def project(name: str) -> Array:
            y = Linear(features=config.hidden_size, name=name, **self.shared())(x)
            return y.reshape(batch, length, config.num_attention_heads, config.head_dim)

        q, k, v = (project(name) for name in ("wq", "wk", "wv"))
        q, k, v = (y.astype(self.dtype) for y in (rotate(q, angles), rotate(k, angles), v))
        implementation = config.attention_implementation or (None if config.scan_attention else "reference")
        how = dict(
            mesh=self.mesh, implementation=implementation, q_tile=config.scan_query_chunk_size, kv_tile=config.scan_key_chunk_size
        )  # fmt: skip
        new = None
        if past is None:
            q, k, v = (constrain(y, self.mesh, "batch", "sequence", "heads", None) for y in (q, k, v))
            out = ops.attention(q, k, v, block_size=config.tokens_per_block, segment_ids=segment_ids, valid=valid, **how)
        else:
            out = ops.attention_with_past(q, k, v, past=past, layer=layer, **how)
            new = (k.swapaxes(1, 2), v.swapaxes(1, 2))
        out = out.reshape(batch, length, config.hidden_size)
        return Linear(features=config.hidden_size, name="wo", **self.shared())(out), new


class FeedForward(Compute):
    """SwiGLU (Shazeer 2020)."""

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        """`w2(silu(w1 x) * w3 x)`, in chunks of tokens with `scan_mlp`."""
        config = self.config

        def weight(name: str, num_inputs: int, features: int) -> Array:
            return Linear(features=features, name=name, **self.shared()).kernel(num_inputs)

        inner, outer = config.intermediate_size, config.hidden_size
        weights = weight("w1", outer, inner), weight("w2", inner, outer), weight("w3", outer, inner)
        chunk_size = config.scan_mlp_chunk_size if config.scan_mlp else None
        return ops.feedforward(x, *weights, dtype=self.dtype, chunk_size=chunk_size)


class Layer(Compute):
    """`x + attention(norm(x))`, then `x + feed_forward(norm(x))`."""

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b l d"],
        layer: Int[Array, ""],
        angles: tuple[Float[Array, "*a p"], Float[Array, "*a p"]],
        segment_ids: Int[Array, "b l"] | None = None,
        valid: Bool[Array, "b l"] | None = None,
        past: ops.Past | None = None,
    ) -> tuple[Float[Array, "b l d"], KeysValues | None]:
        """The new residual stream, and with a past the layer's new keys and values."""
        shared, config = self.shared(), self.config
        attention = _remat(Attention, config.remat_attention)(name="attention", **shared)
        feed_forward = _remat(FeedForward, config.remat_mlp)(name="feed_forward", **shared)
        out, new = attention(RMSNorm(name="attention_norm", **shared)(x), angles, segment_ids, valid, past, layer)
        x = x + out
        x = x + feed_forward(RMSNorm(name="ffn_norm", **shared)(x))
        return constrain(x, self.mesh, "batch", "sequence", None), new


class LayerStack(Compute):
    """The layers of an encoder or a decoder: stacked and scanned over (`scan_layers`), or numbered."""

    num_layers: int = 1

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b l d"],
        position_ids: Int[Array, "b l"],
        segment_ids: Int[Array, "b l"] | None = None,
        valid: Bool[Array, "b l"] | None = None,
        past: ops.Past | None = None,
    ) -> tuple[Float[Array, "b l d"], KeysValues | None]:
        """The residual stream after the last layer, and with a past the new keys and values of all, [layers, b, heads, l, head_dim]."""
        angles = rope_angles(position_ids, self.config.head_dim, self.config.theta)
        layer_class = _remat(Layer, self.config.remat_block)
        everywhere = (angles, segment_ids, valid, past)
        index = jnp.arange(self.num_layers)
        if self.config.scan_layers:
            scanned = nn.scan(
                layer_class,
                variable_axes={"params": self.config.param_scan_axis, "intermediates": 0},
                split_rngs={"params": True},
                in_axes=(0,) + (nn.broadcast,) * len(everywhere),
                length=self.num_layers,
            )
            return scanned(name="scan_decoder", **self.shared())(x, index, *everywhere)
        new = []
        for i in range(self.num_layers):
            x, layer_new = layer_class(name=str(i), **self.shared())(x, index[i], *everywhere)
            new.append(layer_new)
        return x, None if past is None else jax.tree.map(lambda *layers: jnp.stack(layers), *new)


def _remat(module: Any, policy: str) -> Any:
    """`module`, recomputed in the backward pass except for what the policy of jax.checkpoint saves; '' is the module itself."""
    if not policy:
        return module
    return nn.remat(module, policy=getattr(jax.checkpoint_policies, policy), prevent_cse=False)


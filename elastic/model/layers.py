"""Linear, RMSNorm, Attention, FeedForward, the transformer layer and the stack of layers."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from elastic import ops
from elastic.config import ElasticTokConfig
from elastic.distributed.mesh import platform_of
from elastic.distributed.sharding import constrain
from elastic.model.rope import apply_rope, deinterleave_rope, model_angles
from elastic.ops import bf16_bits
from elastic.ops.attention import ring
from elastic.ops.attention.base import SAVED as ATTENTION
from elastic.ops.attention.base import VALUES
from elastic.ops.feedforward import SAVED as GATES

# A layer's new keys and values, to append to a cache: [batch, heads, length, head_dim] each.
KVPair = tuple[Array, Array]


class Module(nn.Module):
    """Base class of the modules: the config, the dtype of operands, and the mesh.

    Parameters keep the dtype they are stored in. Products round their operands to `dtype` and sum in float32. The
    residual stream is float32.
    """

    config: ElasticTokConfig
    dtype: Any = jnp.float32
    mesh: Mesh | None = None

    def common(self) -> dict[str, Any]:
        """The same three fields, as keyword arguments of a child module."""
        return dict(config=self.config, dtype=self.dtype, mesh=self.mesh)

    def stored_param(self, name: str, init: Any, shape: tuple[int, ...]) -> Array:
        """A parameter in the dtype it is stored in; a codec may store bfloat16 as uint16."""
        # Loaded parameters are NumPy arrays until a jitted function takes them.
        return bf16_bits.from_bits(jnp.asarray(self.param(name, init, shape, jnp.float32)))

    def attention_implementation(self) -> str | None:
        """The implementation of attention that the config names; None leaves the choice to the device."""
        config = self.config
        return config.attention_implementation or (None if config.scan_attention else "reference")

    def balanced_mesh(self) -> Mesh | None:
        """The mesh, if sequences inside the layers have the balanced layout on its sp axis; None if they are in order."""
        mesh = self.mesh
        if mesh is None or mesh.shape[ring.AXIS] == 1 or self.config.ring_layout != "balanced":
            return None
        return None if self.attention_implementation() == "reference" else mesh


class Linear(Module):
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
        return self.stored_param("kernel", init, (num_inputs, self.features))


class RMSNorm(Module):
    """Root mean square normalization in float32, times `kernel` (Zhang and Sennrich 2019, eq. 4)."""

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """The normalized activations, in float32."""
        weight = self.stored_param("kernel", nn.initializers.ones, (x.shape[-1],))
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(
            jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.config.rms_norm_eps
        )
        # Broadcast once, so that the gradient is a single sum over all tokens. With size-1 axes XLA:CPU sums 40 times slower.
        return x * jax.lax.broadcast_in_dim(weight.astype(jnp.float32), x.shape, (x.ndim - 1,))


class Attention(Module):
    """Block-causal self-attention with RoPE, of a whole sequence or of one new block with a cache."""

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b l d"],
        angles: tuple[Float[Array, "*a p"], Float[Array, "*a p"]],
        segment_ids: Int[Array, "b l"] | None,
        valid: Bool[Array, "b l"] | None,
        cache: ops.KVCache | None,
        layer: Int[Array, ""],
    ) -> tuple[Float[Array, "b l d"], KVPair | None]:
        """The output, and with a cache the new keys and values.

        Args:
          x: normalized activations [b, l, d], float32.
          angles: cosine and sine from `model_angles`.
          segment_ids: tokens attend to tokens with the same id only; None: all ids are the same.
          valid: False hides a token from every query; None: none is hidden.
          cache: keys and values of earlier blocks; x is then one block.
          layer: the number of this layer, which selects its part of the cache.
        """
        config, (batch, length, _) = self.config, x.shape

        def project(name: str, *, with_rope: bool) -> Array:
            kernel = Linear(features=config.hidden_size, name=name, **self.common()).kernel(
                x.shape[-1]
            )
            y = ops.dense(
                x, deinterleave_rope(kernel, config.head_dim) if with_rope else kernel, self.dtype
            )
            return y.reshape(batch, length, config.num_attention_heads, config.head_dim)

        q, k, v = (
            project("wq", with_rope=True),
            project("wk", with_rope=True),
            project("wv", with_rope=False),
        )
        q, k, v = (y.astype(self.dtype) for y in (apply_rope(q, angles), apply_rope(k, angles), v))
        options: dict[str, Any] = dict(
            mesh=self.mesh,
            implementation=self.attention_implementation(),
            q_tile=config.scan_query_chunk_size,
            kv_tile=config.scan_key_chunk_size,
        )
        new_kv = None
        if cache is None:
            q, k, v = (
                constrain(y, self.mesh, "batch", "sequence", "heads", None) for y in (q, k, v)
            )
            out = ops.attention(
                q,
                k,
                v,
                block_size=config.tokens_per_block,
                segment_ids=segment_ids,
                valid=valid,
                layout="balanced" if self.balanced_mesh() else "plain",
                **options,
            )
        else:
            out = ops.attention_with_cache(q, k, v, cache=cache, layer=layer, **options)
            new_kv = (k.swapaxes(1, 2), v.swapaxes(1, 2))
        out = out.reshape(batch, length, config.hidden_size)
        return Linear(features=config.hidden_size, name="wo", **self.common())(out), new_kv


class FeedForward(Module):
    """SwiGLU (Shazeer 2020)."""

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        """`w2(silu(w1 x) * w3 x)` (eq. 6), in chunks of tokens if `scan_mlp` is set."""
        config = self.config

        def weight(name: str, num_inputs: int, features: int) -> Array:
            return Linear(features=features, name=name, **self.common()).kernel(num_inputs)

        inner, outer = config.intermediate_size, config.hidden_size
        weights = weight("w1", outer, inner), weight("w2", inner, outer), weight("w3", outer, inner)
        split = 1 if self.mesh is None else self.mesh.shape[ring.AXIS]
        return ops.feedforward(
            x,
            *weights,
            dtype=self.dtype,
            chunk_size=config.scan_mlp_chunk_size if config.scan_mlp else None,
            num_parts=split if x.shape[1] % split == 0 else 1,
        )


class Layer(Module):
    """`x + attention(norm(x))`, then `x + feed_forward(norm(x))`."""

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b l d"],
        layer: Int[Array, ""],
        angles: tuple[Float[Array, "*a p"], Float[Array, "*a p"]],
        segment_ids: Int[Array, "b l"] | None = None,
        valid: Bool[Array, "b l"] | None = None,
        cache: ops.KVCache | None = None,
    ) -> tuple[Float[Array, "b l d"], KVPair | None]:
        """The new residual stream, and with a cache the layer's new keys and values.

        Args:
          x: the residual stream [b, l, d], float32.
          layer: the number of this layer.
          angles: cosine and sine from `model_angles`.
          segment_ids: tokens attend to tokens with the same id only; None: all ids are the same.
          valid: False hides a token from every query; None: none is hidden.
          cache: keys and values of earlier blocks; x is then one block.
        """
        common, config = self.common(), self.config
        attention = _remat(Attention, config.remat_attention, in_scan=config.scan_layers)(
            name="attention", **common
        )
        feed_forward = _remat(FeedForward, config.remat_mlp, in_scan=config.scan_layers)(
            name="feed_forward", **common
        )
        out, new_kv = attention(
            RMSNorm(name="attention_norm", **common)(x), angles, segment_ids, valid, cache, layer
        )
        x = x + out
        x = x + feed_forward(RMSNorm(name="ffn_norm", **common)(x))
        return constrain(x, self.mesh, "batch", "sequence", None), new_kv


class LayerStack(Module):
    """The layers of an encoder or a decoder: stacked parameters and a scan (`scan_layers`), or numbered layers."""

    num_layers: int = 1

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b l d"],
        position_ids: Int[Array, "b l"],
        segment_ids: Int[Array, "b l"] | None = None,
        valid: Bool[Array, "b l"] | None = None,
        cache: ops.KVCache | None = None,
    ) -> tuple[Float[Array, "b l d"], KVPair | None]:
        """The residual stream after the last layer, and with a cache the new keys and values of all layers.

        Args:
          x: the residual stream [b, l, d], float32.
          position_ids: the tokens' numbers in their sequences [b, l].
          segment_ids: tokens attend to tokens with the same id only; None: all ids are the same.
          valid: False hides a token from every query; None: none is hidden.
          cache: keys and values of earlier blocks; x is then one block.

        Returns:
          The residual stream [b, l, d], and keys and values [layers, b, heads, l, head_dim] each, or None.
        """
        mesh = self.balanced_mesh() if cache is None else None
        if mesh is None:
            return self._layers(x, position_ids, segment_ids, valid, cache)

        def balanced(y: Array) -> Array:
            return ring.to_balanced(y, mesh)

        x, position_ids = balanced(x), balanced(position_ids)
        segment_ids = None if segment_ids is None else balanced(segment_ids)
        valid = None if valid is None else balanced(valid)
        x, new_kv = self._layers(x, position_ids, segment_ids, valid, cache)
        return ring.from_balanced(x, mesh), new_kv  # outside the layers every sequence is in order

    def _layers(
        self,
        x: Array,
        position_ids: Array,
        segment_ids: Array | None,
        valid: Array | None,
        cache: ops.KVCache | None,
    ) -> tuple[Array, KVPair | None]:
        angles = model_angles(position_ids, self.config)
        layer_class = self._layer_class()
        everywhere = (angles, segment_ids, valid, cache)
        # flax accepts a tuple; its annotation says int.
        in_axes: Any = (0, *(nn.broadcast for _ in everywhere))
        index = jnp.arange(self.num_layers)
        if self.config.scan_layers:
            scanned = nn.scan(
                layer_class,
                variable_axes={"params": self.config.param_scan_axis, "intermediates": 0},
                split_rngs={"params": True},
                in_axes=in_axes,
                length=self.num_layers,
            )
            return scanned(name="scan_decoder", **self.common())(x, index, *everywhere)
        new_kvs = []
        for i in range(self.num_layers):
            x, new_kv = layer_class(name=str(i), **self.common())(x, index[i], *everywhere)
            new_kvs.append(new_kv)
        return x, None if cache is None else jax.tree.map(lambda *kvs: jnp.stack(kvs), *new_kvs)

    def _layer_class(self) -> Any:
        """`Layer` with the remat policy of the config. Without one: on a TPU save everything; on CPU and GPU see below.

        On CPU and GPU reading an array costs as much as recomputing it by elementwise operations. So the default saves
        the operands that the backward pass needs of products (attention and the gate's inputs, rounded as they were
        multiplied) and recomputes everything else. In float32 it also recomputes the gate's inputs, which are half of
        the memory, and the values.
        """
        config = self.config
        asked = config.remat_block or config.remat_attention or config.remat_mlp
        if asked or platform_of(self.mesh) == "tpu":
            return _remat(Layer, config.remat_block, in_scan=config.scan_layers)
        wide = jnp.dtype(self.dtype) == jnp.float32
        names = (ATTENTION,) if wide else (ATTENTION, VALUES, GATES)
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        return nn.remat(Layer, policy=policy, prevent_cse=not config.scan_layers)


def _remat(module: Any, policy: str, *, in_scan: bool) -> Any:
    """`module`, recomputed in the backward pass except for what a policy of jax.checkpoint saves; '' disables this."""
    if not policy:
        return module
    # Outside a scan XLA would merge the recomputation with the forward pass, which saves no memory.
    saved = getattr(jax.checkpoint_policies, policy)
    return nn.remat(module, policy=saved, prevent_cse=not in_scan)

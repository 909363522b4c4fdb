"""RMSNorm, RoPE, MLP, Attention, the layer and the stack of layers."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from elastic import ops
from elastic.config import ElasticTokConfig
from elastic.distributed.mesh import platform_of
from elastic.distributed.sharding import constrain
from elastic.ops import bf16_bits
from elastic.ops.attention import ring
from elastic.ops.attention.base import SAVED as ATTENTION
from elastic.ops.attention.base import VALUES
from elastic.ops.feedforward import SAVED as GATES

_FAR = 1 << 20  # positions: a million tokens are turned as the released code turns them

# A layer's keys and values, for a cache: [batch, heads, length, head_dim] each.
KVPair = tuple[Array, Array]


class Module(nn.Module):
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

    def stored_param(self, name: str, init: Any, shape: tuple[int, ...]) -> Array:
        """A parameter in the type it is stored in; a codec may store bfloat16 as its bits."""
        # Loaded parameters are NumPy's until a jitted function takes them.
        return bf16_bits.from_bits(jnp.asarray(self.param(name, init, shape, jnp.float32)))

    def attention_implementation(self) -> str | None:
        """What the config asks for; None leaves the choice to the device."""
        config = self.config
        return config.attention_implementation or (None if config.scan_attention else "reference")

    def balanced_mesh(self) -> Mesh | None:
        """The mesh on whose sp axis a sequence lies in the balanced layout inside of the layers; None: in order."""
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
    """Root mean square normalization in float32, then times `kernel` (Zhang and Sennrich 2019)."""

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """The normalized activations, in float32."""
        weight = self.stored_param("kernel", nn.initializers.ones, (x.shape[-1],))
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(
            jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.config.rms_norm_eps
        )
        # Stretched in one go: its gradient is then one sum over all tokens. With axes of one in between, XLA:CPU sums 40 times slower.
        return x * jax.lax.broadcast_in_dim(weight.astype(jnp.float32), x.shape, (x.ndim - 1,))


def rope_angles(
    position_ids: Int[Array, "*b l"], head_dim: int, theta: float
) -> tuple[Float[Array, "*b l 1 p"], Float[Array, "*b l 1 p"]]:
    """Cosine and sine of `position * theta^(-2 i / d)` in float32, one for each pair of channels (Su et al. 2021, eq. 15).

    Positions are int32. From `_FAR` on, what lies before the last multiple of it is turned in 32-bit fixed point: in float32 the product
    would be off by more the farther it goes, up to whole turns, and an endless video gets there. Below, nothing is added.
    """
    # By NumPy: at position 10^6 an accelerator's rounding of the power would turn by a visible angle.
    frequency = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    turns = frequency.astype(np.float64) * _FAR / (2 * np.pi) % 1  # of `_FAR` positions
    steps = np.round(turns * 2.0**32).astype(np.uint64).astype(np.uint32)
    shape = (1,) * position_ids.ndim + (-1,)
    far, near = (x[..., None] for x in jnp.divmod(position_ids, _FAR))
    turned = far.astype(jnp.uint32) * steps.reshape(
        shape
    )  # whole turns overflow, and do not matter
    angle = turned.astype(jnp.float32) * np.float32(2 * np.pi / 2**32)
    angle = (angle + near.astype(jnp.float32) * frequency.reshape(shape))[..., None, :]
    return jnp.cos(angle), jnp.sin(angle)


def apply_rope(
    x: Float[Array, "*b l h d"], angles: tuple[Float[Array, "*b l 1 p"], Float[Array, "*b l 1 p"]]
) -> Float[Array, "*b l h d"]:
    """Turns each pair of channels by its angle, in float32; pair i lies in channels i and d / 2 + i (see `pairs_apart`)."""
    cos, sin = angles
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)


def deinterleave_rope(kernel: Float[Array, "i o"], head_dim: int) -> Float[Array, "i o"]:
    """A query or key projection whose interleaved pairs (2i, 2i+1) come out in the channels i and d / 2 + i of their head.

    The checkpoints interleave. Logits do not depend on the order of the channels, if it is the same for queries and keys, and halves
    are rotated without picking every second number: moving the columns of a matrix is cheaper than moving every activation.
    """
    return rearrange(kernel, "i (h p two) -> i (h two p)", p=head_dim // 2, two=2)


class Attention(Module):
    """Block-causal self-attention with RoPE; on a sequence, or of one new block on a cache."""

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
        """The output, and with a cache also the new keys and values."""
        config, (batch, length, _) = self.config, x.shape

        def project(name: str, *, rotated: bool) -> Array:
            kernel = Linear(features=config.hidden_size, name=name, **self.shared()).kernel(
                x.shape[-1]
            )
            y = ops.dense(
                x, deinterleave_rope(kernel, config.head_dim) if rotated else kernel, self.dtype
            )
            return y.reshape(batch, length, config.num_attention_heads, config.head_dim)

        q, k, v = (
            project("wq", rotated=True),
            project("wk", rotated=True),
            project("wv", rotated=False),
        )
        q, k, v = (y.astype(self.dtype) for y in (apply_rope(q, angles), apply_rope(k, angles), v))
        how: dict[str, Any] = dict(
            mesh=self.mesh,
            implementation=self.attention_implementation(),
            q_tile=config.scan_query_chunk_size,
            kv_tile=config.scan_key_chunk_size,
        )
        new = None
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
                **how,
            )
        else:
            out = ops.attention_with_cache(q, k, v, cache=cache, layer=layer, **how)
            new = (k.swapaxes(1, 2), v.swapaxes(1, 2))
        out = out.reshape(batch, length, config.hidden_size)
        return Linear(features=config.hidden_size, name="wo", **self.shared())(out), new


class FeedForward(Module):
    """SwiGLU (Shazeer 2020)."""

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        """`w2(silu(w1 x) * w3 x)`, in chunks of tokens with `scan_mlp`."""
        config = self.config

        def weight(name: str, num_inputs: int, features: int) -> Array:
            return Linear(features=features, name=name, **self.shared()).kernel(num_inputs)

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
        """The new residual stream, and with a cache the layer's new keys and values."""
        shared, config = self.shared(), self.config
        attention = _remat(Attention, config.remat_attention, in_scan=config.scan_layers)(
            name="attention", **shared
        )
        feed_forward = _remat(FeedForward, config.remat_mlp, in_scan=config.scan_layers)(
            name="feed_forward", **shared
        )
        out, new = attention(
            RMSNorm(name="attention_norm", **shared)(x), angles, segment_ids, valid, cache, layer
        )
        x = x + out
        x = x + feed_forward(RMSNorm(name="ffn_norm", **shared)(x))
        return constrain(x, self.mesh, "batch", "sequence", None), new


class LayerStack(Module):
    """The layers of an encoder or a decoder: stacked and scanned over (`scan_layers`), or numbered."""

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
        """The residual stream after the last layer, and with a cache the new keys and values of all, [layers, b, heads, l, head_dim]."""
        mesh = self.balanced_mesh() if cache is None else None
        if mesh is None:
            return self._layers(x, position_ids, segment_ids, valid, cache)

        def there(y: Array) -> Array:
            return ring.to_balanced(y, mesh)

        x, position_ids = there(x), there(position_ids)
        segment_ids = None if segment_ids is None else there(segment_ids)
        valid = None if valid is None else there(valid)
        x, new = self._layers(x, position_ids, segment_ids, valid, cache)
        return ring.from_balanced(x, mesh), new  # outside of the layers every sequence is in order

    def _layers(
        self,
        x: Array,
        position_ids: Array,
        segment_ids: Array | None,
        valid: Array | None,
        cache: ops.KVCache | None,
    ) -> tuple[Array, KVPair | None]:
        angles = rope_angles(position_ids, self.config.head_dim, self.config.theta)
        layer_class = self._layer_class()
        everywhere = (angles, segment_ids, valid, cache)
        in_axes: Any = (
            0,
            *(nn.broadcast for _ in everywhere),
        )  # flax accepts a tuple, its type says int
        index = jnp.arange(self.num_layers)
        if self.config.scan_layers:
            scanned = nn.scan(
                layer_class,
                variable_axes={"params": self.config.param_scan_axis, "intermediates": 0},
                split_rngs={"params": True},
                in_axes=in_axes,
                length=self.num_layers,
            )
            return scanned(name="scan_decoder", **self.shared())(x, index, *everywhere)
        new = []
        for i in range(self.num_layers):
            x, layer_new = layer_class(name=str(i), **self.shared())(x, index[i], *everywhere)
            new.append(layer_new)
        return x, None if cache is None else jax.tree.map(lambda *layers: jnp.stack(layers), *new)

    def _layer_class(self) -> Any:
        """`Layer`, recomputed in the backward pass as the config says; where it says nothing, what is dear to make is kept, on a TPU all.

        On a CPU and a GPU moving an array costs as much as making many a one: the products' results that the backward pass needs are
        kept, rounded as they were multiplied, and what lies between is made again. In float32 the gates, half of it all, and the values
        are made again too.
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
    """`module`, recomputed in the backward pass except for what the policy of jax.checkpoint saves; '' is the module itself."""
    if not policy:
        return module
    # Outside of a scan XLA would merge the recomputation with the forward pass, and save no memory.
    saved = getattr(jax.checkpoint_policies, policy)
    return nn.remat(module, policy=saved, prevent_cse=not in_scan)

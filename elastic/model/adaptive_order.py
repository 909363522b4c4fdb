"""The order 'adaptive': of a block's tokens, more go to the groups that have more to say.

In the order 'coarse_to_fine' a wall gets as many tokens as a face. Here every group still sends its stages one after
another, but the group whose next stage promises the most comes first. What it promises is computed from the codes that it
sent before. The decoder has these too, so it finds the same order, and no bit is spent on it (as in backward adaptive
quantization, Jayant 1973).

The network sees tokens in the order coarse_to_fine. `AdaptiveOrder` stands between it and everything else, where a prefix
of a block is a prefix of the adaptive order.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from elastic.config import ElasticTokConfig
from elastic.distributed.sharding import constrain
from elastic.model import groups
from elastic.model.bottleneck import make_bottleneck
from elastic.model.layers import Module

# Promises are whole numbers of 1/1024, because a sum of floats depends on the device, and one token in another place would
# spoil the block.
_UNIT = 1024
# Groups whose promises differ by less than a quarter take turns. A power of two in units.
_TURN_BITS = 8
_LARGEST_WEIGHT = 100.0  # so that a sum stays within 32 bits
_DONE = np.iinfo(np.int32).min


class Promise(NamedTuple):
    """What a group's stage promises: the logarithm of the squared error that its token takes away, in nats.

    It is `start[stage] + sum(sizes * weight[:, :, stage])` over the stages that the group has sent. Where this is more than the
    group's stage before promised, the stage promises as much as that one.

    Attributes:
      weight: for each channel of each stage, what its size adds to the promises of all stages.
      start: of each stage. The first is the same for all groups.
    """

    weight: Float[Array, "k c k"]
    start: Float[Array, "k"]


def as_coarse_to_fine(config: ElasticTokConfig) -> dict[str, np.ndarray]:
    """The parameters with which the order is coarse_to_fine: of all groups the first stage, then of all the second, ..."""
    stages = config.num_stages
    return {
        "weight": np.zeros((stages, config.code_dim, stages), np.float32),
        "start": -np.arange(stages, dtype=np.float32),
    }


def sent_places(
    sizes: Int[Array, "b t c"],
    num_sent: Int[Array, "b"],
    promise: Promise,
    config: ElasticTokConfig,
    *,
    sent: bool,
) -> Int[Array, "b t"]:
    """The network's number of each sent token of a block. Those after the last sent one are `t` or more.

    Args:
      sizes: the sizes of the codes of each token, whole numbers.
      num_sent: how many tokens are sent.
      promise: decides who is next.
      config: the model.
      sent: whether `sizes` are in the order in which tokens are sent, not in the network's.
    """
    weight = _in_units(jnp.clip(promise.weight, -_LARGEST_WEIGHT, _LARGEST_WEIGHT))
    start = _in_units(promise.start)

    def of_block(sizes: Int[Array, "t c"], num_sent: Int[Array, ""]) -> Int[Array, "t"]:
        return _places(sizes, num_sent, weight, start, config, sent=sent)

    return jax.vmap(of_block)(sizes, num_sent)


def to_sent(x: Shaped[Array, "b t *c"], places: Int[Array, "b t"]) -> Shaped[Array, "b t *c"]:
    """Tokens in the network's order -> in the order in which they are sent."""
    places = places.reshape(*places.shape, *(1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, places, axis=1, mode="fill", fill_value=0)


def to_network(x: Shaped[Array, "b t *c"], places: Int[Array, "b t"]) -> Shaped[Array, "b t *c"]:
    """The inverse of `to_sent`, with zeros for tokens that are not sent."""
    row = jnp.arange(len(x))[:, None]
    return jnp.zeros_like(x).at[row, places].set(x, mode="drop")


class AdaptiveOrder(Module):
    """The order 'adaptive' with its parameters; as they begin, it is the order coarse_to_fine."""

    def promise(self) -> Promise:
        """What decides who sends the next token."""
        first = as_coarse_to_fine(self.config)
        return Promise(
            **{
                name: self.stored_param(
                    name, lambda *_, value=value: jnp.asarray(value), value.shape
                )
                for name, value in first.items()
            }
        )

    @nn.compact
    def places(
        self, codes: Float[Array, "b t c"], num_sent: Int[Array, "b"], *, sent: bool
    ) -> Int[Array, "b t"]:
        """As the function `sent_places`, of codes."""
        sizes = make_bottleneck(self.config).sizes(jax.lax.stop_gradient(codes))
        # A round has all groups of a block, so every device has all of its tokens.
        sizes = constrain(sizes, self.mesh, "batch", None, None)
        return sent_places(sizes, num_sent, self.promise(), self.config, sent=sent)

    def to_sent(
        self,
        codes: Float[Array, "b l c"],
        latents: Float[Array, "b l z"],
        counted: Bool[Array, "b l"] | None,
    ) -> tuple[Float[Array, "b l c"], Float[Array, "b l z"], Bool[Array, "b l"] | None]:
        """The network's codes of whole blocks in the order in which they are sent, and what else it has of these tokens."""
        blocks = self._blocks(codes)
        every = jnp.full(len(blocks), blocks.shape[1], jnp.int32)
        places = self.places(blocks, every, sent=False)

        def sent(x: Shaped[Array, "b l *c"]) -> Shaped[Array, "b l *c"]:
            return to_sent(self._blocks(x), places).reshape(x.shape)

        return sent(codes), sent(latents), None if counted is None else sent(counted)

    def to_network(
        self, codes: Float[Array, "b l c"], kept: Bool[Array, "b l"]
    ) -> tuple[Float[Array, "b l c"], Bool[Array, "b l"]]:
        """The inverse of `to_sent`, and which of the network's tokens are kept."""
        blocks, marks = self._blocks(codes), self._blocks(kept)
        places = self.places(blocks, jnp.sum(marks, axis=1, dtype=jnp.int32), sent=True)
        back = (to_network(x, places) for x in (blocks, marks))
        codes, kept = (x.reshape(y.shape) for x, y in zip(back, (codes, kept), strict=True))
        return codes, kept

    def _blocks(self, x: Shaped[Array, "b l *c"]) -> Shaped[Array, "n t *c"]:
        return x.reshape(-1, self.config.tokens_per_block, *x.shape[2:])


def _in_units(x: Float[Array, "*s"]) -> Int[Array, "*s"]:
    # As bfloat16 holds it, so that a model has the same order in whatever type it is stored.
    x = jax.lax.reduce_precision(x.astype(jnp.float32), exponent_bits=8, mantissa_bits=7)
    return jnp.round(x * _UNIT).astype(jnp.int32)


def _places(
    sizes: Int[Array, "t c"],
    num_sent: Int[Array, ""],
    weight: Int[Array, "k c k"],
    start: Int[Array, "k"],
    config: ElasticTokConfig,
    *,
    sent: bool,
) -> Int[Array, "t"]:
    """`sent_places` of one block. In a round each group whose promise is the largest sends a token."""
    tokens, stages = config.tokens_per_block, config.num_stages
    numbers = groups.by_stage(jnp.arange(tokens, dtype=jnp.int32)[None, :, None], config)
    first = numbers[0, :, 0].reshape(-1)  # the number of each group's stage 0
    alike = numbers.shape[3]  # groups of a slice

    class Sending(NamedTuple):
        done: Int[Array, ""]  # tokens
        stage: Int[Array, "g"]  # the next one of each group
        promise: Int[Array, "g"]  # of that, in turns
        all: Int[Array, "g k"]  # the promises of all stages, as far as is known
        places: Int[Array, "t"]

    def send(now: Sending) -> Sending:
        sends = now.promise == jnp.max(now.promise)
        rank = now.done + jnp.cumsum(sends, dtype=jnp.int32) - 1
        place = first + now.stage * alike
        size = sizes[jnp.where(sends, rank if sent else place, 0)]
        added = jnp.sum(size[:, :, None] * weight[now.stage], axis=1)
        every = now.all + jnp.where(sends[:, None], added, 0)
        stage = now.stage + sends
        next_one = jnp.take_along_axis(every, jnp.minimum(stage, stages - 1)[:, None], axis=1)
        next_one = jnp.where(stage < stages, next_one[:, 0] >> _TURN_BITS, _DONE)
        return Sending(
            done=rank[-1] + 1,
            stage=stage,
            promise=jnp.where(sends, jnp.minimum(now.promise, next_one), now.promise),
            all=every,
            places=now.places.at[jnp.where(sends, rank, tokens)].set(place, mode="drop"),
        )

    nothing = Sending(
        done=jnp.int32(0),
        stage=jnp.zeros_like(first),
        promise=jnp.full_like(first, start[0] >> _TURN_BITS),
        all=jnp.broadcast_to(start, (len(first), stages)),
        places=jnp.full(tokens, tokens, jnp.int32),
    )
    return jax.lax.while_loop(lambda now: now.done < num_sent, send, nothing).places

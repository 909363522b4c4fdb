"""Fits the order 'adaptive' to a trained model: what the next stage of a group promises, from the codes that it has sent.

Blocks are decoded with equally many stages of all groups. What each stage takes off a group's squared error is measured, and
a regression finds it from the sizes of the group's earlier codes.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from einops import rearrange, reduce
from jaxtyping import Array, Float, Int
from scipy import optimize

from elastic.config import ElasticTokConfig
from elastic.model import groups, token_masks
from elastic.model.adaptive_order import as_coarse_to_fine
from elastic.model.autoencoder import Batch, ElasticTok
from elastic.model.bottleneck import make_bottleneck

_WINDOW = 4  # stages: what one takes off is noise, and with `haar_groups` four stages are one turn of all bands
_FIRST = 8  # stages that are all measured; of later ones every fourth
# Per sample, of the regression, for sizes of variance 1: two hundred blocks have few samples for the last stages.
_RIDGE = 0.01
_TINY = 1e-9
_LEAST = 1e-3  # of the mean size of what a stage changes; a mean below it is no gain
_MOST_STEPS = 100  # ten are usual
_FARTHEST = 12.0  # a promise is at most this far from the mean, as a logarithm


class Measured(NamedTuple):
    """What the stages of some groups take off their squared errors.

    Attributes:
      sizes: of the codes of every stage.
      errors: with so many stages as `counts` says.
      counts: rising numbers of stages, from one to all.
    """

    sizes: Int[np.ndarray, "n k c"]
    errors: Float[np.ndarray, "n m"]
    counts: Int[np.ndarray, "m"]


def with_order(config: ElasticTokConfig) -> ElasticTokConfig:
    """The model with the order 'adaptive'.

    Raises:
      ValueError: it cannot have this order.
    """
    return config.replace(token_order="adaptive", condition_encoder=False)


def adaptive(
    params: dict[str, Any], config: ElasticTokConfig
) -> tuple[dict[str, Any], ElasticTokConfig]:
    """A model with groups of patches as one with the order 'adaptive', which is coarse_to_fine at first.

    An encoder that saw which tokens are kept sees all of them kept from now on.

    Args:
      params: of the model, NumPy arrays.
      config: the model.

    Raises:
      ValueError: as `with_order`.
    """
    new = with_order(config)
    params, encoder = dict(params), dict(params["encoder"])
    if config.condition_encoder:
        kept = np.asarray(encoder.pop("is_kept_embed"), np.float32)
        del encoder["is_masked_embed"]
        encoder["stage_embed"] = np.asarray(encoder["stage_embed"], np.float32) + kept
    params["encoder"] = encoder
    params["token_order"] = as_coarse_to_fine(new)
    return params, new


class StageErrors:
    """Measures blocks.

    Args:
      params: of a model whose order is 'adaptive' and still coarse_to_fine, as `adaptive` gives it.
      config: the model.
    """

    def __init__(self, params: dict[str, Any], config: ElasticTokConfig):
        stages = config.num_stages
        counts = [n for n in range(1, stages + 1) if n <= _FIRST or n % _WINDOW == 0]
        self.counts = np.array(counts if counts[-1] == stages else [*counts, stages])
        self._params, self._config = params, config
        self._measure = jax.jit(self._measure_impl)

    def __call__(self, patches: Float[np.ndarray, "t p"]) -> Measured:
        """The groups of one block, from its patches in [-1, 1]."""
        sizes, errors = self._measure(self._params, jnp.asarray(self.counts), patches[None])
        return Measured(np.asarray(sizes), np.asarray(errors).T, self.counts)

    def _measure_impl(self, params: Any, counts: Array, patches: Array) -> tuple[Array, Array]:
        config = self._config
        model, stages, tokens = ElasticTok(config), config.num_stages, config.tokens_per_block
        whole = Batch(patches, jnp.ones(patches.shape[:2], bool))
        encoded: Any = model.apply({"params": params}, whole, method="encode")
        codes = encoded.codes

        def errors(count: Array) -> Array:
            kept = token_masks.kept_mask(count[None] * (tokens // stages), tokens)
            batch = Batch(patches, kept)
            sent = token_masks.drop_tail(codes, kept)
            decoded, _ = model.apply({"params": params}, sent, batch, method="decode")
            square = jnp.square(jnp.clip(decoded, -1, 1) - patches)
            return reduce(groups.by_stage(square, config), "1 s k n p -> (s n)", "sum")

        sizes = make_bottleneck(config).sizes(codes)
        # One after another: at once they would need the memory of as many blocks.
        return rearrange(sizes, "1 (k g) c -> g k c", k=stages), jax.lax.map(errors, counts)


def joined(measured: Sequence[Measured]) -> Measured:
    """The groups of several blocks of a model."""
    sizes, errors, counts = zip(*measured, strict=True)
    return Measured(np.concatenate(sizes), np.concatenate(errors), counts[0])


def fit(measured: Measured) -> dict[str, np.ndarray]:
    """The parameters of the order, `weight` and `start` of `adaptive_order.Promise`, in bfloat16: it reads no more of them."""
    groups, stages, channels = measured.sizes.shape
    errors = _at_all_stages(measured)
    deviation = measured.sizes.std(axis=0).clip(0.5)
    weight, start = np.zeros((stages, channels, stages)), np.zeros(stages)
    for stage in range(1, stages):
        last = min(stage + _WINDOW, stages)
        taken = (errors[:, stage - 1] - errors[:, last - 1]) / (last - stage)
        scaled = (measured.sizes[:, :stage] / deviation[:stage]).reshape(groups, -1)
        found = _log_regression(scaled, taken)
        weight[:stage, :, stage] = found[:-1].reshape(stage, channels) / deviation[:stage]
        start[stage] = found[-1]
    start[0] = start.max() + 1
    return {"weight": weight.astype(ml_dtypes.bfloat16), "start": start.astype(ml_dtypes.bfloat16)}


def _at_all_stages(measured: Measured) -> Float[np.ndarray, "n k"]:
    """The errors after every stage, by the logarithm of those that were measured."""
    every, logs = np.arange(1, measured.sizes.shape[1] + 1), np.log(measured.errors + _TINY)
    return np.exp(np.stack([np.interp(every, measured.counts, line) for line in logs]))


def _log_regression(
    x: Float[np.ndarray, "n f"], y: Float[np.ndarray, "n"]
) -> Float[np.ndarray, "f1"]:
    """The coefficients, and a constant as the last one, with which exp(x @ found) is nearest to y.

    First a Poisson regression, which suits numbers that may be 0 or a little below; then one that weighs each sample by the
    root of what the first expects, for otherwise a few busy groups decide. Both are convex.
    """
    scale = float(y.mean())
    if scale <= _LEAST * float(np.abs(y).mean()):  # noise: nothing is taken off
        return np.append(np.zeros(x.shape[1]), np.log(_LEAST * float(np.abs(y).mean()) + _TINY))
    x = np.concatenate([x, np.ones((len(x), 1))], axis=1).astype(np.float64)
    y = y / scale
    ridge = np.full(x.shape[1], _RIDGE)
    ridge[-1] = 0.0
    found, weight = np.zeros(x.shape[1]), np.ones(len(x))
    for _ in range(2):
        found = _poisson(x, y, weight / len(x), ridge, found)
        weight = np.exp(np.clip(x @ found, -_FARTHEST, _FARTHEST) / -2)
        if weight @ y <= 0:  # it would go to minus infinity
            break
    found[-1] += np.log(scale)
    return found


def _poisson(x, y, weight, ridge, start):
    """Newton's method with a trust region: the logarithm of the mean is x @ result."""

    def expected(b):
        return weight * np.exp(np.clip(x @ b, -_FARTHEST, _FARTHEST))

    def loss(b):
        return expected(b).sum() - weight * y @ (x @ b) + ridge @ b**2 / 2

    def gradient(b):
        return x.T @ (expected(b) - weight * y) + ridge * b

    def curvature(b):
        return x.T @ (x * expected(b)[:, None]) + np.diag(ridge + _TINY)

    return optimize.minimize(
        loss,
        start,
        jac=gradient,
        hess=curvature,
        method="trust-exact",
        options={"gtol": 1e-4, "maxiter": _MOST_STEPS},
    ).x

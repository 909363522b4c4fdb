"""The optimizer of the released scripts, clipped AdamW with a warm-up and a cosine; and Muon for the matrices of layers."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool
from optax import contrib

from elastic.training.config import OptimizerConfig

_EPS = 1e-8  # of AdamW
# Muon: the rate of `in_proj` is relative to the size of its numbers. Patches have thousands of numbers, so its own are
# small, a thousandth after a linear start with groups of patches, and a rate that suits the rest destroys them.
_INPUT_RATE = 10.0  # per root mean square and rate of the rest
_SMALLEST_RMS = 1e-4


def learning_rate(config: OptimizerConfig) -> optax.Schedule:
    """Step number -> learning rate: a linear warm-up from `init_lr` to `lr`, then a cosine to `end_lr` at `lr_decay_steps`."""
    return optax.warmup_cosine_decay_schedule(
        config.init_lr,
        config.lr,
        config.lr_warmup_steps,
        config.lr_decay_steps,
        end_value=config.end_lr,
    )


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """Clipping by the global norm, then AdamW, or Muon and AdamW. AdamW's state has the tree of the released `opt_state`.

    Its `update` takes `good`: where it is False Adam's moments and their count stay as they were; for the rest of the
    state call `where_good`.
    """
    schedule = learning_rate(config)
    decay = (
        _decay_all(config.weight_decay)
        if config.decay_norms
        else optax.add_decayed_weights(config.weight_decay, mask=_is_matrix)
    )
    update = optax.chain(  # as optax.adamw, which is a chain too: a level in the tree of the state
        _scale_by_adam(config), decay, optax.scale_by_learning_rate(schedule)
    )
    if config.type == "muon":
        of_input = optax.chain(
            _scale_by_adam(config),
            optax.scale_by_param_block_rms(_SMALLEST_RMS),
            optax.scale(_INPUT_RATE),
            decay,
            optax.scale_by_learning_rate(schedule),
        )
        update = optax.partition(
            {"matrices": _muon(config), "input": of_input, "rest": update}, _kinds
        )
    optimizer = optax.chain(_clip_by_global_norm(config.clip_gradient), update)
    if config.accumulate_gradient_steps == 1:
        return optimizer
    several = optax.MultiSteps(optimizer, config.accumulate_gradient_steps)
    return optax.GradientTransformationExtraArgs(several.init, cast(Any, several.update))


def _muon(config: OptimizerConfig) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) for matrices, or stacks of them: momentum whose singular values are made equal.

    The update of a matrix grows with the root of how much taller than wide it is, so that one rate suits all shapes.
    """
    schedule = learning_rate(config)

    def last_two(tree: Any) -> Any:
        return jax.tree.map(lambda x: contrib.MuonDimensionNumbers(x.ndim - 2, x.ndim - 1), tree)

    def suit_shapes(updates: Any, params: Any) -> Any:
        del params
        return jax.tree.map(lambda x: x * max(1.0, x.shape[-1] / x.shape[-2]) ** 0.5, updates)

    return optax.chain(
        contrib.scale_by_muon(
            mu_dtype=jnp.bfloat16 if config.bf16_momentum else jnp.float32,
            weight_dimension_numbers=last_two,
        ),
        optax.stateless(suit_shapes),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(lambda n: schedule(n) * (config.matrix_lr / config.lr)),
    )


def _kinds(params: Any) -> Any:
    """'matrices' for the products in layers, 'input' for the first projection, 'rest' for all else."""

    def kind(path: tuple[Any, ...], _: jax.Array) -> str:
        names = set(_names(path))
        if names & {"attention", "feed_forward"}:
            return "matrices"
        return "input" if "in_proj" in names else "rest"

    return jax.tree_util.tree_map_with_path(kind, params)


def where_good(good: Bool[Array, ""], new: Any, old: Any) -> Any:
    """The new state of the optimizer, or where not good the old one. AdamW's part has chosen by itself: see `_scale_by_adam`."""

    def is_adam(state: Any) -> bool:
        return isinstance(state, optax.ScaleByAdamState)

    def choose(new: Any, old: Any) -> Any:
        return new if is_adam(new) else jnp.where(good, new, old)

    return jax.tree.map(choose, new, old, is_leaf=is_adam)


def _clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """As optax's, but by one factor: to divide every number makes XLA:CPU keep a second array of each gradient."""

    def clip(updates: Any, params: Any) -> Any:
        del params
        norm = optax.tree.norm(updates)
        factor = jnp.where(norm < limit, 1.0, limit / norm)
        return jax.tree.map(lambda x: x * factor.astype(x.dtype), updates)

    return optax.stateless(clip)


def _scale_by_adam(config: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """As optax's, but moments stay as they were where not `good`, and new ones take the place of the old ones in memory.

    For that nothing may read an old moment once the new one is made. XLA:CPU fuses a sum into all that use it, the update of the
    parameter too, which then needs a copy of the old moment: 1.7 GB for 200 M parameters. A division it makes once.
    """
    mu_dtype = jnp.bfloat16 if config.bf16_momentum else jnp.float32

    def init(params: Any) -> optax.ScaleByAdamState:
        mu = jax.tree.map(lambda x: jnp.zeros_like(x, dtype=mu_dtype), params)
        nu = jax.tree.map(jnp.zeros_like, params)
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), mu, nu)

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        good: Bool[Array, ""] | bool = True,
        **others: Any,
    ) -> tuple[Any, optax.ScaleByAdamState]:
        del params, others
        next_count = optax.safe_increment(state.count)
        one = jnp.minimum(next_count, 1).astype(jnp.float32)  # which XLA cannot know

        def moment(old: Array, gradient: Array, decay: float) -> Array:
            return jnp.where(good, (1 - decay) * gradient + decay * old, old) / one

        mu = jax.tree.map(lambda m, g: moment(m, g, config.b1), state.mu, updates)
        nu = jax.tree.map(lambda v, g: moment(v, jnp.square(g), config.b2), state.nu, updates)
        # Factors: of two divisions one after the other XLA makes one, and then the first is not made by itself.
        unbias_mu, unbias_nu = (1 / (1 - b**next_count) for b in (config.b1, config.b2))
        updates = jax.tree.map(
            lambda m, v: m * unbias_mu / (jnp.sqrt(v * unbias_nu) + _EPS), mu, nu
        )
        count = jnp.where(good, next_count, state.count)
        mu = jax.tree.map(lambda m: m.astype(mu_dtype), mu)
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)


def _names(path: tuple[Any, ...]) -> list[str]:
    return [str(getattr(key, "key", key)) for key in path]


def _decay_all(weight_decay: float) -> optax.GradientTransformation:
    """As optax.add_decayed_weights, whose mask would change the state that runs have saved; but not the order of tokens.

    The order has no gradient: it would shrink from step to step, and so change.
    """

    def decay(updates: Any, params: Any) -> Any:
        def decayed(path: tuple[Any, ...], update: Array, param: Array) -> Array:
            if "token_order" in _names(path):
                return update
            return update + weight_decay * param

        return jax.tree_util.tree_map_with_path(decayed, updates, params)

    return optax.stateless(decay)


def _is_matrix(params: Any) -> Any:
    """True for the weights of products; False for norm weights, embeddings of kept and masked tokens, the order of tokens."""

    def decayed(path: tuple[Any, ...], _: jax.Array) -> bool:
        names = _names(path)
        others = ("ln_f", "token_order")
        return not any("norm" in name or name.startswith("is_") or name in others for name in names)

    return jax.tree_util.tree_map_with_path(decayed, params)

"""The optimizer of the released scripts: clipped AdamW with a warm-up and a cosine."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Flags `--optimizer.adamw_optimizer.*`, and `--optimizer.accumulate_gradient_steps`. Defaults are the released ones."""

    init_lr: float = 0.0
    lr: float = 1e-4
    end_lr: float = 1e-4
    lr_warmup_steps: int = 2000
    lr_decay_steps: int = 2_000_000
    b1: float = 0.9
    b2: float = 0.95
    clip_gradient: float = 1.0
    weight_decay: float = 1e-4
    bf16_momentum: bool = False
    decay_norms: bool = False  # the released code decays norm weights and embeddings too
    accumulate_gradient_steps: int = 1

    def __post_init__(self):
        if not 0 <= self.lr_warmup_steps < self.lr_decay_steps:
            raise ValueError(
                f"lr_warmup_steps={self.lr_warmup_steps} must be 0 or more and below lr_decay_steps={self.lr_decay_steps}."
            )
        if self.accumulate_gradient_steps < 1:
            raise ValueError(
                f"accumulate_gradient_steps={self.accumulate_gradient_steps} must be 1 or more."
            )


def learning_rate(config: OptimizerConfig) -> optax.Schedule:
    """Step number -> learning rate: a linear warm-up from `init_lr` to `lr`, then a cosine to `end_lr` at `lr_decay_steps`."""
    return optax.warmup_cosine_decay_schedule(
        config.init_lr,
        config.lr,
        config.lr_warmup_steps,
        config.lr_decay_steps,
        end_value=config.end_lr,
    )


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW. The state has the tree of the released `opt_state`."""
    optimizer = optax.chain(
        optax.clip_by_global_norm(config.clip_gradient),
        optax.adamw(
            learning_rate(config),
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
            mask=None if config.decay_norms else _is_matrix,
            mu_dtype=jnp.bfloat16 if config.bf16_momentum else jnp.float32,
        ),
    )
    if config.accumulate_gradient_steps == 1:
        return optimizer
    return optax.MultiSteps(optimizer, config.accumulate_gradient_steps).gradient_transformation()


def _is_matrix(params: Any) -> Any:
    """True for the weights of products; False for norm weights and the two embeddings of kept and masked tokens."""

    def decayed(path: tuple[Any, ...], _: jax.Array) -> bool:
        names = [str(getattr(key, "key", key)) for key in path]
        return not any("norm" in name or name.startswith("is_") or name == "ln_f" for name in names)

    return jax.tree_util.tree_map_with_path(decayed, params)

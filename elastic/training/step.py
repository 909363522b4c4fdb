"""One training step: what it changes, what it draws, and its compiled program."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from einops import repeat
from jaxtyping import Array, Float, Int, Shaped

from elastic.checkpoints import float8
from elastic.data.dataset import HostBatch
from elastic.distributed.sharding import constrain
from elastic.model import Batch, ElasticTok, token_masks
from elastic.patches import to_unit_range
from elastic.training.config import TrainConfig
from elastic.training.loss import training_loss
from elastic.training.optimizer import learning_rate, where_good


class TrainState(NamedTuple):
    """Everything that a step changes. Parameters, their mean and the moments are float32."""

    step: Int[Array, ""]
    params: dict[str, Any]
    opt_state: optax.OptState
    ema: dict[str, Any] | None  # a running mean of the parameters; None: not wanted
    skipped: Int[Array, ""]  # steps without a finite loss so far,
    skipped_in_a_row: Int[Array, ""]  # and since the last good one

    def best_params(self) -> dict[str, Any]:
        """What is evaluated and exported: the mean where there is one."""
        return self.params if self.ema is None else self.ema


def new_state(
    params: dict[str, Any], optimizer: optax.GradientTransformation, *, ema: bool = False
) -> TrainState:
    """The state before the first step."""
    # The released state calls the tree {'params': ...}; the optimizer's moments are named after it.
    moments = optimizer.init({"params": params})
    mean = jax.tree.map(jnp.copy, params) if ema else None  # both are donated: no shared buffers
    return TrainState(_zero(), params, moments, mean, _zero(), _zero())


def _zero() -> Int[Array, ""]:
    return jnp.zeros((), jnp.int32)


def train_step(
    model: ElasticTok,
    optimizer: optax.GradientTransformationExtraArgs,
    state: TrainState,
    batch: Batch,
    key: Shaped[Array, "*k"] | None,
    *,
    ema_decay: float = 0.0,
    in_float8: bool = False,
    log_error: bool = False,
    **perceptual: Any,
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """One update, and the terms of the loss.

    Where the loss or the gradient is not finite, parameters and moments stay as they were and the
    step counts as skipped.

    Args:
      key: draws the VAE's samples; None decodes the mean.
      in_float8: compute with the weights that float8 will store.
      log_error: minimize the logarithm of each block's error, see `losses.training_loss`.
      perceptual: what the perceptual loss needs, see `losses.training_loss`.
    """

    def loss(params: dict[str, Any]) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        used = float8.rounded(params) if in_float8 else params
        return training_loss(model, used, batch, key, log_error=log_error, **perceptual)

    (value, terms), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    gradient_norm = optax.tree.norm(grads)
    good = jnp.isfinite(value) & jnp.isfinite(gradient_norm)

    def if_good(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)

    updates, opt_state = optimizer.update(
        {"params": grads}, state.opt_state, {"params": state.params}, good=good
    )
    updated = cast(dict[str, Any], optax.apply_updates({"params": state.params}, updates))["params"]
    params = if_good(updated, state.params)
    ema = state.ema
    if ema is not None:
        ema = if_good(optax.incremental_update(updated, ema, 1 - ema_decay), ema)
    bad = 1 - good.astype(jnp.int32)
    new = TrainState(
        state.step + 1,
        params,
        where_good(good, opt_state, state.opt_state),
        ema,
        state.skipped + bad,
        (state.skipped_in_a_row + 1) * bad,
    )
    terms |= {
        "gradient_norm": gradient_norm,
        "param_norm": optax.tree.norm(params),
        "skipped_steps": new.skipped,
        "skipped_in_a_row": new.skipped_in_a_row,
    }
    return new, terms


def sample_batch(
    model: ElasticTok, config: TrainConfig, sequences: HostBatch, key: Shaped[Array, "*k"]
) -> Batch:
    """Pixels, freshly drawn kept masks, and what keeps packed files apart."""
    model_config = model.config
    length = model_config.tokens_per_block
    filled = jnp.asarray(sequences.filled)
    num_kept = token_masks.sample_num_kept(
        key,
        filled.shape,
        min_kept=model_config.min_toks,
        max_kept=model_config.max_toks,
        keep_fraction=model_config.keep_fraction,
        full_fraction=config.mask_full_fraction,
        log_uniform=config.mask_log_uniform,
    )

    def of_tokens(x: Shaped[Array, "b n"]) -> Shaped[Array, "b l"]:
        x = repeat(x, "b n -> b (n t)", t=length)
        return constrain(x, model.mesh, "batch", "sequence")

    num_kept = jnp.where(filled, num_kept, 0)
    kept = token_masks.kept_mask(num_kept, length).reshape(len(filled), -1)
    batch = Batch(
        constrain(
            to_unit_range(jnp.asarray(sequences.patches)), model.mesh, "batch", "sequence", None
        ),
        constrain(kept, model.mesh, "batch", "sequence"),
        counted=of_tokens(filled),
    )
    if filled.shape[1] == 1:
        return batch  # one block sees itself alone, from position 0
    within = jnp.arange(length, dtype=jnp.int32)
    starts = jnp.asarray(sequences.block_index) * length
    positions = (starts[:, :, None] + within[None, None]).reshape(kept.shape)
    return batch._replace(
        segment_ids=of_tokens(jnp.asarray(sequences.segment_ids)),
        position_ids=constrain(positions, model.mesh, "batch", "sequence"),
    )


def num_updates(opt_state: optax.OptState) -> Int[Array, ""]:
    """How often the optimizer has changed the parameters: what its schedule counts."""
    return optax.tree.get_all_with_path(opt_state, "count")[0][1]


Step = Callable[[TrainState, HostBatch, Any], tuple[TrainState, dict[str, Array]]]


def step_program(
    config: TrainConfig,
    model: ElasticTok,
    optimizer: optax.GradientTransformationExtraArgs,
    shardings: TrainState,
) -> Step:
    """The compiled step, of a state (donated), sequences and the VGG16 weights (None: no LPIPS).

    All that it draws comes from the seed and the number of the step.
    """
    key = jax.random.key(config.seed)
    schedule = learning_rate(config.optimizer)

    def step_fn(
        state: TrainState, sequences: HostBatch, lpips_weights: Any
    ) -> tuple[TrainState, dict[str, Array]]:
        mask_key, vae_key, frame_key = jax.random.split(jax.random.fold_in(key, state.step), 3)
        batch = sample_batch(model, config, sequences, mask_key)
        perceptual: dict[str, Any] = {}
        if lpips_weights is not None:
            perceptual = dict(perceptual=lpips_weights, frame_key=frame_key)
        rate = jnp.asarray(schedule(num_updates(state.opt_state)))
        about_data = {
            "kept_tokens": jnp.sum(batch.kept) / jnp.maximum(jnp.sum(sequences.filled), 1),
            "visible_blocks": jnp.mean(jnp.asarray(sequences.block_index) + 1.0),
        }
        state, terms = train_step(
            model,
            optimizer,
            state,
            batch,
            vae_key,
            ema_decay=config.ema_decay,
            in_float8=config.save.in_float8,
            log_error=config.log_error,
            **perceptual,
        )
        return state, terms | {"learning_rate": rate} | about_data

    # A state comes out as it went in, so that the second step does not compile anew.
    return jax.jit(step_fn, donate_argnums=0, out_shardings=(shardings, None))

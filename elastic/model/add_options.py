"""Adds options to the parameters of a trained model, so that training goes on from them.

A small model with an option of `elastic/config.py` that an older checkpoint lacks need not begin anew. What the option
adds starts neutral. `token_order`, `condition_encoder`, `condition_decoder`, `lapped_input` and `lapped_output` begin
near the old model (the first with `rope='1d'`). `rope='3d'` changes what the layers see, and `bounded_output=False` changes every
pixel; training has to regain it.
"""

from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from elastic.config import ElasticTokConfig
from elastic.model.adaptive_order import as_coarse_to_fine
from elastic.model.lapped import ignore_border, repeat_border

# Options that add parameters or change their shapes. A model that has one cannot go back.
_ADDING = ("condition_encoder", "condition_decoder", "lapped_input", "lapped_output")
# Options that change what the same parameters compute.
_CHANGING = ("token_order", "rope", "rope_split", "rope_bases", "bounded_output")


def before_options(config: ElasticTokConfig, stored: ElasticTokConfig | None) -> ElasticTokConfig:
    """`config` with those options that parameters depend on as `stored` has them: what a checkpoint must fit.

    Args:
      config: the model that is wanted.
      stored: the config beside the checkpoint; None gives `config`.

    Raises:
      ValueError: the checkpoint has an option that `config` lacks.
    """
    if stored is None:
        return config
    for name in ("patch_group", "haar_groups", "num_group_layers"):
        has, asked = getattr(stored, name), getattr(config, name)
        if has != asked:
            raise ValueError(
                f"A model's groups of patches stay as they are: the checkpoint has {name}={has}, and the model "
                f"asked for has {name}={asked}. Pass the checkpoint's, or start without it."
            )
    lost = [name for name in _ADDING if getattr(stored, name) and not getattr(config, name)]
    if stored.token_order == "adaptive" != config.token_order:
        raise ValueError(
            f"The checkpoint has token_order='adaptive', which cannot be taken away, and the model asked for has "
            f"token_order={config.token_order!r}. Pass --update_elastic_config=\"dict(token_order='adaptive')\"."
        )
    if lost:
        raise ValueError(
            f"The checkpoint has {', '.join(lost)}, and the model asked for has not; options can be added to trained "
            f'parameters, not taken away. Pass --update_elastic_config="dict({", ".join(f"{x}=True" for x in lost)})".'
        )
    return config.replace(**{name: getattr(stored, name) for name in (*_ADDING, *_CHANGING)})


def add_options(
    params: dict[str, Any], before: ElasticTokConfig, config: ElasticTokConfig
) -> dict[str, Any]:
    """Parameters of the model `config`, made from those of the model `before`. The two differ in options only.

    New embeddings are zero. The windows of a lapped output repeat the border pixels of their patches; those of a lapped
    input see nothing new at first. The order 'adaptive' begins as coarse_to_fine.

    Args:
      params: NumPy arrays, in the tree of the checkpoints.
      before: the model that they fit.
      config: the model that the result fits.
    """
    flat: dict[Any, Any] = flatten_dict(params)
    for coder in ("encoder", "decoder"):
        option = f"condition_{coder}"
        if getattr(config, option) and not getattr(before, option):
            for name in ("is_kept_embed", "is_masked_embed"):
                flat[coder, name] = np.zeros((1, config.hidden_size), np.float32)
    if config.lapped_input and not before.lapped_input:
        name = ("encoder", "in_proj", "kernel")
        flat[name] = ignore_border(flat[name], config.group_size)
    if config.lapped_output and not before.lapped_output:
        name = ("decoder", "out_proj", "kernel")
        flat[name] = repeat_border(flat[name], config.group_size)
    if config.token_order == "adaptive" != before.token_order:
        for name, value in as_coarse_to_fine(config).items():
            flat["token_order", name] = value
    return unflatten_dict(flat)


def added_options(before: ElasticTokConfig, config: ElasticTokConfig) -> list[str]:
    """The options, as `name=value`, in which `config` differs from `before`."""
    return [
        f"{name}={getattr(config, name)!r}"
        for name in (*_ADDING, *_CHANGING)
        if getattr(config, name) != getattr(before, name)
    ]

"""The config of the model that a command names, and a one-line description of a loaded model."""

import datetime
import logging
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

import elastic
from elastic import checkpoints
from elastic.config import ElasticTokConfig, check_resolution, load_config, update_config
from elastic.distributed.cpu_devices import set_up_cpu
from elastic.distributed.mesh import make_mesh
from elastic.ops import choose_implementation
from elastic.tokenizer import ElasticTokenizer, EncodeOptions
from elastic.tokenizer.scheduler import check_batch
from elastic.tokenizer.session import check_options

log = logging.getLogger(__name__)


def model_config(checkpoint_spec: str, *, preset: str = "", changes: str = "") -> ElasticTokConfig:
    """The config of a model: the preset if one is named, else the checkpoint's config.json; then `changes` are applied.

    Args:
      checkpoint_spec: names the checkpoint, as `--load_checkpoint` does.
      preset: a preset such as '200m'; '': use the config.json beside the checkpoint.
      changes: options to change, as text such as 'dict(max_toks=1024)'.

    Raises:
      ValueError: there is neither a preset nor a config.json, or an option is unknown or out of range.
    """
    config = load_config(preset) if preset else checkpoints.load_config(checkpoint_spec)
    if config is None:
        raise ValueError(
            f"{checkpoint_spec!r} has no config.json beside it; say what the model is with "
            "--load_elastic_config (200m for the released ones) and --update_elastic_config."
        )
    return update_config(config, changes)


def load_tokenizer(
    spec: str,
    config: ElasticTokConfig,
    options: EncodeOptions,
    *,
    mesh_dim: str,
    batch: int,
    search_width: int,
    **arguments: Any,
) -> ElasticTokenizer:
    """The model of a run on all devices of this process, whose options are checked before the weights are loaded.

    Args:
      spec: names the checkpoint, as `--load_checkpoint` does.
      config: the model.
      options: how the token counts are chosen.
      mesh_dim: how the devices are laid out.
      batch: clips that go through the model at once.
      search_width: counts tried in one call of the model.
      arguments: further ones of `ElasticTokenizer`.

    Raises:
      ValueError: an option does not fit, or the weights cannot be read.
    """
    set_up_cpu()
    mesh = make_mesh(mesh_dim, jax.local_devices())
    check_run(options, config, mesh, width=search_width, batch=batch)
    return ElasticTokenizer.from_pretrained(
        spec, config=config, mesh=mesh, search_width=search_width, **arguments
    )


def check_run(
    options: EncodeOptions,
    config: ElasticTokConfig,
    mesh: Mesh,
    *,
    width: int,
    batch: int = 1,
) -> None:
    """Refuses options that do not fit the model or the devices. Called before weights are loaded.

    Args:
      options: how the token counts are chosen.
      config: the model.
      mesh: the devices.
      width: counts tried in one call of the model.
      batch: clips that go through the model at once.

    Raises:
      ValueError: an option does not fit.
    """
    if options.fit != "tile":  # tiles take any size
        check_resolution(options.resolution or 0, config)
    check_batch(batch, mesh, has_budget=options.has_budget)
    check_options(options, config, width=width)


def log_model(tokenizer: ElasticTokenizer, *, name: str = "") -> None:
    """Logs one short line about the model; with --verbose, the context, its memory, the devices and the kernel too."""
    before = f"{name}: " if name else ""
    if log.isEnabledFor(logging.DEBUG):
        log.debug("%s%s", before, describe(tokenizer))
        return
    config, mesh = tokenizer.config, tokenizer.mesh
    log.info(
        "%sModel %s on %d x %s: %d to %d tokens per block of %d frames at %dx%d.",
        before,
        tokenizer.model_id,
        mesh.size,
        mesh.devices.flat[0].device_kind,
        config.min_toks,
        config.max_toks,
        config.frames_per_block,
        config.resolution,
        config.resolution,
    )


def run_facts(tokenizer: ElasticTokenizer) -> dict[str, Any]:
    """What a result was made with: versions, date, devices and dtype, for report.json."""
    mesh = tokenizer.mesh
    return {
        "elastic": elastic.__version__,
        "jax": jax.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": mesh.devices.flat[0].device_kind,
        "devices": mesh.size,
        "dtype": str(tokenizer.codec.dtype),
    }


def describe(tokenizer: ElasticTokenizer) -> str:
    """One line of text: the model, its context, the devices and the attention implementation."""
    config, mesh, codec = tokenizer.config, tokenizer.mesh, tokenizer.codec
    sizes = [np.size(leaf) for leaf in _leaves(tokenizer.weights)]
    axes = ",".join(f"{axis}:{size}" for axis, size in mesh.shape.items())
    devices = mesh.devices.flat
    kernel = choose_implementation(
        config.attention_implementation,
        head_dim=config.head_dim,
        dtype=tokenizer.codec.dtype,
        mesh=mesh,
    )
    return (
        f"Model {tokenizer.model_id}: {config.bottleneck_type}, {sum(sizes) / 1e6:.1f} M parameters, "
        f"{config.min_toks} to {config.max_toks} tokens per block of {config.frames_per_block} "
        f"frames at {config.resolution}x{config.resolution}; {tokenizer.window_blocks} blocks of "
        f"context, whose cache takes up to {codec.cache_bytes() / 1e6:,.0f} MB ({codec.trial_bytes() / 1e6:,.1f} MB a block); "
        f"{mesh.size} x {devices[0].device_kind} ({axes}); attention {kernel!r}, "
        f"{tokenizer.codec.dtype} products."
    )


def _leaves(tree: Any) -> list[Any]:
    return (
        [leaf for child in tree.values() for leaf in _leaves(child)]
        if isinstance(tree, dict)
        else [tree]
    )

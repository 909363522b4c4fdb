"""Compiles the training step and the block step for a target, and reports memory, FLOPs, tiles and sends.

Nothing is allocated: programs are traced on shapes with shardings.
"""

import collections
import logging
import math
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from elastic import ops
from elastic.aot import hlo, targets
from elastic.config import ElasticTokConfig, parse_dtype
from elastic.data.dataset import HostBatch
from elastic.data.packing import sequence_length
from elastic.distributed.sharding import fitting_spec, param_shardings
from elastic.io.tree import unflatten
from elastic.metrics import lpips_weights
from elastic.model import ElasticTok, flops, param_shapes
from elastic.ops.attention import blockwise
from elastic.ops.attention.base import StaticArgs
from elastic.tokenizer.block_codec import Codec
from elastic.training.config import TrainConfig
from elastic.training.optimizer import make_optimizer
from elastic.training.state import state_layout
from elastic.training.step import step_program

log = logging.getLogger(__name__)

_LONGEST = 600  # characters of a compiler's message


def attention_name(model_config: ElasticTokConfig, mesh: Mesh, dtype: str) -> str:
    """The implementation of attention that runs on the devices of the mesh."""
    return ops.choose_implementation(
        model_config.attention_implementation,
        head_dim=model_config.head_dim,
        dtype=parse_dtype(dtype),
        mesh=mesh,
    )


class Traced(NamedTuple):
    """A lowered program, and its arguments as shapes with shardings."""

    lowered: jax.stages.Lowered
    arguments: Any

    def argument_bytes(self) -> int:
        """Bytes of the arguments on one device."""
        return sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(self.arguments)
        )


def train_step(config: TrainConfig, model_config: ElasticTokConfig, mesh: Mesh) -> Traced:
    """The training step: forward, backward and update, with the state donated."""
    model = ElasticTok(model_config, dtype=config.compute_dtype, mesh=mesh)
    optimizer = make_optimizer(config.optimizer)
    # The state's shapes are traced on this machine, which may lack the device of a kernel.
    like, shardings = state_layout(config, _with_reference_attention(model_config), optimizer, mesh)
    shape = (
        config.data.batch_size,
        sequence_length(config.data, model_config),
        model_config.patch_dim,
    )
    spec = fitting_spec(mesh, shape, "batch", "sequence", None)
    for name, size, part in zip(("batch_size", "seq_length"), shape, spec, strict=False):
        if part is None and mesh.size > 1:
            log.warning(
                "%s=%d is not a multiple of its mesh axes in %s: all their devices compute the same.",
                name,
                size,
                dict(mesh.shape),
            )
    blocks = (shape[0], shape[1] // model_config.tokens_per_block)
    rows = NamedSharding(mesh, fitting_spec(mesh, blocks, "batch", None))
    shapes: tuple[Any, ...] = (
        jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=NamedSharding(mesh, spec)),
        jax.ShapeDtypeStruct(blocks, jnp.int32, sharding=rows),
        jax.ShapeDtypeStruct(blocks, jnp.int32, sharding=rows),
        jax.ShapeDtypeStruct(blocks, jnp.bool_, sharding=rows),
    )
    sequences = HostBatch(*shapes)
    whole = NamedSharding(mesh, P())
    vgg = None
    if model_config.lpips_loss_ratio:
        vgg = jax.tree.map(
            lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=whole),
            unflatten(lpips_weights.SHAPES),
            is_leaf=lambda node: isinstance(node, tuple),
        )
    step: Any = step_program(config, model, optimizer, shardings)
    arguments = (_placed(like, shardings), sequences, vgg)
    with targets.described(mesh.devices.flat[0]):
        return Traced(step.lower(*arguments), arguments)


def block_step(
    model_config: ElasticTokConfig, mesh: Mesh, *, dtype: str, window_blocks: int
) -> Traced:
    """The block step of inference: one candidate of one block, with a cache of `window_blocks` - 1 blocks.

    Args:
      model_config: the model.
      mesh: the target's mesh.
      dtype: the dtype of operands, 'fp32' or 'bf16'.
      window_blocks: blocks in the attention window, the new one included.
    """
    codec = Codec(model_config, dtype=parse_dtype(dtype), mesh=mesh, window_blocks=window_blocks)
    # float32, as training writes them; the released checkpoints are bfloat16.
    params = param_shapes(_with_reference_attention(model_config))
    cache = jax.eval_shape(codec.new_cache)
    patches = (model_config.tokens_per_block, model_config.patch_dim)

    def whole(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P()))

    def cached(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = ops.cache_spec(mesh, 1, model_config.num_attention_heads) if leaf.ndim > 1 else P()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    arguments = (
        _placed(params, param_shardings(mesh, params)),
        jax.tree.map(cached, cache),
        whole((1, *patches), jnp.uint8),
        whole((1, 1), jnp.int32),
        whole((1,), jnp.int32),
    )
    with targets.described(mesh.devices.flat[0]):
        return Traced(codec._try.lower(*arguments, keep=True), arguments)


def _with_reference_attention(model_config: ElasticTokConfig) -> ElasticTokConfig:
    return model_config.replace(attention_implementation="reference")


def _placed(tree: Any, shardings: Any) -> Any:
    def place(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, tree, shardings)


def check(traced: Traced, target: targets.Target, *, loops_count: bool) -> dict[str, Any]:
    """Compiles a program and reports `seconds`, `memory`, `permutes`, and its `text`.

    Memory is in bytes per device. `fits` is None if the target has no limit. `excess` is the need minus the limit, so
    it is negative where memory is left.

    Raises:
      ValueError: the compiler refuses the program for another reason than memory.
    """
    started = time.perf_counter()
    try:
        compiled = traced.lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        over = hlo.out_of_memory(str(error))
        if over is None:
            said = " ".join(str(error).split())[:_LONGEST]
            raise ValueError(f"The compiler for {target} refuses the program: {said}") from error
        arguments = traced.argument_bytes()
        needed = over.needed_bytes + (arguments if over.temporaries_only else 0)
        memory = {
            "arguments": arguments,
            "total": needed,
            "limit": over.available_bytes,
            "fits": False,
            "excess": needed - over.available_bytes,
        }
        seconds = time.perf_counter() - started
        return {"seconds": round(seconds, 1), "memory": memory, "permutes": None, "text": ""}
    seconds = time.perf_counter() - started
    text = compiled.as_text() or ""
    program = hlo.read_program(text)
    return {
        "seconds": round(seconds, 1),
        "memory": _memory(compiled.memory_analysis(), target.chip.usable_bytes),
        "permutes": summarize(hlo.permutes(program, loops_count=loops_count)),
        "text": text,
    }


def _memory(analysis: Any, limit: int) -> dict[str, Any]:
    sizes = {
        "arguments": analysis.argument_size_in_bytes,
        "outputs": analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        "temporaries": analysis.temp_size_in_bytes,
        "code": analysis.generated_code_size_in_bytes,
    }
    total = sum(sizes.values())
    fits = total <= limit if limit else None
    return sizes | {
        "total": total,
        "limit": limit or None,
        "fits": fits,
        "excess": total - limit if limit else None,
    }


def summarize(permutes: list[hlo.Permute]) -> dict[str, Any]:
    """How many sends there are, how many overlap with a kernel, and what runs during those that do not.

    `ring` counts the sends in the ring's loop, which run in every step. `once` counts all others: those that move a
    sequence between its layouts, and the first and last send of the backward ring.
    """

    def count(chosen: list[hlo.Permute]) -> dict[str, int]:
        return {"pairs": len(chosen), "overlapped": sum(permute.overlapped for permute in chosen)}

    exposed = [
        {
            "name": permute.name,
            "source": permute.source,
            "between": dict(collections.Counter(permute.between)),
        }
        for permute in permutes
        if not permute.overlapped
    ]
    return {
        "ring": count([permute for permute in permutes if _in_ring(permute)]),
        "once": count([permute for permute in permutes if not _in_ring(permute)]),
        "exposed": exposed,
    }


def _in_ring(permute: hlo.Permute) -> bool:
    # `source` names the parts of the traced function, outermost first; the loop over layers comes before `shard_map`. A
    # send that the compiler adds to move an array has the name of the operation that needs the array.
    inside = permute.source.rpartition("shard_map")[2]
    return "/while/" in inside and inside.endswith("/ppermute")


def tiles(
    name: str, model_config: ElasticTokConfig, num_queries: int, num_keys: int, dtype: str
) -> tuple[int, int]:
    """The tiles (queries, keys) that the attention kernel uses on one device, in tokens.

    Args:
      name: the implementation of attention.
      model_config: the model.
      num_queries: queries on one device, in tokens.
      num_keys: keys on one device, in tokens.
      dtype: the dtype of operands, 'fp32' or 'bf16'.
    """
    static = StaticArgs(
        model_config.tokens_per_block,
        model_config.scan_query_chunk_size,
        model_config.scan_key_chunk_size,
        model_config.num_attention_heads,
    )
    shape: dict[str, Any] = dict(
        head_dim=model_config.head_dim, dtype=parse_dtype(dtype), static=static
    )
    if name.startswith("pallas_tpu"):
        from elastic.ops.attention import pallas_tpu

        return pallas_tpu.tiles(num_queries=num_queries, num_keys=num_keys, **shape)
    if name in ("gpu", "pallas_gpu"):
        from elastic.ops.attention import pallas_gpu

        found = pallas_gpu.tiles("forward", lengths=(num_queries, num_keys), **shape)
        return found.q_tile, found.kv_tile
    return blockwise.tiles(num_queries, num_keys, static)


def evenness(
    model_config: ElasticTokConfig, length: int, num_devices: int, used: tuple[int, int]
) -> dict[str, Any]:
    """For each layout of the ring, how evenly it divides the attention: `max_over_mean`, `steps_over_mean`.

    Args:
      model_config: the model.
      length: tokens of the sequence.
      num_devices: devices in the ring.
      used: tiles (queries, keys), in tokens.
    """
    found = {}
    for layout in flops.LAYOUTS:
        work = flops.ring_work(
            length,
            num_devices,
            block_size=model_config.tokens_per_block,
            q_tile=used[0],
            kv_tile=used[1],
            layout=layout,
        )
        found[layout] = {
            "max_over_mean": round(work.max_over_mean, 4),
            "steps_over_mean": round(work.steps_over_mean, 4),
        }
    return found


def report_train(
    config: TrainConfig, model_config: ElasticTokConfig, mesh: Mesh, target: targets.Target
) -> dict[str, Any]:
    """The report of the training step: see `check` and `evenness`.

    Args:
      config: batch size, sequence length, dtype and optimizer of the run.
      model_config: the model.
      mesh: the target's mesh.
      target: the hardware.
    """
    name = attention_name(model_config, mesh, config.dtype)
    length, batch = sequence_length(config.data, model_config), config.data.batch_size
    ring = mesh.shape["sp"]
    piece = length // ring // (2 if ring > 1 and model_config.ring_layout == "balanced" else 1)
    found = check(train_step(config, model_config, mesh), target, loops_count=_is_xla(name))
    used = tiles(name, model_config, piece, piece, config.dtype)
    total = batch * flops.training_flops(model_config, length)
    return _report("train", name, model_config, mesh, target, config.dtype) | {
        "tokens": length,
        "batch": batch,
        "tiles": used,
        "flops": total,
        "flops_per_device": total // mesh.size,
        "evenness": evenness(model_config, length, ring, used) if ring > 1 else None,
        **found,
    }


def report_inference(
    model_config: ElasticTokConfig,
    mesh: Mesh,
    target: targets.Target,
    *,
    dtype: str,
    window_blocks: int,
) -> dict[str, Any]:
    """The report of the block step of inference with a full cache.

    Args:
      model_config: the model.
      mesh: the target's mesh.
      target: the hardware.
      dtype: the dtype of operands, 'fp32' or 'bf16'.
      window_blocks: blocks in the attention window, the new one included.
    """
    name = attention_name(model_config, mesh, dtype)
    length = model_config.tokens_per_block
    cache = (window_blocks - 1) * length
    traced = block_step(model_config, mesh, dtype=dtype, window_blocks=window_blocks)
    total = flops.forward_flops(model_config, length, cache=cache)
    return _report("inference", name, model_config, mesh, target, dtype) | {
        "tokens": window_blocks * length,
        "batch": 1,
        "tiles": tiles(name, model_config, length, cache or length, dtype),
        "flops": total,
        "flops_per_device": total // (mesh.shape["tp"] * mesh.shape["sp"]),
        "evenness": None,
        **check(traced, target, loops_count=_is_xla(name)),
    }


def _is_xla(name: str) -> bool:
    return not name.startswith("pallas")


def _report(
    program: str,
    name: str,
    model_config: ElasticTokConfig,
    mesh: Mesh,
    target: targets.Target,
    dtype: str,
) -> dict[str, Any]:
    return {
        "target": str(target),
        "chips": target.num_chips,
        "mesh": dict(mesh.shape),
        "program": program,
        "bottleneck": model_config.bottleneck_type,
        "dtype": dtype,
        "attention": name,
        "ring_layout": model_config.ring_layout,
        "jax": jax.__version__,
    }

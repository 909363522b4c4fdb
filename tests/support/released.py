"""The small models in tests/golden that the released system ran: config, parameters, inputs."""

import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from elastic.checkpoints import load_params
from elastic.config import ElasticTokConfig
from elastic.model import Batch

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
# For programs of attention and of the model that run once: less than half of the compiler's time, by code that is not optimized.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

CASES = ("fsq", "vae")
# Every implementation of attention that a CPU can run: of the Pallas kernels their source, interpreted.
RUNNABLE = ("reference", "blockwise", "pallas_tpu_interpret", "pallas_gpu_interpret")
VARIANTS = ("plain", "packed", "keymask")


@functools.cache
def meta(case: str) -> dict[str, Any]:
    """Everything that was written down about a case."""
    return json.loads((GOLDEN / case / "meta.json").read_text())


@functools.cache
def arrays(case: str, name: str) -> dict[str, np.ndarray]:
    """The arrays of one .npz file."""
    with np.load(GOLDEN / case / f"{name}.npz") as file:
        return dict(file)


def config(case: str, **changes: Any) -> ElasticTokConfig:
    """The config of a case, with tiles that neither divide the sequence nor each other.

    And without LPIPS, as all training data was computed.
    """
    odd = dict(scan_attention=True, scan_query_chunk_size=48, scan_key_chunk_size=24)
    odd |= dict(lpips_loss_ratio=0.0)
    return ElasticTokConfig.from_json_dict(meta(case)["config"]).replace(**odd | changes)


@functools.cache
def params(case: str, *, scan_layers: bool = True) -> dict[str, Any]:
    """The parameters, in float32."""
    name = "params_scan_fp32" if scan_layers else "params_unscan_fp32"
    return load_params(
        f"params::{GOLDEN / case / 'ckpt' / name}", config(case, scan_layers=scan_layers)
    )


@functools.cache
def batch(case: str, variant: str = "plain") -> Batch:
    """The inputs of a variant: 'plain', 'packed', 'keymask' or 'deadrows'."""
    inputs = arrays(case, "inputs")
    names = ("segment_ids", "position_ids", "attention_mask")
    with jax.ensure_compile_time_eval():  # kept for other tests, whoever asks first
        return Batch(
            jnp.asarray(inputs["vision"], jnp.float32) / 127.5 - 1,
            jnp.asarray(inputs["encoding_mask"]),
            *(jnp.asarray(inputs[f"{variant}/{name}"]) for name in names),
        )


def relative_error(ours: Any, theirs: Any) -> float:
    """The largest difference, as a share of the largest number expected."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-30))

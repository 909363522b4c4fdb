"""What the installed libraries call deprecated on our way: with the newest jax a warning of its next releases."""

import json
import os
import pathlib
import subprocess
import sys

import jax

ROOT = pathlib.Path(__file__).resolve().parents[1]

# In a process of its own, because a module warns when it is first loaded. Kernels are lowered for the devices that they are for.
PROGRAM = """
import importlib, json, pathlib, pkgutil, sys, types, warnings

root = pathlib.Path.cwd()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import elastic
    for module in pkgutil.walk_packages(elastic.__path__, "elastic."):
        if module.name != "elastic.cli.demo_page":  # needs Gradio, an extra
            importlib.import_module(module.name)
    for path in sorted((root / "scripts").rglob("*.py")):
        importlib.import_module(".".join(path.relative_to(root).with_suffix("").parts))

    import jax
    import jax.numpy as jnp
    from elastic.aot import targets
    from elastic.ops.attention import cudnn, pallas_gpu, pallas_tpu
    from elastic.ops.attention.base import MaskArgs, StaticArgs, attend, rows

    def gradients(kernel, q):
        mask, static = MaskArgs(*[jnp.int32(n) for n in (0, 0, 256, 0)]), StaticArgs(128, 128, 128, 2, True)
        return jax.grad(lambda *qkv: attend(*qkv, mask, static, kernel)[0].sum(), (0, 1, 2))(q, q, q)

    lowered = []
    gpu = types.SimpleNamespace(platform="gpu", device_kind=targets.CHIPS["h100"].description)
    for kernel, platform, device in (
        (pallas_tpu.KERNEL, "tpu", types.SimpleNamespace(platform="tpu")),
        (pallas_gpu.KERNEL, "cuda", gpu),
        (cudnn.KERNEL, "cuda", gpu),
    ):
        with targets.described(device):
            program = jax.jit(gradients, static_argnums=0).trace(kernel, jax.ShapeDtypeStruct((2, 256, 64), jnp.bfloat16))
            text = program.lower(lowering_platforms=(platform,)).as_text()
        lowered.append(text.count("custom_call"))

found = []
for warning in caught:
    ours = pathlib.Path(warning.filename).resolve().is_relative_to(root)
    if issubclass(warning.category, (DeprecationWarning, FutureWarning, PendingDeprecationWarning)):
        found.append([ours, str(warning.message)])
print(json.dumps([lowered, found]))
"""
# What jax 0.12 says when `pallas_gpu` is lowered for a GPU. Mosaic GPU, which it points to, has neither exact products
# in float32 nor a way to be checked without a GPU: elastic/ops/attention/README.md.
TRITON = "The Pallas Triton backend is deprecated"


def test_no_module_of_ours_uses_what_is_deprecated():
    """Of all warnings while every module is loaded and every kernel is lowered: those that point at our lines are none."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lowered, found = json.loads(done.stdout.splitlines()[-1])
    assert all(calls >= 2 for calls in lowered), (
        lowered
    )  # forward and backward, else nothing was asked
    assert [message for ours, message in found if ours] == []
    # jax points this warning at itself, because the lowering is its own; it is on our way all the same.
    says_so = any(message.startswith(TRITON) for _, message in found)
    assert says_so == (jax.__version_info__[:2] >= (0, 12))

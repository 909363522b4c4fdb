"""Compiling for hardware that this machine lacks: reading programs, counting FLOPs, and the whole script."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from elastic.aot import hlo, targets
from elastic.config import ElasticTokConfig, load_config
from elastic.distributed.mesh import make_mesh
from elastic.model import Batch, ElasticTok, flops, param_shapes
from elastic.training.loss import training_loss

ROOT = pathlib.Path(__file__).resolve().parents[2]
TINY = dict(
    hidden_size=64, intermediate_size=96, num_encoder_layers=1, num_decoder_layers=1, num_attention_heads=2, max_toks=64, min_toks=4,
    max_sequence_length=256, frames_per_block=1, lpips_loss_ratio=0.0,
)  # fmt: skip
SCRIPT = [sys.executable, str(ROOT / "scripts" / "check_compile.py")]

# In the form of a compiled program for a TPU, shortened: a kernel in a branch runs beside the first
# send, and nothing but a copy beside the second.
SCHEDULED = """\
HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8]{0:T(256)})->f32[8]{0:T(256)}}

%nothing (p.1: f32[8]) -> f32[8] {
  ROOT %p.1 = f32[8]{0:T(256)} parameter(0)
}

%work (p.2: f32[8]) -> f32[8] {
  %p.2 = f32[8]{0:T(256)} parameter(0)
  %room = f32[8]{0} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %kernel = (f32[8]{0:T(256)}, /*index=1*/f32[8]{0}) custom-call(%p.2), custom_call_target="TARGET", metadata={op_name="jit(f)/k"}
}

ENTRY %main (a: f32[8], i: s32[]) -> f32[8] {
  %a = f32[8]{0:T(256)} parameter(0)
  %i = s32[]{:T(128)} parameter(1)
  %send = (f32[8]{0:T(256)}, f32[8]{0:T(256)S(1)}, u32[]{:S(2)}) collective-permute-start(%a), metadata={op_name="jit(f)/ppermute"}
  %either = f32[8]{0:T(256)} conditional(%i, %a, %a), branch_computations={%nothing, %work}
  %sent = f32[8]{0:T(256)S(1)} collective-permute-done(%send)
  %send.2 = (f32[8]{0:T(256)}, f32[8]{0:T(256)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%sent)
  %copy = f32[8]{0:T(256)} copy(%either)
  %sent.2 = f32[8]{0:T(256)} collective-permute-done(%send.2)
  ROOT %sum = f32[8]{0:T(256)} add(%copy, %sent.2)
}
"""


@pytest.mark.parametrize(
    ("target", "overlapped"),
    [
        ("tpu_custom_call", [True, False]),
        ("__gpu$xla.gpu.triton", [True, False]),
        ("Sharding", [False, False]),
    ],
)
def test_a_send_overlaps_when_a_kernel_stands_before_its_done(target, overlapped):
    program = hlo.read_program(SCHEDULED.replace("TARGET", target))
    found = hlo.permutes(program, loops_count=False)
    assert [(permute.name, permute.overlapped) for permute in found] == list(
        zip(["send", "send.2"], overlapped, strict=True)
    )
    assert found[0].source == "jit(f)/ppermute"
    assert found[1].between == ("copy",)


def test_a_synchronous_send_of_a_real_program_does_not_overlap():
    mesh = make_mesh("1,1,1,8")

    def ring(x):
        def step(carry, _):
            x, total = carry
            sent = jax.lax.ppermute(x, "sp", [(i, (i + 1) % 8) for i in range(8)])
            work = jax.lax.fori_loop(0, 5, lambda _, y: jnp.sin(y @ y), x)
            return (sent, total + work), None

        return jax.lax.scan(step, (x, x), length=8)[0][1]

    whole = jax.shard_map(ring, mesh=mesh, in_specs=P("sp"), out_specs=P("sp"), check_vma=False)
    compiled = jax.jit(whole).lower(jax.ShapeDtypeStruct((64, 8), jnp.float32)).compile()
    found = hlo.permutes(hlo.read_program(compiled.as_text()), loops_count=True)
    assert [permute.overlapped for permute in found] == [False]


def test_the_order_of_an_unscheduled_program_means_nothing():
    with pytest.raises(ValueError, match="is_scheduled"):
        hlo.read_program("HloModule jit_step, entry_computation_layout={()->f32[]}\n")


def test_what_a_compiler_says_about_memory_is_understood():
    used = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded"
    temporaries = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
        "(512.0M) exceeds available HBM (0.25G)."
    )
    gib = targets.GIB
    assert hlo.out_of_memory(used) == (int(20.5 * gib), int(15.75 * gib), False)
    assert hlo.out_of_memory(temporaries) == (gib // 2, gib // 4, True)
    assert hlo.out_of_memory("INVALID_ARGUMENT: no") is None


@given(blocks=st.integers(0, 5), rest=st.integers(0, 6), block_size=st.integers(7, 9))
def test_visible_pairs_are_those_of_the_mask(blocks, rest, block_size):
    length = blocks * block_size + rest
    block = np.arange(length) // block_size
    assert flops.visible_pairs(length, block_size) == np.sum(block[None] <= block[:, None])


def products(jaxpr) -> int:
    """FLOPs of all products in a traced function, loops counted as often as they run."""
    total = 0
    for equation in jaxpr.eqns:
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        if equation.primitive.name == "dot_general":
            ((contracted, _), _) = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * equation.outvars[0].aval.size * int(np.prod([left[i] for i in contracted]))
        branches = [
            part for value in equation.params.values() for part in (value if isinstance(value, tuple) else [value])
        ]  # fmt: skip
        inner = [
            products(getattr(part, "jaxpr", part))
            for part in branches
            if hasattr(part, "eqns") or hasattr(part, "jaxpr")
        ]
        # A choice between platforms computes one of its branches.
        total += times * (
            max(inner, default=0) if equation.primitive.name == "cond" else sum(inner)
        )
    return total


@pytest.mark.parametrize("name", ["small-fsq", "small-vae"])
def test_a_draft_takes_its_share_of_the_traced_products(name):
    config = load_config(name).replace(attention_implementation="reference")
    shape = (1, config.tokens_per_block)
    batch = Batch(
        jax.ShapeDtypeStruct((*shape, 0), jnp.float32), jax.ShapeDtypeStruct(shape, jnp.bool_)
    )
    codes = jax.ShapeDtypeStruct((*shape, config.code_dim), jnp.float32)

    def traced(draft):
        def decode(params, codes, batch):
            return ElasticTok(config).apply(
                {"params": params}, codes, batch, method="decode", draft=draft
            )[0]

        return products(jax.make_jaxpr(decode)(param_shapes(config), codes, batch).jaxpr)

    assert flops.draft_share(config) == pytest.approx(traced(True) / traced(False), rel=0.1)


@pytest.mark.parametrize("bottleneck", ["fsq", "vae"])
def test_counted_flops_are_those_of_the_traced_products(bottleneck):
    config = ElasticTokConfig(
        **TINY,
        bottleneck_type=bottleneck,
        attention_implementation="reference",
        remat_block="everything_saveable",  # what is made again is not counted
    )
    model = ElasticTok(config)
    shape = (1, config.tokens_per_block)  # one block sees itself whole, as in dense attention
    batch = Batch(
        jax.ShapeDtypeStruct((*shape, config.patch_dim), jnp.float32),
        jax.ShapeDtypeStruct(shape, jnp.bool_),
    )

    def loss(params, batch):
        return training_loss(model, params, batch)[0]

    params = param_shapes(config)
    forward = products(jax.make_jaxpr(loss)(params, batch).jaxpr)
    assert flops.forward_flops(config, config.tokens_per_block) == forward
    # The first products' inputs need no gradient, and the trace may leave it out.
    step = products(jax.make_jaxpr(jax.grad(loss))(params, batch).jaxpr)
    counted = flops.training_flops(config, config.tokens_per_block)
    assert counted - 2 * config.patch_dim * config.hidden_size * shape[1] <= step <= counted
    # Three blocks of one clip see 2 blocks in the mean; three images see themselves, and cost what they cost alone.
    length = 3 * config.tokens_per_block
    whole = flops.training_flops(config, length)
    assert flops.training_flops(config, length, visible_blocks=2.0) == whole
    assert flops.training_flops(config, length, visible_blocks=1.0) == 3 * counted


@given(
    devices=st.sampled_from([1, 2, 4]),
    layout=st.sampled_from(flops.LAYOUTS),
    block_size=st.sampled_from([16, 32, 48]),
    tiles=st.tuples(st.sampled_from([8, 24, 64]), st.sampled_from([8, 16, 64])),
)
def test_ring_work_is_that_of_the_tiles_that_see_something(devices, layout, block_size, tiles):
    length, (q_tile, kv_tile) = 192, tiles
    work = flops.ring_work(
        length, devices, block_size=block_size, q_tile=q_tile, kv_tile=kv_tile, layout=layout
    )
    size = length // devices // (2 if layout == "balanced" else 1)
    pieces = [[r, 2 * devices - 1 - r] if layout == "balanced" else [r] for r in range(devices)]
    expected = []
    for device_pieces in pieces:
        pairs = 0
        for first_query in (p * size + at for p in device_pieces for at in range(0, size, q_tile)):
            queries = np.arange(
                first_query, min(first_query + q_tile, (first_query // size + 1) * size)
            )
            for first_key in (
                p * size + at for p in range(length // size) for at in range(0, size, kv_tile)
            ):
                keys = np.arange(
                    first_key, min(first_key + kv_tile, (first_key // size + 1) * size)
                )
                seen = keys[None] // block_size <= queries[:, None] // block_size
                pairs += seen.size if seen.any() else 0
        expected.append(pairs)
    assert list(work.per_device) == expected


@pytest.mark.parametrize(
    ("length", "devices", "block_size"),
    [(131_072, 16, 4096), (524_288, 128, 2048), (1_048_576, 256, 4096), (1_048_576, 512, 4096)],
)
def test_the_balanced_ring_is_even_within_five_percent(length, devices, block_size):
    sizes = dict(block_size=block_size, q_tile=1024, kv_tile=512)
    balanced, in_order = (
        flops.ring_work(length, devices, **sizes, layout=layout) for layout in ("balanced", "plain")
    )
    assert balanced.max_over_mean <= 1.05
    assert in_order.max_over_mean > 1.8


def test_a_sequence_that_does_not_divide_into_pieces_is_refused():
    with pytest.raises(ValueError, match=r"use 96 tokens"):
        flops.ring_work(100, 4, block_size=4, q_tile=4, kv_tile=4, layout="balanced")


@pytest.mark.parametrize(
    ("text", "shape"),
    [("v4:4x4x4", (4, 4, 4)), ("v4-64chips", (4, 4, 4)), ("v5e-8chips", (2, 4)), ("h100:8", (8,)), ("cpu", (1,)), ("v6e", (1, 1))],
)  # fmt: skip
def test_a_target_is_a_chip_and_how_many(text, shape):
    assert targets.parse_target(text).shape == shape


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v4-64", "v4-64chips"),
        ("v5x:2x2", "Did you mean 'v5p'|Did you mean 'v5e'"),
        ("v4:4x4", "v4:2x2x4"),
        ("v5e-512chips", "128, 256 chips"),
    ],
)
def test_a_target_that_cannot_be_says_why(text, message):
    with pytest.raises(ValueError, match=message):
        targets.parse_target(text)


def check_compile(file: pathlib.Path, *arguments: str, status: int = 0) -> dict:
    """The last record of a run of the script, in a process of its own."""
    options = [f"--update_elastic_config={TINY}", "--load_elastic_config=debug", f"--json={file}"]
    done = subprocess.run(
        [*SCRIPT, *options, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == status, done.stderr
    return json.loads(file.read_text().splitlines()[-1])


@pytest.mark.slow
def test_the_training_step_compiles_for_virtual_devices(tmp_path):
    arguments = ["--target=cpu:4", "--mesh_dim=1,2,2,1", "--dtype=bf16", "--program=both"]
    found = check_compile(tmp_path / "out.jsonl", *arguments)
    train, inference = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    config = ElasticTokConfig(**TINY)
    assert train["flops"] == 2 * flops.training_flops(config, 256)
    assert inference == found
    for row in (train, inference):
        memory = row["memory"]
        parts = ("arguments", "outputs", "temporaries", "code")
        assert memory["total"] == sum(memory[part] for part in parts)
        assert memory["fits"] is None
    # Parameters and two moments in float32, halved over fsdp and again over tp; norms and the ends are not.
    count = sum(leaf.size for leaf in jax.tree.leaves(param_shapes(config)))
    assert 3 * count <= train["memory"]["arguments"] <= 1.5 * 3 * count


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    for name in ("v4", "h100"):
        with pytest.raises(ValueError, match="install"):
            targets.prepare(targets.parse_target(name))


def test_the_gpu_compiler_is_asked_for_where_jax_has_no_plugin_at_all(monkeypatch):
    """There even the package above the plugin is missing, and looking it up raises."""
    monkeypatch.setitem(sys.modules, "jax_plugins", None)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    with pytest.raises(ValueError, match="needs the CUDA compiler; install it with"):
        targets.prepare(targets.parse_target("h100"))


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="the TPU compiler is not installed: pip install -r requirements-ci.txt",
)


@pytest.mark.slow
@needs_libtpu
def test_the_training_step_compiles_for_tpus(tmp_path):
    arguments = ["--target=v5e:2x2", "--mesh_dim=1,1,1,4", "--dtype=bf16"]
    found = check_compile(tmp_path / "out.jsonl", *arguments)
    assert found["chips"] == 4
    assert found["memory"]["fits"] is True
    assert found["attention"] == "pallas_tpu"
    ring = found["permutes"]["ring"]
    assert ring["overlapped"] == ring["pairs"] > 0
    assert found["evenness"]["balanced"]["max_over_mean"] == 1.0


@pytest.mark.slow
@needs_libtpu
def test_a_training_step_that_does_not_fit_says_by_how_much(tmp_path):
    huge = "--train_dataset.vision_dataset.batch_size=100000"
    found = check_compile(
        tmp_path / "out.jsonl", "--target=v5e", "--mesh_dim=1,1,1,1", huge, status=2
    )
    memory = found["memory"]
    assert memory["fits"] is False
    assert memory["limit"] == targets.CHIPS["v5e"].usable_bytes
    assert memory["excess"] == memory["total"] - memory["limit"] > 0

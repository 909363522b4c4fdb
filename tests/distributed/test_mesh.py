"""The mesh string, the mesh, and the one table that says where an array lies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from elastic.config import load_config
from elastic.distributed import sharding
from elastic.distributed.mesh import AXES, make_mesh, parse_mesh_dim
from elastic.model import param_shapes
from elastic.training.config import OptimizerConfig
from elastic.training.optimizer import make_optimizer


@pytest.mark.parametrize(
    ("text", "sizes", "keep_order"),
    [
        ("1,1,-1,1", (1, 1, 8, 1), False),
        ("!1,1,-1,1", (1, 1, 8, 1), True),
        ("2,2,2,1", (2, 2, 2, 1), False),
        (" 2, -1 ,1,2", (2, 2, 1, 2), False),
        ("dp:1,fsdp:-1", (1, 8, 1, 1), False),
        ("!sp:4,tp:2", (1, 1, 2, 4), True),
    ],
)
def test_a_mesh_string_gives_the_size_of_every_axis(text, sizes, keep_order):
    assert parse_mesh_dim(text, 8) == (dict(zip(AXES, sizes, strict=True)), keep_order)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be four sizes"),
        ("1,2", "must be four sizes"),
        ("1,1,1,1,1", "must be four sizes"),
        ("1,1,x,1", "must be four sizes"),
        ("dp:1,2,1,1", "must be four sizes"),
        ("dp:1,dp:8", "known axes are dp, fsdp, tp, sp, each once"),
        ("data:8", "known axes are dp, fsdp, tp, sp"),
        ("-1,-1,1,1", "at most one is -1"),
        ("0,1,1,8", "sizes are 1 or more"),
        ("-2,1,1,1", "sizes are 1 or more"),
        ("2,2,1,1", "asks for 4 devices, but there are 8"),
        ("3,-1,1,1", "asks for 3 devices times what is left, but there are 8"),
    ],
)
def test_a_wrong_mesh_string_is_refused_with_the_rule(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_mesh_dim(text, 8)
    assert repr(text) in str(caught.value)


def test_an_exclamation_mark_keeps_the_devices_in_their_order():
    devices = jax.devices()[::-1]
    mesh = make_mesh("!2,1,1,4", devices)
    assert list(mesh.devices.ravel()) == devices
    assert mesh.axis_names == AXES and mesh.devices.shape == (2, 1, 1, 4)
    assert set(mesh.axis_types) == {AxisType.Auto}


def test_an_axis_without_a_rule_is_refused():
    with pytest.raises(ValueError, match=r"No sharding rule for 'head'.*'heads'"):
        sharding.spec("batch", "head")


def test_an_axis_that_the_mesh_does_not_divide_stays_whole():
    mesh = make_mesh("2,1,2,2")
    fits = sharding.fitting_spec(mesh, (4, 6, 3, 5), "batch", "sequence", "heads", None)
    assert fits == P(("dp", "fsdp"), ("sp",), None, None)


@pytest.mark.parametrize("scan_layers", [True, False])
def test_every_parameter_and_moment_of_the_released_model_has_a_place(scan_layers):
    mesh = make_mesh("1,2,2,2")
    shapes = param_shapes(load_config("200m").replace(scan_layers=scan_layers))
    state = jax.eval_shape(make_optimizer(OptimizerConfig()).init, {"params": shapes})
    for tree in (shapes, state):
        places = sharding.param_shardings(mesh, tree)
        assert jax.tree.structure(places) == jax.tree.structure(tree)
        jax.tree.map(lambda place, leaf: place.shard_shape(leaf.shape), places, tree)
    layer = shapes["encoder"]["encoder_blocks"]["scan_decoder" if scan_layers else "9"]
    wq = layer["attention"]["wq"]["kernel"]
    shard = sharding.param_shardings(mesh, {"wq": wq})["wq"].shard_shape(wq.shape)
    assert shard[-2:] == (1024 // 4, 1024 // 2)  # rows over fsdp and sp, columns (heads) over tp


def test_a_parameter_without_a_rule_is_refused():
    with pytest.raises(ValueError, match="No sharding rule for the parameter encoder/bias"):
        sharding.param_shardings(make_mesh("-1,1,1,1"), {"encoder": {"bias": np.zeros(3)}})


def test_on_one_device_nothing_is_constrained():
    x = jnp.ones((2, 3))
    assert sharding.constrain(x, None, "batch", "sequence") is x
    one = make_mesh("1,1,1,1", jax.devices()[:1])
    assert sharding.constrain(x, one, "batch", "sequence") is x

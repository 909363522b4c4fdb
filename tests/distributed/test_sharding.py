"""Every array has a place on the mesh, by the names of its axes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from elastic.config import load_config
from elastic.distributed import sharding
from elastic.distributed.mesh import make_mesh
from elastic.model import param_shapes
from elastic.training.config import OptimizerConfig
from elastic.training.optimizer import make_optimizer


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

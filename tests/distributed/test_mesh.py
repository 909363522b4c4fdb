"""The mesh string, the mesh, and the one table that says where an array lies."""

import jax
import pytest
from jax.sharding import AxisType

from elastic.distributed.mesh import AXES, make_mesh, parse_mesh_dim


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

"""Logical axis -> mesh axes, in one table; and the logical axes of every parameter."""

import math
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

_RULES: dict[str, tuple[str, ...]] = {
    "batch": ("dp", "fsdp"),
    "image": (
        "dp",
        "fsdp",
        "tp",
        "sp",
    ),  # of the LPIPS network, whose arrays have no other axis to split
    "sequence": ("sp",),
    "embed": ("fsdp", "sp"),  # of parameters only
    "heads": ("tp",),
    "mlp": ("tp",),
}

# The last axes of every parameter, by the name of its module (the two embeddings: by their own name).
_PARAMETERS: dict[str, tuple[str | None, ...]] = {
    "in_proj": (None, "embed"),
    "is_kept_embed": (None, None),
    "is_masked_embed": (None, None),
    "stage_embed": (None, None),
    "stage_scale": (None, None),
    "correction": (None, None),
    "gain": (None, None),
    "cube": (None, None),
    "exchange": (None, None),
    "token_order": (),  # all that the order is computed from
    "wq": ("embed", "heads"),
    "wk": ("embed", "heads"),
    "wv": ("embed", "heads"),
    "wo": ("heads", "embed"),
    "w1": ("embed", "mlp"),
    "w3": ("embed", "mlp"),
    "w2": ("mlp", "embed"),
    "attention_norm": (None,),
    "ffn_norm": (None,),
    "ln_f": (None,),
    "pre_quant": ("embed", None),
    "post_quant": (None, "embed"),
    "out_proj": ("embed", None),
}
# Numbers of an optimizer that belong to no parameter, besides counters.
_OF_OPTIMIZERS = {"ns_coeffs"}


def mesh_axes(axis: str | None) -> tuple[str, ...]:
    """The mesh axes of a logical axis; () for None.

    Raises:
      ValueError: the axis is not in the table.
    """
    if axis is None:
        return ()
    if axis not in _RULES:
        raise ValueError(f"No sharding rule for {axis!r}; known axes are {sorted(_RULES)}.")
    return _RULES[axis]


def spec(*axes: str | None) -> P:
    """The partition spec of an array with these logical axes."""
    return P(*(mesh_axes(axis) or None for axis in axes))


def fitting_spec(mesh: Mesh, shape: tuple[int, ...], *axes: str | None) -> P:
    """`spec`, except that an axis is not split if the mesh axes do not divide its size."""
    parts = []
    for size, axis in zip(shape, axes, strict=True):
        names = mesh_axes(axis)
        fits = names and size % math.prod(mesh.shape[name] for name in names) == 0
        parts.append(names if fits else None)
    return P(*parts)


def constrain(x: jax.Array, mesh: Mesh | None, *axes: str | None) -> jax.Array:
    """`x` with the sharding of its logical axes. Without a mesh, or on one device, x itself."""
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(
        x, NamedSharding(mesh, fitting_spec(mesh, x.shape, *axes))
    )


def param_shardings(mesh: Mesh, params: Any) -> Any:
    """The sharding of every leaf of `params` (arrays or shapes; an optimizer's moments too), by parameter name."""

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
        known = [name for name in names if name in _PARAMETERS]
        if not known:
            if leaf.ndim == 0 or names[-1] in _OF_OPTIMIZERS:
                return NamedSharding(mesh, P())
            raise ValueError(
                f"No sharding rule for the parameter {'/'.join(names)}; known names are {sorted(_PARAMETERS)}."
            )
        axes = _PARAMETERS[known[-1]]
        stacked = (None,) * (leaf.ndim - len(axes))  # the leading axis of scanned layers
        return NamedSharding(mesh, fitting_spec(mesh, leaf.shape, *stacked, *axes))

    return jax.tree_util.tree_map_with_path(sharding, params)

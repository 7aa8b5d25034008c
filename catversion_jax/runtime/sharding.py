"""The device mesh: concepts along one axis, the images of one concept along the other.

Concepts are independent, so a mesh of shape (devices, 1) compiles to a program without collectives.
With a "data" axis, several devices share one concept's batch and its K/V gradients are averaged by
one all-reduce.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from catversion_jax.errors import CatVersionError

CONCEPT_AXIS = "concept"
DATA_AXIS = "data"


def make_mesh(data_parallel: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A (concept, data) mesh over ``devices`` (all by default).

    Raises:
      CatVersionError: ``data_parallel`` does not divide the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    if len(devices) % data_parallel:
        raise CatVersionError(
            f"data_parallel={data_parallel}: must divide the number of devices, {len(devices)}. "
            "Use 1 (each device holds its own concepts) or one of its divisors."
        )
    grid = np.array(devices).reshape(-1, data_parallel)
    return Mesh(grid, (CONCEPT_AXIS, DATA_AXIS))


def by_concept(mesh: Mesh) -> NamedSharding:
    """Leading axis split over the concept axis, replicated over the data axis."""
    return NamedSharding(mesh, PartitionSpec(CONCEPT_AXIS))


def replicated(mesh: Mesh) -> NamedSharding:
    """A full copy on every device (the frozen networks)."""
    return NamedSharding(mesh, PartitionSpec())


def place_by_concept(tree: Any, mesh: Mesh) -> Any:
    """Put a host pytree whose leaves lead with C onto the mesh."""
    return jax.device_put(tree, by_concept(mesh))


def on_every_device(
    function: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """``jax.shard_map`` without ``check_vma``: Pallas kernels do not say over which axes of the
    mesh their results vary. So a mean over devices belongs outside a differentiated function.
    """
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


def mesh_of(tree: Any) -> Mesh:
    """The mesh of the devices on which a tree's arrays lie; every device holds a full copy."""
    sharding = jax.tree.leaves(tree)[0].sharding
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
        return sharding.mesh
    return make_mesh(1, list(sharding.device_set))


def by_device(mesh: Mesh) -> NamedSharding:
    """Leading axis split over all devices."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def place_by_device(tree: Any, mesh: Mesh) -> Any:
    """Put a host pytree whose leaves lead with the number of devices, or a multiple, there."""
    return jax.device_put(tree, by_device(mesh))

"""A frozen network as a plain pytree: the door between flax.nnx (inside ``models/``) and everything
else.

A :class:`Network` is handed to a jitted function as an ARGUMENT. Weights that a jitted function
closes over would be folded into the program as constants, which exhausts memory at Stable
Diffusion's size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Network:
    """Weights and structure of one frozen network.

    Attributes:
      params: nested dict of arrays; the only leaves of the pytree.
      graphdef: the structure, hashable and equal for networks built from equal configurations.
        Static.
    """

    params: dict[Any, Any]
    graphdef: nnx.GraphDef[Any] = dataclasses.field(metadata={"static": True})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's forward pass."""
        return nnx.merge(self.graphdef, self.params)(*args, **kwargs)

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Run another method of the module, such as ``"encode"`` of the VAE."""
        return getattr(nnx.merge(self.graphdef, self.params), method)(*args, **kwargs)

    @property
    def num_params(self) -> int:
        """How many numbers the network holds."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))


def abstract_network(module_fn: Callable[[nnx.Rngs], nnx.Module]) -> Network:
    """The network's structure with ``jax.ShapeDtypeStruct`` leaves; nothing is allocated."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: module_fn(nnx.Rngs(0))))
    return Network(nnx.to_pure_dict(state), graphdef)


def random_network(module_fn: Callable[[nnx.Rngs], nnx.Module], seed: int = 0) -> Network:
    """A network with the module's own random initial weights."""
    graphdef, state = nnx.split(module_fn(nnx.Rngs(seed)))
    return Network(nnx.to_pure_dict(state), graphdef)

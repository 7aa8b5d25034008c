"""A frozen network as a plain pytree: the door between flax.nnx (inside ``models/``) and everything
else.

A :class:`Network` is handed to a jitted function as an ARGUMENT. Weights that a jitted function
closes over would be folded into the program as constants, which exhausts memory at Stable
Diffusion's size.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from catversion_jax.array_types import Array, Key
from catversion_jax.errors import CatVersionError

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


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


def abstract_network(module_fn: Callable[..., nnx.Module]) -> Network:
    """The network's structure with ``jax.ShapeDtypeStruct`` leaves; nothing is allocated.

    Args:
      module_fn: makes the module, given ``rngs``. Two ``functools.partial`` of the same function or
        class with equal arguments are traced once: that takes half a second for a full-size
        network. The arguments must be hashable.
    """
    whole = functools.partial(module_fn)  # flat, also of another partial
    network = _traced(whole.func, whole.args, (*whole.keywords.items(),))
    return Network(jax.tree.map(lambda leaf: leaf, network.params), network.graphdef)


class _OneKey:
    """Serves modules in place of ``nnx.Rngs`` where nothing is drawn: one key for all parameters.

    ``nnx.Rngs`` counts in an array, and under ``nnx.eval_shape`` each increment walks the whole
    program so far.
    """

    def __init__(self) -> None:
        self._key = jax.random.key(0)

    def params(self) -> Key[Array, ""]:
        return self._key


@functools.lru_cache(maxsize=32)
def _traced(
    make: Callable[..., nnx.Module], args: tuple[Any, ...], keywords: tuple[tuple[str, Any], ...]
) -> Network:
    module = nnx.eval_shape(lambda: make(*args, **dict(keywords), rngs=_OneKey()))
    graphdef, state = nnx.split(module)
    return Network(nnx.to_pure_dict(state), graphdef)


def random_network(module_fn: Callable[..., nnx.Module], seed: int = 0) -> Network:
    """A network with random weights of the usual size, a function of the structure and ``seed``.

    Norms are the identity, biases zero, embeddings and kernels normal with variance 1 / width and
    1 / fan-in. They are drawn by numpy in the order of the sorted names: a module's own
    initialisation compiles programs for every shape of tensor, half a minute for a few MB.
    """
    abstract = abstract_network(module_fn)
    rng = np.random.default_rng(seed)

    def drawn(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = path[-1].key
        if name in ("scale", "bias"):
            values = np.full(leaf.shape, float(name == "scale"))
        else:
            fan_in = leaf.shape[-1] if name == "embedding" else math.prod(leaf.shape[:-1])
            values = rng.standard_normal(leaf.shape) / math.sqrt(fan_in)
        return jax.device_put(values.astype(leaf.dtype))

    return Network(jax.tree_util.tree_map_with_path(drawn, abstract.params), abstract.graphdef)


def named_dtype(name: str) -> Any:
    """``jnp.float32`` or ``jnp.bfloat16`` by its name.

    Raises:
      CatVersionError: another name.
    """
    if name not in DTYPES:
        raise CatVersionError(f"dtype={name!r}: must be one of {', '.join(DTYPES)}.")
    return DTYPES[name]

"""PyTorch weights into a network: one mechanical rule, one table of old names, strict in both
directions.

Modules carry Hugging Face attribute names, so the PyTorch name of a parameter is its path joined by
dots:

    | leaf      | PyTorch  | layout                                          |
    |-----------|----------|-------------------------------------------------|
    | kernel    | weight   | linear ``[I O] <- [O I]``, conv ``[H W I O] <- [O I H W]`` |
    | scale     | weight   | as is                                           |
    | embedding | weight   | as is                                           |
    | other     | the same | as is                                           |
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from catversion_jax.errors import CatVersionError, listed
from catversion_jax.models.weights.network import Network, abstract_network
from catversion_jax.models.weights.safetensors_files import MOST_LISTED, open_checkpoint

RENAMES: tuple[tuple[str, str], ...] = (
    # AutoencoderKL before diffusers 0.17: the mid block's attention.
    (r"\.attentions\.(\d+)\.query\.", r".attentions.\1.to_q."),
    (r"\.attentions\.(\d+)\.key\.", r".attentions.\1.to_k."),
    (r"\.attentions\.(\d+)\.value\.", r".attentions.\1.to_v."),
    (r"\.attentions\.(\d+)\.proj_attn\.", r".attentions.\1.to_out.0."),
)
"""Old name -> present name, as regular expressions."""

PREFIXES = ("text_model.", "vision_model.")
"""transformers >= 5.6 writes CLIPTextModel and CLIPVisionModel without them, older files have
them.
"""

IGNORED = (r"(^|\.)position_ids$",)
"""Buffers that hold 0, 1, 2, ...; never a weight."""

PENDING_BYTES = 256 * 1024 * 1024
"""Host arrays whose transfer may be under way at once."""

LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}


class TensorLike(Protocol):
    """What a state dict holds: ``numpy.asarray`` gives the values, perhaps by reading a file just
    then.
    """

    @property
    def shape(self) -> Sequence[int]:
        """The tensor's shape in PyTorch's layout."""

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray: ...


def load_network(
    module_fn: Callable[..., nnx.Module],
    folder: str | Path,
    *,
    dtype: Any = jnp.float32,
    sharding: Any = None,
    variant: str | None = None,
    ignore: Sequence[str] = (),
) -> Network:
    """Build a network and fill it from a folder's safetensors.

    Args:
      module_fn: see :func:`~.network.abstract_network`.
      folder: a diffusers or transformers model folder.
      dtype: of the weights on the device.
      sharding: where the weights go, as for ``jax.device_put``.
      variant: for instance ``"fp16"``.
      ignore: regular expressions of tensor names that belong to parts this network does not have.

    Raises:
      CatVersionError: see :func:`convert_state_dict` and
        :func:`~.safetensors_files.open_checkpoint`.
    """
    tensors = open_checkpoint(folder, variant=variant)
    target = abstract_network(module_fn)
    return convert_state_dict(
        tensors,
        target,
        dtype=dtype,
        sharding=sharding,
        source=str(folder),
        ignore=ignore,
    )


def convert_state_dict(
    tensors: Mapping[str, TensorLike],
    target: Network,
    *,
    dtype: Any = jnp.float32,
    sharding: Any = None,
    source: str = "the state dict",
    ignore: Sequence[str] = (),
    on_weight: Callable[[str, np.ndarray], None] | None = None,
) -> Network:
    """Fill ``target``'s structure with PyTorch tensors, one after another.

    Args:
      tensors: by PyTorch name, in PyTorch's layout.
      target: see :func:`~.network.abstract_network`.
      dtype: of the weights on the device.
      sharding: where the weights go, as for ``jax.device_put``.
      source: what to call ``tensors`` in the message.
      ignore: regular expressions of names that belong to parts this network does not have.
      on_weight: is called with the present name of every weight and its numbers as stored.

    Raises:
      CatVersionError: missing, unexpected or misshaped tensors, of which one error lists all; or
        one that holds no floating-point numbers.
    """
    treedef = jax.tree_util.tree_structure(target.params)
    parameters, found = stored_names(tensors, target, source=source, ignore=ignore)
    placed: list[jax.Array] = []
    under_way: list[jax.Array] = []
    for name, parameter in parameters.items():
        stored = np.asarray(tensors[found[name]])
        _check_floating(stored.dtype, found[name], source)
        if on_weight is not None:
            on_weight(name, stored)
        array = parameter.from_torch(stored)
        placed.append(jax.device_put(np.ascontiguousarray(array, dtype=dtype), sharding))
        under_way.append(placed[-1])
        if sum(array.nbytes for array in under_way) > PENDING_BYTES:
            jax.block_until_ready(under_way)
            under_way.clear()
    jax.block_until_ready(under_way)
    return Network(jax.tree_util.tree_unflatten(treedef, placed), target.graphdef)


def stored_names(
    tensors: Mapping[str, TensorLike],
    target: Network,
    *,
    source: str,
    ignore: Sequence[str] = (),
) -> tuple[dict[str, Parameter], dict[str, str]]:
    """The parameters of ``target``, and which stored name serves each; the numbers are not read.

    Raises:
      CatVersionError: as :func:`convert_state_dict`; of the type of numbers where ``tensors`` say
        it.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(target.params)
    made = (Parameter.of(path, leaf.shape) for path, leaf in leaves)
    parameters = {parameter.name: parameter for parameter in made}
    found, unexpected = _match_names(tensors, parameters, (*IGNORED, *ignore))
    missing = [name for name in parameters if name not in found]
    misshaped = [
        f"{stored}: {list(tensors[stored].shape)}, expected {list(parameters[name].torch_shape)}"
        for name, stored in found.items()
        if not parameters[name].takes(tuple(tensors[stored].shape))
    ]
    if missing or unexpected or misshaped:
        raise CatVersionError(_mismatch(source, missing, unexpected, misshaped))
    for stored in found.values():
        if isinstance(dtype := getattr(tensors[stored], "dtype", None), np.dtype):
            _check_floating(dtype, stored, source)
    return parameters, found


def _check_floating(dtype: Any, name: str, source: str) -> None:
    if not jnp.issubdtype(dtype, jnp.floating):
        raise CatVersionError(
            f"{source}: {name} holds {dtype}, must be floating-point numbers. Use the model's "
            "unquantized weights."
        )


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One row of the conversion table: a parameter, and where PyTorch keeps it.

    Attributes:
      name: the parameter's name in PyTorch.
      shape: its shape here.
      is_kernel: whether PyTorch stores it in another layout.
    """

    name: str
    shape: tuple[int, ...]
    is_kernel: bool

    @classmethod
    def of(cls, path: Sequence[Any], shape: tuple[int, ...]) -> Parameter:
        """The parameter at a pytree path."""
        names = [str(entry.key) for entry in path]
        return cls(
            ".".join([*names[:-1], LEAVES.get(names[-1], names[-1])]), shape, names[-1] == "kernel"
        )

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """The shape PyTorch stores."""
        if not self.is_kernel:
            return self.shape
        *window, inputs, outputs = self.shape
        return (outputs, inputs, *window)

    def takes(self, stored: tuple[int, ...]) -> bool:
        """The same shape, or a 1x1 convolution ``[O I 1 1]`` where a linear layer ``[O I]`` is
        expected.
        """
        linear = self.is_kernel and len(self.shape) == 2
        return stored == self.torch_shape or (linear and stored == (*self.torch_shape, 1, 1))

    def from_torch(self, array: np.ndarray) -> np.ndarray:
        """The stored values in this parameter's layout."""
        if not self.is_kernel:
            return array
        array = array.reshape(self.torch_shape)
        return np.moveaxis(array, (0, 1), (-1, -2))


def _match_names(
    tensors: Mapping[str, TensorLike], wanted: Container[str], ignored: Sequence[str]
) -> tuple[dict[str, str], list[str]]:
    """Which stored name serves which wanted one, and the stored names that serve none."""
    found: dict[str, str] = {}
    unexpected = []
    for stored in tensors:
        if any(re.search(pattern, stored) for pattern in ignored):
            continue
        name = present_name(stored)
        candidates = [name, *(prefix + name for prefix in PREFIXES)]
        candidates += [name.removeprefix(prefix) for prefix in PREFIXES if name.startswith(prefix)]
        match = next((candidate for candidate in candidates if candidate in wanted), None)
        if match is None:
            unexpected.append(stored)
        elif match in found:
            unexpected.append(f"{stored} (the same parameter as {found[match]})")
        else:
            found[match] = stored
    return found, unexpected


def present_name(name: str) -> str:
    """The name today's diffusers gives a parameter that an older version wrote as ``name``."""
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _mismatch(source: str, missing: list[str], unexpected: list[str], misshaped: list[str]) -> str:
    lines = [f"{source}: the weights do not fit the configuration beside them."]
    for title, names in (
        ("missing", missing),
        ("unexpected", unexpected),
        ("misshaped", misshaped),
    ):
        if names:
            lines += [
                f"{len(names)} {title}:",
                *(f"  {name}" for name in listed(names, MOST_LISTED)),
            ]
    lines.append(
        "Check that weights and config.json belong to the same model and the download is complete."
    )
    return "\n".join(lines)


def state_dict_of(network: Network) -> dict[str, np.ndarray]:
    """The network's weights by PyTorch name and in PyTorch's layout: the inverse of
    :func:`convert_state_dict`.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(network.params)
    state_dict = {}
    for path, leaf in leaves:
        parameter = Parameter.of(path, leaf.shape)
        array = np.asarray(leaf)
        state_dict[parameter.name] = np.ascontiguousarray(
            np.moveaxis(array, (-1, -2), (0, 1)) if parameter.is_kernel else array
        )
    return state_dict

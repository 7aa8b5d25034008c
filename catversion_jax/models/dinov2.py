"""The vision transformer of DINOv2 (arXiv 2304.07193), with registers (arXiv 2309.16588) or not:
the ViT of ``vit.py`` with three differences.

    (1)  the position embeddings are resized from the grid they were trained on to the grid of the
         pictures: bicubic, and antialiased where there are registers
    (2)  h_0 = [cls + pos_0; registers; patches + pos]
    (3)  h + lambda * f(norm(h)) in place of h + f(norm(h)); lambda is folded into the last linear
         layer of f when the weights are read

Source: transformers ``Dinov2Model`` and ``Dinov2WithRegistersModel``.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

from catversion_jax.array_types import Array, Float
from catversion_jax.errors import CatVersionError
from catversion_jax.models.vit import IGNORED, ViT, ViTConfig, vit_name
from catversion_jax.models.weights.convert import TensorLike, convert_state_dict
from catversion_jax.models.weights.hf_config import (
    TRANSFORMERS_IGNORED,
    check_integers,
    check_numbers,
    check_supported,
    read_config,
)
from catversion_jax.models.weights.network import Network, abstract_network
from catversion_jax.models.weights.safetensors_files import open_checkpoint

MODEL_TYPES = ("dinov2", "dinov2_with_registers")
_RENAMES = (
    (r"^(dinov2|dinov2_with_registers)\.", ""),
    (r"\.norm1\.", ".layer_norm1."),
    (r"\.norm2\.", ".layer_norm2."),
)
_SCALE = re.compile(r"^(?P<layer>.+)\.layer_scale(?P<number>[12])\.lambda1$")
_SCALED = {"1": "self_attn.out_proj", "2": "mlp.fc2"}
_POSITIONS = "position_embeddings"
_READ_KEYS = frozenset({"mlp_ratio", "num_register_tokens", "use_swiglu_ffn", "qkv_bias"})
_UNUSED_KEYS = frozenset(
    {"attention_probs_dropout_prob", "hidden_dropout_prob", "drop_path_rate", "layerscale_value"}
    | {"out_features", "out_indices", "stage_names", "apply_layernorm", "reshape_hidden_states"}
    | {"use_mask_token"}
)


@dataclasses.dataclass(frozen=True)
class Dinov2Config(ViTConfig):
    """A ``config.json`` of DINOv2; the defaults are transformers' own.

    Attributes:
      trained_size: pixels per side of the pictures that the position embeddings are of.
      image_size: of the pictures that are embedded.
      num_register_tokens: 0 without registers.
    """

    model_type: ClassVar[str] = "dinov2"

    layer_norm_eps: float = 1e-6
    patch_size: int = 14
    trained_size: int = 224
    num_register_tokens: int = 0

    @classmethod
    def from_dinov2(
        cls, config: Mapping[str, Any], *, source: str, image_size: int
    ) -> Dinov2Config:
        """From a ``config.json``, for pictures of ``image_size``.

        Raises:
          CatVersionError: a key that changes the computation and is not supported, or pictures that
            hold no whole number of patches.
        """
        names = {field.name for field in dataclasses.fields(ViTConfig)} - {"intermediate_size"}
        check_supported(
            config,
            source=source,
            used=names | _READ_KEYS,
            ignored=TRANSFORMERS_IGNORED | _UNUSED_KEYS,
            only={
                "hidden_act": ("gelu",),
                "model_type": MODEL_TYPES,
                "qkv_bias": (True,),
                "use_swiglu_ffn": (False,),
            },
        )
        registers = config.get("model_type") == MODEL_TYPES[1]
        check_numbers(config, {"mlp_ratio": (1 / 64, 64)}, source=source)
        check_integers(config, {"num_register_tokens": (0, 256)}, source=source)
        own = {key: value for key, value in config.items() if key in names}
        own.setdefault("patch_size", 16 if registers else cls.patch_size)
        own.setdefault("layer_norm_eps", cls.layer_norm_eps)
        ratio = config.get("mlp_ratio", 4)
        base = ViTConfig.from_vit({**own, "model_type": "vit"}, source=source)
        if image_size % base.patch_size:
            raise CatVersionError(
                f"{source}: pictures of {image_size} pixels hold no whole number of patches of "
                f"{base.patch_size}. Set crop_size in preprocessor_config.json to a multiple."
            )
        return cls(
            **{
                **dataclasses.asdict(base),
                "intermediate_size": int(base.hidden_size * ratio),
                "image_size": image_size,
            },
            trained_size=base.image_size,
            num_register_tokens=config.get("num_register_tokens", 4) if registers else 0,
        )


class Dinov2(ViT):
    """Equations (2) and (3); positions are resized and scales folded already."""

    def __init__(
        self, config: Dinov2Config, *, dtype: Any = jnp.float32, param_dtype: Any, rngs: nnx.Rngs
    ):
        super().__init__(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.num_registers = config.num_register_tokens
        if self.num_registers:
            shape = (1, self.num_registers, config.hidden_size)
            self.register_tokens = nnx.Param(jnp.zeros(shape, param_dtype))

    def embedded(self, pixels: Float[Array, "B H W 3"]) -> Float[Array, "B S D"]:
        """Equation (2)."""
        hidden = super().embedded(pixels)
        if not self.num_registers:
            return hidden
        shape = (len(hidden), self.num_registers, hidden.shape[-1])
        registers = jnp.broadcast_to(self.register_tokens[...], shape)
        return jnp.concatenate([hidden[:, :1], registers, hidden[:, 1:]], axis=1)


def load_dinov2(
    folder: str | Path, *, image_size: int | None = None, dtype: Any = jnp.float32
) -> tuple[Network, int]:
    """Load a Dinov2Model or Dinov2WithRegistersModel folder; call ``"image_embeds"`` on the
    network.

    Args:
      folder: of transformers.
      image_size: pixels per side of the pictures; None is the size that its positions are of.
      dtype: of the weights.

    Returns:
      The network and its image size.

    Raises:
      CatVersionError: the folder is not DINOv2's, or its weights do not fit.
    """
    raw, source = read_config(folder), str(Path(folder) / "config.json")
    if raw.get("model_type") not in MODEL_TYPES:
        raise CatVersionError(
            f"{folder}: is a {raw.get('model_type')!r}, not DINOv2. Give a Dinov2Model folder such "
            "as facebook/dinov2-base or facebook/dinov2-with-registers-base."
        )
    if image_size is None:
        check_integers(raw, {"image_size": (1, 2**12)}, source=source)
        image_size = int(raw.get("image_size", 224))
    config = Dinov2Config.from_dinov2(raw, source=source, image_size=image_size)
    tensors = _folded({_present_name(k): tensor for k, tensor in open_checkpoint(folder).items()})
    if _POSITIONS in tensors:
        positions: Any = resized_positions(np.asarray(tensors[_POSITIONS]), config)
        tensors[_POSITIONS] = positions
    target = abstract_network(functools.partial(Dinov2, config, dtype=dtype, param_dtype=dtype))
    network = convert_state_dict(tensors, target, dtype=dtype, source=str(folder), ignore=IGNORED)
    return network, config.image_size


def resized_positions(
    positions: Float[np.ndarray, "1 S D"], config: Dinov2Config
) -> Float[np.ndarray, "1 T D"]:
    """Position embeddings on the grid of the pictures, the class position's kept."""
    before, after = (size // config.patch_size for size in (config.trained_size, config.image_size))
    if before == after or positions.shape[1] != before**2 + 1:
        return positions  # a wrong number is said where the weights are compared
    weights = bicubic_weights(before, after, antialias=config.num_register_tokens > 0)
    grid = positions[0, 1:].astype(np.float64).reshape(before, before, -1)
    resized = np.einsum("HI,WJ,IJD->HWD", weights, weights, grid)
    patches = resized.reshape(1, after * after, -1).astype(positions.dtype)
    return np.concatenate([positions[:, :1], patches], axis=1)


def bicubic_weights(before: int, after: int, *, antialias: bool) -> Float[np.ndarray, "O I"]:
    """``torch.nn.functional.interpolate(mode="bicubic", align_corners=False)`` of one axis, as a
    matrix: Keys' kernel with a = -0.75 on repeated borders, and, with ``antialias``, a = -0.5,
    widened when shrinking, on what lies inside.
    """
    scale = before / after
    stretch = max(scale, 1.0) if antialias else 1.0
    weights = np.zeros((after, before))
    for row in range(after):
        centre = (row + 0.5) * scale - 0.5
        reach = int(np.ceil(2 * stretch)) + 1
        for place in range(int(np.floor(centre)) - reach, int(np.floor(centre)) + reach + 1):
            weight = _keys_kernel((place - centre) / stretch, -0.5 if antialias else -0.75)
            if not antialias:
                weights[row, min(max(place, 0), before - 1)] += weight
            elif 0 <= place < before:
                weights[row, place] += weight
    return weights / weights.sum(axis=1, keepdims=True)


def _keys_kernel(distance: float, a: float) -> float:
    x = abs(distance)
    if x < 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return a * (((x - 5) * x + 8) * x - 4) if x < 2 else 0.0


def _folded(tensors: Mapping[str, TensorLike]) -> dict[str, TensorLike]:
    """The tensors with each lambda of equation (3) in the layer before it."""
    folded = {name: tensor for name, tensor in tensors.items() if not _SCALE.match(name)}
    for name, tensor in tensors.items():
        if (match := _SCALE.match(name)) is None:
            continue
        scale = np.asarray(tensor)
        for kind in ("weight", "bias"):
            scaled = f"{match['layer']}.{_SCALED[match['number']]}.{kind}"
            if scaled not in folded:
                continue  # said where the weights are compared
            array: Any = np.asarray(folded[scaled])
            factor = scale.reshape(-1, *[1] * (array.ndim - 1)).astype(array.dtype)
            if len(factor) == len(array):
                folded[scaled] = array * factor
    return folded


def _present_name(name: str) -> str:
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return vit_name(name)

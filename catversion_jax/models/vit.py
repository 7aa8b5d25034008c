"""The vision transformer of DINO (arXiv 2104.14294): CLIP's encoder with other ends.

    (1)  h_0 = [cls_token; patches(pixels)] + position_embeddings
    (2)  h_{i+1} = layer_i(h_i)        (pre-norm attention and MLP, as in ``clip/encoder.py``)
    (3)  image_embeds = layernorm(h_L)[0]

Source: transformers ``ViTModel``; ``RENAMES`` maps its files' names to the shared encoder's.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from catversion_jax.array_types import Array, Float
from catversion_jax.errors import CatVersionError
from catversion_jax.models.clip.encoder import CLIPEncoder, EncoderConfig, layer_norm
from catversion_jax.models.weights.convert import convert_state_dict
from catversion_jax.models.weights.hf_config import (
    TRANSFORMERS_IGNORED,
    check_supported,
    read_config,
)
from catversion_jax.models.weights.network import Network, abstract_network
from catversion_jax.models.weights.safetensors_files import open_checkpoint

# From the stored names to those of the encoder it shares with CLIP.
RENAMES = (
    (r"^vit\.", ""),
    (r"^embeddings\.(patch_embeddings\.)?", ""),
    (r"^encoder\.layer\.", "encoder.layers."),
    (r"\.attention\.attention\.query\.", ".self_attn.q_proj."),
    (r"\.attention\.attention\.key\.", ".self_attn.k_proj."),
    (r"\.attention\.attention\.value\.", ".self_attn.v_proj."),
    (r"\.attention\.output\.dense\.", ".self_attn.out_proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".layer_norm1."),
    (r"\.layernorm_after\.", ".layer_norm2."),
)
IGNORED = (r"^pooler\.", r"^classifier\.", r"mask_token$")
_UNUSED_KEYS = frozenset(
    {"attention_probs_dropout_prob", "hidden_dropout_prob", "encoder_stride", "pooler_act"}
    | {"pooler_output_size"}
)


@dataclasses.dataclass(frozen=True)
class ViTConfig(EncoderConfig):
    """A ViT's ``config.json``; the defaults are transformers' own."""

    model_type = "vit"

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 16

    @classmethod
    def from_vit(cls, config: Mapping[str, Any], *, source: str) -> ViTConfig:
        """From the ``config.json`` of a ViTModel.

        Raises:
          CatVersionError: a key that changes the computation and is not supported.
        """
        check_supported(
            config,
            source=source,
            used=[field.name for field in dataclasses.fields(cls)],
            ignored=TRANSFORMERS_IGNORED | _UNUSED_KEYS,
            only={"hidden_act": ("gelu",), "model_type": ("vit",), "qkv_bias": (True,)},
        )
        own = {k: v for k, v in config.items() if k not in _UNUSED_KEYS and k != "qkv_bias"}
        return cls.from_hf(own, source=source)


class ViT(nnx.Module):
    """Equations (1) to (3)."""

    def __init__(
        self, config: ViTConfig, *, dtype: Any = jnp.float32, param_dtype: Any, rngs: nnx.Rngs
    ):
        dtypes = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        width, patch = config.hidden_size, config.patch_size
        positions = (config.image_size // patch) ** 2 + 1
        self.cls_token = nnx.Param(jnp.zeros((1, 1, width), param_dtype))
        self.position_embeddings = nnx.Param(jnp.zeros((1, positions, width), param_dtype))
        self.projection = nnx.Conv(
            config.num_channels,
            width,
            (patch, patch),
            strides=(patch, patch),
            padding="VALID",
            **dtypes,
        )
        self.encoder = CLIPEncoder(config, **dtypes)
        self.layernorm = layer_norm(config, **dtypes)

    def embedded(self, pixels: Float[Array, "B H W 3"]) -> Float[Array, "B S D"]:
        """Equation (1), of normalized pixels of the model's size."""
        patches = self.projection(pixels)
        batch, width = patches.shape[0], patches.shape[-1]
        first = jnp.broadcast_to(self.cls_token[...], (batch, 1, width))
        hidden = jnp.concatenate([first, patches.reshape(batch, -1, width)], axis=1)
        return hidden + self.position_embeddings[...]

    def image_embeds(self, pixels: Float[Array, "B H W 3"]) -> Float[Array, "B D"]:
        """The class position's last state, of normalized pixels of the model's size."""
        hidden = self.embedded(pixels)
        for block in self.encoder.layers:
            hidden = block(hidden)
        return self.layernorm(hidden)[:, 0]


def load_vit(folder: str | Path, *, dtype: Any = jnp.float32) -> tuple[Network, int]:
    """Load a ViTModel folder of transformers; call ``"image_embeds"`` on the network.

    Returns:
      The network and its image size in pixels.

    Raises:
      CatVersionError: the folder is not a ViTModel's, or its weights do not fit.
    """
    raw = read_config(folder)
    if raw.get("model_type") != "vit":
        raise CatVersionError(
            f"{folder}: is a {raw.get('model_type')!r}, the DINO score needs a ViTModel folder. "
            "DreamBench's is facebook/dino-vits16; DINOv2 is read too: facebook/dinov2-base."
        )
    config = ViTConfig.from_vit(raw, source=str(Path(folder) / "config.json"))
    tensors = {vit_name(name): tensor for name, tensor in open_checkpoint(folder).items()}
    target = abstract_network(functools.partial(ViT, config, dtype=dtype, param_dtype=dtype))
    network = convert_state_dict(tensors, target, dtype=dtype, source=str(folder), ignore=IGNORED)
    return network, config.image_size


def vit_name(name: str) -> str:
    """The shared encoder's name of a tensor that a ViTModel file stores as ``name``."""
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name

"""CLIP's vision encoder, and the whole CLIP with both projections, which turns images and texts
into scores.

    (1)  h_0 = pre_layrnorm([class_embedding; patches(pixels)] + position_embedding)
    (2)  pooled = post_layernorm(h_L[0])
    (3)  image_embeds = visual_projection(pooled),
         text_embeds = text_projection(text state at end-of-text)

Source: transformers ``CLIPVisionModel`` and ``CLIPModel`` (whose spelling ``pre_layrnorm`` is
kept).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx

from catversion_jax.array_types import Array, Float, Int
from catversion_jax.errors import CatVersionError, shown
from catversion_jax.models.clip.encoder import CLIPEncoder, EncoderConfig, layer_norm
from catversion_jax.models.clip.text import CLIPTextConfig, CLIPTextModel
from catversion_jax.models.weights.convert import load_network
from catversion_jax.models.weights.hf_config import (
    TRANSFORMERS_IGNORED,
    check_integers,
    check_supported,
    read_config,
)
from catversion_jax.models.weights.network import Network


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig(EncoderConfig):
    """A vision encoder's ``config.json``; the defaults are transformers' own, for keys a file
    leaves out.
    """

    model_type: ClassVar[str] = "clip_vision_model"

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """Both encoders and the width of the shared embedding."""

    text: CLIPTextConfig
    vision: CLIPVisionConfig
    projection_dim: int = 512

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], *, source: str) -> CLIPConfig:
        """From the ``config.json`` of a CLIPModel.

        Raises:
          CatVersionError: a key that changes the computation and is not supported.
        """
        check_integers(config, {"projection_dim": (1, 2**14)}, source=source)
        parts = ("text_config", "vision_config", "text_config_dict", "vision_config_dict")
        check_supported(
            config,
            source=source,
            used=(*parts, "projection_dim"),
            ignored=TRANSFORMERS_IGNORED | {"logit_scale_init_value"},
            only={"model_type": ("clip",)},
        )
        return cls(
            text=CLIPTextConfig.from_hf(
                sub_config(config, "text_config", source=source), source=f"{source}, text_config"
            ),
            vision=CLIPVisionConfig.from_hf(
                sub_config(config, "vision_config", source=source),
                source=f"{source}, vision_config",
            ),
            projection_dim=config.get("projection_dim", cls.projection_dim),
        )


class CLIPVisionEmbeddings(nnx.Module):
    """The sum in equation (1)."""

    def __init__(self, config: CLIPVisionConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        width, patch = config.hidden_size, config.patch_size
        dtypes = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.image_size = config.image_size
        self.class_embedding = nnx.Param(jnp.zeros((width,), param_dtype))
        self.patch_embedding = nnx.Conv(
            config.num_channels,
            width,
            (patch, patch),
            strides=(patch, patch),
            padding="VALID",
            use_bias=False,
            **dtypes,
        )
        self.position_embedding = nnx.Embed((config.image_size // patch) ** 2 + 1, width, **dtypes)

    def __call__(self, pixels: Float[Array, "B H W 3"]) -> Float[Array, "B S D"]:
        """Patches, row by row, after the class position.

        Raises:
          CatVersionError: not the model's image size.
        """
        if pixels.shape[1:3] != (self.image_size, self.image_size):
            raise CatVersionError(
                f"images of {pixels.shape[1]}x{pixels.shape[2]} pixels: this CLIP takes "
                f"{self.image_size}x{self.image_size}. Resize and crop them first."
            )
        patches = self.patch_embedding(pixels)  # [B h w D]
        patches = patches.reshape(patches.shape[0], -1, patches.shape[-1])
        first = jnp.broadcast_to(
            self.class_embedding.astype(patches.dtype), (patches.shape[0], 1, patches.shape[-1])
        )
        states = jnp.concatenate([first, patches], axis=1)
        return states + self.position_embedding(jnp.arange(states.shape[1]))


class CLIPVisionModel(nnx.Module):
    """The vision encoder."""

    def __init__(
        self,
        config: CLIPVisionConfig,
        *,
        dtype: Any = jnp.float32,
        param_dtype: Any,
        rngs: nnx.Rngs,
    ):
        dtypes = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.embeddings = CLIPVisionEmbeddings(config, **dtypes)
        self.pre_layrnorm = layer_norm(config, **dtypes)
        self.encoder = CLIPEncoder(config, **dtypes)
        self.post_layernorm = layer_norm(config, **dtypes)

    def __call__(self, pixels: Float[Array, "B H W 3"]) -> Float[Array, "B S D"]:
        """The last hidden state of normalized pixels, class position first, no final norm."""
        hidden = self.pre_layrnorm(self.embeddings(pixels))
        for block in self.encoder.layers:
            hidden = block(hidden)
        return hidden

    def pooled(self, pixels: Float[Array, "B H W 3"]) -> Float[Array, "B D"]:
        """Equation (2)."""
        return self.post_layernorm(self(pixels)[:, 0])


class CLIPModel(nnx.Module):
    """Both encoders with their projections; embeddings are not normalized."""

    def __init__(
        self, config: CLIPConfig, *, dtype: Any = jnp.float32, param_dtype: Any, rngs: nnx.Rngs
    ):
        dtypes = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.text_model = CLIPTextModel(config.text, **dtypes)
        self.vision_model = CLIPVisionModel(config.vision, **dtypes)
        self.text_projection = nnx.Linear(
            config.text.hidden_size, config.projection_dim, use_bias=False, **dtypes
        )
        self.visual_projection = nnx.Linear(
            config.vision.hidden_size, config.projection_dim, use_bias=False, **dtypes
        )

    def image_states(self, pixels: Float[Array, "B H W 3"]) -> Float[Array, "B D"]:
        """Equation (2), of pixels as :meth:`image_embeds` takes them."""
        return self.vision_model.pooled(pixels)

    def image_embeds(self, pixels: Float[Array, "B H W 3"]) -> Float[Array, "B E"]:
        """Embeddings of pixels that are resized and normalized with CLIP's mean and deviation."""
        return self.visual_projection(self.vision_model.pooled(pixels))

    def text_embeds(self, token_ids: Int[Array, "B T"]) -> Float[Array, "B E"]:
        """Embeddings of prompts."""
        last = self.text_model(token_ids)
        return self.text_projection(self.text_model.pooled(last, token_ids))


def sub_config(config: Mapping[str, Any], name: str, *, source: str) -> Mapping[str, Any]:
    """``text_config`` or ``vision_config``; as in transformers an old ``<name>_dict`` beside it
    wins.

    Raises:
      CatVersionError: it is no JSON object.
    """
    old = config.get(f"{name}_dict")
    found = old if old is not None else config.get(name) or {}
    if not isinstance(found, Mapping):
        raise CatVersionError(
            f"{source}: {name} = {shown(found)}, must be a JSON object. Download it again."
        )
    return found


def load_clip(folder: str | Path, *, dtype: Any = jnp.float32, sharding: Any = None) -> Network:
    """Load a CLIPModel folder of transformers; call ``"image_embeds"`` and ``"text_embeds"`` on the
    result.

    Raises:
      CatVersionError: the folder is not a CLIPModel's, or its weights do not fit.
    """
    config = CLIPConfig.from_hf(read_config(folder), source=str(Path(folder) / "config.json"))
    return load_network(
        functools.partial(CLIPModel, config, dtype=dtype, param_dtype=dtype),
        folder,
        dtype=dtype,
        sharding=sharding,
        ignore=(r"^logit_scale$",),  # the temperature of the training loss
    )

"""A fine-tuned torch UNet drawn with our sampler: the same noise and steps as every arm."""

from __future__ import annotations

import dataclasses

import jax
from diffusers import UNet2DConditionModel as TorchUNet

from catversion_jax.models.stable_diffusion import Backbone
from catversion_jax.models.weights.convert import convert_state_dict
from catversion_jax.models.weights.network import Network


def backbone_with(backbone: Backbone, unet: TorchUNet, name: str) -> Backbone:
    """The backbone with another UNet of the same structure.

    Args:
      backbone: the plain model.
      unet: fine-tuned from that model's.
      name: what images drawn with it say about their model.
    """
    tensors = {key: value.cpu().numpy() for key, value in unet.state_dict().items()}
    first = jax.tree.leaves(backbone.unet.params)[0]
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), backbone.unet.params
    )
    target = Network(shapes, backbone.unet.graphdef)
    tuned = convert_state_dict(
        tensors, target, dtype=first.dtype, sharding=first.sharding, source=name
    )
    return dataclasses.replace(backbone, unet=tuned, name=f"{backbone.name} ({name})")

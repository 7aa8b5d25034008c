"""What the original single-file checkpoints leave out: the configuration of each family, as the
diffusers folders of Stable Diffusion 1.5, 2.1 and XL base publish it, and where a file keeps its
text encoders.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

Config = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class TextEncoderPlace:
    """Where a file keeps a text encoder.

    Attributes:
      prefix: of its tensors' names.
      layout: ``"clip"`` has transformers' names, ``"open_clip"`` those of open_clip.
      pad_token: what fills a prompt up.
    """

    prefix: str
    layout: Literal["clip", "open_clip"]
    pad_token: str


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
      name: as a message says it.
      configs: a ``config.json`` for each component with weights.
      scheduler: ``scheduler_config.json``, without ``prediction_type``.
      text_encoders: by component.
      prediction_type: what a file means that says nothing; None where both kinds exist.
      epsilon_sample_size: latent positions per side of the models that predict the noise, where
        that differs from ``configs["unet"]["sample_size"]``.
      pipeline: the class of diffusers that draws with it.
    """

    name: str
    configs: Mapping[str, Config]
    scheduler: Config
    text_encoders: Mapping[str, TextEncoderPlace]
    prediction_type: str | None = "epsilon"
    epsilon_sample_size: int | None = None
    pipeline: str = "StableDiffusionPipeline"


def _text_config(hidden_size: int, num_layers: int, activation: str, num_heads: int) -> Config:
    return {
        "model_type": "clip_text_model",
        "hidden_size": hidden_size,
        "intermediate_size": 4 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "hidden_act": activation,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 77,
        "vocab_size": 49408,
        "eos_token_id": 49407,
    }


_CLIP_L = _text_config(768, 12, "quick_gelu", 12)
_OPEN_CLIP_H = _text_config(1024, 23, "gelu", 16)
"""The 23 layers that Stable Diffusion 2 uses of 24."""
_OPEN_CLIP_BIG_G = {**_text_config(1280, 32, "gelu", 20), "projection_dim": 1280}

_UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "sample_size": 64,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
    "use_linear_projection": False,
}
_UNET_2 = {
    **_UNET,
    "sample_size": 96,
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
_UNET_XL = {
    **_UNET,
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}

_VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "scaling_factor": 0.18215,
}

_SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}

SD1 = Family(
    "Stable Diffusion 1.x",
    {"text_encoder": _CLIP_L, "unet": _UNET, "vae": _VAE},
    {**_SCHEDULE, "_class_name": "PNDMScheduler", "skip_prk_steps": True},
    {"text_encoder": TextEncoderPlace("cond_stage_model.transformer.", "clip", "<|endoftext|>")},
)
SD2 = Family(
    "Stable Diffusion 2.x",
    {"text_encoder": _OPEN_CLIP_H, "unet": _UNET_2, "vae": _VAE},
    {**_SCHEDULE, "_class_name": "DDIMScheduler"},
    {"text_encoder": TextEncoderPlace("cond_stage_model.model.", "open_clip", "!")},
    prediction_type=None,
    epsilon_sample_size=64,
)
SDXL = Family(
    "Stable Diffusion XL",
    {
        "text_encoder": _CLIP_L,
        "text_encoder_2": _OPEN_CLIP_BIG_G,
        "unet": _UNET_XL,
        "vae": {**_VAE, "scaling_factor": 0.13025, "force_upcast": True},
    },
    {
        **_SCHEDULE,
        "_class_name": "EulerDiscreteScheduler",
        "timestep_spacing": "leading",
        "interpolation_type": "linear",
        "use_karras_sigmas": False,
    },
    {
        "text_encoder": TextEncoderPlace(
            "conditioner.embedders.0.transformer.", "clip", "<|endoftext|>"
        ),
        "text_encoder_2": TextEncoderPlace("conditioner.embedders.1.model.", "open_clip", "!"),
    },
    pipeline="StableDiffusionXLPipeline",
)

FAMILIES = (SD1, SD2, SDXL)

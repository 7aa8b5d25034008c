"""Our tables of the families against the published configurations, given diffusers' and
transformers' own defaults.
"""

import inspect

import pytest
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UNet2DConditionModel,
)
from torch_reference import SD15_UNET, SD15_VAE, SD21_UNET, TEXT_ENCODERS
from transformers import CLIPTextConfig

from catversion_jax.models.weights.families import SD1, SD2, SDXL

CLIP_L, CLIP_H = TEXT_ENCODERS["SD 1.5"], TEXT_ENCODERS["SD 2.1"]
CLIP_BIG_G = CLIP_H | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
}
UNET_XL = SD15_UNET | {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True,
}
VAE_XL = SD15_VAE | {"scaling_factor": 0.13025, "force_upcast": True}
SCHEDULE = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "clip_sample": False,
}
PUBLISHED = {
    ("1.x", "text_encoder"): (CLIPTextConfig, SD1, CLIP_L),
    ("1.x", "unet"): (UNet2DConditionModel, SD1, SD15_UNET),
    ("1.x", "vae"): (AutoencoderKL, SD1, SD15_VAE),
    ("2.x", "text_encoder"): (CLIPTextConfig, SD2, CLIP_H),
    ("2.x", "unet"): (UNet2DConditionModel, SD2, SD21_UNET),
    ("2.x", "vae"): (AutoencoderKL, SD2, SD15_VAE),
    ("XL", "text_encoder"): (CLIPTextConfig, SDXL, CLIP_L),
    ("XL", "text_encoder_2"): (CLIPTextConfig, SDXL, CLIP_BIG_G),
    ("XL", "unet"): (UNet2DConditionModel, SDXL, UNET_XL),
    ("XL", "vae"): (AutoencoderKL, SDXL, VAE_XL),
}
SCHEDULERS = {
    "1.x": (PNDMScheduler, SD1, SCHEDULE | {"skip_prk_steps": True}),
    "2.x": (DDIMScheduler, SD2, SCHEDULE),
    "XL": (EulerDiscreteScheduler, SDXL, SCHEDULE | {"timestep_spacing": "leading"}),
}
# No computation of ours reads the first three. As id of the end token ours says 49407, where the
# published files have the 2 that transformers takes for "the highest id".
APART = ("upcast_attention", "bos_token_id", "pad_token_id", "eos_token_id")


def with_defaults(kind, config):
    parameters = inspect.signature(kind).parameters
    values = {name: parameter.default for name, parameter in parameters.items()}
    values |= {key: value for key, value in config.items() if key in values}
    kept = {key: value for key, value in values.items() if key not in APART}
    if kind is AutoencoderKL:
        del kept["sample_size"]
    return {k: list(v) if isinstance(v, tuple) else v for k, v in kept.items()}


@pytest.mark.parametrize("case", PUBLISHED, ids="-".join)
def test_a_component_is_configured_as_published(case):
    kind, family, published = PUBLISHED[case]
    assert with_defaults(kind, family.configs[case[1]]) == with_defaults(kind, published)


@pytest.mark.parametrize("case", SCHEDULERS)
def test_the_schedule_is_the_published_one(case):
    kind, family, published = SCHEDULERS[case]
    assert with_defaults(kind, family.scheduler) == with_defaults(kind, published)

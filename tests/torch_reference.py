"""What the parity tests share: random torch weights that hide nothing, and errors relative to the
scale.

Parity is judged on ``max |ours - torch| / max |torch|`` in float32: 1e-5 for a layer, 1e-4 for a
network.
"""

from __future__ import annotations

import numpy as np
import torch

from catversion_jax.models.weights.convert import convert_state_dict
from catversion_jax.models.weights.network import Network, abstract_network

# Published config.json files, as they are on the Hugging Face hub (underscored bookkeeping left
# out).
SD15_UNET = {
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
SD21_UNET = SD15_UNET | {
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "sample_size": 96,
    "use_linear_projection": True,
    "upcast_attention": True,
}
# unet/config.json of nota-ai/bk-sdm-base, -small and -tiny, as far as they differ from SD 1.5's.
BK_SDM_UNETS = {
    "BK-SDM-Base": {"layers_per_block": 1, "mid_block_type": "UNetMidBlock2DCrossAttn"},
    "BK-SDM-Small": {"layers_per_block": 1, "mid_block_type": None},
    "BK-SDM-Tiny": {
        "layers_per_block": 1,
        "mid_block_type": None,
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["CrossAttnDownBlock2D"] * 3,
        "up_block_types": ["CrossAttnUpBlock2D"] * 3,
    },
}
SDXL_UNET = SD15_UNET | {
    "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
    "upcast_attention": None,
    "use_linear_projection": True,
}
# Stable Diffusion XL, less deep. The depths agree with the table by which ComfyUI tells
# segmind/SSD-1B and segmind/Segmind-Vega (comfy/model_detection.py); they have 1.33 and 0.745
# thousand million parameters, as published.
SEGMIND_UNETS = {
    "SSD-1B": SDXL_UNET
    | {
        "mid_block_type": "UNetMidBlock2D",
        "transformer_layers_per_block": [1, [2, 2], [4, 4]],
        "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
    },
    "Segmind-Vega": SDXL_UNET
    | {
        "mid_block_type": "UNetMidBlock2D",
        "transformer_layers_per_block": [1, [1, 1], [2, 2]],
        "reverse_transformer_layers_per_block": [[2, 2, 2], [1, 1, 1], 1],
    },
}
SD15_VAE = {
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
# text_encoder/config.json of stable-diffusion-v1-5 and stable-diffusion-2-1
TEXT_ENCODERS = {
    "SD 1.5": {
        "hidden_act": "quick_gelu",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "eos_token_id": 2,
        "bos_token_id": 0,
        "pad_token_id": 1,
    },
    "SD 2.1": {
        "hidden_act": "gelu",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 23,
        "eos_token_id": 2,
        "bos_token_id": 0,
        "pad_token_id": 1,
    },
}
SDXL_VAE = SD15_VAE | {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True}
# text_encoder_2/config.json of stable-diffusion-xl-base-1.0; its text_encoder is SD 1.5's.
SDXL_TEXT_ENCODER_2 = {
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
    "eos_token_id": 2,
    "bos_token_id": 0,
    "pad_token_id": 1,
}
# scheduler_config.json of the published SD 1.x folders, as far as it decides the noise.
SD1_SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}

# The same of stable-diffusion-xl-base-1.0.
SDXL_SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


def randomise(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Draw every parameter, biases and norm weights included, so that no zero or one hides an
    error.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.3 * noise + (1.0 if name.endswith("weight") else 0.0))
    return module.eval().requires_grad_(False)


def as_network(module: torch.nn.Module, module_fn) -> Network:
    """Our network with a torch module's weights."""
    return convert_state_dict(module.state_dict(), abstract_network(module_fn))


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    """Standard normal float32."""
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def nchw(array) -> torch.Tensor:
    """``[B h w c]`` array to ``[B c h w]`` tensor."""
    return torch.tensor(np.asarray(array)).permute(0, 3, 1, 2).contiguous()


def nhwc(tensor: torch.Tensor) -> np.ndarray:
    """``[B c h w]`` tensor to ``[B h w c]`` array."""
    return tensor.detach().permute(0, 2, 3, 1).numpy()


def relative_error(ours, reference) -> float:
    """Largest difference over the reference's largest magnitude."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    if ours.shape != reference.shape:
        raise ValueError(f"shapes differ: {ours.shape} and {reference.shape}")
    return float(np.abs(ours - reference).max() / np.abs(reference).max())


def concatenated_attention(module, key, value, hidden_states, *args, **kwargs):
    """CLIP's attention with ``key`` and ``value`` ``[P N H]`` before its own."""
    batch, length, _ = hidden_states.shape
    q, k, v = (
        projection(hidden_states).view(batch, length, *key.shape[1:]).transpose(1, 2)
        for projection in (module.q_proj, module.k_proj, module.v_proj)
    )
    k, v = (
        torch.cat([extra.transpose(0, 1).expand(batch, -1, -1, -1), own], dim=2)
        for extra, own in ((key, k), (value, v))
    )
    visible = torch.ones(length, length).tril().bool()
    visible = torch.cat([torch.ones(length, key.shape[0]).bool(), visible], dim=1)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    return module.out_proj(out.transpose(1, 2).reshape(hidden_states.shape)), None

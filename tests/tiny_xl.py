"""A small random Stable Diffusion XL of the real classes of diffusers and transformers."""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from random_model import byte_vocabulary
from tiny_pipelines import tiny_tokenizer
from torch_reference import SD1_SCHEDULE, SDXL_SCHEDULE, randomise
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from catversion_jax.methods.per_encoder import PerEncoder
from catversion_jax.methods.residual import KVResidual

WIDTHS, PROJECTION, TIME_WIDTH = (32, 48), 24, 8
LAYERS = ((1, 2), (3, 4))


def save_tiny_xl(
    folder: Path,
    *,
    context: int = 24,
    seed: int = 0,
    zeros_for_empty: bool = True,
    blocks: int = 2,
) -> Path:
    """Two encoders, ``text_time``, 32x32 images, about 1 MB. As in the published folders the second
    tokenizer pads with ``"!"``, whose id is 0, and the configurations say ``eos_token_id = 2``.
    """
    sizes = {
        "vocab_size": len(byte_vocabulary()),
        "num_attention_heads": 4,
        "max_position_embeddings": context,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }
    first = CLIPTextConfig(
        **sizes,
        hidden_size=WIDTHS[0],
        intermediate_size=64,
        num_hidden_layers=4,
        hidden_act="quick_gelu",
        projection_dim=WIDTHS[0],
    )
    second = CLIPTextConfig(
        **sizes,
        hidden_size=WIDTHS[1],
        intermediate_size=96,
        num_hidden_layers=5,
        hidden_act="gelu",
        projection_dim=PROJECTION,
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32)[-blocks:],
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D")[-blocks:],
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")[:blocks],
        transformer_layers_per_block=(1, 2)[:blocks],
        attention_head_dim=(2, 4)[-blocks:],
        cross_attention_dim=sum(WIDTHS),
        norm_num_groups=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_WIDTH,
        projection_class_embeddings_input_dim=PROJECTION + 6 * TIME_WIDTH,
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=32,
        scaling_factor=0.13025,
    )
    scheduler = EulerDiscreteScheduler(**SDXL_SCHEDULE)
    tokenizer = tiny_tokenizer(folder / "tokenizer", context=context)
    tokenizer_2 = CLIPTokenizer.from_pretrained(folder / "tokenizer", pad_token="!")
    tokenizer_2.model_max_length = context
    pipeline = StableDiffusionXLPipeline(
        vae=randomise(vae, seed),
        text_encoder=randomise(CLIPTextModel(first), seed + 1),
        text_encoder_2=randomise(CLIPTextModelWithProjection(second), seed + 2),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=randomise(unet, seed + 3),
        scheduler=scheduler,
        force_zeros_for_empty_prompt=zeros_for_empty,
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder)
    # The published file carries the keys of other schedulers too.
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(SD1_SCHEDULE | json.loads(file.read_text())))
    return folder


def load_xl(folder: Path) -> StableDiffusionXLPipeline:
    """The pipeline of torch, float32."""
    pipe = StableDiffusionXLPipeline.from_pretrained(
        folder, torch_dtype=torch.float32, add_watermarker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def residuals(seed: int = 0, **settings: object) -> PerEncoder:
    """One of the tiny model's: 4 heads in both encoders, the second one's last layer included."""
    rng = np.random.default_rng(seed)
    return PerEncoder(
        tuple(
            KVResidual(*rng.normal(size=(2, 2, 1, 4, width // 4)).astype("f4"), layers, **settings)
            for width, layers in zip(WIDTHS, LAYERS, strict=True)
        )
    )

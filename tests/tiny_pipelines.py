"""A small random Stable Diffusion of the real classes of diffusers, and what belongs to it."""

import copy
import functools
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from random_model import byte_vocabulary
from torch_reference import SD1_SCHEDULE, randomise
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from catversion_jax.methods.concept_file import save_concept
from catversion_jax.methods.residual import KVResidual

NUM_LAYERS, NUM_HEADS, HEAD_DIM = 4, 4, 8


def tiny_tokenizer(folder: Path, *, context: int):
    """CLIP's tokenizer without merges: every byte is a token."""
    # from files: the constructor's arguments changed with transformers 5
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(byte_vocabulary()))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=context)


def save_tiny_sd(
    folder: Path, *, context: int = 24, seed: int = 0, blocks: int = 2, **unet_options
) -> Path:
    """Write a random Stable Diffusion of the real classes, 16x16 images, a few hundred kB.

    With one block instead of two the UNet has no middle either: it compiles in a third of the time.
    """
    vocabulary = byte_vocabulary()
    tokenizer = tiny_tokenizer(folder / "tokenizer", context=context)
    torch.manual_seed(seed)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocabulary),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=context,
            projection_dim=32,
            bos_token_id=vocabulary["<|startoftext|>"],
            eos_token_id=vocabulary["<|endoftext|>"],
            pad_token_id=vocabulary["<|endoftext|>"],
        )
    )
    # The usual 0.02 gives near-zero attention logits: make the text matter, so that a wrong mask is
    # seen.
    with torch.no_grad():
        for name, parameter in text_encoder.named_parameters():
            if "norm" not in name and parameter.ndim == 2:
                parameter.normal_(std=0.2)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=unet_options.pop("in_channels", 4),
        out_channels=4,
        block_out_channels=(32, 64)[:blocks],
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D")[:blocks],
        mid_block_type="UNetMidBlock2DCrossAttn" if blocks > 1 else None,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")[-blocks:],
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
        **unet_options,
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=16,
    )
    scheduler = DDIMScheduler(**SD1_SCHEDULE)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


@functools.cache
def loaded_once(folder: Path, dtype: torch.dtype) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(folder, torch_dtype=dtype)


def load_pipe(
    folder: Path, implementation: str = "sdpa", dtype=torch.float32
) -> StableDiffusionPipeline:
    pipe = copy.copy(loaded_once(folder, dtype))
    pipe.text_encoder, pipe.unet = copy.deepcopy((pipe.text_encoder, pipe.unet))
    pipe.text_encoder.set_attn_implementation(implementation)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_inpainting_pipe(folder: Path) -> StableDiffusionInpaintPipeline:
    plain = load_pipe(folder)
    pipe = StableDiffusionInpaintPipeline(
        plain.vae, plain.text_encoder, plain.tokenizer, plain.unet, plain.scheduler, None, None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_residual(
    seed: int, positions: int = 1, layers: tuple = (1, 2, 3), bias: float = 0.0
) -> KVResidual:
    rng = np.random.default_rng(seed)
    shape = (len(layers), positions, NUM_HEADS, HEAD_DIM)
    draw = lambda: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    return KVResidual(draw(), draw(), layers, bias)


def write(folder: Path, name: str, base_class: str, residual: KVResidual, **kwargs) -> Path:
    return save_concept(
        folder / name / "catversion.safetensors",
        residual,
        base_class=base_class,
        name=name,
        **kwargs,
    )


def write_cat_and_dog(folder: Path) -> dict[str, Path]:
    """The files of two concepts by their names, ``tom`` and ``rex``."""
    words = {"tom": "cat", "rex": "dog"}
    return {
        name: write(folder, name, word, make_residual(i, bias=1.0))
        for i, (name, word) in enumerate(words.items())
    }


def token_ids(pipe, *prompts: str) -> torch.Tensor:
    length = pipe.tokenizer.model_max_length
    return pipe.tokenizer(
        list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids


@torch.no_grad()
def encode(pipe, *prompts: str, **kwargs) -> torch.Tensor:
    """The last states of the pipeline's text encoder, whatever the loader warns of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pipe.text_encoder(token_ids(pipe, *prompts), **kwargs).last_hidden_state


def save_clip(folder, tokenizer):
    """A random CLIP that reads bytes and sees 32 pixels."""
    vocabulary = byte_vocabulary()
    end = vocabulary["<|endoftext|>"]
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    text = sizes | {
        "num_attention_heads": 4,
        "vocab_size": len(vocabulary),
        "max_position_embeddings": 48,
        "bos_token_id": vocabulary["<|startoftext|>"],
        "eos_token_id": end,
    }
    vision = sizes | {"num_attention_heads": 4, "image_size": 32, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    randomise(transformers.CLIPModel(config)).save_pretrained(folder)
    for file in tokenizer.iterdir():
        shutil.copy(file, folder)


def add_safety_checker(folder, threshold=1.0):
    """A random safety checker for a pipeline folder: a cosine above ``threshold`` is flagged."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    vision = sizes | {"num_attention_heads": 4, "image_size": 32, "patch_size": 8}
    config = transformers.CLIPConfig(vision_config=vision, projection_dim=24)
    network = randomise(StableDiffusionSafetyChecker(config))
    network.concept_embeds_weights.data.fill_(threshold)
    network.special_care_embeds_weights.data.fill_(1.0)
    network.save_pretrained(folder / "safety_checker")
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    transformers.CLIPImageProcessor(**size).save_pretrained(folder / "feature_extractor")
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))


def save_vit(folder):
    config = transformers.ViTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    randomise(transformers.ViTModel(config), seed=1).save_pretrained(folder)


def drawn_by_torch(pipe, prompts, negative, latents, settings) -> np.ndarray:
    """``[n height width 3]`` in 0..1: what a pipeline of diffusers draws with our settings."""
    return pipe(
        prompts,
        negative_prompt=negative,
        latents=torch.from_numpy(latents),
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        height=settings.height,
        width=settings.width,
        output_type="np",
    ).images

"""Folders of Stable Diffusion 1.5 and XL in their published sizes, with random weights."""

import gc
import json
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
import transformers
from tiny_pipelines import tiny_tokenizer
from torch_reference import (
    SD1_SCHEDULE,
    SD15_UNET,
    SD15_VAE,
    SDXL_SCHEDULE,
    SDXL_TEXT_ENCODER_2,
    SDXL_UNET,
    SDXL_VAE,
    TEXT_ENCODERS,
)


def write_sd15_configs(folder: Path) -> None:
    """Everything but weights."""
    tiny_tokenizer(folder / "tokenizer", context=77).save_pretrained(folder / "tokenizer")
    with torch.device("meta"):
        diffusers.UNet2DConditionModel.from_config(SD15_UNET).save_config(folder / "unet")
        diffusers.AutoencoderKL.from_config(SD15_VAE).save_config(folder / "vae")
    diffusers.DDIMScheduler(**SD1_SCHEDULE).save_config(folder / "scheduler")
    transformers.CLIPTextConfig(**TEXT_ENCODERS["SD 1.5"]).save_pretrained(folder / "text_encoder")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))


def write_sdxl_configs(folder: Path) -> None:
    """Everything of Stable Diffusion XL but weights."""
    for name in ("tokenizer", "tokenizer_2"):
        tiny_tokenizer(folder / name, context=77).save_pretrained(folder / name)
    with torch.device("meta"):
        diffusers.UNet2DConditionModel.from_config(SDXL_UNET).save_config(folder / "unet")
        diffusers.AutoencoderKL.from_config(SDXL_VAE).save_config(folder / "vae")
    diffusers.EulerDiscreteScheduler(**SDXL_SCHEDULE).save_config(folder / "scheduler")
    configs = {"text_encoder": TEXT_ENCODERS["SD 1.5"], "text_encoder_2": SDXL_TEXT_ENCODER_2}
    for name, config in configs.items():
        transformers.CLIPTextConfig(**config).save_pretrained(folder / name)
    index = {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True}
    kinds = {
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index | kinds))


def write_sd15(folder: Path) -> None:
    """Random weights in the published sizes, half precision on disk (2.1 GB)."""
    torch.manual_seed(0)
    text_config = transformers.CLIPTextConfig(**TEXT_ENCODERS["SD 1.5"])
    pipeline = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL.from_config(SD15_VAE),
        text_encoder=transformers.CLIPTextModel(text_config),
        tokenizer=tiny_tokenizer(folder.parent / "tokenizer", context=77),
        unet=diffusers.UNet2DConditionModel.from_config(SD15_UNET),
        scheduler=diffusers.DDIMScheduler(**SD1_SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(folder)


def write_sdxl(folder: Path) -> None:
    """The same of Stable Diffusion XL (7.1 GB), a component at a time."""
    write_sdxl_configs(folder)
    torch.manual_seed(0)
    first = transformers.CLIPTextConfig(**TEXT_ENCODERS["SD 1.5"])
    second = transformers.CLIPTextConfig(**SDXL_TEXT_ENCODER_2)
    components: dict[str, Callable[[], torch.nn.Module]] = {
        "unet": lambda: diffusers.UNet2DConditionModel.from_config(SDXL_UNET),
        "text_encoder_2": lambda: transformers.CLIPTextModelWithProjection(second),
        "text_encoder": lambda: transformers.CLIPTextModel(first),
        "vae": lambda: diffusers.AutoencoderKL.from_config(SDXL_VAE),
    }
    for name, make in components.items():
        torch.set_default_dtype(torch.float16)
        try:
            module = make()
        finally:
            torch.set_default_dtype(torch.float32)
        module.half().save_pretrained(folder / name)
        del module
        gc.collect()

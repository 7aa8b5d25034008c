"""A small random model and three toy concepts, written without torch.

The model has Stable Diffusion's architecture and random weights: it draws noise, whatever it is
asked for.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from catversion_jax.runtime.atomic_files import make_folder, write_atomically

if TYPE_CHECKING:
    from PIL import Image

    from catversion_jax.models.weights.network import Network

CONTEXT = 48
TEXT_WIDTH = 64
IMAGE_SIZE = 64

SCHEDULER_CONFIG = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
UNET_CONFIG: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": TEXT_WIDTH,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
VAE_CONFIG: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [16, 32, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "sample_size": IMAGE_SIZE,
    "scaling_factor": 0.18215,
}


def write_random_model(folder: Path, seed: int = 0) -> None:
    """A complete diffusers folder with random weights, about 5 MB."""
    from catversion_jax.models.clip.text import CLIPTextConfig, CLIPTextModel
    from catversion_jax.models.layers.resnet import LayerFactory
    from catversion_jax.models.unet.config import UNetConfig
    from catversion_jax.models.unet.unet import UNet2DConditionModel
    from catversion_jax.models.vae import AutoencoderKL, VAEConfig
    from catversion_jax.models.weights.network import random_network

    vocabulary = byte_vocabulary()
    end = vocabulary["<|endoftext|>"]
    text_config = {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "hidden_act": "quick_gelu",
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 4 * TEXT_WIDTH,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
        "vocab_size": len(vocabulary),
        "bos_token_id": vocabulary["<|startoftext|>"],
        "eos_token_id": end,
        "pad_token_id": end,
        "projection_dim": TEXT_WIDTH,
        "dtype": "float32",
    }
    parsed = CLIPTextConfig.from_hf(text_config, source="the example")
    text_encoder = random_network(
        lambda rngs: CLIPTextModel(parsed, param_dtype="float32", rngs=rngs), seed
    )
    unet_config = UNetConfig.from_hf(UNET_CONFIG)
    vae_config = VAEConfig.from_hf(VAE_CONFIG)
    unet = random_network(
        lambda rngs: UNet2DConditionModel(unet_config, layers=LayerFactory(rngs)), seed + 1
    )
    vae = random_network(
        lambda rngs: AutoencoderKL(vae_config, layers=LayerFactory(rngs)), seed + 2
    )
    _write_component(folder / "text_encoder", text_config, text_encoder, "model")
    _write_component(folder / "unet", UNET_CONFIG, unet, "diffusion_pytorch_model")
    _write_component(folder / "vae", VAE_CONFIG, vae, "diffusion_pytorch_model")
    _write_tokenizer(folder / "tokenizer", vocabulary)
    _write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER_CONFIG)
    index = {
        "_class_name": "StableDiffusionPipeline",
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
    }
    _write_json(folder / "model_index.json", index)


def byte_vocabulary() -> dict[str, int]:
    """CLIP's byte-level vocabulary without merges: 256 bytes, 256 that end a word, two specials."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    remapped = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [
        chr(256 + index) for index in range(len(remapped))
    ]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return {word: index for index, word in enumerate(words)}


def write_toy_concepts(folder: Path) -> None:
    """Three concepts drawn with simple shapes: image, mask and ``concept.json`` each."""
    from PIL import Image

    backgrounds = ("#f4efe6", "#9cc4e4", "#6b8e5a", "#40364a")
    for name, (base_class, draw) in TOYS.items():
        make_folder(folder / name)
        _write_json(folder / name / "concept.json", {"base_class": base_class})
        for index, background in enumerate(backgrounds):
            image = Image.new("RGB", (4 * IMAGE_SIZE, 4 * IMAGE_SIZE), background)
            mask = Image.new("L", image.size, 0)
            draw(image, mask, angle=index * math.pi / 8)
            image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS).save(
                folder / name / f"{index + 1}.png"
            )
            small = mask.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)
            small.save(folder / name / f"{index + 1}.mask.png")


def _striped_ball(image: Image.Image, mask: Image.Image, angle: float) -> None:
    from PIL import ImageDraw

    canvas, side = ImageDraw.Draw(image), image.width
    box = (0.15 * side, 0.15 * side, 0.85 * side, 0.85 * side)
    for stripe in range(8):
        start = math.degrees(angle) + 45 * stripe
        canvas.pieslice(box, start, start + 45, fill="#d7263d" if stripe % 2 else "#fdf0d5")
    ImageDraw.Draw(mask).ellipse(box, fill=255)


def _purple_kite(image: Image.Image, mask: Image.Image, angle: float) -> None:
    from PIL import ImageDraw

    side, tilt = image.width, angle / 2 - 0.4
    corners = [(0.0, -0.4), (0.26, -0.08), (0.0, 0.4), (-0.26, -0.08)]

    def turned(x: float, y: float) -> tuple[float, float]:
        return (
            side * (0.5 + x * math.cos(tilt) - y * math.sin(tilt)),
            side * (0.5 + x * math.sin(tilt) + y * math.cos(tilt)),
        )

    outline = [turned(x, y) for x, y in corners]
    canvas = ImageDraw.Draw(image)
    canvas.polygon(outline, fill="#7b2cbf")
    canvas.line([outline[0], outline[2]], fill="#ffd60a", width=8)
    canvas.line([outline[1], outline[3]], fill="#ffd60a", width=8)
    ImageDraw.Draw(mask).polygon(outline, fill=255)


def _teal_cup(image: Image.Image, mask: Image.Image, angle: float) -> None:
    from PIL import ImageDraw

    side, shift = image.width, 0.04 * math.sin(4 * angle)
    body = [((0.3 + shift) * side, 0.25 * side), ((0.66 + shift) * side, 0.8 * side)]
    handle = [((0.58 + shift) * side, 0.36 * side), ((0.8 + shift) * side, 0.64 * side)]
    dot = [((0.42 + shift) * side, 0.45 * side), ((0.54 + shift) * side, 0.57 * side)]
    for canvas, colours in (
        (ImageDraw.Draw(image), ("#0a9396", "#ee9b00")),
        (ImageDraw.Draw(mask), (255, 255)),
    ):
        canvas.ellipse(handle, outline=colours[0], width=14)
        canvas.rounded_rectangle(body, radius=18, fill=colours[0])
        canvas.ellipse(dot, fill=colours[1])


TOYS = {
    "striped_ball": ("ball", _striped_ball),
    "purple_kite": ("kite", _purple_kite),
    "teal_cup": ("cup", _teal_cup),
}


def _write_component(folder: Path, config: dict[str, Any], network: Network, stem: str) -> None:
    from safetensors.numpy import save

    from catversion_jax.models.weights.convert import state_dict_of

    _write_json(folder / "config.json", config)
    write_atomically(
        folder / f"{stem}.safetensors", save(state_dict_of(network), metadata={"format": "pt"})
    )


def _write_tokenizer(folder: Path, vocabulary: dict[str, int]) -> None:
    _write_json(folder / "vocab.json", vocabulary)
    write_atomically(folder / "merges.txt", b"#version: 0.2\n")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": CONTEXT,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    _write_json(folder / "tokenizer_config.json", settings)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    make_folder(path.parent)
    write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())

"""Stage 6: the diffusers folder: ``python package.py WORK OUT``.

Writes everything ``StableDiffusionPipeline.from_pretrained`` reads, and ``clip/``, in float16; a
model card that lies there stays. The text tower of ``clip/`` and the text encoder are the same
weights, as in Stable Diffusion 1.x.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from compose import SIZE
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from pool import load_pool
from tokens import CONTEXT
from train_clip import load_clip
from train_unet import SCHEDULER, UNET, cached_latents
from train_vae import make_vae
from training import load_average
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer

from catversion_jax.integrations.pipeline_folder import name_for_older_transformers


def pipeline(work: Path) -> StableDiffusionPipeline:
    """The averaged networks in float32."""
    pool = load_pool(work)
    _, scale = cached_latents(work, pool)
    vae: AutoencoderKL = load_average(work, "vae", make_vae())
    vae.register_to_config(scaling_factor=scale)
    clip = load_clip(work)
    text_encoder = CLIPTextModel(clip.text_model.config)
    state = {k: v for k, v in clip.state_dict().items() if k.startswith("text_model.")}
    if not hasattr(text_encoder, "text_model"):  # transformers >= 5.6
        state = {k.removeprefix("text_model."): v for k, v in state.items()}
    text_encoder.load_state_dict(state)
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(work / "tokenizer", model_max_length=CONTEXT),
        unet=load_average(work, "unet", UNet2DConditionModel(**UNET)),
        scheduler=DDIMScheduler(**SCHEDULER, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    pipe = pipeline(args.work)
    pipe.to(torch.float16).save_pretrained(args.out, safe_serialization=True)
    name_for_older_transformers(args.out / "text_encoder")
    shutil.rmtree(args.out / "tokenizer")
    shutil.copytree(args.work / "tokenizer", args.out / "tokenizer")
    load_clip(args.work).half().save_pretrained(args.out / "clip")
    size = {"height": SIZE, "width": SIZE}
    CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=size).save_pretrained(
        args.out / "clip"
    )
    for config in (args.out / "text_encoder" / "config.json", args.out / "clip" / "config.json"):
        # transformers would load float16 weights as float16, diffusers gives float32
        content = json.loads(config.read_text())
        content["dtype"] = "float32"
        for part in ("text_config", "vision_config"):
            if part in content:
                content[part]["dtype"] = "float32"
        config.write_text(json.dumps(content, indent=1) + "\n")
    total = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    print(f"{args.out}: {total / 1e6:.1f} MB")


if __name__ == "__main__":
    main()

"""A tiny-sd folder's networks where the stages look for them: ``stages_of.py WORK FOLDER``.

For a later sitting on another machine: after ``sprites.py`` and ``pool.py``, the VAE and CLIP need
no second training, and ``train_unet.py`` continues from the averaged denoiser.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPModel


def main() -> None:
    """Write ``vae.ema.pt``, ``clip/`` and ``unet.start.pt``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    for kind, name, target in (
        (AutoencoderKL, "vae", "vae.ema.pt"),
        (UNet2DConditionModel, "unet", "unet.start.pt"),
    ):
        network = kind.from_pretrained(args.folder / name, torch_dtype=torch.float32)
        torch.save(network.state_dict(), args.work / target)
    CLIPModel.from_pretrained(args.folder / "clip", dtype=torch.float32).save_pretrained(
        args.work / "clip"
    )


if __name__ == "__main__":
    main()

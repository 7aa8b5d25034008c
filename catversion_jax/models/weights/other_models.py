"""Pipelines that are no Stable Diffusion conditioned by CLIP, told by their ``model_index.json``.

What a concept changes is CLIP's text encoder, and what it was derived for is a UNet that reads its
states. Stable Diffusion 3, FLUX, Kolors, Stable Cascade, PixArt and their like have another
denoiser, another text encoder, or both. Their names need not be known: the index says what they
consist of.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from catversion_jax.errors import CatVersionError, shown

_CLIP = ("CLIPTextModel", "CLIPTextModelWithProjection")
_ORDINARY = {"unet", "vae", "scheduler", "safety_checker", "feature_extractor", "image_encoder"}
_NEEDED = ("unet", "vae", "text_encoder")


def check_is_stable_diffusion(folder: Path, index: Mapping[str, Any]) -> None:
    """Refuse another architecture.

    Args:
      folder: of the model.
      index: its :func:`~.model_index.read_model_index`.

    Raises:
      CatVersionError: it is one; the message says what it has and lacks.
    """
    parts = {
        name: str(value[1]).removeprefix("Flax")
        for name, value in index.items()
        if isinstance(value, list) and value[1] is not None
    }
    kind = shown(index.get("_class_name"))
    if index.get("requires_aesthetics_score") is True:
        raise CatVersionError(
            f"{folder}: {kind} with requires_aesthetics_score is the refiner of Stable Diffusion "
            "XL, which only finishes images. Use the base model."
        )
    other_text = {
        name: part
        for name, part in parts.items()
        if name.startswith("text_encoder") and part not in _CLIP
    }
    strange = {
        name: part
        for name, part in parts.items()
        if name not in _ORDINARY and not name.startswith(("text_encoder", "tokenizer"))
    }
    two = "text_encoder_2" in parts
    lacking = [
        name
        for name in _NEEDED
        if parts and name not in parts and (strange or two or not (folder / name).is_dir())
    ]
    facts = [f"its {name} is a {part}, which is no CLIP" for name, part in other_text.items()]
    if lacking:
        has = ", ".join(f"{name} ({part})" for name, part in strange.items())
        facts.insert(0, f"it has no {' and no '.join(lacking)}{', but ' if has else ''}{has}")
    if facts:
        raise CatVersionError(
            f"{folder}: {kind} is no Stable Diffusion with a UNet that reads CLIP's text encoder: "
            f"{'; '.join(facts)}. Use a Stable Diffusion 1.x, 2.x or XL model."
        )

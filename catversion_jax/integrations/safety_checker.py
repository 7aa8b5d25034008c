"""The safety checker of a model folder (``StableDiffusionSafetyChecker``), as diffusers runs it.

    from catversion_jax.integrations.safety_checker import load_safety_checker
    flagged = load_safety_checker("stable-diffusion-v1-5")(pixels)

Needs torch, diffusers and transformers; nothing is downloaded.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from catversion_jax.array_types import Int
from catversion_jax.errors import CatVersionError, shown

SAFETY_CHECKER, FEATURE_EXTRACTOR = "safety_checker", "feature_extractor"


@dataclasses.dataclass(frozen=True)
class SafetyChecker:
    """The network and what prepares pictures for it.

    Attributes:
      network: ``StableDiffusionSafetyChecker``.
      extractor: its ``CLIPImageProcessor``.
    """

    network: Any
    extractor: Any

    @torch.no_grad()
    def __call__(self, pixels: Int[np.ndarray, "n H W 3"]) -> list[bool]:
        """Whether each picture shows something that the checker was made to find."""
        seen = self.extractor([Image.fromarray(one) for one in pixels], return_tensors="pt")
        blackened = [np.zeros((1, 1, 3), np.float32) for _ in pixels]  # it writes into these
        _, flagged = self.network(images=blackened, clip_input=seen.pixel_values)
        return [bool(one) for one in flagged]


def load_safety_checker(folder: str | Path) -> SafetyChecker:
    """Load ``safety_checker`` and ``feature_extractor`` of a diffusers folder.

    Raises:
      CatVersionError: one is missing, or cannot be read.
    """
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPImageProcessor

    folder = Path(folder)
    remedy = "Download the model again, with these two folders."
    for part in (SAFETY_CHECKER, FEATURE_EXTRACTOR):
        if not (folder / part).is_dir():
            raise CatVersionError(f"{folder}: has no folder {part}. {remedy}")
    try:
        loaded: Any = StableDiffusionSafetyChecker.from_pretrained(
            folder / SAFETY_CHECKER,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
        network, found = loaded
        extractor = CLIPImageProcessor.from_pretrained(
            folder / FEATURE_EXTRACTOR, local_files_only=True
        )
    except Exception as error:  # transformers raises anything on wrong files
        raise CatVersionError(
            f"{folder / SAFETY_CHECKER}: cannot be read ({shown(error)}). {remedy}"
        ) from error
    if missing := sorted(found["missing_keys"]):  # transformers would draw them at random
        raise CatVersionError(
            f"{folder / SAFETY_CHECKER}: its weights lack {len(missing)} tensors, such as "
            f"{missing[0]}. {remedy}"
        )
    return SafetyChecker(network.float().eval(), extractor)

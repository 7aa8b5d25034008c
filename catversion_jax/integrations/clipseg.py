"""Object masks from CLIPSeg (Luedecke and Ecker, arXiv 2112.10003), as transformers runs it.

    from catversion_jax.integrations.clipseg import load_clipseg
    masks = load_clipseg("CIDAS_clipseg-rd64-refined")(pixels, ["teapot", "dog"])

Needs torch and a local folder of ``CLIPSegForImageSegmentation`` with its processor; nothing is
downloaded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from catversion_jax.array_types import Int
from catversion_jax.errors import CatVersionError

MODEL_TYPE = "clipseg"
THRESHOLD = 0.5
"""Least probability of an object's pixel: CLIPSeg is trained with binary cross-entropy."""


@dataclasses.dataclass(frozen=True)
class CLIPSeg:
    """The network and its processor.

    Attributes:
      model: ``CLIPSegForImageSegmentation``.
      processor: its ``CLIPSegProcessor``.
      threshold: least probability of the object's pixels.
      side: pixels per side the network sees.
    """

    model: Any
    processor: Any
    threshold: float
    side: int

    def __call__(
        self, pixels: Int[np.ndarray, "n H W 3"], base_classes: Sequence[str]
    ) -> Int[np.ndarray, "n H W"]:
        """Masks as :func:`~catversion_jax.sampling.class_word_masks.class_word_masks` gives them.

        An object that is not found gives an empty mask.
        """
        if len(base_classes) != len(pixels):
            raise CatVersionError(
                f"{len(base_classes)} base classes for {len(pixels)} images: give one per image."
            )
        masks = [self._mask(image, word) for image, word in zip(pixels, base_classes, strict=True)]
        return np.stack(masks)

    @torch.no_grad()
    def _mask(self, image: np.ndarray, base_class: str) -> np.ndarray:
        # one image at a time, so that a mask does not depend on its neighbours
        inputs = self.processor(
            text=[base_class], images=[image], truncation=True, return_tensors="pt"
        )
        logits = self.model(**inputs).logits.reshape(1, 1, *[self.side] * 2)
        full = torch.nn.functional.interpolate(
            logits, image.shape[:2], mode="bilinear", align_corners=False
        )
        return (torch.sigmoid(full[0, 0]) >= self.threshold).numpy().astype(np.uint8) * 255


def load_clipseg(folder: str | Path, *, threshold: float = THRESHOLD) -> CLIPSeg:
    """Load a local CLIPSeg folder.

    Raises:
      CatVersionError: the folder holds no CLIPSeg, or the threshold is not within 0..1.
    """
    from transformers import AutoConfig, CLIPSegForImageSegmentation, CLIPSegProcessor

    if not 0 < threshold < 1:
        raise CatVersionError(f"threshold={threshold}: must be between 0 and 1; 0.5 is usual.")
    folder = Path(folder).expanduser()
    remedy = (
        "Give a local folder of CLIPSegForImageSegmentation and its processor, such as a download "
        "of CIDAS/clipseg-rd64-refined."
    )
    if not (folder / "config.json").is_file():
        raise CatVersionError(f"{folder}: no config.json, so no CLIPSeg. {remedy}")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        if config.model_type != MODEL_TYPE:
            raise CatVersionError(f"{folder}: is a {config.model_type!r}, no CLIPSeg. {remedy}")
        model = CLIPSegForImageSegmentation.from_pretrained(folder, local_files_only=True)
        processor = CLIPSegProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, CatVersionError):
            raise
        raise CatVersionError(f"{folder}: cannot be read ({error}). {remedy}") from error
    side = int(config.vision_config.image_size)
    return CLIPSeg(model.float().eval(), processor, threshold, side)

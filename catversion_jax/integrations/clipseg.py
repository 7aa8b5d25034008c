"""Object masks from CLIPSeg (Luedecke and Ecker, arXiv 2112.10003), as transformers runs it.

    from catversion_jax.integrations.clipseg import load_clipseg
    masks = load_clipseg("CIDAS_clipseg-rd64-refined")(pixels, ["teapot", "dog"])

Needs torch and a local folder of ``CLIPSegForImageSegmentation`` with its processor; nothing is
downloaded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from catversion_jax.array_types import Int
from catversion_jax.errors import CatVersionError, shown
from catversion_jax.models.clip.encoder import SIZES
from catversion_jax.models.clip.vision import sub_config
from catversion_jax.models.weights.hf_config import check_integers, read_config

MODEL_TYPE = "clipseg"
_DECODER_SIZES = {
    "projection_dim": (1, 2**14),
    "reduce_dim": (1, 2**14),
    "conditional_layer": (0, 128),
    "decoder_num_attention_heads": (1, 1024),
    "decoder_intermediate_size": (1, 2**17),
}
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
    from transformers import CLIPSegForImageSegmentation, CLIPSegProcessor

    if not 0 < threshold < 1:
        raise CatVersionError(f"threshold={threshold}: must be between 0 and 1; 0.5 is usual.")
    folder = Path(folder).expanduser()
    remedy = (
        "Give a local folder of CLIPSegForImageSegmentation and its processor, such as a download "
        "of CIDAS/clipseg-rd64-refined."
    )
    if not (folder / "config.json").is_file():
        raise CatVersionError(f"{folder}: no config.json, so no CLIPSeg. {remedy}")
    config = read_config(folder)
    if config.get("model_type") != MODEL_TYPE:
        raise CatVersionError(
            f"{folder}: is a {shown(config.get('model_type'))}, no CLIPSeg. {remedy}"
        )
    _check_sizes(config, str(folder / "config.json"))
    try:
        loaded: Any = CLIPSegForImageSegmentation.from_pretrained(
            folder, local_files_only=True, output_loading_info=True
        )
        model, found = loaded
        processor = CLIPSegProcessor.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises anything on wrong files
        raise CatVersionError(f"{folder}: cannot be read ({shown(error)}). {remedy}") from error
    if missing := sorted(found["missing_keys"]):  # transformers would draw them at random
        raise CatVersionError(
            f"{folder}: its weights lack {len(missing)} tensors that its configuration asks for, "
            f"such as {missing[0]}. {remedy}"
        )
    width, heads = model.config.reduce_dim, model.config.decoder_num_attention_heads
    if width % heads:
        raise CatVersionError(
            f"{folder}: decoder_num_attention_heads = {heads} must divide reduce_dim = {width}. "
            f"{remedy}"
        )
    side = int(model.config.vision_config.image_size)
    return CLIPSeg(model.float().eval(), processor, threshold, side)


def _check_sizes(config: Mapping[str, Any], source: str) -> None:
    """Refuse sizes of which transformers would build a network for hours.

    Raises:
      CatVersionError: one is no number, or out of its range.
    """
    sizes = {key: bounds for key, bounds in SIZES.items() if key != "eos_token_id"}
    for part in ("text_config", "vision_config"):
        tower = sub_config(config, part, source=source)
        check_integers(tower, sizes, source=f"{source}, {part}")
    check_integers(config, _DECODER_SIZES, source=source)
    layers = config.get("extract_layers", [])
    if not isinstance(layers, list):
        raise CatVersionError(
            f"{source}: extract_layers = {shown(layers)}, must be a list of layers. Download it "
            "again."
        )
    count = sub_config(config, "vision_config", source=source).get("num_hidden_layers", 12)
    for layer in layers:
        check_integers({"extract_layers": layer}, {"extract_layers": (0, count - 1)}, source=source)

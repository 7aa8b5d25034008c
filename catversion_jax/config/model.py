"""Which frozen model a run personalizes."""

from __future__ import annotations

import dataclasses

from catversion_jax.config.options import Options, option


@dataclasses.dataclass(frozen=True)
class ModelOptions(Options):
    """Model."""

    pretrained_model_name_or_path: str = option(
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "Model to personalize: a diffusers folder, a single .safetensors file as model sites give "
        "it, a Hugging Face hub id, or tiny-sd, which this package contains (official: SD 1.5).",
        decides_result=True,
    )
    revision: str | None = option(
        None, "Hub revision of the model: a branch, a tag or a commit.", decides_result=True
    )
    variant: str | None = option(
        None, "Variant of the model's weight files, for example fp16.", decides_result=True
    )
    prediction_type: str | None = option(
        None,
        "What the UNet of a single-file model predicts, epsilon or v_prediction, where the file "
        "does not say it.",
        decides_result=True,
    )

"""The pipeline class of an exported folder of Stable Diffusion 1.x or 2.x."""

from __future__ import annotations

from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)

from catversion_jax.integrations.exported_pipeline import ConceptPipeline, connect, with_concepts


class CatVersionPipeline(ConceptPipeline, StableDiffusionPipeline):
    """StableDiffusionPipeline with the concepts of its folder loaded and active."""

    __init__ = with_concepts(StableDiffusionPipeline.__init__)
    save_plain = StableDiffusionPipeline.save_pretrained


def register_connected() -> None:
    """Let diffusers' ``AutoPipeline...from_pipe`` find it and its like; see :func:`connect`."""
    connect(
        "catversion",
        CatVersionPipeline,
        StableDiffusionImg2ImgPipeline,
        StableDiffusionInpaintPipeline,
    )

"""The pipeline class of an exported folder of Stable Diffusion XL."""

from __future__ import annotations

from diffusers import (
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)

from catversion_jax.integrations.exported_pipeline import ConceptPipeline, connect, with_concepts


class CatVersionXLPipeline(ConceptPipeline, StableDiffusionXLPipeline):
    """StableDiffusionXLPipeline with the concepts of its folder loaded and active."""

    __init__ = with_concepts(StableDiffusionXLPipeline.__init__)
    save_plain = StableDiffusionXLPipeline.save_pretrained


def register_connected() -> None:
    """Let diffusers' ``AutoPipeline...from_pipe`` find it and its like; see :func:`connect`."""
    connect(
        "catversion-xl",
        CatVersionXLPipeline,
        StableDiffusionXLImg2ImgPipeline,
        StableDiffusionXLInpaintPipeline,
    )

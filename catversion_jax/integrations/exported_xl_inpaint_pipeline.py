"""The pipeline class of an exported folder of a Stable Diffusion XL that inpaints."""

from __future__ import annotations

from diffusers import StableDiffusionXLInpaintPipeline

from catversion_jax.integrations.exported_pipeline import ConceptPipeline, with_concepts


class CatVersionXLInpaintPipeline(ConceptPipeline, StableDiffusionXLInpaintPipeline):
    """StableDiffusionXLInpaintPipeline with the concepts of its folder loaded and active."""

    __init__ = with_concepts(StableDiffusionXLInpaintPipeline.__init__)
    save_plain = StableDiffusionXLInpaintPipeline.save_pretrained


def register_connected() -> None:
    """Its UNet reads nine channels, so none of diffusers' other pipelines can take it over."""

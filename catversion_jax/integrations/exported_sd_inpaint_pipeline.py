"""The pipeline class of an exported folder of a Stable Diffusion 1.x or 2.x that inpaints."""

from __future__ import annotations

from diffusers import StableDiffusionInpaintPipeline

from catversion_jax.integrations.exported_pipeline import ConceptPipeline, with_concepts


class CatVersionInpaintPipeline(ConceptPipeline, StableDiffusionInpaintPipeline):
    """StableDiffusionInpaintPipeline with the concepts of its folder loaded and active."""

    __init__ = with_concepts(StableDiffusionInpaintPipeline.__init__)
    save_plain = StableDiffusionInpaintPipeline.save_pretrained


def register_connected() -> None:
    """Its UNet reads nine channels, so none of diffusers' other pipelines can take it over."""

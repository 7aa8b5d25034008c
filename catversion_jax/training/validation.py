"""Sample grids: the photos, the plain model and the concept, for the same prompts and seeds."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from catversion_jax.concepts.prompts import fill_template
from catversion_jax.config import RecordingOptions
from catversion_jax.config.sampling import grid_settings
from catversion_jax.methods.learned import Learned
from catversion_jax.models.stable_diffusion import Backbone
from catversion_jax.models.tiny_vae import with_tiny_vae
from catversion_jax.runtime.atomic_files import make_folder
from catversion_jax.sampling.denoising import checked_sampler, draw_requests
from catversion_jax.sampling.grids import image_grid
from catversion_jax.sampling.png import save_png
from catversion_jax.sampling.requests import ConceptUse, ImageRequest
from catversion_jax.training.preparation import PreparedConcept


class SampleGrids:
    """Draws the grids of one run; the plain model's images are drawn once per prompt and seed."""

    def __init__(self, backbone: Backbone, options: RecordingOptions, resolution: int):
        self._options = options
        tiny = options.validation_vae
        self._backbone = backbone if tiny is None else with_tiny_vae(backbone, tiny)
        self._plain: dict[tuple[str, int], np.ndarray] = {}
        settings = grid_settings(
            options.validation_inference_steps,
            options.validation_guidance_scale,
            backbone.drawing_defaults,
        )
        self._settings = dataclasses.replace(settings, height=resolution, width=resolution)
        # Mistakes should show now, not at the first grid.
        for template in options.validation_prompt:
            fill_template(template, "thing", where="validation_prompt", needs_class_word=False)
        checked_sampler(backbone, self._settings)

    def write(self, path: Path, concept: PreparedConcept, learned: Learned, step: int) -> None:
        """Write the grid of one concept, ``learned`` without a concept axis."""
        columns = [
            (
                fill_template(
                    template,
                    concept.spec.base_class,
                    where=concept.spec.name,
                    needs_class_word=False,
                ),
                seed,
            )
            for template in self._options.validation_prompt
            for seed in range(self._options.num_validation_images)
        ]
        record = concept.record
        use = ConceptUse(
            record.name,
            record.base_class,
            learned,
            when=record.when,
            class_forms=record.class_forms,
        )
        missing = [column for column in columns if column not in self._plain]
        requests = [ImageRequest(prompt, (use,), seed) for prompt, seed in columns]
        requests += [ImageRequest(prompt, (), seed) for prompt, seed in missing]
        images = draw_requests(self._backbone, requests, self._settings).images
        self._plain |= dict(zip(missing, images[len(columns) :], strict=True))
        grid = image_grid(
            [[self._plain[column] for column in columns], list(images[: len(columns)])],
            row_labels=["plain model", f"{record.name}, step {step}"],
            column_labels=[f"{prompt} (seed {seed})" for prompt, seed in columns],
            references=concept.references,
        )
        make_folder(path.parent)
        save_png(
            path,
            grid,
            {"concept": record.name, "step": step, "columns": [list(c) for c in columns]},
        )

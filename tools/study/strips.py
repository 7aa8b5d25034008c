"""Pictures for the page: a concept's real images, and what each method draws of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from catversion_jax.concepts import read_concepts
from catversion_jax.concepts.images import decode_upright
from catversion_jax.concepts.prompts import with_class_word
from catversion_jax.evaluation.image_folders import image_name, read_pixels
from catversion_jax.sampling.grids import image_grid
from catversion_jax.sampling.png import save_png

COLUMNS = {
    "none": "class word",
    "textual_inversion": "Textual Inversion, 1 vector",
    "textual_inversion_preserving_1": "Textual Inversion, 1 vector, preserved",
    "textual_inversion_preserving": "Textual Inversion, 4 vectors, preserved",
    "dreambooth": "DreamBooth",
    "dreambooth_preserving": "DreamBooth, preserved",
    "catversion_official": "official settings",
    "predicted_25": "predicted, 25 updates",
    "catversion": "preset=fast",
    "longer_context": "preset=quality",
}
PROMPTS_SHOWN = 3
CELL = 96
COLOURS = 128  # of a strip's palette: small files, and no difference the eye sees


def write_strips(
    out: Path, folder: Path, arms: Mapping[str, Any], count: int, prefix: str = "study"
) -> list[Path]:
    """One picture for each of ``count`` concepts, evenly spread over the list."""
    shown = [arm for arm in COLUMNS if arm in arms]
    if not shown:
        return []
    settings = json.loads((out / "arms" / shown[0] / "scores.json").read_text())["settings"]
    source = json.loads((out / "source.json").read_text())["concepts"]
    specs = {spec.name: spec for spec in read_concepts(source).concepts}
    names = settings["concepts"]
    paths = []
    for name in (names[i * len(names) // count] for i in range(min(count, len(names)))):
        spec = specs[name]
        references = [np.asarray(decode_upright(image).picture) for image in spec.images]
        prompts = _prompts(settings["prompt_set"], spec.base_class)
        files = {
            (arm, text): out / "arms" / arm / "images" / name / image_name(text, 0)
            for arm in shown
            for text in prompts
        }
        grid = image_grid(
            [
                [read_pixels(p) if (p := files[arm, text]).is_file() else None for arm in shown]
                for text in prompts
            ],
            row_labels=prompts,
            column_labels=[COLUMNS[arm] for arm in shown],
            references=references,
            min_cell=CELL,
        )
        small = grid.quantize(COLOURS, dither=Image.Dither.NONE)
        paths.append(folder / f"{prefix}-{name.replace('_', '-')}.png")
        save_png(paths[-1], small)
    return paths


def _prompts(prompt_set: Mapping[str, Any], base_class: str) -> list[str]:
    """The first prompts of a class, filled in."""
    live = base_class in prompt_set["live_classes"]
    rows = prompt_set["live_prompts" if live else "prompts"]
    return [with_class_word(row["template"], base_class) for row in rows[:PROMPTS_SHOWN]]

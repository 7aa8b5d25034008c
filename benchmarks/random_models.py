"""Stable Diffusion 1.5 and XL as folders without trained weights; speed does not depend on them.

The published configurations are those the tests hold against the published parameter counts.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))


def write_random_sd15(folder: Path) -> Path:
    """Random weights in half precision, 2.1 GB; what is there already stays."""
    from full_size_models import write_sd15

    if not (folder / "model_index.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_sd15(folder)
    return folder


def write_random_sdxl(folder: Path) -> Path:
    """The same of Stable Diffusion XL, 7.1 GB."""
    from full_size_models import write_sdxl

    if not (folder / "vae" / "config.json").is_file():  # the last that is written
        folder.mkdir(parents=True, exist_ok=True)
        write_sdxl(folder)
    return folder


def write_sd15_configurations(folder: Path) -> Path:
    """Everything but weights: enough to compile for."""
    from full_size_models import write_sd15_configs

    folder.mkdir(parents=True, exist_ok=True)
    write_sd15_configs(folder)
    return folder


def write_sdxl_configurations(folder: Path) -> Path:
    """The same of Stable Diffusion XL."""
    from full_size_models import write_sdxl_configs

    folder.mkdir(parents=True, exist_ok=True)
    write_sdxl_configs(folder)
    return folder

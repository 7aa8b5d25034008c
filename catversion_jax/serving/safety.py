"""The safety checker of the model's folder, which looks at pictures before anybody gets them. It
runs where the folder has one and torch is installed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from catversion_jax.config.model import ModelOptions
from catversion_jax.models.weights.hub import locate_model
from catversion_jax.models.weights.model_index import component_class, read_model_index
from catversion_jax.runtime.bucket_paths import embedded_or_given

Checker = Callable[[np.ndarray], Sequence[bool]]
"""A function from pixels, uint8 ``[n H W 3]``, to whether each picture is flagged."""

NEEDED = ("torch", "diffusers", "transformers")
FLAGGED = "The model's safety checker has flagged a picture; it is black."


def find_checker(options: ModelOptions) -> tuple[Checker | None, str]:
    """The safety checker of a model, or None, and a text for the operator: which one looks at
    pictures, or why none does.

    Raises:
      CatVersionError: the model has a checker that cannot be read.
    """
    model = options.pretrained_model_name_or_path
    if embedded_or_given(model).is_file():
        return None, "none: a single file holds no safety checker"
    folder = locate_model(model, revision=options.revision, weights=False)
    if component_class(read_model_index(folder), "safety_checker") is None:
        return None, "none: the model has no safety checker"
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        return None, (
            f"none: the model's safety checker needs {', '.join(missing)}, not installed here; "
            "pip install 'catversion-jax[torch]'"
        )
    if not Path(folder, "safety_checker").is_dir():
        return None, (
            "none: the model names a safety checker, but its folder safety_checker is not here; "
            "download the whole model and give its folder as --model"
        )
    from catversion_jax.integrations.safety_checker import load_safety_checker

    return load_safety_checker(folder), "the model's own"

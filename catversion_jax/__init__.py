"""Personalized text-to-image on Cloud TPU: CatVersion (arXiv 2311.14631) for many concepts at once,
in JAX.

Importing this package is light; public names load what they need on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from catversion_jax.concepts import read_concepts
    from catversion_jax.config import TrainConfig, load_config
    from catversion_jax.evaluation.evaluate import evaluate
    from catversion_jax.methods.concept_file import load_concept, save_concept
    from catversion_jax.methods.official_adapter import import_official_concept
    from catversion_jax.methods.residual import KVResidual
    from catversion_jax.models.lone_text_encoder import load_text_encoder
    from catversion_jax.models.stable_diffusion import load_backbone
    from catversion_jax.sampling.generate import generate
    from catversion_jax.training.start import train

__version__ = "0.2.0"

_HOME = {
    "KVResidual": "catversion_jax.methods.residual",
    "load_backbone": "catversion_jax.models.stable_diffusion",
    "load_text_encoder": "catversion_jax.models.lone_text_encoder",
    "load_concept": "catversion_jax.methods.concept_file",
    "save_concept": "catversion_jax.methods.concept_file",
    "import_official_concept": "catversion_jax.methods.official_adapter",
    "TrainConfig": "catversion_jax.config",
    "load_config": "catversion_jax.config",
    "read_concepts": "catversion_jax.concepts",
    "train": "catversion_jax.training.start",
    "generate": "catversion_jax.sampling.generate",
    "evaluate": "catversion_jax.evaluation.evaluate",
}

__all__ = [
    "KVResidual",
    "TrainConfig",
    "evaluate",
    "generate",
    "import_official_concept",
    "load_backbone",
    "load_concept",
    "load_config",
    "load_text_encoder",
    "read_concepts",
    "save_concept",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(
            f"module 'catversion_jax' has no attribute {name!r}; it has {', '.join(__all__)}"
        )
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

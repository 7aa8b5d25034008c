"""What the user gave: concepts found in folders, manifests and datasets, checked before anything is
decoded.

``reading`` builds and checks them, ``layouts`` knows one layout per function, ``files`` sorts one
folder, ``datasets`` reads Hugging Face datasets, ``fields`` the values beside a concept,
``prompts`` fills templates.
"""

from catversion_jax.concepts.folders import ImageSource
from catversion_jax.concepts.reading import (
    ConceptList,
    ConceptProblem,
    ConceptSpec,
    check_concept_name,
    concept_prompts,
    read_concepts,
    read_configured_concepts,
)

__all__ = [
    "ConceptList",
    "ConceptProblem",
    "ConceptSpec",
    "ImageSource",
    "check_concept_name",
    "concept_prompts",
    "read_concepts",
    "read_configured_concepts",
]

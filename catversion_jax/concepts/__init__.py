"""What the user gave: concepts found in folders, manifests and datasets, checked before anything is
decoded.

``reading`` builds and checks them. ``layouts`` has one function per layout, ``datasets`` reads
Hugging Face datasets, and ``entries`` is what both return. ``folders`` sorts the files of one
folder, ``fields`` checks the values beside a concept, and ``prompts`` fills templates.
"""

from catversion_jax.concepts.folders import ImageSource
from catversion_jax.concepts.names import check_concept_name
from catversion_jax.concepts.reading import (
    ConceptList,
    ConceptProblem,
    ConceptSpec,
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

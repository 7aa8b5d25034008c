"""What is evaluated: concepts of a run or of an images folder, each with its training images."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from PIL import Image

from catversion_jax.array_types import Int
from catversion_jax.concepts import ConceptList, ImageSource
from catversion_jax.concepts.images import decode_upright
from catversion_jax.concepts.mask_files import MaskMaker
from catversion_jax.errors import CatVersionError
from catversion_jax.methods.concept_file import (
    CONCEPT_FILE_NAME,
    Concept,
    concept_folders,
)
from catversion_jax.training.run.reader import (
    evaluation_losses,
    plain_loss,
    readable_concepts,
    recorded_concepts,
    step_files,
)


@dataclasses.dataclass(frozen=True)
class Subject:
    """One concept to evaluate.

    Attributes:
      name: name of the concept and of its folder of images.
      base_class: the words that call it.
      references: its training images.
      concept: what was learned, None where only images are given.
      folder: its folder in the run, None where only images are given.
    """

    name: str
    base_class: str
    references: tuple[ImageSource, ...]
    concept: Concept | None = None
    folder: Path | None = None

    def steps(self) -> dict[int, Path]:
        """Concept files of intermediate steps, in order."""
        return {} if self.folder is None else step_files(self.folder)

    def eval_losses(self) -> dict[str, list[tuple[float, float | None]]]:
        """Evaluation loss over the training step, and the plain model's, as the run recorded
        them.
        """
        points = [] if self.folder is None else list(evaluation_losses(self.folder))
        if self.folder is None or not points:
            return {}
        curves: dict[str, list[tuple[float, float | None]]] = {"concept": [*points]}
        if (plain := plain_loss(self.folder)) is not None:
            curves["plain model"] = [(points[0][0], plain), (points[-1][0], plain)]
        return curves


@dataclasses.dataclass(frozen=True)
class References:
    """A concept's training images at full size; ``masks`` holds None where there is none."""

    pictures: list[Int[np.ndarray, "H W 3"]]
    masks: list[Int[np.ndarray, "H W"] | None]


def read_run(folder: Path, concepts: ConceptList | None) -> tuple[list[Subject], dict[str, str]]:
    """The finished concepts of a run.

    Args:
      folder: the output folder of training, or one concept's folder in it.
      concepts: the training images; None reads them where the run's ``config.resolved.yaml`` says.

    Returns:
      The concepts that can be evaluated, and why the others cannot, by name.

    Raises:
      CatVersionError: no concept can be evaluated.
    """
    if concepts is None:
        concepts = recorded_concepts(folder)
    known = {spec.name: spec for spec in concepts.concepts}
    unreadable = {problem.name: problem.message for problem in concepts.problems}
    trained, damaged = readable_concepts(concept_folders(folder))
    left_out = {path.name: reason for path, reason in damaged.items()}
    subjects: list[Subject] = []
    for path, concept in trained:
        if concept.name in known:
            images = known[concept.name].images
            subjects.append(Subject(concept.name, concept.base_class, images, concept, path))
        else:
            left_out[concept.name] = unreadable.get(concept.name) or (
                f"{folder}: no training images of {concept.name}; found those of "
                f"{', '.join(list(known)[:5]) or 'none'}. Give the folder or manifest it was "
                "trained on with --concepts."
            )
    if not subjects:
        raise CatVersionError(next(iter(left_out.values())))
    return subjects, left_out


def subjects_of_images(folder: Path, concepts: ConceptList) -> list[Subject]:
    """The concepts that have a folder of images in ``folder``.

    Raises:
      CatVersionError: none has.
    """
    subjects = [
        Subject(spec.name, spec.base_class, spec.images)
        for spec in concepts.concepts
        if (folder / spec.name).is_dir()
    ]
    if not subjects:
        names = ", ".join(spec.name for spec in concepts.concepts)
        raise CatVersionError(
            f"{folder}: is neither a run (no {CONCEPT_FILE_NAME} in it) nor holds images in a "
            f"folder named like a concept ({names}). Images lie in <concept>/<prompt>_<seed>.png."
        )
    return subjects


def read_references(subject: Subject, masker: MaskMaker | None, resolution: int) -> References:
    """Decode a concept's training images and masks (files, else alpha, else ``masker``).

    Args:
      subject: the concept.
      masker: makes the masks that are missing, of the centre square at ``resolution``, which then
        stands for the picture; None leaves them out.
      resolution: pixels per side the masker's model draws.

    Raises:
      ConceptError: an image or mask cannot be read.
    """
    pictures: list[np.ndarray] = []
    masks: list[np.ndarray | None] = []
    for source in subject.references:
        image = decode_upright(source, alpha="mask")
        opaque, mask = image.picture, image.mask
        if mask is None and masker is not None:
            side = min(opaque.size)
            left, top = (opaque.width - side) // 2, (opaque.height - side) // 2
            square = opaque.crop((left, top, left + side, top + side)).resize(
                (resolution, resolution), Image.Resampling.BICUBIC
            )
            pictures.append(np.asarray(square))
            masks.append(masker(pictures[-1][None], [subject.base_class])[0])
            continue
        pictures.append(np.asarray(opaque))
        masks.append(None if mask is None else np.asarray(mask))
    return References(pictures, masks)

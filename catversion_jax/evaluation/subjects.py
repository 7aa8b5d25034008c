"""What is evaluated: concepts of a run or of an images folder, each with its training images."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from catversion_jax.array_types import Int
from catversion_jax.concepts import ConceptList, ConceptSpec, ImageSource
from catversion_jax.concepts.images import decode_upright
from catversion_jax.concepts.mask_files import MaskMaker
from catversion_jax.errors import CatVersionError, listed, shown
from catversion_jax.methods.concept_file import (
    CONCEPT_FILE_NAME,
    Concept,
    concept_folders,
)
from catversion_jax.training.run.identity import image_digest
from catversion_jax.training.run.reader import (
    evaluation_losses,
    plain_loss,
    readable_concepts,
    recorded_concepts,
    step_files,
)

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Subject:
    """One concept to evaluate.

    Attributes:
      name: name of the concept and of its folder of images.
      base_class: the words that call it.
      references: its training images.
      concept: what was learned, None where only images are given.
      folder: its folder in the run, None where only images are given.
      held_out: its images that it was not trained on.
    """

    name: str
    base_class: str
    references: tuple[ImageSource, ...]
    concept: Concept | None = None
    folder: Path | None = None
    held_out: tuple[ImageSource, ...] = ()

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
    """Photos of a concept at full size.

    Attributes:
      pictures: its training images.
      masks: of each of them; None where there is none.
      held_out: the same of its images that it was not trained on, where there are any; the scores
        are then against these.
    """

    pictures: list[Int[np.ndarray, "H W 3"]]
    masks: list[Int[np.ndarray, "H W"] | None]
    held_out: References | None = None

    @property
    def judged_by(self) -> References:
        """The photos that pictures are compared with."""
        return self if self.held_out is None else self.held_out


def read_run(
    folder: Path, concepts: ConceptList | None, holdout: int | None = None
) -> tuple[list[Subject], dict[str, str]]:
    """The finished concepts of a run.

    Args:
      folder: the output folder of training, or one concept's folder in it.
      concepts: the training images; None reads them where the run's ``config.resolved.yaml`` says.
      holdout: last photos of each concept that are held out; None is what the run says.

    Returns:
      The concepts that can be evaluated, and why the others cannot, by name.

    Raises:
      CatVersionError: no concept can be evaluated.
    """
    if concepts is None:
        concepts = recorded_concepts(folder, holdout)
    known = {spec.name: spec for spec in concepts.concepts}
    unreadable = {problem.name: problem.message for problem in concepts.problems}
    trained, damaged = readable_concepts(concept_folders(folder))
    left_out = {path.name: reason for path, reason in damaged.items()}
    subjects: list[Subject] = []
    for path, concept in trained:
        if concept.name in known:
            spec = known[concept.name]
            try:
                _warn_of_other_photos(concept, spec)
                held_out = _not_trained_on(concept, spec)
            except CatVersionError as error:
                left_out[concept.name] = str(error)
                continue
            subjects.append(
                Subject(concept.name, concept.base_class, spec.images, concept, path, held_out)
            )
        else:
            left_out[concept.name] = unreadable.get(concept.name) or (
                f"{folder}: no training images of {concept.name}; found those of "
                f"{', '.join(list(known)[:5]) or 'none'}. Give the folder or manifest it was "
                "trained on with --concepts."
            )
    if not subjects:
        raise CatVersionError(next(iter(left_out.values())))
    return subjects, left_out


def _trained_digests(concept: Concept) -> list[str] | None:
    """Of the images that a concept was trained on; None where its file, of version 0.1, does not
    know.
    """
    digests = concept.train_config.get("digests")
    images = digests.get("images") if isinstance(digests, dict) else None
    return images if isinstance(images, list) else None


def _warn_of_other_photos(concept: Concept, spec: ConceptSpec) -> None:
    """Say which photos are not those that a concept was trained on, as far as its file knows."""
    trained = _trained_digests(concept)
    if trained is None:
        return
    others = [source.label for source in spec.images if image_digest(source) not in trained]
    if others:
        logger.warning(
            f"{concept.name}: {len(others)} of the {len(spec.images)} photos that its pictures "
            f"are compared with are not among those it was trained on "
            f"({', '.join(listed(others, 3))}): added or changed since. Train it again, or say "
            "with --concepts where its photos lie."
        )


def _not_trained_on(concept: Concept, spec: ConceptSpec) -> tuple[ImageSource, ...]:
    """Its held-out photos, without those that the concept file lists as training images: by the
    SHA-256 of their bytes, by name where a file of version 0.1 knows no more.
    """
    trained = _trained_digests(concept)
    held_out = []
    for source in spec.eval_images:
        is_trained = (
            image_digest(source) in trained
            if trained is not None
            else source.label in concept.images
        )
        if is_trained:
            logger.warning(
                f"{concept.name}: {source.label} was trained on, so it does not count as held out. "
                "Train with holdout=1 or eval_images, into another output_dir."
            )
        else:
            held_out.append(source)
    return tuple(held_out)


def subjects_of_images(folder: Path, concepts: ConceptList) -> tuple[list[Subject], dict[str, str]]:
    """The concepts that have a folder of images in ``folder``.

    Folders of images that belong to no concept are named in a warning.

    Returns:
      The concepts that can be evaluated, and why others with such a folder cannot, by name.

    Raises:
      CatVersionError: no concept can be evaluated.
    """
    subjects = [
        Subject(spec.name, spec.base_class, spec.images, held_out=spec.eval_images)
        for spec in concepts.concepts
        if (folder / spec.name).is_dir()
    ]
    left_out = {
        problem.name: problem.message
        for problem in concepts.problems
        if (folder / problem.name).is_dir()
    }
    if not subjects:
        names = ", ".join(spec.name for spec in concepts.concepts)
        raise CatVersionError(
            next(iter(left_out.values()), None)
            or f"{folder}: is neither a run (no {CONCEPT_FILE_NAME} in it) nor holds images in a "
            f"folder named like a concept ({names}). Images lie in <concept>/<prompt>_<seed>.png."
        )
    known = {subject.name for subject in subjects} | left_out.keys()
    unknown = [
        shown(path.name)
        for path in sorted(folder.iterdir())
        if path.name not in known and path.is_dir() and any(path.glob("*.png"))
    ]
    if unknown:
        logger.warning(
            "not scored, no concept of the given training images has their name: %s",
            ", ".join(listed(unknown)),
        )
    return subjects, left_out


def read_references(subject: Subject, masker: MaskMaker | None, resolution: int) -> References:
    """Decode a concept's photos and masks (files, else alpha, else ``masker``).

    Args:
      subject: the concept.
      masker: makes the masks that are missing, of the centre square at ``resolution``, which then
        stands for the picture; None leaves them out.
      resolution: pixels per side the masker's model draws.

    Raises:
      ConceptError: an image or mask cannot be read.
    """
    trained = _decoded(subject.references, subject.base_class, masker, resolution)
    if not subject.held_out:
        return trained
    held_out = _decoded(subject.held_out, subject.base_class, masker, resolution)
    return dataclasses.replace(trained, held_out=held_out)


def _decoded(
    sources: Sequence[ImageSource], base_class: str, masker: MaskMaker | None, resolution: int
) -> References:
    pictures: list[np.ndarray] = []
    masks: list[np.ndarray | None] = []
    for source in sources:
        image = decode_upright(source, alpha="mask")
        opaque, mask = image.picture, image.mask
        if mask is None and masker is not None:
            side = min(opaque.size)
            left, top = (opaque.width - side) // 2, (opaque.height - side) // 2
            square = opaque.crop((left, top, left + side, top + side)).resize(
                (resolution, resolution), Image.Resampling.BICUBIC
            )
            pictures.append(np.asarray(square))
            masks.append(masker(pictures[-1][None], [base_class])[0])
            continue
        pictures.append(np.asarray(opaque))
        masks.append(None if mask is None else np.asarray(mask))
    return References(pictures, masks)

"""Whom to evaluate: the concepts of a run or of an images folder, each with its training images."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from catversion_jax.array_types import Int
from catversion_jax.concepts import ConceptList, ImageSource, read_configured_concepts
from catversion_jax.concepts.images import decode_upright
from catversion_jax.config.training import load_config
from catversion_jax.errors import CatVersionError
from catversion_jax.methods.concept_file import (
    CONCEPT_FILE_NAME,
    Concept,
    concept_folders,
    load_concept,
)

Masker = Callable[[Int[np.ndarray, "n H W 3"], Sequence[str]], Int[np.ndarray, "n H W"]]
"""uint8 pictures and the class of each to uint8 masks, 255 on the object."""

_STEP_FILE = re.compile(r"^catversion-(\d+)\.safetensors$")


@dataclasses.dataclass(frozen=True)
class Subject:
    """One concept to evaluate.

    Attributes:
      name: of the concept and of its folder of images.
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
        found = {} if self.folder is None else _step_files(self.folder)
        return {step: path for step, path in sorted(found.items())}

    def eval_losses(self) -> dict[str, list[tuple[float, float | None]]]:
        """Evaluation loss over the training step, and the plain model's, as the run recorded
        them.
        """
        path = None if self.folder is None else self.folder / "metrics.csv"
        if path is None or not path.is_file():
            return {}
        with path.open(encoding="utf-8", newline="") as file:
            rows = [r for r in csv.DictReader(file) if r["eval_loss"]]
        points: list[tuple[float, float | None]] = [
            (float(row["step"]), float(row["eval_loss"])) for row in rows
        ]
        curves = {"concept": points}
        summary = path.with_name("metrics.json")
        if points and summary.is_file():
            plain = json.loads(summary.read_text(encoding="utf-8"))["plain_eval_loss"]
            curves["plain model"] = [(points[0][0], plain), (points[-1][0], plain)]
        return curves


@dataclasses.dataclass(frozen=True)
class References:
    """A concept's training images at full size; ``masks`` holds None where there is none."""

    pictures: list[Int[np.ndarray, "H W 3"]]
    masks: list[Int[np.ndarray, "H W"] | None]


def is_run(folder: Path) -> bool:
    """Whether ``folder`` holds trained concepts (a run, or one concept's folder)."""
    return next(folder.rglob(CONCEPT_FILE_NAME), None) is not None


def read_run(folder: Path, concepts: ConceptList | None) -> list[Subject]:
    """The finished concepts of a run.

    Args:
      folder: the output folder of training, or one concept's folder in it.
      concepts: the training images; None reads them where the run's ``config.resolved.yaml`` says.

    Raises:
      CatVersionError: a concept's training images are not known or not found.
    """
    trained = [(path, load_concept(path)) for path in concept_folders(folder)]
    if concepts is None:
        concepts = _recorded_concepts(folder)
    known = {spec.name: spec for spec in concepts.concepts}
    missing = [concept.name for _, concept in trained if concept.name not in known]
    if missing:
        raise CatVersionError(
            f"{folder}: no training images of {', '.join(missing)}; found those of "
            f"{', '.join(known)}. Give the folder or manifest it was trained on with --concepts."
        )
    return [
        Subject(concept.name, concept.base_class, known[concept.name].images, concept, path)
        for path, concept in trained
    ]


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


def recorded_model(folder: Path) -> str | None:
    """The model a run was trained on, as its ``run.json`` says."""
    path = _up(folder, "run.json")
    if path is None:
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))["base_model"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_references(subject: Subject, masker: Masker | None, resolution: int) -> References:
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
        opaque, _, mask = decode_upright(source, alpha="mask")
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


def _recorded_concepts(folder: Path) -> ConceptList:
    path = _up(folder, "config.resolved.yaml")
    if path is None:
        raise CatVersionError(
            f"{folder}: records no training images (no config.resolved.yaml). Give them with "
            "--concepts."
        )
    config = load_config(path)
    try:
        return read_configured_concepts(config)
    except CatVersionError as error:
        raise CatVersionError(
            f"{error}\n{path} names {config.concepts!r} as the training images; where they lie "
            "now, say with --concepts."
        ) from None


def _up(folder: Path, name: str) -> Path | None:
    """A run's file from the run's folder or one of a concept in it (``concepts/<name>``)."""
    candidates = [folder / name, folder.absolute().parent.parent / name]
    return next((path for path in candidates if path.is_file()), None)


def _step_files(folder: Path) -> dict[int, Path]:
    return {
        int(match[1]): path for path in folder.iterdir() if (match := _STEP_FILE.match(path.name))
    }

"""What is known of a concept's images: the numbers, and which of them tables average."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from catversion_jax.evaluation.vectors import Judged


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores of some images of one concept; None where nothing could be scored.

    Attributes:
      images: number of images that were scored.
      image_alignment: CLIP, generated against the photos, whole pictures. The photos are those that
        were held out from training, where there are any, else the training images.
      image_alignment_masked: the same on masked crops of both.
      text_alignment_edit: against the prompt without the concept word (the paper's).
      text_alignment_prompt: against the full prompt.
      overall: geometric mean of ``image_alignment`` and ``text_alignment_edit``.
      overall_masked: geometric mean of ``image_alignment_masked`` and ``text_alignment_edit``.
      dino: as ``image_alignment``, with DINO.
      nearest_reference: highest similarity of an image to a single training image.
      copies: images nearer to a training image than the training images are to each other.
      masks: images that have a mask.
      empty_masks: those whose mask holds no object; left out of the masked scores.
      dino_max: as ``dino``, of each image with the nearest photo (DINOv2 only, as the next two).
      dino_masked: as ``dino``, on masked crops of both.
      dino_masked_max: as ``dino_max``, on masked crops of both.
      rank1: share of the images that are nearest to a photo of their own concept among the photos
        of all concepts of the class (:mod:`~catversion_jax.evaluation.gallery`).
      mean_average_precision: how far up its own concept's photos stand in an image's ranking.
    """

    images: int
    image_alignment: float | None
    image_alignment_masked: float | None
    text_alignment_edit: float | None
    text_alignment_prompt: float | None
    overall: float | None
    overall_masked: float | None
    dino: float | None
    nearest_reference: float | None
    copies: int
    masks: int
    empty_masks: int
    dino_max: float | None = None
    dino_masked: float | None = None
    dino_masked_max: float | None = None
    rank1: float | None = None
    mean_average_precision: float | None = None


OPTIONAL = tuple(f.name for f in dataclasses.fields(Scores) if f.default is None)
"""Scores that are written only where they were asked for."""

METRICS = (
    "image_alignment",
    "image_alignment_masked",
    "text_alignment_edit",
    "text_alignment_prompt",
    "overall",
    "overall_masked",
    "dino",
    "nearest_reference",
    *OPTIONAL,
)
"""What tables average over concepts."""


def plain_scores(scores: Scores) -> dict[str, Any]:
    """The scores by name, without those that were not asked for."""
    values = dataclasses.asdict(scores)
    return {k: v for k, v in values.items() if v is not None or k not in OPTIONAL}


@dataclasses.dataclass(frozen=True)
class RealImages:
    """What the training images reach, against the held-out photos or, without any, among
    themselves: the ceiling of the image scores. ``copy_limit`` is of the training images always.
    """

    image_alignment: float | None
    image_alignment_masked: float | None
    dino: float | None
    copy_limit: float | None
    images: int
    masks: int
    empty_masks: int
    dino_masked: float | None = None


@dataclasses.dataclass(frozen=True)
class PromptScores:
    """Scores of one prompt; ``first_seed`` is its image that pages show."""

    prompt: str
    edit: str
    scores: Scores
    shown: Path


@dataclasses.dataclass(frozen=True)
class SubjectScores:
    """All scores of one concept.

    Attributes:
      name: the concept's name.
      base_class: the words that call it.
      total: scores of all its images.
      first_seed: scores of the images with the first seed of every prompt.
      prompts: scores prompt by prompt.
      real: what its training images score among themselves.
      seeds: the seeds of its images.
      ignored: images of prompts that are not in the set.
      held_out: names of the photos that the scores are against, where they were held out from
        training.
      judged: the vectors that a gallery compares; None where there is none.
    """

    name: str
    base_class: str
    total: Scores
    first_seed: Scores
    prompts: tuple[PromptScores, ...]
    real: RealImages
    seeds: tuple[int, ...]
    ignored: tuple[str, ...]
    held_out: tuple[str, ...] = ()
    judged: Judged | None = dataclasses.field(default=None, compare=False, repr=False)

"""Folders of images to scores, concept by concept."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from catversion_jax.array_types import Float
from catversion_jax.concepts.mask_files import MaskMaker, write_mask
from catversion_jax.evaluation.alignment import (
    among_themselves,
    copy_limit,
    matched_cosines,
    mean_pairwise_cosine,
    nearest_reference,
    overall,
)
from catversion_jax.evaluation.embedders import ClipEmbedder, DinoEmbedder
from catversion_jax.evaluation.image_folders import (
    GeneratedImage,
    find_images,
    mask_path,
    read_mask,
    read_pixels,
)
from catversion_jax.evaluation.masked_crops import masked_crop
from catversion_jax.evaluation.prompts import PromptSet
from catversion_jax.evaluation.subjects import References, Subject


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores of some images of one concept; None where nothing could be scored.

    Attributes:
      images: number of images that were scored.
      image_alignment: CLIP, generated against training images, whole pictures.
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


# What tables average over concepts.
METRICS = (
    "image_alignment",
    "image_alignment_masked",
    "text_alignment_edit",
    "text_alignment_prompt",
    "overall",
    "overall_masked",
    "dino",
    "nearest_reference",
)


@dataclasses.dataclass(frozen=True)
class RealImages:
    """What the training images reach among themselves: the ceiling of the image scores."""

    image_alignment: float | None
    image_alignment_masked: float | None
    dino: float | None
    copy_limit: float | None
    images: int
    masks: int
    empty_masks: int


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
    """

    name: str
    base_class: str
    total: Scores
    first_seed: Scores
    prompts: tuple[PromptScores, ...]
    real: RealImages
    seeds: tuple[int, ...]
    ignored: tuple[str, ...]


class Scorer:
    """Embedders, masks and prompts of one evaluation."""

    def __init__(
        self,
        clip: ClipEmbedder,
        prompt_set: PromptSet,
        *,
        dino: DinoEmbedder | None = None,
        masker: MaskMaker | None = None,
    ):
        self.clip, self.dino, self.masker = clip, dino, masker
        self.prompt_set = prompt_set

    def score(self, subject: Subject, references: References, folder: Path) -> SubjectScores:
        """Score the images in ``folder/<concept>``.

        Raises:
          CatVersionError: no image there, or one that cannot be read.
        """
        prompts = self.prompt_set.of(subject.base_class)
        found, ignored = find_images(folder / subject.name, prompts, subject.base_class)
        filled = [prompt.filled(subject.base_class) for prompt in prompts]
        vectors = self._vectors(subject, found, references, [p.edit for p in prompts], filled)
        number = np.array([image.prompt for image in found])
        seeds = np.array([image.seed for image in found])
        by_prompt = []
        for index in sorted(set(number.tolist())):
            rows = np.flatnonzero(number == index)
            by_prompt.append(
                PromptScores(
                    filled[index],
                    prompts[index].edit,
                    vectors.scores(rows),
                    found[rows[0]].path,
                )
            )
        return SubjectScores(
            subject.name,
            subject.base_class,
            vectors.scores(np.arange(len(found))),
            vectors.scores(np.flatnonzero(seeds == seeds.min())),
            tuple(by_prompt),
            vectors.real(),
            tuple(sorted({image.seed for image in found})),
            tuple(ignored),
        )

    def _vectors(
        self,
        subject: Subject,
        found: Sequence[GeneratedImage],
        references: References,
        edits: Sequence[str],
        filled: Sequence[str],
    ) -> _Vectors:
        pixels = [read_pixels(image.path) for image in found]
        masks = self._masks(subject, found, pixels)
        number = [image.prompt for image in found]
        crops = [self._crop(p, m) for p, m in zip(pixels, masks, strict=True)]
        reference_crops = [
            self._crop(p, m) for p, m in zip(references.pictures, references.masks, strict=True)
        ]
        # an empty edit text has no score; its place is taken by the prompt and never read
        edit_vectors = self.clip.texts([edit or f for edit, f in zip(edits, filled, strict=True)])
        return _Vectors(
            generated=self.clip.images(pixels),
            references=self.clip.images(references.pictures),
            masked=self.clip.images([crop for crop in crops if crop is not None]),
            has_crop=np.array([crop is not None for crop in crops]),
            has_mask=np.array([mask is not None for mask in masks]),
            masked_references=self.clip.images([c for c in reference_crops if c is not None]),
            reference_masks=sum(mask is not None for mask in references.masks),
            edits=edit_vectors[number],
            has_edit=np.array([bool(edits[i]) for i in number]),
            prompts=self.clip.texts(filled)[number],
            dino=None if self.dino is None else self.dino.images(pixels),
            dino_references=None if self.dino is None else self.dino.images(references.pictures),
        )

    def _crop(self, picture: np.ndarray, mask: np.ndarray | None) -> np.ndarray | None:
        return None if mask is None else masked_crop(picture, mask, self.clip.mean)

    def _masks(
        self, subject: Subject, found: Sequence[GeneratedImage], pixels: Sequence[np.ndarray]
    ) -> list[np.ndarray | None]:
        """Mask files; those missing are made and kept where there is a masker."""
        masks = [read_mask(image.path) for image in found]
        missing = [i for i, mask in enumerate(masks) if mask is None]
        if self.masker is not None and missing:
            made = self.masker(
                np.stack([pixels[i] for i in missing]), [subject.base_class] * len(missing)
            )
            for i, mask in zip(missing, made, strict=True):
                write_mask(mask_path(found[i].path), Image.fromarray(mask))
                masks[i] = mask
        return masks


@dataclasses.dataclass(frozen=True)
class _Vectors:
    """Unit vectors of one concept's images, row by row; ``masked`` only of those with an object."""

    generated: Float[np.ndarray, "n E"]
    references: Float[np.ndarray, "r E"]
    masked: Float[np.ndarray, "m E"]
    has_crop: np.ndarray
    has_mask: np.ndarray
    masked_references: Float[np.ndarray, "q E"]
    reference_masks: int
    edits: Float[np.ndarray, "n E"]
    has_edit: np.ndarray
    prompts: Float[np.ndarray, "n E"]
    dino: Float[np.ndarray, "n F"] | None
    dino_references: Float[np.ndarray, "r F"] | None

    def scores(self, rows: np.ndarray) -> Scores:
        """Scores of some of the images."""
        generated = self.generated[rows]
        image = mean_pairwise_cosine(generated, self.references)
        crop_rows = (np.cumsum(self.has_crop) - 1)[rows[self.has_crop[rows]]]
        masked = mean_pairwise_cosine(self.masked[crop_rows], self.masked_references)
        with_edit = rows[self.has_edit[rows]]
        text = _mean(matched_cosines(self.generated[with_edit], self.edits[with_edit]))
        nearest = nearest_reference(generated, self.references)
        limit = copy_limit(self.references)
        dino = None
        if self.dino is not None and self.dino_references is not None:
            dino = mean_pairwise_cosine(self.dino[rows], self.dino_references)
        return Scores(
            images=len(rows),
            image_alignment=image,
            image_alignment_masked=masked,
            text_alignment_edit=text,
            text_alignment_prompt=_mean(matched_cosines(generated, self.prompts[rows])),
            overall=overall(image, text),
            overall_masked=overall(masked, text),
            dino=dino,
            nearest_reference=float(nearest.max()),
            copies=0 if limit is None else int((nearest > limit).sum()),
            masks=int(self.has_mask[rows].sum()),
            empty_masks=int((self.has_mask & ~self.has_crop)[rows].sum()),
        )

    def real(self) -> RealImages:
        """Scores of the training images among themselves."""
        return RealImages(
            among_themselves(self.references),
            among_themselves(self.masked_references),
            None if self.dino_references is None else among_themselves(self.dino_references),
            copy_limit(self.references),
            len(self.references),
            self.reference_masks,
            self.reference_masks - len(self.masked_references),
        )


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None

"""Folders of images to scores, concept by concept."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
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
from catversion_jax.models.embedders import ClipEmbedder, DinoEmbedder


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
            tuple(source.label for source in subject.held_out),
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
        # an empty edit text has no score; its place is taken by the prompt and never read
        edit_vectors = self.clip.texts([edit or f for edit, f in zip(edits, filled, strict=True)])
        trained = self._photos(references)
        held_out = None if references.held_out is None else self._photos(references.held_out)
        return _Vectors(
            generated=self.clip.images(pixels),
            trained=trained,
            held_out=held_out,
            masked=self.clip.images([crop for crop in crops if crop is not None]),
            has_crop=np.array([crop is not None for crop in crops]),
            has_mask=np.array([mask is not None for mask in masks]),
            edits=edit_vectors[number],
            has_edit=np.array([bool(edits[i]) for i in number]),
            prompts=self.clip.texts(filled)[number],
            dino=None if self.dino is None else self.dino.images(pixels),
        )

    def _photos(self, references: References) -> _Photos:
        crops = [
            self._crop(p, m) for p, m in zip(references.pictures, references.masks, strict=True)
        ]
        return _Photos(
            whole=self.clip.images(references.pictures),
            masked=self.clip.images([crop for crop in crops if crop is not None]),
            masks=sum(mask is not None for mask in references.masks),
            dino=None if self.dino is None else self.dino.images(references.pictures),
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
class _Photos:
    """Unit vectors of photos; ``masked`` only of those with an object, ``masks`` of all that have a
    mask.
    """

    whole: Float[np.ndarray, "r E"]
    masked: Float[np.ndarray, "q E"]
    masks: int
    dino: Float[np.ndarray, "r F"] | None


@dataclasses.dataclass(frozen=True)
class _Vectors:
    """Unit vectors of one concept's images, row by row; ``masked`` only of those with an object."""

    generated: Float[np.ndarray, "n E"]
    trained: _Photos
    held_out: _Photos | None
    masked: Float[np.ndarray, "m E"]
    has_crop: np.ndarray
    has_mask: np.ndarray
    edits: Float[np.ndarray, "n E"]
    has_edit: np.ndarray
    prompts: Float[np.ndarray, "n E"]
    dino: Float[np.ndarray, "n F"] | None

    @property
    def photos(self) -> _Photos:
        """What images are compared with."""
        return self.trained if self.held_out is None else self.held_out

    def scores(self, rows: np.ndarray) -> Scores:
        """Scores of some of the images."""
        generated, photos = self.generated[rows], self.photos
        image = mean_pairwise_cosine(generated, photos.whole)
        crop_rows = (np.cumsum(self.has_crop) - 1)[rows[self.has_crop[rows]]]
        masked = mean_pairwise_cosine(self.masked[crop_rows], photos.masked)
        with_edit = rows[self.has_edit[rows]]
        text = _mean(matched_cosines(self.generated[with_edit], self.edits[with_edit]))
        nearest = nearest_reference(generated, self.trained.whole)
        limit = copy_limit(self.trained.whole)
        dino = None
        if self.dino is not None and photos.dino is not None:
            dino = mean_pairwise_cosine(self.dino[rows], photos.dino)
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
        """Scores of the training images among themselves, or against the held-out ones."""
        trained, held_out = self.trained, self.held_out

        def ceiling(of: Callable[[_Photos], np.ndarray | None]) -> float | None:
            left, right = of(trained), None if held_out is None else of(held_out)
            if left is None:
                return None
            return among_themselves(left) if right is None else mean_pairwise_cosine(left, right)

        return RealImages(
            ceiling(lambda photos: photos.whole),
            ceiling(lambda photos: photos.masked),
            ceiling(lambda photos: photos.dino),
            copy_limit(trained.whole),
            len(trained.whole),
            trained.masks,
            trained.masks - len(trained.masked),
        )


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None

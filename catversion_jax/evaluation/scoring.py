"""Folders of images to scores, concept by concept."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Container, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from catversion_jax.array_types import Float
from catversion_jax.concepts.mask_files import MaskMaker, write_mask
from catversion_jax.evaluation.alignment import (
    among_themselves,
    copy_limit,
    matched_cosines,
    mean_nearest_cosine,
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
from catversion_jax.evaluation.scores import PromptScores, RealImages, Scores, SubjectScores
from catversion_jax.evaluation.subjects import References, Subject
from catversion_jax.evaluation.vectors import Judged, View
from catversion_jax.models.embedders import ClipEmbedder, DinoEmbedder, ImageEmbedder


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

    def score(
        self,
        subject: Subject,
        references: References,
        folder: Path,
        only: Container[Path] | None = None,
    ) -> SubjectScores:
        """Score the images in ``folder/<concept>``, or those of them that are among ``only``.

        Raises:
          CatVersionError: no image there, or one that cannot be read.
        """
        prompts = self.prompt_set.of(subject.base_class)
        found, ignored = find_images(folder / subject.name, prompts, subject.base_class, only)
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
            vectors.judged(),
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
        look = functools.partial(_view, pixels=pixels, masks=masks, references=references)
        dino = self.dino
        # an empty edit text has no score; its place is taken by the prompt and never read
        edit_vectors = self.clip.texts([edit or f for edit, f in zip(edits, filled, strict=True)])
        return _Vectors(
            whole=look(self.clip),
            masked=look(self.clip, masked=True),
            dino=None if dino is None else look(dino),
            dino_masked=look(dino, masked=True) if dino and dino.judges_objects else None,
            judge="CLIP" if dino is None else dino.kind,
            held_out=references.held_out is not None,
            has_crop=np.array([mask is not None and bool((mask >= 128).any()) for mask in masks]),
            has_mask=np.array([mask is not None for mask in masks]),
            trained_masks=sum(mask is not None for mask in references.masks),
            edits=edit_vectors[number],
            has_edit=np.array([bool(edits[i]) for i in number]),
            prompts=self.clip.texts(filled)[number],
        )

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


def _view(
    embedder: ImageEmbedder,
    *,
    pixels: Sequence[np.ndarray],
    masks: Sequence[np.ndarray | None],
    references: References,
    masked: bool = False,
) -> View:
    """Pictures and photos as an embedder sees them: whole, or those with an object, that alone."""

    def vectors(pictures: Sequence[np.ndarray], of: Sequence[np.ndarray | None]) -> np.ndarray:
        if not masked:
            return embedder.images(pictures)
        pairs = zip(pictures, of, strict=True)
        crops = [masked_crop(p, mask, embedder.mean) for p, mask in pairs if mask is not None]
        return embedder.images([crop for crop in crops if crop is not None])

    trained, held_out = vectors(references.pictures, references.masks), references.held_out
    photos = trained if held_out is None else vectors(held_out.pictures, held_out.masks)
    return View(vectors(pixels, masks), photos, trained)


@dataclasses.dataclass(frozen=True)
class _Vectors:
    """Unit vectors of one concept's images, row by row; the masked ones only of those with an
    object.
    """

    whole: View
    masked: View
    dino: View | None
    dino_masked: View | None
    judge: str
    held_out: bool
    has_crop: np.ndarray
    has_mask: np.ndarray
    trained_masks: int
    edits: Float[np.ndarray, "n E"]
    has_edit: np.ndarray
    prompts: Float[np.ndarray, "n E"]

    def scores(self, rows: np.ndarray) -> Scores:
        """Scores of some of the images."""
        generated = self.whole.drawn[rows]
        image = mean_pairwise_cosine(generated, self.whole.photos)
        crop_rows = (np.cumsum(self.has_crop) - 1)[rows[self.has_crop[rows]]]
        masked = mean_pairwise_cosine(self.masked.drawn[crop_rows], self.masked.photos)
        with_edit = rows[self.has_edit[rows]]
        text = _mean(matched_cosines(self.whole.drawn[with_edit], self.edits[with_edit]))
        nearest = nearest_reference(generated, self.whole.trained)
        limit = copy_limit(self.whole.trained)
        dino = dino_max = dino_masked = dino_masked_max = None
        if self.dino is not None:
            dino = mean_pairwise_cosine(self.dino.drawn[rows], self.dino.photos)
        if self.dino is not None and self.dino_masked is not None:
            crops, photos = self.dino_masked.drawn[crop_rows], self.dino_masked.photos
            dino_max = mean_nearest_cosine(self.dino.drawn[rows], self.dino.photos)
            dino_masked = mean_pairwise_cosine(crops, photos)
            dino_masked_max = mean_nearest_cosine(crops, photos)
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
            dino_max=dino_max,
            dino_masked=dino_masked,
            dino_masked_max=dino_masked_max,
        )

    def judged(self) -> Judged:
        """What a gallery compares: vectors of DINOv2 or the judge, CLIP's without them."""
        if self.dino is not None and self.dino_masked is not None:
            return Judged(self.judge, self.dino, self.dino_masked, self.held_out)
        return Judged("CLIP", self.whole, self.masked, self.held_out)

    def real(self) -> RealImages:
        """Scores of the training images among themselves, or against the held-out ones."""

        def ceiling(view: View | None) -> float | None:
            if view is None:
                return None
            if self.held_out:
                return mean_pairwise_cosine(view.trained, view.photos)
            return among_themselves(view.trained)

        return RealImages(
            ceiling(self.whole),
            ceiling(self.masked),
            ceiling(self.dino),
            copy_limit(self.whole.trained),
            len(self.whole.trained),
            self.trained_masks,
            self.trained_masks - len(self.masked.trained),
            ceiling(self.dino_masked),
        )


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None

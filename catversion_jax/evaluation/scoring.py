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
from catversion_jax.evaluation.vectors import Judged, Photos, View
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
        crops = _crops(pixels, masks, self.clip)
        # an empty edit text has no score; its place is taken by the prompt and never read
        edit_vectors = self.clip.texts([edit or f for edit, f in zip(edits, filled, strict=True)])
        trained = self._photos(references)
        held_out = None if references.held_out is None else self._photos(references.held_out)
        return _Vectors(
            generated=self.clip.images(pixels),
            trained=trained,
            held_out=held_out,
            masked=_embedded(crops, self.clip),
            has_crop=np.array([crop is not None for crop in crops]),
            has_mask=np.array([mask is not None for mask in masks]),
            edits=edit_vectors[number],
            has_edit=np.array([bool(edits[i]) for i in number]),
            prompts=self.clip.texts(filled)[number],
            dino=None if self.dino is None else self.dino.images(pixels),
            dino_masked=self._dino_masked(pixels, masks),
            judge="CLIP" if self.dino is None else self.dino.kind,
        )

    def _dino_masked(
        self, pixels: Sequence[np.ndarray], masks: Sequence[np.ndarray | None]
    ) -> np.ndarray | None:
        if self.dino is None or not self.dino.judges_objects:
            return None
        return _embedded(_crops(pixels, masks, self.dino), self.dino)

    def _photos(self, references: References) -> Photos:
        pictures, masks = references.pictures, references.masks
        return Photos(
            whole=self.clip.images(pictures),
            masked=_embedded(_crops(pictures, masks, self.clip), self.clip),
            masks=sum(mask is not None for mask in masks),
            dino=None if self.dino is None else self.dino.images(pictures),
            dino_masked=self._dino_masked(pictures, masks),
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


def _crops(
    pictures: Sequence[np.ndarray], masks: Sequence[np.ndarray | None], embedder: ImageEmbedder
) -> list[np.ndarray | None]:
    """Objects alone, on the colour that the embedder sees as zero; None without an object."""
    return [
        None if mask is None else masked_crop(picture, mask, embedder.mean)
        for picture, mask in zip(pictures, masks, strict=True)
    ]


def _embedded(crops: Sequence[np.ndarray | None], embedder: ImageEmbedder) -> np.ndarray:
    return embedder.images([crop for crop in crops if crop is not None])


@dataclasses.dataclass(frozen=True)
class _Vectors:
    """Unit vectors of one concept's images, row by row; ``masked`` only of those with an object."""

    generated: Float[np.ndarray, "n E"]
    trained: Photos
    held_out: Photos | None
    masked: Float[np.ndarray, "m E"]
    has_crop: np.ndarray
    has_mask: np.ndarray
    edits: Float[np.ndarray, "n E"]
    has_edit: np.ndarray
    prompts: Float[np.ndarray, "n E"]
    dino: Float[np.ndarray, "n F"] | None
    dino_masked: Float[np.ndarray, "m F"] | None
    judge: str

    @property
    def photos(self) -> Photos:
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
        dino = dino_max = dino_masked = dino_masked_max = None
        if self.dino is not None and photos.dino is not None:
            dino = mean_pairwise_cosine(self.dino[rows], photos.dino)
        if self.dino_masked is not None and photos.dino_masked is not None:
            crops = self.dino_masked[crop_rows]
            dino_max = mean_nearest_cosine(self.dino[rows], photos.dino)
            dino_masked = mean_pairwise_cosine(crops, photos.dino_masked)
            dino_masked_max = mean_nearest_cosine(crops, photos.dino_masked)
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
        trained, photos = self.trained, self.photos
        if self.dino_masked is not None:
            judge = self.judge
            whole = View(self.dino, photos.dino, trained.dino)
            masked = View(self.dino_masked, photos.dino_masked, trained.dino_masked)
        else:
            judge = "CLIP"
            whole = View(self.generated, photos.whole, trained.whole)
            masked = View(self.masked, photos.masked, trained.masked)
        return Judged(judge, whole, masked, self.held_out is not None)

    def real(self) -> RealImages:
        """Scores of the training images among themselves, or against the held-out ones."""
        trained, held_out = self.trained, self.held_out

        def ceiling(of: Callable[[Photos], np.ndarray | None]) -> float | None:
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
            ceiling(lambda photos: photos.dino_masked),
        )


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None

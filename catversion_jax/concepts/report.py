"""What a user should know about a concept before training it: every image decoded, no accelerator,
no jax.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from catversion_jax.concepts import ConceptSpec, ImageSource, concept_prompts
from catversion_jax.concepts.images import Alpha, decode_upright
from catversion_jax.concepts.quarantine import concept_errors, grouped
from catversion_jax.errors import ConceptError, listed, shown
from catversion_jax.models.clip.tokenizer import Tokenizer

# CatVersion and its peers train on this many images.
USUAL_IMAGES = (3, 10)
_THUMBNAIL_SIDE = 16
# Mean colour difference of two thumbnails, relative to their own contrast. Rescaled and
# recompressed copies of photos measure 0.02, crops by a few percent 0.2, different photos of one
# object 0.45 and more.
_NEARLY_SAME = 0.25
# Photos of one moment have names that follow each other: so many are compared with each.
_NEIGHBOURS = 20
_MOST_LISTED = 20


@dataclasses.dataclass(frozen=True)
class ConceptReport:
    """One line of ``catversion check``. A concept with ``problems`` would be quarantined in
    training.
    """

    name: str
    base_class: str
    class_forms: tuple[str, ...]
    num_images: int
    num_masks: int
    smallest_side: int | None
    prompts: tuple[str, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    problems: tuple[str, ...]
    skipped: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _ImageFacts:
    label: str
    size: tuple[int, int]
    transparent: bool
    has_mask: bool
    mask_fault: str | None
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    digest: bytes
    thumbnail: np.ndarray


def report_concept(
    spec: ConceptSpec,
    *,
    resolution: int,
    alpha: Alpha = "white",
    templates: str | Sequence[str] = "default",
    default_when: str = "class_word",
    tokenizer: Tokenizer | None = None,
) -> ConceptReport:
    """Decode a concept's images and look for what usually goes wrong.

    Args:
      spec: the concept.
      resolution: training size in pixels; smaller images would be scaled up.
      alpha: what transparency will be used for.
      templates: the run's prompt templates.
      default_when: the run's ``when``.
      tokenizer: of the model, to see whether words and prompts fit; None leaves that out.
    """
    facts: list[_ImageFacts] = []
    problems: list[str] = []
    num_masks = 0
    for number, source in enumerate((*spec.images, *spec.eval_images)):
        try:
            with concept_errors(f"{source.label}: cannot be read"):
                facts.append(_image_facts(source, alpha))
                num_masks += facts[-1].has_mask and number < len(spec.images)
        except ConceptError as error:
            problems.append(str(error))
    prompts: tuple[str, ...] = ()
    warnings = [*spec.warnings, *_count_warnings(len(spec.images))]
    try:
        prompts = concept_prompts(spec, templates, default_when=default_when)
    except ConceptError as error:
        problems.append(str(error))
    if tokenizer is not None:
        try:
            with concept_errors(f"{spec.name}: its words cannot be tokenized"):
                warnings += _token_warnings(spec.base_class, prompts, tokenizer)
        except ConceptError as error:
            problems.append(str(error))
    warnings += _image_warnings(facts, resolution, alpha)
    return ConceptReport(
        name=spec.name,
        base_class=spec.base_class,
        class_forms=spec.class_forms,
        num_images=len(spec.images),
        num_masks=num_masks,
        smallest_side=min((min(fact.size) for fact in facts), default=None),
        prompts=prompts,
        warnings=tuple(warnings),
        notes=(*spec.notes, *grouped((f.label, note) for f in facts for note in f.notes)),
        problems=tuple(problems),
        skipped=spec.skipped,
    )


def _image_facts(source: ImageSource, alpha: Alpha) -> _ImageFacts:
    image = decode_upright(source, alpha=alpha)
    opaque = image.picture
    small = opaque.resize((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE), Image.Resampling.BOX)
    return _ImageFacts(
        label=source.label,
        size=opaque.size,
        transparent=image.transparency is not None,
        has_mask=image.mask is not None,
        mask_fault=image.mask_fault,
        notes=image.notes,
        warnings=image.warnings,
        digest=hashlib.sha256(repr(opaque.size).encode() + opaque.tobytes()).digest(),
        thumbnail=np.asarray(small, np.float64),
    )


def _count_warnings(count: int) -> list[str]:
    low, high = USUAL_IMAGES
    if count < low:
        return [f"only {count} image{'s' if count > 1 else ''}; {low} to {high} are usual"]
    return [f"{count} images; {low} to {high} are usual"] if count > high else []


def _image_warnings(facts: Sequence[_ImageFacts], resolution: int, alpha: Alpha) -> list[str]:
    warnings = grouped((fact.label, text) for fact in facts for text in fact.warnings)
    faults = grouped((f.label, f"the mask {f.mask_fault}") for f in facts if f.mask_fault)
    warnings += [f"{fault} (masked_training refuses it; see mask_polarity)" for fault in faults]
    if small := [f"{f.label} {f.size[0]}x{f.size[1]}" for f in facts if min(f.size) < resolution]:
        warnings.append(f"smaller than {resolution}, will be scaled up: {', '.join(small)}")
    warnings += _repetition_warnings(facts)
    masked = sum(fact.has_mask for fact in facts)
    if 0 < masked < len(facts):
        without = ", ".join(fact.label for fact in facts if not fact.has_mask)
        warnings.append(f"masks for {masked} of {len(facts)} images only; without: {without}")
    if alpha == "white" and (see_through := [fact.label for fact in facts if fact.transparent]):
        warnings.append(
            f"transparent parts become white (alpha=mask also masks them): {', '.join(see_through)}"
        )
    return warnings


def _repetition_warnings(facts: Sequence[_ImageFacts]) -> list[str]:
    """Pictures that are there several times; the time grows in proportion to their number."""
    if not facts:
        return []
    warnings = []
    thumbnails = np.stack([fact.thumbnail for fact in facts])
    contrasts = np.abs(thumbnails - thumbnails.mean(axis=(1, 2), keepdims=True)).mean(
        axis=(1, 2, 3)
    )
    last_of: dict[bytes, _ImageFacts] = {}
    for place, fact in enumerate(facts):
        if (twin := last_of.get(fact.digest)) is not None:
            warnings.append(f"{twin.label} and {fact.label} are the same picture")
        last_of[fact.digest] = fact
        before = slice(max(place - _NEIGHBOURS, 0), place)
        difference = np.abs(thumbnails[before] - thumbnails[place]).mean(axis=(1, 2, 3))
        # + 1 grey level: blank pictures have none
        contrast = (contrasts[before] + contrasts[place]) / 2 + 1.0
        for other, relative in zip(facts[before], difference / contrast, strict=True):
            if relative < _NEARLY_SAME and other.digest != fact.digest:
                warnings.append(f"{other.label} and {fact.label} are nearly the same picture")
    return listed(warnings, _MOST_LISTED)


def _token_warnings(base_class: str, prompts: Sequence[str], tokenizer: Tokenizer) -> list[str]:
    warnings = []
    # start and end token
    length, room = len(tokenizer.word_ids(base_class)), tokenizer.model_max_length - 2
    if length > room:
        warnings.append(
            f"base class {base_class!r} has {length} tokens, the model reads only {room}"
        )
    for prompt in prompts:
        if cut := tokenizer.cut_off(prompt):
            warnings.append(
                f"prompt {shown(prompt)} is longer than the model reads; cut off: {shown(cut)}"
            )
    return warnings

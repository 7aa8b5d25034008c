"""What to personalize: concepts, read from any of the usual layouts and checked before anything is
loaded.

One broken concept among many becomes a :class:`ConceptProblem` and the others go on. Mistakes in
the list as a whole (nothing found, two concepts of one name) are raised, all at once. ``layouts``
knows the layouts, ``folders`` tells images from masks.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from catversion_jax.concepts.captions import caption_prompts
from catversion_jax.concepts.class_words import LONGEST_WORDS, are_plain_words
from catversion_jax.concepts.entries import Entry
from catversion_jax.concepts.entry_images import images_of
from catversion_jax.concepts.fields import (
    PROMPT_KEYS,
    class_forms_field,
    mask_polarity_field,
    prompts_field,
    random_flip_field,
    seed_field,
    when_field,
)
from catversion_jax.concepts.folders import FolderImages, ImageSource, MaskPolarity, list_images
from catversion_jax.concepts.held_out import check_holdout, held_out_note, split_last
from catversion_jax.concepts.layouts import read_entries
from catversion_jax.concepts.names import with_sound_names
from catversion_jax.concepts.prompts import fill_template, prompt_templates
from catversion_jax.concepts.quarantine import concept_errors
from catversion_jax.config import DataOptions
from catversion_jax.errors import CatVersionError, ConceptError, did_you_mean, shown
from catversion_jax.runtime.shards import WHOLE, Shard, find_shard

KNOWN_KEYS = (
    "name",
    "path",
    "base_class",
    "class_forms",
    *PROMPT_KEYS,
    "seed",
    "random_flip",
    "when",
    "images",
    "eval_images",
    "masks",
    "mask_polarity",
)


@dataclasses.dataclass(frozen=True)
class ConceptSpec:
    """One concept to train.

    Attributes:
      name: also its output folder's name; unique in the list.
      base_class: the word or words that invoke it, such as ``teapot`` or ``stuffed animal``.
      images: training images in natural order, each with its mask when one was found.
      prompts: training prompts or templates of its own; empty means the run's.
      seed: a seed of its own, or None for the run's.
      random_flip: probability of a horizontal flip, or None for the run's.
      when: ``class_word`` or ``always``, or None for the run's.
      skipped: names in its folder that are not training images.
      warnings: what a user should look at before training; shown by ``catversion check``.
      notes: remarks that ask for no correction.
      class_forms: further forms of the base class that call the concept, such as its plural.
      eval_images: photos that are held out from training; evaluation scores against them.
    """

    name: str
    base_class: str
    images: tuple[ImageSource, ...]
    prompts: tuple[str, ...] = ()
    seed: int | None = None
    random_flip: float | None = None
    when: str | None = None
    skipped: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    class_forms: tuple[str, ...] = ()
    eval_images: tuple[ImageSource, ...] = ()


@dataclasses.dataclass(frozen=True)
class ConceptProblem:
    """A concept that cannot be trained, and why."""

    name: str
    message: str


@dataclasses.dataclass(frozen=True)
class ConceptList:
    """All concepts of one source.

    Attributes:
      concepts: those that can be trained, in the order of the source.
      problems: those that cannot, each with the reason.
      skipped: entries of the source that belong to no concept.
      notes: remarks on the source as a whole.
    """

    concepts: tuple[ConceptSpec, ...]
    problems: tuple[ConceptProblem, ...] = ()
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def part(self, shard: Shard) -> ConceptList:
        """The concepts and problems that belong to ``shard``."""
        return dataclasses.replace(
            self,
            concepts=tuple(spec for spec in self.concepts if shard.holds(spec.name)),
            problems=tuple(problem for problem in self.problems if shard.holds(problem.name)),
        )


def read_configured_concepts(options: DataOptions, default_when: str) -> ConceptList:
    """:func:`read_concepts` with what a run's options say; ``default_when`` is the run's ``when``.

    Raises:
      CatVersionError: as for :func:`read_concepts`.
    """
    return read_concepts(
        options.concepts,
        base_class=options.base_class,
        dataset_split=options.dataset_split,
        image_column=options.image_column,
        concept_column=options.concept_column,
        base_class_column=options.base_class_column,
        default_when=default_when,
        mask_polarity=options.mask_polarity,
        max_megapixels=options.max_megapixels,
        holdout=options.holdout,
        shard=find_shard(options.shard or str(WHOLE), os.environ),
    )


def read_concepts(
    source: str | Path,
    *,
    base_class: str | None = None,
    dataset_split: str = "train",
    image_column: str = "image",
    concept_column: str | None = None,
    base_class_column: str | None = None,
    default_when: str = "class_word",
    mask_polarity: MaskPolarity | None = DataOptions.mask_polarity,
    max_megapixels: float = DataOptions.max_megapixels,
    holdout: int = DataOptions.holdout,
    shard: Shard = WHOLE,
) -> ConceptList:
    """Find the concepts of ``source`` and check them. No image is decoded.

    Args:
      source: a folder of images, a folder of such folders, a YAML/JSON/JSONL/CSV manifest, Custom
        Diffusion's ``concepts_list.json``, OneTrainer's ``concepts.json``, kohya's project folder
        or dataset file, a DreamBench folder, or a Hugging Face dataset (folder, or
        ``hf:owner/name``).
      base_class: of the concepts that do not name their own. For a single folder it also overrides
        ``concept.json``, as a command line overrides a file.
      dataset_split: split of a Hugging Face dataset.
      image_column: its image column.
      concept_column: its column that names the concept of a row; None makes the dataset one
        concept.
      base_class_column: its column with the base class.
      default_when: the run's choice for concepts that make none; under ``always`` prompts need no
        class word.
      mask_polarity: what the object is in mask files, for concepts that do not say.
      max_megapixels: most pixels of an image, in millions, that will be decoded.
      holdout: number of each concept's last images that are held out from training, where at least
        3 are left and the concept has no ``eval_images`` of its own.
      shard: the part of the list that is wanted; nothing of the other concepts is looked at but
        their names. It may be empty.

    Raises:
      CatVersionError: the source is not found or not understood, the whole list holds no usable
        concept, or has duplicate names. The message lists everything that is wrong.
    """
    check_holdout(holdout)
    with concept_errors(f"{shown(str(source))[1:-1]}: cannot be read as concepts"):
        layout = read_entries(
            source,
            dataset_split=dataset_split,
            image_column=image_column,
            concept_column=concept_column,
            base_class_column=base_class_column,
        )
    entries = [entry for entry in with_sound_names(layout.entries) if shard.holds(entry.name)]
    read = functools.partial(
        read_entry,
        base_class=base_class,
        single=layout.single,
        default_when=default_when,
        mask_polarity=mask_polarity,
        max_megapixels=max_megapixels,
        holdout=holdout,
        list_folder=functools.cache(list_images),
    )
    concepts: list[ConceptSpec] = []
    problems: list[ConceptProblem] = []
    for entry in entries:
        try:
            concepts.append(read(entry))
        except ConceptError as error:
            problems.append(ConceptProblem(entry.name, str(error)))
    if not concepts and not (shard.count > 1 and layout.entries):
        reasons = [problem.message for problem in problems]
        raise CatVersionError("\n".join(reasons) or f"{source}: no concept found.")
    return ConceptList(tuple(concepts), tuple(problems), layout.skipped, layout.notes)


def read_entry(
    entry: Entry,
    *,
    base_class: str | None,
    single: bool,
    default_when: str,
    mask_polarity: MaskPolarity | None,
    max_megapixels: float,
    holdout: int,
    list_folder: Callable[[Path], FolderImages],
) -> ConceptSpec:
    """One concept of a source, checked; no image is decoded.

    Args:
      entry: what the source says of it.
      base_class, default_when, mask_polarity, max_megapixels, holdout: as for
        :func:`read_concepts`.
      single: whether the source is this concept alone.
      list_folder: lists a folder in which listed images lie; many concepts may lie in one.

    Raises:
      ConceptError: it cannot be used.
    """
    with concept_errors(f"{entry.where}: cannot be read"):
        spec = _build_concept(
            entry,
            base_class,
            single,
            default_when,
            mask_polarity,
            max_megapixels,
            holdout,
            list_folder,
        )
        concept_prompts(spec, "default", default_when=default_when)
    return spec


def concept_prompts(
    spec: ConceptSpec, default_templates: str | Sequence[str], *, default_when: str = "class_word"
) -> tuple[str, ...]:
    """The training prompts of a concept, placeholders filled with its base class.

    Args:
      spec: its own prompts are used when it has some.
      default_templates: the run's templates: texts with ``{}`` or ``{base_class}``, or
        ``'object'``/``'style'``.
      default_when: the run's ``when``, for a concept that has none.

    Raises:
      ConceptError: a prompt lacks the base-class words (unless ``when`` is ``always``), or has
        another placeholder.
    """
    templates = spec.prompts or prompt_templates(default_templates)
    needed = (spec.when or default_when) != "always"
    return tuple(
        fill_template(
            template,
            spec.base_class,
            where=spec.name,
            needs_class_word=needed,
            class_forms=spec.class_forms,
        )
        for template in templates
    )


def _build_concept(
    entry: Entry,
    argument: str | None,
    overrides: bool,
    default_when: str,
    mask_polarity: MaskPolarity | None,
    max_megapixels: float,
    holdout: int,
    list_folder: Callable[[Path], FolderImages],
) -> ConceptSpec:
    if entry.problem:
        raise ConceptError(entry.problem)
    notes = list(entry.notes)
    fields = _checked_keys(entry, notes)
    found = images_of(entry, fields, list_folder)
    base_class = _base_class(fields, entry, argument, overrides, notes)
    polarity = mask_polarity_field(fields.get("mask_polarity"), entry.where) or mask_polarity
    images, held_out = (
        tuple(
            dataclasses.replace(source, mask_polarity=polarity, max_megapixels=max_megapixels)
            for source in sources
        )
        for sources in (found.images, found.held_out)
    )
    if holdout and not held_out:
        images, held_out, remark = split_last(images, holdout)
        notes += [remark] if remark else []
    notes += [held_out_note(held_out)] if held_out else []
    when = when_field(fields.get("when"), entry.where)
    prompts = prompts_field(fields, entry.where)
    class_forms = class_forms_field(fields.get("class_forms"), base_class, entry.where)
    captions, remarks = caption_prompts(
        images,
        (base_class, *class_forms),
        needs_class_word=(when or default_when) != "always",
        wanted=not prompts,
    )
    notes += remarks
    return ConceptSpec(
        name=entry.name,
        base_class=base_class,
        images=images,
        prompts=prompts or captions,
        seed=seed_field(fields.get("seed"), entry.where),
        random_flip=random_flip_field(fields.get("random_flip"), entry.where),
        when=when,
        skipped=found.skipped,
        warnings=found.warnings,
        notes=tuple(notes),
        class_forms=class_forms,
        eval_images=held_out,
    )


def _checked_keys(entry: Entry, notes: list[str]) -> dict[str, Any]:
    """Known keys with a value. A near-miss of a known key is an error, anything else is
    descriptive.
    """
    unknown = [key for key in entry.fields if key not in KNOWN_KEYS]
    mistakes = []
    for key in unknown:
        if hint := did_you_mean(str(key).casefold(), KNOWN_KEYS, cutoff=0.75):
            mistakes.append(f"{entry.where}: unknown key {shown(key)}.{hint}")
    if mistakes:
        raise ConceptError("\n".join(mistakes))
    if unknown:
        listed = ", ".join(
            shown(key)[1:-1] if isinstance(key, str) else shown(key) for key in unknown
        )
        notes.append(f"keys without effect: {listed[:300]}")
    return {
        key: value
        for key, value in entry.fields.items()
        if key in KNOWN_KEYS and value not in (None, "")
    }


def _base_class(
    fields: Mapping[str, Any], entry: Entry, argument: str | None, overrides: bool, notes: list[str]
) -> str:
    own = fields.get("base_class")
    if own is not None and not isinstance(own, str):
        raise ConceptError(
            f"{entry.where}: base_class={shown(own)}: must be text; put it in quotes."
        )
    if own and argument and own != argument:
        used = argument if overrides else own
        notes.append(f"base_class {shown(used)} used, not {shown(own if overrides else argument)}")
        own = used
    words = " ".join((own or argument or "").split())
    if not words:
        raise ConceptError(
            f"{entry.where}: no base class. Say what it is a kind of: base_class=teapot on the "
            f'command line, or {{"base_class": "teapot"}} in {entry.base_class_home}.'
        )
    if not are_plain_words(words, LONGEST_WORDS):
        raise ConceptError(
            f"{entry.where}: base_class={shown(words)}: must be plain words such as 'teapot' or "
            f"'stuffed animal', without placeholders, at most {LONGEST_WORDS} characters."
        )
    return words

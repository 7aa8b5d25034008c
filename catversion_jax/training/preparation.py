"""From concepts on disk to rows of the program: images encoded, prompts encoded, start
values made.

Everything here happens per concept, with programs of fixed shape, so that a row never depends on
its neighbours.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from catversion_jax.concepts import ConceptSpec, concept_prompts
from catversion_jax.concepts.images import LoadedImage
from catversion_jax.concepts.latents import EncodedConcept, encode_concept, load_concept_images
from catversion_jax.concepts.quarantine import concept_errors
from catversion_jax.concepts.repainting import areas_to_repaint
from catversion_jax.config import DataOptions, MethodOptions, ObjectiveOptions
from catversion_jax.errors import CatVersionError, ConceptError, shown
from catversion_jax.methods.learned import Learned, stack_learned
from catversion_jax.methods.table import method_for
from catversion_jax.models.clip.text_projection import TextStates
from catversion_jax.models.stable_diffusion import Backbone
from catversion_jax.models.text_encoders import LowerStates
from catversion_jax.training.predicted_start import StartPredictor
from catversion_jax.training.prompt_states import (
    check_prompts_fit,
    empty_prompt,
    lower_text,
    plain_states,
)
from catversion_jax.training.required_masks import with_required_masks
from catversion_jax.training.run.directory import READERS
from catversion_jax.training.run.identity import changed_content, image_digests, token_digest
from catversion_jax.training.run.records import ConceptRecord
from catversion_jax.training.start_values import init_learned
from catversion_jax.training.state import ConceptData, concept_key

logger = logging.getLogger(__name__)

States = TypeVar("States", tuple[LowerStates, ...], TextStates | None)


@dataclasses.dataclass(frozen=True)
class PreparedConcept:
    """One concept, ready to take a row.

    Attributes:
      spec: what the user gave.
      record: what its concept file will say beside the numbers.
      learned: start values, leaves ``[L P N H]`` or ``[V D]``.
      encoded: VAE posterior of its images.
      text: of each text encoder its prompts ``[K T D]``, entering the first adapted layer.
      plain_text: the same of the prompts without room for learned vectors.
      plain: what the plain model makes of the prompts, where it is preserved; else None.
      prompts: the K training prompts.
      references: a few of its images, ``[H W 3]`` uint8, for the sample grids.
      own_start: start values without the prediction, where there is one: what ``learned`` falls
        back to where the prediction is no better than the plain model.
    """

    spec: ConceptSpec
    record: ConceptRecord
    learned: Learned
    encoded: EncodedConcept
    text: tuple[LowerStates, ...]
    plain_text: tuple[LowerStates, ...]
    prompts: tuple[str, ...]
    references: tuple[np.ndarray, ...]
    plain: TextStates | None = None
    own_start: Learned | None = None


def describe_concept(
    spec: ConceptSpec,
    backbone: Backbone,
    data: DataOptions,
    method: MethodOptions,
    *,
    seed: int,
    recorded: Mapping[str, Any],
    images: Mapping[str, Any],
    networks: Mapping[str, str],
) -> ConceptRecord:
    """What decides a concept's result; no image is decoded.

    Args:
      spec: what the user gave.
      backbone: the frozen networks.
      data: the run's prompts and flips, where the concept has none of its own.
      method: what is learned.
      seed: the run's, where the concept has none of its own.
      recorded: the run's options that decide the result, for the concept's file.
      images: digests of its images, and of its masks where they decide the result.
      networks: digests of the model, and of the concept encoder where there is one.

    Raises:
      ConceptError: a prompt does not name the concept, or ``when`` contradicts the method.
    """
    when = spec.when or method.when
    if when == "always" and method_for(method).replaces_word:
        raise ConceptError(
            f"{spec.name}: when=always: the vectors of method={method.method} stand for the class "
            "word, so they act only where that is written. Use when=class_word."
        )
    prompts = concept_prompts(spec, data.instance_prompt, default_when=method.when)
    return ConceptRecord(
        name=spec.name,
        base_class=spec.base_class,
        when=when,
        base_model=backbone.name,
        **backbone.fingerprints,
        images=tuple(source.label for source in spec.images),
        prompts=prompts,
        random_flip=data.random_flip if spec.random_flip is None else spec.random_flip,
        seed=seed if spec.seed is None else spec.seed,
        config={
            **recorded,
            "prediction_type": backbone.noise_schedule.prediction_type,
        },
        class_forms=spec.class_forms,
        digests={
            **images,
            "tokens": token_digest([read(list(prompts)) for read in backbone.tokenizers]),
            **networks,
        },
    )


def masks_decide(objective: ObjectiveOptions, backbone: Backbone) -> bool:
    """Whether object masks are part of what is learned: of the loss, or of the areas that an
    inpainting model is shown (``concepts/repainting.py``).
    """
    return bool(objective.needs_masks) or backbone.inpaints


def describe_concepts(
    specs: Sequence[ConceptSpec],
    backbone: Backbone,
    data: DataOptions,
    method: MethodOptions,
    *,
    seed: int,
    recorded: Mapping[str, Any],
    networks: Mapping[str, str],
    masked: bool,
) -> tuple[dict[str, ConceptRecord], dict[str, str]]:
    """The records of the concepts that can be trained, and why the others cannot, by name.

    Arguments are those of :func:`describe_concept`; ``masked`` says whether masks decide results.
    """
    records, failures = {}, {}
    with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
        hashed = [pool.submit(image_digests, spec, masked=masked) for spec in specs]
        for spec, images in zip(specs, hashed, strict=True):
            try:
                records[spec.name] = describe_concept(
                    spec,
                    backbone,
                    data,
                    method,
                    seed=seed,
                    recorded=recorded,
                    images=images.result(),
                    networks=networks,
                )
            except Exception as error:
                failures[spec.name] = concept_failure(spec.name, error)
    return records, failures


def concept_failure(name: str, error: Exception) -> str:
    """Why a concept is given up, whatever reading it raised, lack of memory included.

    Raises:
      Exception: ``error`` itself, where it is not the concept's: wrong options, or the device.
    """
    if isinstance(error, ConceptError):
        return str(error)
    if isinstance(error, CatVersionError | jax.errors.JaxRuntimeError):
        raise error
    logger.debug("%s", name, exc_info=error)
    kind = "out of memory" if isinstance(error, MemoryError) else type(error).__name__
    return f"{name}: cannot be read ({kind}: {shown(error)}). Look at its files and words."


def training_images(spec: ConceptSpec, backbone: Backbone, data: DataOptions) -> list[LoadedImage]:
    """The concept's images as square pixels of the training resolution.

    Raises:
      ConceptError: one or more cannot be used.
    """
    resolution = data.resolution or backbone.default_resolution
    return load_concept_images(spec, resolution=resolution, crop=data.crop, alpha=data.alpha)


def prepare_concept(
    spec: ConceptSpec,
    record: ConceptRecord,
    backbone: Backbone,
    data: DataOptions,
    method: MethodOptions,
    objective: ObjectiveOptions,
    predictor: StartPredictor | None = None,
    noise_seed: int | None = None,
    images: Sequence[LoadedImage] | None = None,
) -> PreparedConcept:
    """Read, check and encode one concept.

    Args:
      spec: what the user gave.
      record: what :func:`describe_concept` said of it.
      backbone: the frozen networks.
      data: how images become square pixels.
      method: what is learned.
      objective: whether the loss needs masks, and those that are missing are made.
      predictor: predicts the start values; None where they are those of ``method.init``.
      noise_seed: of the noise of the start values; None for the predictor's, or the concept's own.
      images: what :func:`training_images` gave; None decodes them.

    Raises:
      ConceptError: an image cannot be used or was changed since the record was made, a prompt has
        no room for the class word or for what is learned, or masks are missing where the loss needs
        them and ``make_masks`` is off.
    """
    prompts = record.prompts
    with concept_errors(f"{spec.name}: its prompts cannot be tokenized"):
        check_prompts_fit(record, backbone)
    if images is None:
        images = training_images(spec, backbone, data)
    if objective.needs_masks:
        images = with_required_masks(images, spec, objective, backbone)
    for image in images:
        for warning in image.warnings:
            logger.warning(f"{spec.name}: {image.label}: {warning}")
    digests = image_digests(spec, masked="masks" in record.digests)
    if changed := changed_content(record.digests, digests, record.images):
        raise ConceptError(
            f"{spec.name}: {'; '.join(changed)}: replaced after this run had begun. Run the same "
            "command again."
        )
    encoded = encode_concept(
        images,
        backbone.vae,
        latent_scale=backbone.latent_scale,
        latent_downsampling=backbone.latent_downsampling,
        repainted=[areas_to_repaint(image, record.seed, i) for i, image in enumerate(images)]
        if backbone.inpaints
        else None,
    )
    if (
        objective.masked_training
        and objective.unmasked_weight == 0
        and not objective.preserves
        and not encoded.mask.any((2, 3)).all()
    ):
        raise ConceptError(
            f"{spec.name}: with unmasked_weight=0 an image whose mask is empty (after the crop) "
            "has no loss. Correct the mask, or use a weight above 0 with another output_dir."
        )
    token_ids = [tokenizer(prompts) for tokenizer in backbone.tokenizers]
    word_positions = [
        tokenizer.word_positions(ids[0], record.class_words) or (0,)
        for tokenizer, ids in zip(backbone.tokenizers, token_ids, strict=True)
    ]
    if noise_seed is None:
        noise_seed = record.seed if predictor is None else predictor.encoder.noise_seed
    learned = init_learned(
        method,
        backbone.text_encoders,
        backbone.text_facts,
        [ids[0] for ids in token_ids],
        word_positions,
        noise_seed,
    )
    own_start = None
    if predictor is not None:
        own_start = jax.tree.map(np.asarray, learned)
        with concept_errors(f"{spec.name}: its start values cannot be predicted"):
            learned = predictor.start(images, spec.base_class, own_start)
    text, plain_text = lower_text(record, backbone, learned, token_ids)
    references = tuple(image.picture for image in images[:2])
    learned = jax.tree.map(np.asarray, learned)
    return PreparedConcept(
        spec=spec,
        record=record,
        learned=learned,
        encoded=encoded,
        text=text,
        plain_text=plain_text,
        prompts=prompts,
        references=references,
        plain=plain_states(backbone, plain_text, learned) if objective.preserves else None,
        own_start=own_start,
    )


def assemble_rows(
    rows: Sequence[PreparedConcept],
    backbone: Backbone,
    objective: ObjectiveOptions,
    *,
    max_images: int,
    max_prompts: int,
) -> tuple[Learned, ConceptData, ConceptData]:
    """Stack concepts, one for each row.

    Args:
      rows: the concept of each row.
      backbone: the frozen networks.
      objective: whether the loss needs masks, the plain model and the empty prompt.
      max_images: images of the largest concept of the whole run, so that shapes never change.
      max_prompts: training prompts of the one with most of them.

    Returns:
      Start values, data, and the data of the plain model, whose prompts hold no learned vectors.
    """
    num_rows = len(rows)
    empty_text = empty_plain = None
    if objective.caption_dropout > 0:
        learned = rows[0].learned
        empty = empty_prompt(backbone, learned)
        empty_text = jax.tree.map(lambda leaf: np.stack([leaf] * num_rows), empty)
        if objective.preserves:
            of_one = jax.tree.map(lambda leaf: leaf[None], empty)
            states = plain_states(backbone, of_one, learned)
            empty_plain = jax.tree.map(lambda leaf: np.stack([leaf[0]] * num_rows), states)
    arrays: dict[str, Any] = dict(
        rng=jnp.stack([concept_key(row.record.seed) for row in rows]),
        latent_mean=np.stack([padded(row.encoded.mean, max_images) for row in rows]),
        latent_std=np.stack([padded(row.encoded.std, max_images) for row in rows]),
        mask=np.stack([padded(row.encoded.mask, max_images) for row in rows])
        if objective.needs_masks
        else None,
        num_images=np.array([len(row.encoded.mean) for row in rows], np.int32),
        flip=np.array([row.record.random_flip for row in rows], np.float32),
        text=_stacked([row.text for row in rows], max_prompts),
        num_prompts=np.array([len(row.prompts) for row in rows], np.int32),
        empty_text=empty_text,
        time_ids=np.stack([padded(row.encoded.time_ids, max_images) for row in rows])
        if backbone.reads_time_ids
        else None,
        kept=np.stack(
            [padded(row.encoded.kept, max_images) for row in rows if row.encoded.kept is not None]
        )
        if backbone.inpaints
        else None,
        plain=_stacked([row.plain for row in rows], max_prompts),
        empty_plain=empty_plain,
    )
    data = ConceptData(**arrays)
    plain = data  # where there is no room for learned vectors, the plain model reads the same
    if any(
        one is not other
        for row in rows
        for one, other in zip(row.text, row.plain_text, strict=True)
    ):
        plain_text = _stacked([row.plain_text for row in rows], max_prompts)
        plain = dataclasses.replace(data, text=plain_text)
    return stack_learned([row.learned for row in rows]), data, plain


def _stacked(rows: Sequence[States], max_prompts: int) -> States:
    return jax.tree.map(
        lambda *leaves: np.stack([padded(leaf, max_prompts) for leaf in leaves]), *rows
    )


def padded(array: np.ndarray, length: int) -> np.ndarray:
    """``array`` with zeros behind it, so that its first axis has ``length``."""
    array = np.asarray(array)
    padding = np.zeros((length - len(array), *array.shape[1:]), array.dtype)
    return np.concatenate([array, padding])

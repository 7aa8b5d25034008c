"""From concepts on disk to rows of the program: images encoded, prompts encoded, start
values made.

Everything here happens per concept, with programs of fixed shape, so that a row never depends on
its neighbours.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from catversion_jax.concepts import ConceptSpec, concept_prompts
from catversion_jax.concepts.foreign_syntax import foreign_syntax
from catversion_jax.concepts.latents import EncodedConcept, encode_concept, load_concept_images
from catversion_jax.concepts.quarantine import concept_errors, grouped
from catversion_jax.config import DataOptions, MethodOptions, ObjectiveOptions
from catversion_jax.errors import CatVersionError, ConceptError, shown
from catversion_jax.methods.learned import Learned, stack_learned
from catversion_jax.methods.table import method_for
from catversion_jax.models.clip.tokenizer import PlacedPrompt
from catversion_jax.models.stable_diffusion import Backbone
from catversion_jax.models.weights.network import Network
from catversion_jax.training.run.directory import READERS
from catversion_jax.training.run.identity import changed_content, image_digests, token_digest
from catversion_jax.training.run.records import ConceptRecord
from catversion_jax.training.start_values import init_learned
from catversion_jax.training.state import ConceptData, concept_key

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PreparedConcept:
    """One concept, ready to take a row.

    Attributes:
      spec: what the user gave.
      record: what its concept file will say beside the numbers.
      learned: start values, leaves ``[L P N H]`` or ``[V D]``.
      encoded: VAE posterior of its images.
      text_hidden: ``[K T D]`` states of its prompts entering the first adapted layer.
      plain_hidden: ``[K T D]`` the same of the prompts without room for learned vectors.
      word_places: ``[K T]`` where the class word stands in them.
      prompts: the K training prompts.
      references: a few of its images, ``[H W 3]`` uint8, for the sample grids.
    """

    spec: ConceptSpec
    record: ConceptRecord
    learned: Learned
    encoded: EncodedConcept
    text_hidden: np.ndarray
    plain_hidden: np.ndarray
    word_places: np.ndarray
    prompts: tuple[str, ...]
    references: tuple[np.ndarray, ...]


def describe_concept(
    spec: ConceptSpec,
    backbone: Backbone,
    data: DataOptions,
    method: MethodOptions,
    *,
    seed: int,
    recorded: Mapping[str, Any],
    images: Mapping[str, Any],
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
        text_encoder_sha256=backbone.text_encoder_sha256,
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
            "tokens": token_digest(backbone.tokenizer(list(prompts))),
            **backbone.digests,
        },
    )


def describe_concepts(
    specs: Sequence[ConceptSpec],
    backbone: Backbone,
    data: DataOptions,
    method: MethodOptions,
    *,
    seed: int,
    recorded: Mapping[str, Any],
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


def prepare_concept(
    spec: ConceptSpec,
    record: ConceptRecord,
    backbone: Backbone,
    data: DataOptions,
    method: MethodOptions,
    objective: ObjectiveOptions,
) -> PreparedConcept:
    """Read, check and encode one concept.

    Args:
      spec: what the user gave.
      record: what :func:`describe_concept` said of it.
      backbone: the frozen networks.
      data: how images become square pixels.
      method: what is learned.
      objective: whether the loss needs masks.

    Raises:
      ConceptError: an image cannot be used or was changed since the record was made, a prompt has
        no room for the class word or for what is learned, or masks are missing where the loss needs
        them.
    """
    prompts = record.prompts
    with concept_errors(f"{spec.name}: its prompts cannot be tokenized"):
        _check_prompts_fit(record, backbone)
    resolution = data.resolution or backbone.default_resolution
    images = load_concept_images(spec, resolution=resolution, crop=data.crop, alpha=data.alpha)
    unmasked = [
        source.label
        for source, image in zip(spec.images, images, strict=True)
        if image.mask is None
    ]
    if objective.masked_training and unmasked:
        raise ConceptError(
            f"{spec.name}: masked_training=true, but {len(unmasked)} of {len(images)} images have "
            f"no mask ({', '.join(unmasked[:3])}). Add x.mask.png beside each (catversion masks "
            "makes them), or use alpha=mask or masked_training=false with another output_dir."
        )
    faults = [(i.label, f"the mask {i.mask_fault}") for i in images if i.mask_fault]
    if objective.masked_training and faults:
        raise ConceptError(
            f"{spec.name}: masked_training=true, but {len(faults)} of {len(images)} masks look "
            f"wrong ({'; '.join(grouped(faults)[:3])}). Correct them, or say what the object is "
            'in them with "mask_polarity": "white" or "black" in concept.json.'
        )
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
    )
    if (
        objective.masked_training
        and objective.unmasked_weight == 0
        and not encoded.mask.any((2, 3)).all()
    ):
        raise ConceptError(
            f"{spec.name}: with unmasked_weight=0 an image whose mask is empty (after the crop) "
            "has no loss. Correct the mask, or use a weight above 0 with another output_dir."
        )
    token_ids = backbone.tokenizer(prompts)
    word_positions = backbone.tokenizer.word_positions(token_ids[0], record.class_words)
    learned = init_learned(
        method,
        backbone.text_encoder,
        backbone.num_text_layers,
        token_ids[0],
        word_positions or (0,),
        record.seed,
    )
    placed = _place_prompts(record, backbone, learned)
    lower = functools.partial(lower_text_states, backbone.text_encoder, layer=learned.first_layer)
    text_hidden = plain_hidden = np.stack([lower(ids) for ids in token_ids])
    if learned.num_word_places is not None:  # the learned vectors' room moves the other tokens
        text_hidden = np.stack([lower(one.token_ids) for one in placed])
    references = tuple(
        np.round((image.pixels + 1) * 127.5).astype(np.uint8) for image in images[:2]
    )
    learned = jax.tree.map(np.asarray, learned)
    return PreparedConcept(
        spec=spec,
        record=record,
        learned=learned,
        encoded=encoded,
        text_hidden=text_hidden,
        plain_hidden=plain_hidden,
        word_places=np.stack([one.word_places[0] for one in placed]),
        prompts=prompts,
        references=references,
    )


def _place_prompts(
    record: ConceptRecord, backbone: Backbone, learned: Learned
) -> list[PlacedPrompt]:
    """The training prompts with room for what is learned.

    Raises:
      ConceptError: a prompt has no room for all learned vectors.
    """
    placed = [
        backbone.tokenizer.place(prompt, [record.class_words], [learned.num_word_places])
        for prompt in record.prompts
    ]
    needed = learned.num_word_places or 0
    for prompt, one in zip(record.prompts, placed, strict=True):
        if one.word_places.max(initial=-1) + 1 < needed:
            raise ConceptError(
                f"{record.name}: prompt {prompt!r} has no room for {needed} vectors in the model's "
                f"context of {backbone.tokenizer.model_max_length} tokens. Use fewer "
                "(num_vectors) or a shorter prompt."
            )
    return placed


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
      objective: whether the loss needs masks and the empty prompt.
      max_images: images of the largest concept of the whole run, so that shapes never change.
      max_prompts: training prompts of the one with most of them.

    Returns:
      Start values, data, and the data of the plain model, whose prompts hold no learned vectors.
    """
    num_rows = len(rows)
    empty_hidden = None
    if objective.caption_dropout > 0:
        layer = rows[0].learned.first_layer
        empty = lower_text_states(backbone.text_encoder, backbone.tokenizer([""])[0], layer)
        empty_hidden = np.stack([empty] * num_rows)
    arrays: dict[str, Any] = dict(
        rng=jnp.stack([concept_key(row.record.seed) for row in rows]),
        latent_mean=np.stack([_padded(row.encoded.mean, max_images) for row in rows]),
        latent_std=np.stack([_padded(row.encoded.std, max_images) for row in rows]),
        mask=np.stack([_padded(row.encoded.mask, max_images) for row in rows])
        if objective.masked_training
        else None,
        num_images=np.array([len(row.encoded.mean) for row in rows], np.int32),
        flip=np.array([row.record.random_flip for row in rows], np.float32),
        text_hidden=np.stack([_padded(row.text_hidden, max_prompts) for row in rows]),
        num_prompts=np.array([len(row.prompts) for row in rows], np.int32),
        empty_hidden=empty_hidden,
        word_places=np.stack([_padded(row.word_places, max_prompts) for row in rows]),
    )
    data = ConceptData(**arrays)
    plain_hidden = np.stack([_padded(row.plain_hidden, max_prompts) for row in rows])
    plain = ConceptData(**{**arrays, "text_hidden": plain_hidden})
    return stack_learned([row.learned for row in rows]), data, plain


def lower_text_states(text_encoder: Network, token_ids: np.ndarray, layer: int) -> np.ndarray:
    """States ``[T D]`` of one prompt ``[T]`` entering ``layer``, encoded alone."""
    return np.asarray(_lower(text_encoder, token_ids[None], layer)[0])


@functools.partial(jax.jit, static_argnames="layer")
def _lower(text_encoder: Network, token_ids: jax.Array, layer: int) -> jax.Array:
    return text_encoder.call("lower", token_ids, layer)


def _padded(array: np.ndarray, length: int) -> np.ndarray:
    array = np.asarray(array)
    padding = np.zeros((length - len(array), *array.shape[1:]), array.dtype)
    return np.concatenate([array, padding])


def _check_prompts_fit(record: ConceptRecord, backbone: Backbone) -> None:
    tokenizer = backbone.tokenizer
    if foreign := foreign_syntax(record.prompts):
        logger.warning(f"{record.name}: {foreign}")
    for prompt in record.prompts:
        lost = tokenizer.cut_off(prompt)
        if not lost:
            continue
        if record.when == "class_word" and not tokenizer.contains(prompt, record.class_words):
            raise ConceptError(
                f"{record.name}: the base class {record.base_class!r} does not fit into the "
                f"model's context of {tokenizer.model_max_length} tokens: prompt {prompt!r} loses "
                f"{lost!r}. Use shorter words."
            )
        logger.warning(
            f"{record.name}: prompt {prompt!r} is longer than the model reads; cut off: {lost!r}"
        )

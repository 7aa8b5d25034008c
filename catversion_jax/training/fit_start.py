"""Fitting a concept encoder to many concepts at once, through the frozen networks.

    (1)  L(weights) = mean_concepts  L_concept(start(photos without one; weights))

``L_concept`` is the ordinary loss of ``objective.py``, of one image of the concept: the one that
the encoder does not see (of a single photo it is that one). So it cannot learn to repeat a photo,
and what it says of a thing must hold for the next picture of it.

The concepts of a step are split over the devices; the gradient of the weights is the mean over all
of them, one all-reduce per step. That is the only collective of this package: concepts that are
trained exchange nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from catversion_jax.array_types import Bool, Float
from catversion_jax.concepts import ConceptSpec
from catversion_jax.config import DataOptions, FitOptions, MethodOptions, ObjectiveOptions
from catversion_jax.diffusion import noise_schedule
from catversion_jax.errors import CatVersionError
from catversion_jax.methods.concept_encoder import (
    MATCHING_OPTIONS,
    NUM_PHOTO_FEATURES,
    NUM_WORD_FEATURES,
    ConceptEncoder,
    Whitening,
    new_weights,
)
from catversion_jax.methods.learned import Learned, stack_learned
from catversion_jax.models.embedders import ClipEmbedder
from catversion_jax.models.stable_diffusion import Backbone
from catversion_jax.runtime.batches import full_batches
from catversion_jax.runtime.sharding import (
    CONCEPT_AXIS,
    place_by_concept,
    replicated,
)
from catversion_jax.training.eval_step import make_eval_step
from catversion_jax.training.fit_step import FitInputs, make_fit_step
from catversion_jax.training.predicted_start import photo_states, word_embedding
from catversion_jax.training.preparation import (
    PreparedConcept,
    assemble_rows,
    concept_failure,
    describe_concepts,
    masks_decide,
    padded,
    prepare_concept,
    training_images,
)
from catversion_jax.training.state import ConceptData

logger = logging.getLogger(__name__)

FEWEST_CONCEPTS = 8
"""Fewer have hardly any principal components, and the encoder would learn them by heart."""


@dataclasses.dataclass(frozen=True)
class Example:
    """A concept to fit on, with what the encoder sees of it.

    Attributes:
      concept: its images and prompts, and its start values by ``init=class_word``.
      photos: ``[M D]`` CLIP's pooled states.
      word: ``[E]`` CLIP's embedding of the class word.
    """

    concept: PreparedConcept
    photos: Float[np.ndarray, "M D"]
    word: Float[np.ndarray, "E"]

    @property
    def name(self) -> str:
        """Name of the concept."""
        return self.concept.spec.name


@dataclasses.dataclass(frozen=True)
class HeldOutLosses:
    """Mean evaluation losses of the concepts that were left out of the fit.

    Attributes:
      num_concepts: how many; with none the losses are NaN.
      plain: of the model without a concept.
      class_word: of the start values without the prediction.
      predicted: of the predicted start values.
    """

    num_concepts: int
    plain: float
    class_word: float
    predicted: float


def is_held_out(name: str, share: float) -> bool:
    """Whether a concept only judges; by its name, so that more concepts move nobody."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) < share * 2**32


def fit_encoder(
    examples: Sequence[Example],
    backbone: Backbone,
    mesh: Mesh,
    method: MethodOptions,
    objective: ObjectiveOptions,
    options: FitOptions,
    *,
    clip_name: str,
    clip: ClipEmbedder,
    on_step: Callable[[int, int], None] | None = None,
) -> ConceptEncoder:
    """Fit a concept encoder; the same numbers for the same arguments.

    Args:
      examples: the concepts, without those that only judge.
      backbone: the frozen networks, on every device of the mesh.
      mesh: of this process.
      method: what is learned, with ``init=class_word``.
      objective: the loss.
      options: how it is fitted.
      clip_name: what the file calls the CLIP.
      clip: the CLIP of the features.
      on_step: is told now and then how many steps of how many are done.

    Raises:
      CatVersionError: too few concepts, or the loss or a weight is not finite.
    """
    if len(examples) < FEWEST_CONCEPTS:
        raise CatVersionError(
            f"{len(examples)} concepts to fit on: must be at least {FEWEST_CONCEPTS}, and hundreds "
            "are wanted. Give more concepts; a few are trained as well without a predicted start."
        )
    photos = Whitening.of(np.concatenate([one.photos for one in examples]), NUM_PHOTO_FEATURES)
    words = Whitening.of(np.stack([one.word for one in examples]), NUM_WORD_FEATURES)
    num_numbers = sum(leaf.size for leaf in jax.tree.leaves(examples[0].concept.learned))
    num_features = photos.components.shape[1] + words.components.shape[1]
    weights = new_weights(num_features, num_numbers, options.rank, options.seed)
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(learning_rates(options)),
    )
    step = make_fit_step(
        noise_schedule(backbone.noise_schedule),
        tx,
        mesh,
        objective,
        first_layers=[part.first_layer for part in examples[0].concept.learned.parts],
    )
    features = [(photos(one.photos), words(one.word)) for one in examples]
    max_images = max(len(one.photos) for one in examples)
    assemble = functools.partial(
        assemble_rows,
        backbone=backbone,
        objective=objective,
        max_images=max_images,
        max_prompts=max(len(one.concept.prompts) for one in examples),
    )
    everywhere = replicated(mesh)
    state = jax.device_put((weights, tx.init(weights)), everywhere)
    order = _Order(len(examples), _batch_size(options, mesh), options.seed)
    for number in range(options.num_steps):
        chosen, visits = order.next()
        own, data, _ = assemble([examples[i].concept for i in chosen])
        seen: dict[str, Any] = {
            "photos": np.stack([padded(features[i][0], max_images) for i in chosen]),
            "words": np.stack([features[i][1] for i in chosen]),
            "visits": visits,
        }
        inputs = place_by_concept(FitInputs(own, data, **seen), mesh)
        *state, loss = step(*state, inputs, backbone.text_encoders, backbone.unet)
        last = number + 1 == options.num_steps
        if on_step is not None and (last or (number + 1) % 25 == 0):
            logger.debug("step %d: loss %.4f", number + 1, float(loss))
            on_step(number + 1, options.num_steps)
    fitted = jax.tree.map(np.asarray, state[0])
    largest = np.max([np.abs(leaf).max() for leaf in (loss, *jax.tree.leaves(fitted))])  # or NaN
    if not largest <= np.finfo(np.float16).max:
        raise CatVersionError(
            f"learning_rate={options.learning_rate}: the loss or a weight of the fit is not finite "
            "at its end. Use a smaller one."
        )
    return ConceptEncoder(
        photos=photos,
        words=words,
        weights=fitted,
        options={name: getattr(method, name) for name in MATCHING_OPTIONS},
        noise_seed=options.seed,
        fingerprints=dict(backbone.fingerprints),
        clip=clip_name,
        clip_sha256=clip.sha256,
        fitted_on=tuple(sorted(one.name for one in examples)),
    )


def learning_rates(options: FitOptions) -> optax.Schedule:
    """The rate of each update: up along a line, down along a cosine."""
    warmup = min(max(1, options.num_steps // 30), options.num_steps - 1)
    return optax.warmup_cosine_decay_schedule(0.0, options.learning_rate, warmup, options.num_steps)


def held_out_losses(
    encoder: ConceptEncoder,
    examples: Sequence[Example],
    backbone: Backbone,
    mesh: Mesh,
    objective: ObjectiveOptions,
    *,
    num_eval_samples: int,
) -> HeldOutLosses:
    """How well the prediction does on concepts that were left out of the fit."""
    if not examples:
        return HeldOutLosses(0, *[float("nan")] * 3)
    evaluate = make_eval_step(
        noise_schedule(backbone.noise_schedule),
        mesh,
        first_layers=[part.first_layer for part in examples[0].concept.learned.parts],
        num_samples=num_eval_samples,
        batch_size=num_eval_samples,
    )
    size = mesh.shape[CONCEPT_AXIS]
    found: list[Mapping[str, float]] = []
    for rows in full_batches(len(examples), size):
        batch = [examples[row] for row in rows]
        own, data, plain_data = assemble_rows(
            [one.concept for one in batch],
            backbone,
            objective,
            max_images=max(len(one.photos) for one in examples),
            max_prompts=max(len(one.concept.prompts) for one in examples),
        )
        predicted = stack_learned(
            [encoder.start(one.photos, one.word, one.concept.learned) for one in batch]
        )
        given: dict[str, tuple[Learned | None, ConceptData]] = {
            "plain": (None, plain_data),
            "class_word": (own, data),
            "predicted": (predicted, data),
        }
        due: Bool[np.ndarray, "C"] = np.ones(size, bool)
        losses = {}
        for name, one in given.items():
            learned, seen, is_due = place_by_concept((*one, due), mesh)
            found_now = evaluate(learned, seen, is_due, backbone.text_encoders, backbone.unet)
            losses[name] = np.asarray(found_now)
        found += [{k: float(v[i]) for k, v in losses.items()} for i in range(size)]
    found = found[: len(examples)]
    means = {name: float(np.mean([one[name] for one in found])) for name in found[0]}
    return HeldOutLosses(len(found), **means)


def _batch_size(options: FitOptions, mesh: Mesh) -> int:
    """A multiple of the devices."""
    devices = mesh.shape[CONCEPT_AXIS]
    return -(-options.batch_size // devices) * devices


class _Order:
    """The concepts of each step: epochs, each a permutation of all."""

    def __init__(self, count: int, size: int, seed: int):
        self._rng = np.random.default_rng(seed)
        self._count, self._size = count, size
        self._queue: list[int] = []
        self._visits = np.zeros(count, np.int32)

    def next(self) -> tuple[list[int], np.ndarray]:
        """Indices, and how often each was chosen before."""
        while len(self._queue) < self._size:
            self._queue += self._rng.permutation(self._count).tolist()
        chosen, self._queue = self._queue[: self._size], self._queue[self._size :]
        visits = []
        for index in chosen:
            visits.append(self._visits[index])
            self._visits[index] += 1
        return chosen, np.array(visits, np.int32)


def read_examples(
    concepts: Sequence[ConceptSpec],
    backbone: Backbone,
    data: DataOptions,
    method: MethodOptions,
    objective: ObjectiveOptions,
    clip: ClipEmbedder,
    *,
    seed: int,
    on_concept: Callable[[int, int], None] | None = None,
) -> tuple[list[Example], dict[str, str]]:
    """Concepts ready to fit on, and why the others are not, by name.

    Args:
      concepts: what the user gave.
      backbone: the frozen networks.
      data: how images become square pixels, and the prompts.
      method: what is learned, with ``init=class_word``.
      objective: the loss.
      clip: the CLIP of the features.
      seed: of the noise of the start values, the same for all.
      on_concept: is told how many of how many are done.
    """
    records, failures = describe_concepts(
        concepts,
        backbone,
        data,
        method,
        seed=seed,
        recorded={},
        networks={},
        masked=masks_decide(objective, backbone),
    )
    examples = []
    for number, spec in enumerate(concepts, 1):
        try:
            if spec.name in records:
                images = training_images(spec, backbone, data)
                prepared = prepare_concept(
                    spec,
                    records[spec.name],
                    backbone,
                    data,
                    method,
                    objective,
                    noise_seed=seed,
                    images=images,
                )
                word = word_embedding(clip, spec.base_class)
                examples.append(Example(prepared, photo_states(clip, images), word))
        except Exception as error:
            failures[spec.name] = concept_failure(spec.name, error)
        if on_concept is not None:
            on_concept(number, len(concepts))
    return examples, failures

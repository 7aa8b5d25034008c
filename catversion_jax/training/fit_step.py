"""One step of fitting a concept encoder; see ``fit_start.py``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from catversion_jax.array_types import Array, Bool, Float, Int
from catversion_jax.config import ObjectiveOptions
from catversion_jax.diffusion import NoiseSchedule
from catversion_jax.methods.concept_encoder import EncoderWeights
from catversion_jax.methods.learned import Learned
from catversion_jax.models.weights.network import Network
from catversion_jax.runtime.sharding import CONCEPT_AXIS, on_every_device
from catversion_jax.training.objective import DiffusionBatch, diffusion_losses
from catversion_jax.training.state import ConceptData
from catversion_jax.training.step import sample_batch

FIT_STREAM = 5
"""Of a concept's key; see ``state.py`` for the others."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FitInputs:
    """What C concepts bring to one step.

    Attributes:
      own: start values without the prediction, leaves ``[C ...]``.
      data: images and prompts.
      photos: ``[C M F]`` whitened features, of ``data.num_images`` photos.
      words: ``[C W]`` the same of the class words.
      visits: ``[C]`` int32, how often the concept was in a step before.
    """

    own: Learned
    data: ConceptData
    photos: Float[Array, "C M F"]
    words: Float[Array, "C W"]
    visits: Int[Array, "C"]


def make_fit_step(
    schedule: NoiseSchedule,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    objective: ObjectiveOptions,
    *,
    first_layers: Sequence[int],
) -> Callable[..., tuple[EncoderWeights, Any, Array]]:
    """``(weights, opt_state, inputs, text_encoders, unet) -> (weights, opt_state, loss)``.

    Weights and moments are donated.
    """
    one_image = dataclasses.replace(objective, train_batch_size=1)

    def drawn(inputs: FitInputs) -> tuple[Float[Array, "F"], DiffusionBatch]:
        """Of one concept: what the encoder sees, and the image that it does not see."""
        data, num_images = inputs.data, inputs.data.num_images
        key = jax.random.fold_in(jax.random.fold_in(data.rng, FIT_STREAM), inputs.visits)
        target_key, subset_key = jax.random.split(key)
        target = jax.random.randint(target_key, (), 0, num_images)
        places = jnp.arange(inputs.photos.shape[0])
        seen = _some_others(subset_key, places, target, num_images)
        mean = jnp.sum(inputs.photos * seen[:, None], 0) / jnp.sum(seen)
        alone: dict[str, Any] = {
            name: None if (array := getattr(data, name)) is None else array[target][None]
            for name in ("latent_mean", "latent_std", "mask", "time_ids", "kept")
        }
        data = dataclasses.replace(data, num_images=jnp.int32(1), **alone)
        batch = sample_batch(
            data,
            inputs.visits,
            first_place=jnp.int32(0),
            batch_size=1,
            objective=one_image,
            num_train_timesteps=schedule.num_train_timesteps,
        )
        return jnp.concatenate([mean, inputs.words]), batch

    def step(
        weights: EncoderWeights,
        opt_state: Any,
        inputs: FitInputs,
        text_encoders: tuple[Network, ...],
        unet: Network,
    ) -> tuple[EncoderWeights, Any, Array]:
        features, batch = jax.vmap(drawn)(inputs)

        def mean_loss(weights: EncoderWeights) -> Array:
            learned = jax.vmap(weights.predicted)(features, inputs.own)
            losses = diffusion_losses(
                learned,
                text_encoders,
                unet,
                batch,
                schedule,
                first_layers=first_layers,
                **objective.loss_weights,
            )
            return losses.mean()

        loss, grads = jax.value_and_grad(mean_loss)(weights)
        if mesh.shape[CONCEPT_AXIS] > 1:
            loss, grads = jax.lax.pmean((loss, grads), CONCEPT_AXIS)
        updates, opt_state = tx.update(grads, opt_state, weights)
        return optax.apply_updates(weights, updates), opt_state, loss

    everywhere, rows = PartitionSpec(), PartitionSpec(CONCEPT_AXIS)
    spread = on_every_device(
        step,
        mesh,
        in_specs=(everywhere, everywhere, rows, everywhere, everywhere),
        out_specs=(everywhere, everywhere, everywhere),
    )
    return jax.jit(spread, donate_argnums=(0, 1))


def _some_others(
    key: Array, places: Int[Array, "M"], target: Int[Array, ""], num_images: Int[Array, ""]
) -> Bool[Array, "M"]:
    """A random part of the photos that are not the target, at least one; of a single photo that."""
    others = (places < num_images) & (places != target)
    chosen = jax.random.bernoulli(key, 0.5, places.shape) & others
    neighbour = places == (target + 1) % num_images
    return jnp.where(jnp.any(chosen), chosen, neighbour)

"""The evaluation loss of every concept: fixed noise and fixed timesteps, so comparable over time.

The training loss is dominated by its random timesteps; this one is the plain mean squared error
over stratified timesteps, without a flip, of the mean of the VAE's posterior.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from catversion_jax.array_types import Array, Bool, Float, Int
from catversion_jax.diffusion.schedule import NoiseSchedule
from catversion_jax.methods.learned import Learned
from catversion_jax.models.clip.text_projection import TextStates
from catversion_jax.models.text_encoders import LowerStates
from catversion_jax.models.weights.network import Network
from catversion_jax.runtime.random_normal import standard_normal
from catversion_jax.runtime.sharding import CONCEPT_AXIS, on_every_device
from catversion_jax.training.objective import DiffusionBatch, denoising_losses, prompted_states
from catversion_jax.training.state import EVAL_STREAM, ConceptData

EvalStep = Callable[
    [Learned | None, ConceptData, Array, tuple[Network, ...], Network],
    Float[Array, "C"],
]


def make_eval_step(
    schedule: NoiseSchedule,
    mesh: Mesh,
    *,
    first_layers: Sequence[int],
    num_samples: int,
    batch_size: int,
) -> EvalStep:
    """``(learned, data, due [C], text_encoders, unet) -> losses [C]``.

    With ``learned=None`` it is the plain model's loss. Rows that are not ``due`` cost nothing and
    give NaN: concepts that began at different moments are evaluated at different ones.

    Arguments are those of :func:`make_eval_programs`.
    """
    return evaluation_step(
        *make_eval_programs(
            schedule,
            mesh,
            first_layers=first_layers,
            num_samples=num_samples,
            batch_size=batch_size,
        )
    )


def evaluation_step(encode: Callable[..., TextStates], measure: Callable[..., Array]) -> EvalStep:
    """What :func:`make_eval_step` returns, of its two programs."""

    def evaluate(
        learned: Learned | None,
        data: ConceptData,
        due: Bool[Array, "C"],
        text_encoders: tuple[Network, ...],
        unet: Network,
    ) -> Float[Array, "C"]:
        return measure(encode(learned, data, due, text_encoders), data, due, unet)

    return evaluate


def make_eval_programs(
    schedule: NoiseSchedule,
    mesh: Mesh,
    *,
    first_layers: Sequence[int],
    num_samples: int,
    batch_size: int,
) -> tuple[Callable[..., TextStates], Callable[..., Array]]:
    """The two programs of an evaluation: the text encoders', which is small and compiled once with
    and once without something learned, and the UNet's, which is large and serves both.

    Args:
      schedule: noise schedule of the model.
      mesh: of this process.
      first_layers: of each encoder the lowest layer whose output depends on what is learned.
      num_samples: pairs of noise and timestep in the loss of a concept.
      batch_size: largest number of them that the UNet sees at once.
    """
    at_once = max(n for n in range(1, batch_size + 1) if num_samples % n == 0)

    def encoded(
        learned: Learned | None,
        data: ConceptData,
        due: Bool[Array, "C"],
        text_encoders: tuple[Network, ...],
    ) -> TextStates:
        """Of the first S prompts, ``[C S T D]``, no more than there are samples; one row after the
        other, so that long lists of prompts need no memory.
        """

        def one_row(row: tuple[Learned | None, tuple[LowerStates, ...], Array]) -> TextStates:
            *of_row, is_due = row
            learned, text = jax.tree.map(lambda leaf: leaf[None], tuple(of_row))

            def encode() -> TextStates:
                states = prompted_states(learned, text_encoders, text, first_layers=first_layers)
                return jax.tree.map(lambda leaf: leaf[0], states)

            def nothing() -> TextStates:
                shapes = jax.eval_shape(encode)
                return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

            return jax.lax.cond(is_due, encode, nothing)

        prompts = jax.tree.map(lambda leaf: leaf[:, :num_samples], data.text)
        return jax.lax.map(one_row, (learned, prompts, due))

    def one_concept(states: TextStates, data: ConceptData, unet: Network) -> Float[Array, ""]:
        """``states`` of S prompts."""
        rng = jax.random.fold_in(data.rng, EVAL_STREAM)

        def draw(index: Int[Array, ""]) -> tuple[DiffusionBatch, TextStates]:
            image, prompt = index % data.num_images, index % data.num_prompts
            latents = data.latent_mean[image, 0]
            noise = standard_normal(jax.random.fold_in(rng, index), latents.shape)
            timestep = ((2 * index + 1) * schedule.num_train_timesteps) // (2 * num_samples)
            time_ids = None if data.time_ids is None else data.time_ids[image]
            kept = None
            if data.kept is not None:
                kept = data.kept[image, index // data.num_images % data.kept.shape[1], 0]
            # The prompts are encoded already.
            batch = DiffusionBatch(latents, noise, timestep, (), time_ids=time_ids, kept=kept)
            return batch, jax.tree.map(lambda leaf: leaf[prompt], states)

        def some_samples(indices: Int[Array, "B"]) -> Float[Array, "1"]:
            batch, drawn = jax.tree.map(lambda leaf: leaf[None], jax.vmap(draw)(indices))
            return denoising_losses(drawn, unet, batch, schedule)

        return jnp.mean(jax.lax.map(some_samples, jnp.arange(num_samples).reshape(-1, at_once)))

    def losses(
        states: TextStates, data: ConceptData, due: Bool[Array, "C"], unet: Network
    ) -> Float[Array, "C"]:
        def one_row(row: tuple[TextStates, ConceptData, Array]) -> Array:
            states, data, is_due = row
            return jax.lax.cond(
                is_due,
                lambda: one_concept(states, data, unet),
                lambda: jnp.nan * data.flip,
            )

        return jax.lax.map(one_row, (states, data, due))

    rows, everywhere = PartitionSpec(CONCEPT_AXIS), PartitionSpec()
    spread = functools.partial(on_every_device, mesh=mesh, out_specs=rows)
    encode = jax.jit(spread(encoded, in_specs=(rows, rows, rows, everywhere)))
    measure = jax.jit(spread(losses, in_specs=(rows, rows, rows, everywhere)))
    return encode, measure

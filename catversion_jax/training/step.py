"""The compiled programs of training: many steps of many concepts, and their evaluation losses.

Per device: a loop over the steps of a dispatch, inside it one gradient step of all the device's
concepts. ``shard_map`` spreads that over the (concept, data) mesh.
Frozen networks are arguments: XLA would fold closed-over weights into the program as constants.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from catversion_jax.array_types import Array, Float, Int
from catversion_jax.config import DeviceOptions, ObjectiveOptions
from catversion_jax.diffusion import NoiseSchedule
from catversion_jax.methods.learned import Learned
from catversion_jax.models.weights.network import Network
from catversion_jax.runtime.random_normal import standard_normal
from catversion_jax.runtime.sharding import CONCEPT_AXIS, DATA_AXIS, on_every_device
from catversion_jax.training.objective import DiffusionBatch, diffusion_losses
from catversion_jax.training.state import (
    ORDER_STREAM,
    TIMESTEP_STREAM,
    TRAIN_STREAM,
    ConceptData,
    TrainState,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepMetrics:
    """What one dispatch reports to the host; nothing else leaves the device.

    Attributes:
      losses: ``[steps_per_dispatch C]`` float32, NaN in the rows that were not run.
      failed_step: ``[C]`` int32 as in :class:`TrainState`.
    """

    losses: Float[Array, "S C"]
    failed_step: Int[Array, "C"]


TrainStep = Callable[..., tuple[TrainState, StepMetrics]]


def steps_per_dispatch(asked: int | None) -> int:
    """Steps of one call of the compiled program: what was asked for, or what suits the platform.

    On CPU that is one, without a loop: inside a loop XLA gives the convolutions of the backward
    pass a kernel layout that its fast implementation does not take.
    """
    if asked is not None:
        return asked
    return 1 if jax.default_backend() == "cpu" else 10


def make_train_step(
    schedule: NoiseSchedule,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    objective: ObjectiveOptions,
    devices: DeviceOptions,
    *,
    ema_decay: float | None,
) -> TrainStep:
    """Compile-once ``(state, data, text_encoders, unet, num_steps) -> (state, metrics)``.

    ``state`` is donated. ``num_steps`` is traced: any number up to :func:`steps_per_dispatch` runs
    without recompiling.

    Args:
      schedule: noise schedule of the model.
      tx: the optimizer of one concept.
      mesh: the devices.
      objective: the batch and its loss.
      devices: how a batch is split, how many steps a call may make, what the backward pass
        computes again (``auto``, which planning resolves, counts as ``none`` here).
      ema_decay: of the moving average of what is learned; None where none is kept.
    """
    local_batch = objective.train_batch_size // devices.data_parallel
    max_steps = steps_per_dispatch(devices.steps_per_dispatch)
    policy = devices.gradient_checkpointing
    recompute = "none" if policy == "auto" else policy
    # Without a split batch nothing may mention the data axis: even a sum over one device is a
    # collective.
    splits_batch = devices.data_parallel > 1

    def one_step(
        state: TrainState, data: ConceptData, text_encoders: tuple[Network, ...], unet: Network
    ) -> tuple[TrainState, Array]:
        first_place = jax.lax.axis_index(DATA_AXIS) * local_batch if splits_batch else jnp.int32(0)
        sample = functools.partial(
            sample_batch,
            first_place=first_place,
            batch_size=local_batch,
            objective=objective,
            num_train_timesteps=schedule.num_train_timesteps,
        )
        batch = jax.vmap(sample)(data, state.step)

        def loss_fn(learned: Learned) -> tuple[Array, Array]:
            losses = diffusion_losses(
                learned,
                text_encoders,
                unet,
                batch,
                schedule,
                first_layers=[part.first_layer for part in learned.parts],
                **objective.loss_weights,
                recompute=recompute,
            )
            return losses.sum(), losses  # a concept's gradient is that of its own loss

        grads, losses = jax.grad(loss_fn, has_aux=True)(state.learned)
        if splits_batch:
            losses, grads = jax.lax.pmean((losses, grads), DATA_AXIS)
        update = functools.partial(apply_update, tx=tx, ema_decay=ema_decay)
        return jax.vmap(update)(state, losses, grads), losses

    def many_steps(
        state: TrainState,
        data: ConceptData,
        text_encoders: tuple[Network, ...],
        unet: Network,
        num_steps: Int[Array, ""],
    ):
        if max_steps == 1:
            state, loss = one_step(state, data, text_encoders, unet)
            return state, StepMetrics(loss[None], state.failed_step)

        def body(index: Array, carry: tuple[TrainState, Array]) -> tuple[TrainState, Array]:
            state, losses = carry
            state, loss = one_step(state, data, text_encoders, unet)
            return state, losses.at[index].set(loss)

        empty = jnp.full((max_steps, *state.step.shape), jnp.nan, jnp.float32)
        state, losses = jax.lax.fori_loop(0, num_steps, body, (state, empty))
        return state, StepMetrics(losses, state.failed_step)

    by_concept = PartitionSpec(CONCEPT_AXIS)
    per_row: Any = PartitionSpec(None, CONCEPT_AXIS)
    per_concept: Any = by_concept
    sharded = on_every_device(
        many_steps,
        mesh,
        in_specs=(by_concept, by_concept, PartitionSpec(), PartitionSpec(), PartitionSpec()),
        out_specs=(by_concept, StepMetrics(per_row, per_concept)),
    )
    return jax.jit(sharded, donate_argnums=0)


def apply_update(
    state: TrainState,
    loss: Array,
    grads: Learned,
    tx: optax.GradientTransformation,
    ema_decay: float | None = None,
) -> TrainState:
    """One optimizer update of one concept.

    When anything is not finite: its old state, with the failing step noted.
    """
    updates, opt_state = tx.update(grads, state.opt_state, state.learned)
    learned = optax.apply_updates(state.learned, updates)
    finite = jnp.isfinite(loss)
    for leaf in jax.tree.leaves((grads, learned)):
        finite &= jnp.all(jnp.isfinite(leaf))
    healthy = state.failed_step < 0
    keep = finite & healthy
    average = None
    if ema_decay is not None:
        share = 1 - _decay_at(state.step, ema_decay)
        average = jax.tree.map(lambda a, new: a + share * (new - a), state.average, learned)
    new = TrainState(state.step + 1, learned, opt_state, state.failed_step, average)
    chosen = jax.tree.map(functools.partial(jnp.where, keep), new, state)
    failed = jnp.where(healthy & ~finite, state.step, state.failed_step)
    return dataclasses.replace(chosen, failed_step=failed)


def _decay_at(step: Int[Array, ""], decay: float) -> Array:
    """Decay of the average in the update after ``step`` others: shorter at the start, so that the
    start values are forgotten (diffusers' ``EMAModel``).
    """
    return jnp.where(step == 0, 0.0, jnp.minimum((1.0 + step) / (10.0 + step), decay))


def sample_batch(
    data: ConceptData,
    step: Int[Array, ""],
    first_place: Int[Array, ""],
    batch_size: int,
    objective: ObjectiveOptions,
    num_train_timesteps: int,
) -> DiffusionBatch:
    """Draw images, noise, timesteps and prompts of one concept and step (no C axis here).

    Images come in epochs, each a fresh permutation: every image is used equally often.

    Args:
      data: of the concept.
      step: updates it has seen.
      first_place: place in the concept's whole batch at which this device's part begins.
      batch_size: number of places of this device's part.
      objective: size of the whole batch and how it is drawn.
      num_train_timesteps: of the noise schedule.
    """
    step_rng = jax.random.fold_in(jax.random.fold_in(data.rng, TRAIN_STREAM), step)

    def draw(place: Int[Array, ""]):
        rngs = jax.random.split(jax.random.fold_in(step_rng, place), 6)
        image = _epoch_image(data, step * objective.train_batch_size + place)
        flipped = jax.random.bernoulli(rngs[0], data.flip).astype(jnp.int32)
        mean, std = data.latent_mean[image, flipped], data.latent_std[image, flipped]
        latents = mean + std * standard_normal(rngs[1], mean.shape)
        noise = standard_normal(rngs[2], mean.shape)
        if objective.timestep_sampling == "uniform":
            timestep = jax.random.randint(rngs[3], (), 0, num_train_timesteps)
        else:
            draw_even = {
                "stratified": _stratified_timestep,
                "proportional": _proportional_timestep,
            }[objective.timestep_sampling]
            shift = _even_shift(data, step)
            timestep = draw_even(shift, place, objective.train_batch_size, num_train_timesteps)
        prompt = jax.random.randint(rngs[4], (), 0, data.num_prompts)
        text, plain = jax.tree.map(lambda leaf: leaf[prompt], (data.text, data.plain))
        if data.empty_text is not None:
            dropped = jax.random.bernoulli(rngs[5], objective.caption_dropout)
            text, plain = jax.tree.map(
                functools.partial(jnp.where, dropped),
                (data.empty_text, data.empty_plain),
                (text, plain),
            )
        mask = None if data.mask is None else data.mask[image, flipped]
        time_ids = None if data.time_ids is None else data.time_ids[image]
        kept = None
        if data.kept is not None:
            area = jax.random.randint(jax.random.fold_in(rngs[0], 1), (), 0, data.kept.shape[1])
            kept = data.kept[image, area, flipped]
        return DiffusionBatch(latents, noise, timestep, text, mask, time_ids, kept, plain)

    return jax.vmap(draw)(first_place + jnp.arange(batch_size))


def _even_shift(data: ConceptData, step: Int[Array, ""]) -> Array:
    """``2**32 u`` of a step: ``u`` starts at random and goes on by the golden ratio from step to
    step (modulo 1, as 32-bit integers, which lose nothing): of all shifts the one that leaves the
    smallest gaps.
    """
    golden = jnp.uint32(2654435769)  # 2**32 (sqrt(5) - 1) / 2
    start = jax.random.bits(jax.random.fold_in(data.rng, TIMESTEP_STREAM), (), jnp.uint32)
    return start + golden * step.astype(jnp.uint32)


def _stratified_timestep(
    shift: Array, place: Int[Array, ""], batch_size: int, num_train_timesteps: int
) -> Int[Array, ""]:
    """``t = N (place + u) / n``: place i of a batch of n draws from the i-th n-th of the
    schedule.
    """
    within = ((shift >> 16) * num_train_timesteps) >> 16
    return (place * num_train_timesteps + within.astype(jnp.int32)) // batch_size


def _proportional_timestep(
    shift: Array, place: Int[Array, ""], batch_size: int, num_train_timesteps: int
) -> Int[Array, ""]:
    """``t = N sqrt((place + u) / n)``, so that ``P(t) = (2 t + 1) / N^2``.

    The square root is looked up among the squares, in 32-bit integers: every device rounds alike.
    """
    whole, most = 2**32, num_train_timesteps
    stratum = jnp.uint32(whole // batch_size % whole)  # of one image there is no second place
    share = place.astype(jnp.uint32) * stratum + shift // jnp.uint32(batch_size)
    begins = jnp.array([k * k * whole // most**2 for k in range(1, most)], jnp.uint32)
    return jnp.sum(begins <= share, dtype=jnp.int32)


def _epoch_image(data: ConceptData, position: Int[Array, ""]) -> Int[Array, ""]:
    """Index of the image at ``position`` of the endless concatenation of shuffled epochs."""
    max_images = data.latent_mean.shape[0]
    order_rng = jax.random.fold_in(data.rng, ORDER_STREAM)
    epoch_rng = jax.random.fold_in(order_rng, position // data.num_images)
    # One key per image: the order does not depend on how many padded images follow the real ones.
    images = jnp.arange(max_images)
    order = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(epoch_rng, i)))(images)
    order = jnp.where(images < data.num_images, order, jnp.inf)
    return jnp.argsort(order)[position % data.num_images]

r"""The loss of a concept: the frozen model's denoising objective, seen through its text encoder.

    (1)  x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps,        t ~ U{0 .. 999},  eps ~ N(0, I)
    (2)  L(learned) = mean_images  w(t) mean_pixels m |unet(x_t, t, c(learned)) - target|^2

``c(learned)`` is the text encoders' output with what a concept learned (in Stable Diffusion XL with
the pooled state, and the image's time ids beside it), ``target`` is eps, v or x_0 as the
scheduler's ``prediction_type`` says. The official objective is w = m = 1 (plain epsilon
MSE). Options:

    (3)  min-SNR (arXiv 2303.09556): w = min(snr, gamma) for x_0, / snr for epsilon,
         / (snr + 1) for v
    (4)  masked: m = max(mask, unmasked_weight), divided by its mean over the image's pixels
    (5)  preserving: p |unet(x_t, t, c(learned)) - unet(x_t, t, c(nothing))|^2 beside it under the
         mean over pixels, p = preserve_weight (1 - mask); m and p are divided by the mean of m + p

In (5) the plain model's prediction is a target like any other: no gradient passes through it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from catversion_jax.array_types import Array, Float, Int
from catversion_jax.diffusion import NoiseSchedule
from catversion_jax.methods.learned import Learned
from catversion_jax.models.clip.text_projection import TextStates
from catversion_jax.models.layers.recompute import Recompute
from catversion_jax.models.text_encoders import LowerStates, upper_text_states
from catversion_jax.models.unet.embeddings import AddedConditions
from catversion_jax.models.weights.network import Network


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DiffusionBatch:
    """What C concepts see in one step, B images each.

    Attributes:
      latents: ``[C B h w c]`` scaled VAE latents (x_0).
      noise: ``[C B h w c]``.
      timesteps: ``[C B]`` int32 in ``0..num_train_timesteps-1``.
      text: of each text encoder the prompts ``[C B T D]``, entering the first adapted layer (they
        do not depend on what is learned).
      mask: ``[C B h w]`` object mask in 0..1, or None where the loss is not masked.
      time_ids: ``[C B 6]`` what Stable Diffusion XL is told of the images' sizes, or None.
      kept: ``[C B h w 1+c]`` what an inpainting model reads beside the noisy latents, or None.
      plain: ``[C B T D]`` what the plain model makes of the prompts, or None where it is not
        preserved.
    """

    latents: Float[Array, "C B h w c"]
    noise: Float[Array, "C B h w c"]
    timesteps: Int[Array, "C B"]
    text: tuple[LowerStates, ...]
    mask: Float[Array, "C B h w"] | None = None
    time_ids: Float[Array, "C B 6"] | None = None
    kept: Float[Array, "C B h w k"] | None = None
    plain: TextStates | None = None


def diffusion_losses(
    learned: Learned | None,
    text_encoders: tuple[Network, ...],
    unet: Network,
    batch: DiffusionBatch,
    schedule: NoiseSchedule,
    *,
    first_layers: Sequence[int],
    snr_gamma: float | None = None,
    unmasked_weight: float = 1.0,
    preserve_weight: float = 0.0,
    recompute: Recompute = "none",
) -> Float[Array, "C"]:
    """Equation (2) for each of C concepts; float32 whatever the networks compute in.

    A concept's loss depends only on what it learned itself, so the gradient of the sum over
    concepts is each one's own.

    Args:
      learned: what the concepts learn (leaves ``[C L P N H]`` or ``[C V D]``), or None for the
        plain model's loss.
      text_encoders: frozen CLIP text encoders.
      unet: frozen UNet.
      batch: see :class:`DiffusionBatch`.
      schedule: noise schedule of the model.
      first_layers: the layer of each encoder that ``batch.text`` enters.
      snr_gamma: equation (3); None for w = 1.
      unmasked_weight: equation (4), used where the batch has a mask.
      preserve_weight: equation (5), used where the batch has plain states and so a mask.
      recompute: what the UNet's backward pass computes again instead of keeping it.
    """
    states = prompted_states(learned, text_encoders, batch.text, first_layers=first_layers)
    return denoising_losses(
        states,
        unet,
        batch,
        schedule,
        snr_gamma=snr_gamma,
        unmasked_weight=unmasked_weight,
        preserve_weight=preserve_weight,
        recompute=recompute,
    )


def prompted_states(
    learned: Learned | None,
    text_encoders: tuple[Network, ...],
    text: tuple[LowerStates, ...],
    *,
    first_layers: Sequence[int],
) -> TextStates:
    """What the UNet is told of the prompts, ``[C B T D]`` and ``[C B P]``: their states after the
    layers from ``first_layers`` on.

    Arguments are those of :func:`diffusion_losses` and :class:`DiffusionBatch`.
    """
    if learned is None:
        return jax.vmap(
            lambda text: upper_text_states(
                text_encoders,
                [dataclasses.replace(one, word_places=None) for one in text],
                first_layers,
            )
        )(text)
    return jax.vmap(
        lambda text, learned: upper_text_states(text_encoders, text, first_layers, learned.parts)
    )(text, learned)


def denoising_losses(
    states: TextStates,
    unet: Network,
    batch: DiffusionBatch,
    schedule: NoiseSchedule,
    *,
    snr_gamma: float | None = None,
    unmasked_weight: float = 1.0,
    preserve_weight: float = 0.0,
    recompute: Recompute = "none",
) -> Float[Array, "C"]:
    """:func:`diffusion_losses` from what the UNet is told, see :func:`prompted_states`.

    The UNet, which is the same for all, sees the images of all concepts as *one* batch: under
    ``vmap`` its arrays would have two batch axes, neither of which alone fills a TPU's tiles, and
    the compiler would copy the result of every convolution into another layout.
    """
    concepts, images = batch.timesteps.shape
    batch, states = jax.tree.map(
        lambda leaf: leaf.reshape(concepts * images, *leaf.shape[2:]), (batch, states)
    )
    noisy = schedule.add_noise(batch.latents, batch.noise, batch.timesteps)
    if batch.kept is not None:
        noisy = jnp.concatenate([noisy, batch.kept], axis=-1)
    prediction = _prediction(states, unet, batch, noisy, recompute)
    target = schedule.target(batch.latents, batch.noise, batch.timesteps)
    error = jnp.square(prediction - target)
    if batch.mask is not None:
        weight = jnp.maximum(batch.mask, unmasked_weight)
        if batch.plain is None:
            weight = weight / jnp.mean(weight, axis=(1, 2), keepdims=True)
            error = error * weight[..., None]
        else:
            plain = jax.lax.stop_gradient(_prediction(batch.plain, unet, batch, noisy, "none"))
            outside = preserve_weight * (1 - batch.mask)
            mean = jnp.mean(weight + outside, axis=(1, 2), keepdims=True)
            changed = jnp.square(prediction - plain)
            error = error * (weight / mean)[..., None] + changed * (outside / mean)[..., None]
    loss = jnp.mean(error, axis=(1, 2, 3))
    if snr_gamma is not None:
        loss = loss * min_snr_weight(schedule, batch.timesteps, snr_gamma)
    return jnp.mean(loss.reshape(concepts, images), axis=1)


def _prediction(
    states: TextStates,
    unet: Network,
    batch: DiffusionBatch,
    noisy: Float[Array, "B h w c"],
    recompute: Recompute,
) -> Float[Array, "B h w c"]:
    """What the UNet, told ``states``, says of the noisy latents of a batch of images."""
    added = None
    if states.pooled is not None and batch.time_ids is not None:
        added = AddedConditions(states.pooled, batch.time_ids)
    prediction = unet(noisy, batch.timesteps, states.context, recompute, added=added)
    return prediction.astype(jnp.float32)


def min_snr_weight(
    schedule: NoiseSchedule, timesteps: Int[Array, "B"], gamma: float
) -> Float[Array, "B"]:
    """Equation (3), by the schedule's prediction type."""
    snr = schedule.snr(timesteps)
    if schedule.prediction_type == "epsilon":
        # min(snr, gamma) / snr, written so that a zero-terminal-SNR step gives its limit 1.
        return jnp.minimum(1.0, gamma / jnp.maximum(snr, 1e-20))
    if schedule.prediction_type == "v_prediction":
        return jnp.minimum(snr, gamma) / (snr + 1.0)
    return jnp.minimum(snr, gamma)

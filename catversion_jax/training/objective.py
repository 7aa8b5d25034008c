r"""The loss of a concept: the frozen model's denoising objective, seen through its text encoder.

    (1)  x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps,        t ~ U{0 .. 999},  eps ~ N(0, I)
    (2)  L(learned) = mean_images  w(t) mean_pixels m |unet(x_t, t, c(learned)) - target|^2

``c(learned)`` is the text encoder's output with what a concept learned, ``target`` is eps, v or x_0
as the scheduler's ``prediction_type`` says. The official objective is w = m = 1 (plain epsilon
MSE). Options:

    (3)  min-SNR (arXiv 2303.09556): w = min(snr, gamma) for x_0, / snr for epsilon,
         / (snr + 1) for v
    (4)  masked: m = max(mask, unmasked_weight), divided by its mean over the image's pixels
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from catversion_jax.array_types import Array, Float, Int
from catversion_jax.diffusion import NoiseSchedule
from catversion_jax.methods.learned import Learned
from catversion_jax.models.layers.recompute import Recompute
from catversion_jax.models.weights.network import Network


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DiffusionBatch:
    """What C concepts see in one step, B images each.

    Attributes:
      latents: ``[C B h w c]`` scaled VAE latents (x_0).
      noise: ``[C B h w c]``.
      timesteps: ``[C B]`` int32 in ``0..num_train_timesteps-1``.
      text_hidden: ``[C B T D]`` text states entering the first adapted layer (they do not depend
        on what is learned).
      mask: ``[C B h w]`` object mask in 0..1, or None where the loss is not masked.
      word_places: ``[C B T]`` where the class word stands, or None where what is learned need not
        know.
    """

    latents: Float[Array, "C B h w c"]
    noise: Float[Array, "C B h w c"]
    timesteps: Int[Array, "C B"]
    text_hidden: Float[Array, "C B T D"]
    mask: Float[Array, "C B h w"] | None = None
    word_places: Int[Array, "C B T"] | None = None


def diffusion_losses(
    learned: Learned | None,
    text_encoder: Network,
    unet: Network,
    batch: DiffusionBatch,
    schedule: NoiseSchedule,
    *,
    first_layer: int,
    snr_gamma: float | None = None,
    unmasked_weight: float = 1.0,
    recompute: Recompute = "none",
) -> Float[Array, "C"]:
    """Equation (2) for each of C concepts; float32 whatever the networks compute in.

    A concept's loss depends only on what it learned itself, so the gradient of the sum over
    concepts is each one's own.

    Args:
      learned: what the concepts learn (leaves ``[C L P N H]`` or ``[C V D]``), or None for the
        plain model's loss.
      text_encoder: frozen CLIP text encoder.
      unet: frozen UNet.
      batch: see :class:`DiffusionBatch`.
      schedule: noise schedule of the model.
      first_layer: encoder layer that ``batch.text_hidden`` enters.
      snr_gamma: equation (3); None for w = 1.
      unmasked_weight: equation (4), used where the batch has a mask.
      recompute: what the UNet's backward pass computes again instead of keeping it.
    """
    context = text_context(
        learned, text_encoder, batch.text_hidden, batch.word_places, first_layer=first_layer
    )
    return denoising_losses(
        context,
        unet,
        batch,
        schedule,
        snr_gamma=snr_gamma,
        unmasked_weight=unmasked_weight,
        recompute=recompute,
    )


def text_context(
    learned: Learned | None,
    text_encoder: Network,
    text_hidden: Float[Array, "C B T D"],
    word_places: Int[Array, "C B T"] | None,
    *,
    first_layer: int,
) -> Float[Array, "C B T D"]:
    """What the UNet attends to: the prompts' states after the layers from ``first_layer`` on.

    Arguments are those of :func:`diffusion_losses` and :class:`DiffusionBatch`.
    """

    def of_concept(hidden: Array, learned: Learned | None, word_places: Array | None) -> Array:
        return text_encoder.call(
            "upper", hidden, learned, layer=first_layer, word_places=word_places
        )

    return jax.vmap(of_concept)(text_hidden, learned, None if learned is None else word_places)


def denoising_losses(
    context: Float[Array, "C B T D"],
    unet: Network,
    batch: DiffusionBatch,
    schedule: NoiseSchedule,
    *,
    snr_gamma: float | None = None,
    unmasked_weight: float = 1.0,
    recompute: Recompute = "none",
) -> Float[Array, "C"]:
    """:func:`diffusion_losses` from what the UNet attends to, see :func:`text_context`.

    The UNet, which is the same for all, sees the images of all concepts as *one* batch: under
    ``vmap`` its arrays would have two batch axes, neither of which alone fills a TPU's tiles, and
    the compiler would copy the result of every convolution into another layout.
    """
    concepts, images = batch.timesteps.shape
    batch, context = jax.tree.map(
        lambda leaf: leaf.reshape(concepts * images, *leaf.shape[2:]), (batch, context)
    )
    noisy = schedule.add_noise(batch.latents, batch.noise, batch.timesteps)
    prediction = unet(noisy, batch.timesteps, context, recompute).astype(jnp.float32)
    target = schedule.target(batch.latents, batch.noise, batch.timesteps)
    error = jnp.square(prediction - target)
    if batch.mask is not None:
        weight = jnp.maximum(batch.mask, unmasked_weight)
        weight = weight / jnp.mean(weight, axis=(1, 2), keepdims=True)
        error = error * weight[..., None]
    loss = jnp.mean(error, axis=(1, 2, 3))
    if snr_gamma is not None:
        loss = loss * min_snr_weight(schedule, batch.timesteps, snr_gamma)
    return jnp.mean(loss.reshape(concepts, images), axis=1)


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

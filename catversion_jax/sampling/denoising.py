"""Prompts to images with one frozen backbone and any concepts.

Which concepts act on a prompt is decided in ``requests.py``. The unconditional branch of
classifier-free guidance (arXiv 2207.12598), that is the negative prompt, is always the plain
encoding:

    (1)  output = plain + guidance_scale (prompted - plain)  above 1; no second branch at or below 1

What makes an image repeatable: its prompt is encoded alone, its noise comes from its own seed,
batches have a fixed size (padded) and contexts of one length (concepts with states of their own
make longer ones), and images are decoded one by one. The same seed gives the same bits whatever
else is in the batch. Every device that holds the networks draws images of its own, without
communication. One program serves every sampler and every number of steps: the row of the
sampler's table and the guidance scale are traced scalars, the frozen networks are arguments.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from catversion_jax.array_types import Array, Float, Int, Key
from catversion_jax.config.sampling import SamplingSettings
from catversion_jax.diffusion import Sampler, SamplerRow, make_sampler
from catversion_jax.errors import CatVersionError, shown
from catversion_jax.models.stable_diffusion import Backbone
from catversion_jax.models.vae import vae_decode
from catversion_jax.models.weights.network import Network
from catversion_jax.runtime.batches import batches_by_size, full_batches
from catversion_jax.runtime.random_normal import standard_normal
from catversion_jax.runtime.sharding import (
    by_device,
    mesh_of,
    on_every_device,
    place_by_device,
    replicated,
)
from catversion_jax.sampling.encoding import (
    Conditions,
    KnownTexts,
    conditions,
    encode_requests,
    stack_conditions,
)
from catversion_jax.sampling.inpainting import KeptPicture, inpainting_input
from catversion_jax.sampling.requests import ImageRequest, prompt_warnings

logger = logging.getLogger(__name__)


class UNetInputs(NamedTuple):
    """What the UNet is told of a batch of images beside their noisy latents.

    Attributes:
      texts: the conditions of the prompts, and with guidance of the negative prompts.
      guidance: the guidance scale of each, where the UNet takes it as an input.
      kept: mask and latents of what is kept, where the model inpaints (``inpainting.py``).
    """

    texts: list[Conditions]
    guidance: Float[Array, " B"] | None = None
    kept: Float[Array, "B h w c"] | None = None


@dataclasses.dataclass(frozen=True)
class GeneratedImages:
    """What :func:`draw_requests` returns.

    Attributes:
      pixels: ``[n height width 3]`` float32 within 0..1.
      latents: ``[n h w channels]`` float32, the last ``x`` before decoding.
      warnings: what the user should know about the prompts; also logged.
    """

    pixels: Float[np.ndarray, "n height width 3"]
    latents: Float[np.ndarray, "n h w channels"]
    warnings: tuple[str, ...]

    @property
    def images(self) -> np.ndarray:
        """``[n height width 3]`` uint8, rounded as diffusers' ``numpy_to_pil`` does."""
        return (np.nan_to_num(self.pixels) * 255).round().astype(np.uint8)


def draw_requests(
    backbone: Backbone,
    requests: Sequence[ImageRequest],
    settings: SamplingSettings | None = None,
    *,
    latents: Float[np.ndarray, "n channels h w"] | None = None,
    picture: KeptPicture | None = None,
    known: KnownTexts | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> GeneratedImages:
    """Draw every request.

    Args:
      backbone: the frozen networks.
      requests: at least one.
      settings: None is the defaults.
      latents: standard-normal initial latents in diffusers' NCHW layout, one per request, instead
        of the seeds'.
      picture: what an inpainting model keeps a part of; None paints everything anew.
      known: text states of earlier calls with this model, which are not made again.
      on_step: called with (steps done, steps in all) of the whole call.

    Raises:
      CatVersionError: a setting, a size or a latent shape that cannot be; a picture for a model
        that reads none.
    """
    settings = (settings or SamplingSettings()).over(backbone.drawing_defaults)
    if not requests:
        raise CatVersionError("requests is empty: give at least one prompt.")
    sampler = checked_sampler(backbone, settings)
    shape = latent_shape(backbone, settings)
    start = checked_latents(backbone, settings, latents, len(requests))
    warnings = prompt_warnings(backbone.tokenizers, requests)
    for message in warnings:
        logger.warning(message)
    kept = inpainting_input(backbone, picture, *shape[:2])
    guidance_scale = cast(float, settings.guidance_scale)
    # A UNet that takes the scale as an input gives the guided output by itself.
    encoded_scale = 1.0 if backbone.takes_guidance else guidance_scale
    texts = encode_requests(backbone, requests, encoded_scale, known)
    factor = backbone.latent_downsampling
    branches = [
        [conditions(states, shape[0] * factor, shape[1] * factor) for states in branch]
        for branch in texts
    ]
    mesh = mesh_of(backbone.unet)
    per_device = settings.batch_size or (1 if jax.default_backend() == "cpu" else 4)
    batch_size = per_device * mesh.size
    batches = batches_by_size([len(states.context) for states in texts[0]], batch_size)
    report = _reporter(on_step, len(batches) * len(sampler.rows))
    last = np.empty((len(requests), *shape), np.float32)
    for rows in batches:
        seeds = np.array([requests[i].seed for i in rows], np.uint32)
        keys, x = _initial_noise(place_by_device(seeds, mesh), shape)
        if start is not None:
            x = place_by_device(start[rows], mesh)
        scales: Any = np.full(len(rows), guidance_scale, np.float32)
        same: Any = None if kept is None else np.stack([kept] * len(rows))
        inputs = UNetInputs(
            [stack_conditions([branch[i] for i in rows]) for branch in branches],
            scales if backbone.takes_guidance else None,
            same,
        )
        placed = place_by_device(inputs, mesh)
        drawn = _denoise(backbone.unet, sampler, guidance_scale, x, placed, keys, report)
        own = rows[: len(set(rows))]  # the filling comes last
        last[own] = drawn[: len(own)]
    pixels = decode_latents(backbone, last)
    warnings += _overflow_warnings(requests, pixels)
    return GeneratedImages(pixels, last, warnings)


def _overflow_warnings(
    requests: Sequence[ImageRequest], pixels: Float[np.ndarray, "n height width 3"]
) -> tuple[str, ...]:
    """Names the images that hold NaN, which are black: a result that looks like one."""
    broken = np.flatnonzero(~np.isfinite(pixels).all(axis=(1, 2, 3)))
    if not broken.size:
        return ()
    first = requests[int(broken[0])]
    message = (
        f"{broken.size} of {len(requests)} images, first {shown(first.prompt, 80)} with seed "
        f"{first.seed}, hold numbers that are not finite, and are black there. Use "
        "dtype=float32, a smaller guidance_scale or scale, and check the model's weights."
    )
    logger.warning(message)
    return (message,)


def checked_sampler(backbone: Backbone, settings: SamplingSettings) -> Sampler:
    """The table of the settings' sampler for this model.

    Raises:
      CatVersionError: see :func:`~catversion_jax.diffusion.make_sampler`.
    """
    settings = settings.over(backbone.drawing_defaults)
    return make_sampler(
        cast(str, settings.sampler),
        backbone.noise_schedule,
        cast(int, settings.num_inference_steps),
        eta=settings.eta,
        karras=settings.karras,
    )


def _reporter(on_step: Callable[[int, int], None] | None, total: int) -> Callable[[Array], None]:
    """Calls ``on_step`` with the number of states it was given so far."""
    progress = iter(range(1, total + 1))

    def report(x: Array) -> None:
        if on_step is not None:
            x.block_until_ready()  # dispatch runs ahead of the device, a progress bar should not
            on_step(next(progress), total)

    return report


def latent_shape(backbone: Backbone, settings: SamplingSettings) -> tuple[int, int, int]:
    """``(h, w, channels)`` of one image's latents.

    Raises:
      CatVersionError: height or width is not a positive multiple of the VAE's factor.
    """
    factor = backbone.latent_downsampling
    sides = []
    for name in ("height", "width"):
        side = getattr(settings, name)
        side = backbone.default_resolution if side is None else side
        if side < factor or side % factor:
            raise CatVersionError(
                f"{name}={side}: must be a positive multiple of {factor}, the VAE's factor of this "
                f"model; {max(round(side / factor), 1) * factor} is the nearest."
            )
        sides.append(side // factor)
    return sides[0], sides[1], backbone.latent_channels


def _denoise(
    unet: Network,
    sampler: Sampler,
    guidance_scale: float,
    noise: Float[Array, "B h w channels"],
    inputs: UNetInputs,
    keys: Key[Array, " B"],
    report: Callable[[Array], None],
) -> Float[np.ndarray, "B h w channels"]:
    """The loop of one batch: one dispatch per step, nothing comes back to the host until the
    end.
    """
    mesh = mesh_of(unet)
    sigma, guidance = jax.device_put(
        (np.float32(sampler.init_noise_sigma), np.float32(guidance_scale)), replicated(mesh)
    )
    x, x0 = _first_state(noise, sigma)
    for step, row in enumerate(sampler.rows):
        before = x
        row, number = jax.device_put((row, np.uint32(step)), replicated(mesh))
        x, x0 = _denoise_step(mesh, unet, row, guidance, x, x0, inputs, keys, number)
        if step > 0:
            report(before)  # while the device works on this step
    report(x)
    return jax.device_get(x)


def decode_latents(
    backbone: Backbone, latents: Float[np.ndarray, "n h w channels"]
) -> Float[np.ndarray, "n height width 3"]:
    """Pixels within 0..1, one image at a time on each device: float32 at full size is where the
    memory goes.
    """
    mesh, count = mesh_of(backbone.vae), len(latents)
    scale = jax.device_put(np.float32(backbone.latent_scale), replicated(mesh))
    images = [
        jax.device_get(_decode(mesh, backbone.vae, place_by_device(latents[rows], mesh), scale))
        for rows in full_batches(count, mesh.size)
    ]
    return np.concatenate(images)[:count]


def checked_latents(
    backbone: Backbone, settings: SamplingSettings, latents: np.ndarray | None, count: int
) -> Float[np.ndarray, "n h w channels"] | None:
    """Initial latents of ``count`` images from diffusers' NCHW layout; None stays None.

    Raises:
      CatVersionError: wrong shape, wrong type, or numbers that are not finite.
    """
    if latents is None:
        return None
    try:
        latents = np.asarray(latents)
    except Exception as error:  # lists of several lengths, tensors of a device
        raise CatVersionError(
            f"latents of type {type(latents).__name__}: must be a NumPy array ({shown(error)})."
        ) from None
    height, width, channels = latent_shape(backbone, settings)
    expected = (count, channels, height, width)
    if latents.shape != expected:
        raise CatVersionError(
            f"latents of shape {latents.shape}: must be {expected}, one [channels height width] "
            "per image as in diffusers. Change --height/--width or the number of images, or draw "
            f"them with np.random.default_rng(0).normal(size={expected})."
        )
    largest = np.finfo(np.float32).max
    # NaN is not below it either
    if not np.issubdtype(latents.dtype, np.floating) or not (np.abs(latents) <= largest).all():
        raise CatVersionError(
            f"latents of type {latents.dtype}: must be finite floating-point numbers that "
            "float32 can hold."
        )
    return np.ascontiguousarray(latents.transpose(0, 2, 3, 1), dtype=np.float32)


# ---- compiled functions --------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=1)
def _initial_noise(
    seeds: Int[Array, " B"], shape: tuple[int, int, int]
) -> tuple[Key[Array, " B"], Float[Array, "B h w channels"]]:
    """Each image's key and the noise of its fold 0; step ``i`` of a stochastic sampler uses fold
    ``i + 1``.
    """
    keys = jax.vmap(jax.random.key)(seeds)
    return keys, _noise(keys, 0, shape)


def _noise(keys: Key[Array, " B"], fold: Array | int, shape: tuple[int, ...]) -> Array:
    return jax.vmap(lambda key: standard_normal(jax.random.fold_in(key, fold), shape))(keys)


@jax.jit
def _first_state(noise: Array, init_noise_sigma: Array) -> tuple[Array, Array]:
    return noise * init_noise_sigma, jnp.zeros_like(noise)


@functools.partial(jax.jit, static_argnums=0)
def _denoise_step(
    mesh: Mesh,
    unet: Network,
    row: SamplerRow,
    guidance_scale: Float[Array, ""],
    x: Float[Array, "B h w channels"],
    previous_x0: Float[Array, "B h w channels"],
    inputs: UNetInputs,
    keys: Key[Array, " B"],
    step: Int[Array, ""],
) -> tuple[Array, Array]:
    """:func:`_advance` with its arguments, the images split over the devices."""
    everywhere, images = replicated(mesh).spec, by_device(mesh).spec
    specs = (everywhere, everywhere, everywhere, images, images, images, images, everywhere)
    advance = on_every_device(_advance, mesh, specs, (images, images))
    return advance(unet, row, guidance_scale, x, previous_x0, inputs, keys, step)


def _advance(
    unet: Network,
    row: SamplerRow,
    guidance_scale: Float[Array, ""],
    x: Float[Array, "B h w channels"],
    previous_x0: Float[Array, "B h w channels"],
    inputs: UNetInputs,
    keys: Key[Array, " B"],
    step: Int[Array, ""],
) -> tuple[Array, Array]:
    """One step."""
    texts, guidance, kept = inputs
    model_input = row.input_scale * x
    if kept is not None:
        model_input = jnp.concatenate([model_input, kept], axis=-1)

    def told(*texts: Conditions) -> Array:
        context, added = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *texts)
        repeated = jnp.concatenate([model_input] * len(texts))
        output = unet(repeated, row.timestep, context, added=added, guidance=guidance)
        return output.astype(jnp.float32)

    if len({context.shape[1] for context, _ in texts}) == 1:
        output = told(*texts)
    else:
        output = jnp.concatenate([told(one) for one in texts])
    if len(texts) == 2:
        prompted, plain = jnp.split(output, 2)
        output = plain + guidance_scale * (prompted - plain)  # (1)
    return row.advance(x, output, previous_x0, _noise(keys, step + 1, x.shape[1:]))


@functools.partial(jax.jit, static_argnums=0)
def _decode(
    mesh: Mesh,
    vae: Network,
    latents: Float[Array, "B h w channels"],
    latent_scale: Float[Array, ""],
) -> Float[Array, "B height width 3"]:
    """:func:`_pixels` with its arguments, the images split over the devices."""
    everywhere, images = replicated(mesh).spec, by_device(mesh).spec
    decode = on_every_device(_pixels, mesh, (everywhere, images, everywhere), images)
    return decode(vae, latents, latent_scale)


def _pixels(
    vae: Network, latents: Float[Array, "B h w channels"], latent_scale: Float[Array, ""]
) -> Float[Array, "B height width 3"]:
    images = vae_decode(vae, latents / latent_scale).astype(jnp.float32)
    return jnp.clip(images / 2 + 0.5, 0, 1)

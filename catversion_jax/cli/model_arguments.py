"""The options that name a model, and loading it, for the commands that use one."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from catversion_jax.config.sampling import SAMPLERS, USUAL, SamplingSettings, sampling_settings

if TYPE_CHECKING:
    from catversion_jax.models.stable_diffusion import Backbone

DEFAULTS = SamplingSettings()


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """How a model's files are read: ``--revision``, ``--variant`` and ``--prediction_type``."""
    parser.add_argument("--revision", help="branch, tag or commit of the model on the hub")
    parser.add_argument("--variant", help="variant of the weight files, for example fp16")
    add_prediction_type_argument(parser)


def add_prediction_type_argument(parser: argparse.ArgumentParser) -> None:
    """What the UNet of a single-file model predicts."""
    parser.add_argument(
        "--prediction_type",
        help="what a single-file model predicts that does not say it: epsilon or v_prediction",
    )


def add_dtype_argument(parser: argparse.ArgumentParser) -> None:
    """The numbers the model computes with."""
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="number type of text encoder and UNet [float32 on CPU, else bfloat16]",
    )


def load_model(args: argparse.Namespace, model: str, *, dtype: str | None = None) -> Backbone:
    """Load ``model`` on one device with the options of :func:`add_source_arguments`."""
    from catversion_jax.models.stable_diffusion import load_model

    return load_model(
        model,
        revision=args.revision,
        variant=args.variant,
        prediction_type=args.prediction_type,
        dtype=dtype,
        max_devices=1,
    )


def add_sampling_arguments(
    parser: argparse.ArgumentParser, *, usual_batch_size: str = "1 on CPU, else 4"
) -> None:
    """The options of :class:`SamplingSettings`; ``usual_batch_size`` is what the help says of the
    default of ``--batch_size``.
    """
    add = parser.add_argument
    own = "distilled models such as SD-Turbo: their own"
    add("--sampler", help=f"one of {', '.join(SAMPLERS)} [{USUAL.sampler}; {own}]")
    add(
        "--num_inference_steps",
        type=int,
        help=f"number of denoising steps [{USUAL.num_inference_steps}; {own}]",
    )
    add(
        "--guidance_scale",
        type=float,
        help=f"weight of classifier-free guidance [{USUAL.guidance_scale:g}; {own}]",
    )
    add(
        "--eta",
        type=float,
        help=f"noise of the ddim sampler: 0 deterministic, 1 DDPM [{DEFAULTS.eta}]",
    )
    add(
        "--karras",
        action=argparse.BooleanOptionalAction,
        help="Karras spacing of the noise levels [as the model's folder says]",
    )
    add("--height", type=int, help="height of the images in pixels [the model's]")
    add("--width", type=int, help="width of the images in pixels [the model's]")
    add(
        "--batch_size",
        type=int,
        help=f"number of images denoised together on each device [{usual_batch_size}]",
    )


def given_sampling_settings(args: argparse.Namespace) -> SamplingSettings:
    """The options of :func:`add_sampling_arguments` that were given, over the defaults."""
    return sampling_settings(**given_sampling_options(args))


def given_sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of :func:`add_sampling_arguments` by name; None where none was given."""
    return {field.name: getattr(args, field.name) for field in dataclasses.fields(SamplingSettings)}

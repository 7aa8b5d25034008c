"""``catversion_jax.generate``: prompts and concepts to images."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import cast

import numpy as np

from catversion_jax.array_types import Float, Int
from catversion_jax.config.sampling import (
    MAX_IMAGES_PER_PROMPT,
    SamplingSettings,
    check_count,
    sampling_settings,
)
from catversion_jax.errors import CatVersionError, shown
from catversion_jax.models.stable_diffusion import Backbone, load_model
from catversion_jax.runtime.atomic_files import make_folder
from catversion_jax.runtime.bucket_paths import as_path
from catversion_jax.sampling.concept_shelf import Concepts, ConceptShelf
from catversion_jax.sampling.inpainting import KeptPicture
from catversion_jax.sampling.pages import (
    IMAGES_PER_PAGE,
    ImageMetadata,
    Page,
    PageFolder,
    draw_pages,
)
from catversion_jax.sampling.prompts import Prompt
from catversion_jax.sampling.requests import ImageRequest


@dataclasses.dataclass(frozen=True)
class GenerateResult:
    """What :func:`generate` drew.

    Attributes:
      images: uint8 ``[B H W 3]``: prompts in order, the seeds of each next to each other.
      requests: what each image shows: prompt, concepts, seed, negative prompt.
      files: the PNG of each image; empty where no ``output_dir`` was given.
      grids: one labelled grid for every page of 64 images; empty where no ``output_dir`` was given.
      warnings: what the caller should know about the prompts, for instance that none of its words
        calls a concept; also logged.
    """

    images: Int[np.ndarray, "B H W 3"]
    requests: tuple[ImageRequest, ...]
    files: tuple[Path, ...]
    grids: tuple[Path, ...]
    warnings: tuple[str, ...]


def generate(
    prompts: str | Sequence[str | Prompt],
    concepts: Concepts = (),
    *,
    model: str | Path | Backbone | None = None,
    revision: str | None = None,
    variant: str | None = None,
    prediction_type: str | None = None,
    dtype: str | None = None,
    seeds: int | Sequence[int] = 0,
    negative_prompt: str = "",
    scale: float = 1.0,
    when: str | None = None,
    keep_apart: bool = False,
    force: bool = False,
    latents: Float[np.ndarray, "B C h w"] | None = None,
    image: Int[np.ndarray, "H W 3"] | str | Path | None = None,
    mask_image: Int[np.ndarray, "H W"] | str | Path | None = None,
    output_dir: str | Path | None = None,
    on_step: Callable[[int, int], None] | None = None,
    sampler: str | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    eta: float | None = None,
    karras: bool | None = None,
    height: int | None = None,
    width: int | None = None,
    batch_size: int | None = None,
) -> GenerateResult:
    """Draw images with one frozen model and any trained concepts.

    A concept acts on the prompts that contain its base-class words, and on no negative prompt. An
    image depends on its own seed, not on what else is drawn with it.

    Args:
      prompts: what to draw, one prompt or several.
      concepts: the path of a concept file or of its folder (``"path:0.8"`` gives a scale), a
        ``Concept`` as ``load_concept`` returns it, a pair of one of these and its scale, a sequence
        of such, or a mapping from path to scale.
      model: a diffusers folder, a ``.safetensors`` file, a Hugging Face hub id, or a backbone that
        ``load_backbone`` returned, so that several calls load it once. None is the model that the
        concepts were trained on.
      revision: branch, tag or commit of the hub id.
      variant: variant of the weight files, for instance ``"fp16"``.
      prediction_type: ``"epsilon"`` or ``"v_prediction"``, for a single-file model that does not
        say it.
      dtype: ``"float32"`` or ``"bfloat16"`` for text encoder and UNet; None is float32 on CPU, else
        bfloat16.
      seeds: one image is drawn for every prompt and seed; each within 0..2**32 - 1.
      negative_prompt: what to keep away from.
      scale: strength of the concepts that have none of their own: 0 is the plain model exactly, 1
        is as trained.
      when: ``"class_word"`` or ``"always"``; None is what the concept files say.
      keep_apart: where several concepts act on one prompt, each is seen from its own word up to
        the next concept's word only, so that a dog does not take the colours of a cup behind it.
      force: use a concept though it was trained with another text encoder of the same shape.
      latents: standard-normal initial latents in diffusers' layout, one per image, instead of those
        of the seeds; ``h`` and ``w`` are pixels divided by the VAE's factor (8).
      image: for inpainting models: the picture of which a part is painted anew, a file or uint8;
        it is scaled to the size that is drawn. None paints everything anew.
      mask_image: white where ``image`` is painted anew, a file or uint8.
      output_dir: receives a PNG per image, which carries its settings, and labelled grids. None
        writes nothing.
      on_step: is called with (steps done, steps in all) of the page of 64 images under way.
      sampler: ``"ddim"``, ``"euler"``, ``"euler_ancestral"``, ``"dpmsolver++"`` or ``"lcm"``. None
        is ``"ddim"``, and for models that were distilled to few steps (SD-Turbo) the sampler, the
        steps and the guidance that they were made for.
      num_inference_steps: denoising steps; None is 50.
      guidance_scale: weight of classifier-free guidance, none at 1 or below; None is 7.5.
      eta: of ddim: 0 is deterministic, 1 is DDPM.
      karras: Karras spacing of the noise levels; None is what the model's folder says.
      height: pixels, a multiple of the VAE's factor; None is the model's own.
      width: as ``height``.
      batch_size: images denoised together on each device; None is 1 on CPU, else 4.

    Returns:
      The images as uint8 ``[B H W 3]``, with what was asked for and the files that were written.

    Raises:
      CatVersionError: no prompt, a file that is no concept, a concept made for another model, a
        model that cannot be read, or a setting that cannot be. The message says the value, the rule
        and the remedy.

    Example:
      >>> import catversion_jax as cv
      >>> drawn = cv.generate("a teapot on the beach", "runs/mine/concepts/my_teapot", seeds=[0, 1])
      >>> drawn.images.shape
      (2, 512, 512, 3)
    """
    settings = sampling_settings(
        sampler=sampler,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        eta=eta,
        karras=karras,
        height=height,
        width=width,
        batch_size=batch_size,
    )
    rows = _prompts(prompts)
    # one more than allowed: an endless iterator ends, too
    listed = [seeds] if not isinstance(seeds, Iterable) or isinstance(seeds, str) else seeds
    all_seeds = list(itertools.islice(listed, MAX_IMAGES_PER_PROMPT + 1))
    check_count("number of seeds", max(len(all_seeds), 1), MAX_IMAGES_PER_PROMPT)
    if not rows or not all_seeds:
        raise CatVersionError(
            f"prompts={prompts!r}, seeds={seeds!r}: give at least one prompt and one seed."
        )
    picture = KeptPicture.of(image, mask_image)
    drawn = list(
        generated_pages(
            rows,
            all_seeds,
            ConceptShelf(concepts, scale=scale, when=when, keep_apart=keep_apart),
            settings,
            model=model,
            revision=revision,
            variant=variant,
            prediction_type=prediction_type,
            dtype=dtype,
            negative_prompt=negative_prompt,
            force=force,
            latents=latents,
            picture=picture,
            output_dir=None if output_dir is None else as_path(output_dir),
            on_step=on_step,
        )
    )
    return GenerateResult(
        np.concatenate([one.page.images for one in drawn]),
        tuple(request for one in drawn for request in one.page.requests),
        tuple(file for one in drawn for file in one.files),
        tuple(one.grid for one in drawn if one.grid is not None),
        tuple(dict.fromkeys(warning for one in drawn for warning in one.page.warnings)),
    )


def _prompts(prompts: object) -> list[Prompt]:
    """The prompts of a call, however they are given.

    Raises:
      CatVersionError: one is neither text nor a :class:`Prompt`.
    """
    several = isinstance(prompts, Iterable) and not isinstance(prompts, str | bytes | Prompt)
    given = cast("Iterable[object]", prompts) if several else [prompts]
    rows: list[Prompt] = []
    for one in given:
        row = Prompt(one) if isinstance(one, str) else one
        if not isinstance(row, Prompt):
            raise CatVersionError(
                f"prompts: {shown(row)} must be text or a Prompt. Give one of these, or a list."
            )
        rows.append(row)
    return rows


@dataclasses.dataclass(frozen=True)
class GeneratedPage:
    """One page, and the files it became where an ``output_dir`` was given.

    Attributes:
      page: what was drawn.
      files: the PNG of each image.
      grid: the labelled grid.
    """

    page: Page
    files: Sequence[Path] = ()
    grid: Path | None = None


def generated_pages(
    rows: Sequence[Prompt],
    seeds: Sequence[int],
    shelf: ConceptShelf,
    settings: SamplingSettings,
    *,
    model: str | Path | Backbone | None,
    revision: str | None,
    variant: str | None,
    prediction_type: str | None,
    dtype: str | None,
    negative_prompt: str,
    force: bool,
    latents: Float[np.ndarray, "B C h w"] | None,
    picture: KeptPicture | None,
    output_dir: Path | None,
    on_step: Callable[[int, int], None] | None,
    latents_name: str = "given",
) -> Iterator[GeneratedPage]:
    """Draw page by page, each written before the next one is begun.

    A wrong concept, seed or folder shows before the model is loaded. Arguments are those of
    :func:`generate`; ``latents_name`` is what the PNGs say of initial latents.

    Raises:
      CatVersionError: as for :func:`generate`.
    """
    requests = shelf.requests(rows, seeds, negative_prompt)
    if output_dir is not None:
        make_folder(output_dir)
    backbone = load_model(
        shelf.base_model() if model is None else model,
        revision=revision,
        variant=variant,
        prediction_type=prediction_type,
        dtype=dtype,
        max_devices=len(requests),
    )
    shelf.check(backbone, force=force)
    folder = None
    if output_dir is not None:
        describe = ImageMetadata(
            backbone, settings, None if latents is None else latents_name, picture
        )
        folder = PageFolder(output_dir, len(seeds), describe)
    for page in draw_pages(
        backbone,
        requests,
        settings,
        latents=latents,
        picture=picture,
        # whole rows of the grid
        images_per_page=max(IMAGES_PER_PAGE // len(seeds), 1) * len(seeds),
        on_step=on_step,
    ):
        yield GeneratedPage(page) if folder is None else GeneratedPage(page, *folder.write(page))

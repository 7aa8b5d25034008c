"""``catversion generate``: prompts and concepts to PNG files and a grid."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from catversion_jax.cli.model_arguments import (
    add_dtype_argument,
    add_sampling_arguments,
    add_source_arguments,
    given_sampling_settings,
)
from catversion_jax.cli.paths import path_argument
from catversion_jax.cli.progress import progress
from catversion_jax.cli.prompt_files import read_prompts
from catversion_jax.concepts.fields import WHEN
from catversion_jax.config.sampling import MAX_IMAGES_PER_PROMPT, check_count
from catversion_jax.errors import CatVersionError, counted, shown
from catversion_jax.sampling.prompts import Prompt

if TYPE_CHECKING:
    import numpy as np


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command; names are those of diffusers' pipelines where they have the
    option.
    """
    add = parser.add_argument
    add("--model", required=True, help="model folder, single .safetensors file or hub id")
    add_source_arguments(parser)
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", action="append", help="what to draw; repeatable")
    prompts.add_argument(
        "--prompts",
        metavar="FILE",
        type=path_argument,
        help=(
            "file of prompts: text with one on each line; or JSONL or YAML rows with the keys "
            "prompt, concepts, seed, negative_prompt"
        ),
    )
    add(
        "--concept", action="append", default=[], metavar="PATH[:SCALE]",
        help="concept file, its folder, FILE.arrow#NAME or hf://USER/NAME/FOLDER; repeatable",
    )  # fmt: skip
    add(
        "--scale",
        type=float,
        default=1.0,
        help="strength of the concepts that have none of their own: 0 plain model, 1 trained [1]",
    )
    add(
        "--when",
        choices=WHEN,
        help="prompts that concepts act on: those with the class word, or all [as the files say]",
    )
    add(
        "--keep_apart",
        action="store_true",
        help="where a prompt calls several concepts, let each act from its own word up to the next "
        "concept's word only",
    )
    add(
        "--force",
        action="store_true",
        help="use a concept though it was trained with another text encoder",
    )
    add("--negative_prompt", default="", help="what to keep away from; concepts never act on it")
    add(
        "--num_images_per_prompt",
        type=int,
        default=1,
        help="images of each prompt; image i has the seed SEED + i [1]",
    )
    add(
        "--seed",
        type=int,
        default=0,
        help="seed of the first image of each prompt; an image depends on its own seed, not on "
        "what is drawn with it [0]",
    )
    add(
        "--latents",
        metavar="FILE.npy",
        type=path_argument,
        help="array of initial latents of shape [images channels h w], as diffusers takes them",
    )
    add(
        "--image",
        metavar="FILE",
        type=path_argument,
        help="for inpainting models: picture of which a part is painted anew; without it all is",
    )
    add(
        "--mask_image",
        metavar="FILE",
        type=path_argument,
        help="mask of --image, white where it is painted anew",
    )
    add(
        "--output_dir",
        type=path_argument,
        default="catversion-images",
        help="receives the PNGs and the grid [catversion-images]",
    )
    add_sampling_arguments(parser)
    add_dtype_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Draw everything, beside what is there already, under the next numbers."""
    check_count("--num_images_per_prompt", args.num_images_per_prompt, MAX_IMAGES_PER_PROMPT)
    settings = given_sampling_settings(args)
    rows = [Prompt(p) for p in args.prompt] if args.prompt else read_prompts(args.prompts)
    seeds = range(args.seed, args.seed + args.num_images_per_prompt)
    latents = None if args.latents is None else _read_latents(args.latents)

    from catversion_jax.sampling.concept_shelf import ConceptShelf
    from catversion_jax.sampling.generate import generated_pages
    from catversion_jax.sampling.inpainting import KeptPicture

    picture = KeptPicture.of(args.image, args.mask_image)
    shelf = ConceptShelf(args.concept, scale=args.scale, when=args.when, keep_apart=args.keep_apart)
    with progress(f"drawing {len(rows) * len(seeds)} images", "step") as advance:
        for drawn in generated_pages(
            rows,
            seeds,
            shelf,
            settings,
            model=args.model,
            revision=args.revision,
            variant=args.variant,
            prediction_type=args.prediction_type,
            dtype=args.dtype,
            negative_prompt=args.negative_prompt,
            force=args.force,
            latents=latents,
            picture=picture,
            latents_name=str(args.latents),
            output_dir=args.output_dir,
            on_step=advance,
        ):
            print(f"{counted(len(drawn.files), 'image')} and {drawn.grid}")
    return 0


def _read_latents(path: Path) -> np.ndarray:
    import numpy as np

    try:
        with path.open("rb") as file:
            value = np.load(file, allow_pickle=False)
    # Of a damaged header numpy lets errors of many classes through, MemoryError included.
    except Exception as error:
        reason = getattr(error, "strerror", None) or shown(error)
        raise CatVersionError(
            f"--latents {path}: is not a readable .npy array ({reason}). Write it with "
            "np.save(file, latents)."
        ) from None
    if not isinstance(value, np.ndarray):
        raise CatVersionError(
            f"--latents {path}: holds several arrays; save one with np.save(file, latents)."
        )
    return value

"""``catversion generate``: prompts and concepts to PNG files and a grid."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from catversion_jax import __version__
from catversion_jax.cli.prompt_files import PromptRow, read_prompts
from catversion_jax.concepts.fields import WHEN
from catversion_jax.config.sampling import SAMPLERS, SamplingSettings
from catversion_jax.errors import CatVersionError
from catversion_jax.runtime.bucket_paths import as_path

if TYPE_CHECKING:
    import numpy as np

    from catversion_jax.methods.concept_file import Concept
    from catversion_jax.models.stable_diffusion import Backbone
    from catversion_jax.sampling.requests import ConceptUse, ImageRequest

_IMAGES_PER_PAGE = 64
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(SamplingSettings)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command; names are those of diffusers' pipelines where they have the
    option.
    """
    add = parser.add_argument
    add("--model", required=True, help="diffusers folder or Hugging Face hub id")
    add("--revision", help="hub revision of the model")
    add("--variant", help="weight file variant, for example fp16")
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", action="append", help="what to draw; repeatable")
    prompts.add_argument(
        "--prompts",
        metavar="FILE",
        help=(
            "text, one prompt a line; or JSONL/YAML rows of prompt, concepts, seed, negative_prompt"
        ),
    )
    add(
        "--concept", action="append", default=[], metavar="PATH[:SCALE]",
        help="concept file or its folder; repeatable, several act together",
    )  # fmt: skip
    add(
        "--scale",
        type=float,
        default=1.0,
        help="of concepts without their own: 0 plain model, 1 trained [1]",
    )
    add("--when", choices=WHEN, help="when concepts act [as their files say]")
    add(
        "--force",
        action="store_true",
        help="use a concept though it was trained with another text encoder",
    )
    add("--negative_prompt", default="", help="what to keep away from; concepts never act on it")
    add("--num_images_per_prompt", type=int, default=1, help="image i has seed + i [1]")
    add(
        "--seed", type=int, default=0, help="an image depends on its own seed, not on the batch [0]"
    )
    add(
        "--latents",
        metavar="FILE.npy",
        help="initial latents [images channels h w], as diffusers takes them",
    )
    add(
        "--output_dir",
        default="catversion-images",
        help="receives the PNGs and the grid [catversion-images]",
    )
    add_sampling_arguments(parser)


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of :class:`SamplingSettings` and the number format."""
    add = parser.add_argument
    add("--sampler", help=f"one of {', '.join(SAMPLERS)} [{_DEFAULTS['sampler']}]")
    add("--num_inference_steps", type=int, help=f"[{_DEFAULTS['num_inference_steps']}]")
    add("--guidance_scale", type=float, help=f"[{_DEFAULTS['guidance_scale']}]")
    add("--eta", type=float, help=f"ddim: 0 deterministic, 1 DDPM [{_DEFAULTS['eta']}]")
    add(
        "--karras",
        action=argparse.BooleanOptionalAction,
        help="Karras spacing [as the model's folder says]",
    )
    add("--height", type=int, help="pixels [the model's]")
    add("--width", type=int, help="pixels [the model's]")
    add("--batch_size", type=int, help="images denoised together on a device [CPU: 1, else 4]")
    add("--dtype", choices=("float32", "bfloat16"), help="[float32 on CPU, else bfloat16]")


def sampling_settings(args: argparse.Namespace) -> SamplingSettings:
    """The options of :func:`add_sampling_arguments` that were given, over the defaults."""
    given = {name: getattr(args, name) for name in _DEFAULTS if getattr(args, name) is not None}
    return SamplingSettings(**given)


def run(args: argparse.Namespace) -> int:
    """Draw everything; files that are there already are kept."""
    if args.num_images_per_prompt < 1:
        raise CatVersionError(
            f"--num_images_per_prompt {args.num_images_per_prompt}: must be at least 1."
        )
    settings = sampling_settings(args)
    rows = [PromptRow(p) for p in args.prompt] if args.prompt else read_prompts(Path(args.prompts))
    shelf = _ConceptShelf(args)
    for row in rows:
        shelf.of_row(row)  # a wrong name or path shows before the model is loaded
    latents = None if args.latents is None else _read_latents(Path(args.latents))

    import jax

    from catversion_jax.models.stable_diffusion import default_dtype, load_backbone
    from catversion_jax.runtime.atomic_files import make_folder
    from catversion_jax.runtime.sharding import make_mesh, replicated
    from catversion_jax.sampling.requests import check_concept

    make_folder(Path(args.output_dir))
    num_images = len(rows) * args.num_images_per_prompt
    dtype = args.dtype or default_dtype()
    backbone = load_backbone(
        args.model,
        revision=args.revision,
        variant=args.variant,
        dtype=dtype,
        sharding=replicated(make_mesh(1, jax.local_devices()[:num_images])),
    )
    for concept, use in shelf.used():
        check_concept(backbone, use, concept.text_encoder_sha256, force=args.force)
    requests = [request for row in rows for request in _requests(args, row, shelf)]
    _draw_pages(args, backbone, settings, requests, latents)
    return 0


class _ConceptShelf:
    """The concepts of the command line and of prompt rows, each file read once."""

    def __init__(self, args: argparse.Namespace):
        self._when, self._scale = args.when, args.scale
        self._by_path: dict[Path, Concept] = {}
        self._uses: dict[int, tuple[Concept, ConceptUse]] = {}
        self._by_name: dict[str, tuple[Concept, float]] = {}
        self._default: tuple[ConceptUse, ...] = ()
        for text in args.concept:
            path, scale = _split_scale(text, self._scale)
            concept = self._load(as_path(path))
            if concept.name in self._by_name:
                raise CatVersionError(
                    f"--concept {text}: another --concept is called {concept.name!r} too. Give "
                    "each once."
                )
            self._by_name[concept.name] = (concept, scale)
            self._default += (self._use(concept, scale),)

    def of_row(self, row: PromptRow) -> tuple[ConceptUse, ...]:
        """The concepts a prompt asks for; without its own, all of the command line."""
        if row.concepts is None:
            return self._default
        return tuple(self._find(text) for text in row.concepts)

    def used(self) -> list[tuple[Concept, ConceptUse]]:
        """Every concept in use so far, with its file's content."""
        return list(self._uses.values())

    def _find(self, text: str) -> ConceptUse:
        name, scale = _split_scale(text, None)
        if name in self._by_name:
            concept, default_scale = self._by_name[name]
            return self._use(concept, default_scale if scale is None else scale)
        if not as_path(name).exists():
            known = ", ".join(map(repr, self._by_name)) or "none"
            raise CatVersionError(
                f"concept {name!r} of a prompt row: is neither a file nor the name of a --concept "
                f"({known})."
            )
        return self._use(self._load(as_path(name)), self._scale if scale is None else scale)

    def _load(self, path: Path) -> Concept:
        from catversion_jax.methods.concept_file import (
            CONCEPT_FILE_NAME,
            concept_folders,
            load_concept,
        )

        if path.is_dir() and not (path / CONCEPT_FILE_NAME).exists():
            inside = concept_folders(path)[:8]
            if inside:
                raise CatVersionError(
                    f"--concept {path}: holds several concepts; give one of "
                    f"{', '.join(map(str, inside))}."
                )
        if path not in self._by_path:
            self._by_path[path] = load_concept(path)
        return self._by_path[path]

    def _use(self, concept: Concept, scale: float) -> ConceptUse:
        from catversion_jax.sampling.requests import ConceptUse

        use = ConceptUse(
            concept.name, concept.base_class, concept.learned, scale, self._when or concept.when
        )
        self._uses.setdefault(id(concept), (concept, use))
        return use


def _split_scale(text: str, default: Any) -> tuple[str, Any]:
    """``path:0.8`` to path and scale; a colon that no number follows belongs to the path."""
    head, colon, tail = text.rpartition(":")
    try:
        return (head, float(tail)) if colon and head else (text, default)
    except ValueError:
        return text, default


def _requests(args: argparse.Namespace, row: PromptRow, shelf: _ConceptShelf) -> list[ImageRequest]:
    from catversion_jax.sampling.requests import ImageRequest

    seed = args.seed if row.seed is None else row.seed
    negative = args.negative_prompt if row.negative_prompt is None else row.negative_prompt
    return [
        ImageRequest(row.prompt, shelf.of_row(row), seed + index, negative)
        for index in range(args.num_images_per_prompt)
    ]


def _read_latents(path: Path) -> np.ndarray:
    import numpy as np

    try:
        value = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise CatVersionError(
            f"--latents {path}: is not a readable .npy array ({error}). Write it with "
            "np.save(file, latents)."
        ) from None
    if not isinstance(value, np.ndarray):
        raise CatVersionError(
            f"--latents {path}: holds several arrays; save one with np.save(file, latents)."
        )
    return value


def _draw_pages(
    args: argparse.Namespace,
    backbone: Backbone,
    settings: SamplingSettings,
    requests: Sequence[ImageRequest],
    latents: np.ndarray | None,
) -> None:
    """Draw and write page by page, so that a long job keeps what it has."""
    from catversion_jax.sampling.denoising import checked_latents, draw_requests
    from catversion_jax.sampling.png import save_png
    from catversion_jax.sampling.requests import active_concepts

    # all of them, before the first page
    checked_latents(backbone, settings, latents, len(requests))
    folder, columns = Path(args.output_dir), args.num_images_per_prompt
    per_page = max(_IMAGES_PER_PAGE // columns, 1) * columns
    first = _next_number(folder)
    for start in range(0, len(requests), per_page):
        page = requests[start : start + per_page]
        own_latents = None if latents is None else latents[start : start + per_page]
        with _progress(f"images {start + 1}-{start + len(page)} of {len(requests)}") as advance:
            result = draw_requests(backbone, page, settings, latents=own_latents, on_step=advance)
        for offset, (image, request) in enumerate(zip(result.images, page, strict=True)):
            acting = active_concepts(backbone.tokenizer, request.prompt, request.concepts)
            metadata = _metadata(args, backbone, settings, request, acting)
            name = f"{first + start + offset:05d}-{_slug(request.prompt)}-seed{request.seed}.png"
            save_png(folder / name, image, metadata)
        grid_path = folder / f"grid-{first + start:05d}.png"
        save_png(grid_path, _grid(result.images, page, columns))
        plural = "" if len(page) == 1 else "s"
        print(f"{len(page)} image{plural} and {grid_path}")


@contextlib.contextmanager
def _progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar that appears with the first step: warnings about the prompts come before
    it.
    """
    from tqdm import tqdm

    bars: list[Any] = []

    def advance(done: int, total: int) -> None:
        if not bars:
            bars.append(tqdm(desc=title, total=total, unit="step"))
        bars[0].update(done - bars[0].n)

    try:
        yield advance
    finally:
        for bar in bars:
            bar.close()


def _grid(images: np.ndarray, page: Sequence[ImageRequest], columns: int) -> Any:
    from catversion_jax.sampling.grids import image_grid

    rows = [list(images[i : i + columns]) for i in range(0, len(page), columns)]
    seeds = [
        [request.seed for request in page[i : i + columns]] for i in range(0, len(page), columns)
    ]
    prompts = [page[i].prompt for i in range(0, len(page), columns)]
    if all(row == seeds[0] for row in seeds):
        return image_grid(
            rows, row_labels=prompts, column_labels=[f"seed {seed}" for seed in seeds[0]]
        )
    labels = [f"{prompt} (from seed {row[0]})" for prompt, row in zip(prompts, seeds, strict=True)]
    return image_grid(
        rows, row_labels=labels, column_labels=[f"image {i + 1}" for i in range(columns)]
    )


def _metadata(
    args: argparse.Namespace,
    backbone: Backbone,
    settings: SamplingSettings,
    request: ImageRequest,
    acting: Sequence[ConceptUse],
) -> dict[str, Any]:
    """Everything another run needs to draw the same image."""
    concepts = [
        {
            "name": use.name,
            "base_class": use.base_class,
            "scale": use.scale,
            "when": use.when,
            "acts": any(use is one for one in acting),
        }
        for use in request.concepts
    ]
    return {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "seed": request.seed,
        "concepts": concepts,
        **{key: value for key, value in dataclasses.asdict(settings).items() if value is not None},
        "latents": args.latents,
        "model": backbone.name,
        "text_encoder_sha256": backbone.text_encoder_sha256,
        "software": f"catversion_jax {__version__}",
    }


def _next_number(folder: Path) -> int:
    numbers = [
        int(m.group(1))
        for path in folder.iterdir()
        if (m := re.match(r"(\d{5,})-.*\.png$", path.name))
    ]
    return max(numbers, default=-1) + 1


def _slug(prompt: str) -> str:
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")
    return words[:40].strip("-") or "image"

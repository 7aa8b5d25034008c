"""Drawing many images page by page, and the files they become.

A page is what is drawn at once, so that a long job keeps what it has. Every PNG carries one form of
metadata, which says all that decides its pixels.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from catversion_jax import __version__
from catversion_jax.array_types import Int
from catversion_jax.config.sampling import SamplingSettings
from catversion_jax.methods.learned import named_arrays
from catversion_jax.methods.table import settings_of
from catversion_jax.models.stable_diffusion import Backbone
from catversion_jax.sampling.denoising import checked_latents, draw_requests
from catversion_jax.sampling.grids import image_grid
from catversion_jax.sampling.inpainting import KeptPicture
from catversion_jax.sampling.png import save_png, slug
from catversion_jax.sampling.requests import ConceptUse, ImageRequest, active_concepts

IMAGES_PER_PAGE = 64
_PROMPT_LENGTH = 40
"""Letters of the prompt in a file's name."""


@dataclasses.dataclass(frozen=True)
class Page:
    """Images that were drawn together.

    Attributes:
      start: number of the first one in the whole job, from 0.
      requests: what was asked for.
      images: uint8 ``[n H W 3]``, one per request.
      warnings: what the user should know about the prompts; also logged.
    """

    start: int
    requests: Sequence[ImageRequest]
    images: Int[np.ndarray, "n H W 3"]
    warnings: tuple[str, ...]


def draw_pages(
    backbone: Backbone,
    requests: Sequence[ImageRequest],
    settings: SamplingSettings,
    *,
    latents: np.ndarray | None = None,
    picture: KeptPicture | None = None,
    images_per_page: int = IMAGES_PER_PAGE,
    on_step: Callable[[int, int], None] | None = None,
) -> Iterator[Page]:
    """Draw requests page by page; arguments as for :func:`draw_requests`.

    ``on_step`` counts the steps of the page under way. All initial latents are checked before the
    first page is drawn.

    Raises:
      CatVersionError: a setting, a size or a latent shape that cannot be.
    """
    checked_latents(backbone, settings, latents, len(requests))
    for start in range(0, len(requests), images_per_page):
        page = requests[start : start + images_per_page]
        own_latents = None if latents is None else latents[start : start + images_per_page]
        drawn = draw_requests(
            backbone, page, settings, latents=own_latents, picture=picture, on_step=on_step
        )
        yield Page(start, page, drawn.images, drawn.warnings)


# ---- files ---------------------------------------------------------------------------------------


class PageFolder:
    """A folder that receives a PNG for each image and a grid for each page.

    Files are numbered from the first number that no earlier image has; nothing is overwritten,
    also not what another command has written here meanwhile.

    Args:
      folder: exists, except in a bucket.
      columns: images of one prompt, a row of the grid.
      describe: the metadata of each request.
    """

    def __init__(
        self, folder: Path, columns: int, describe: Callable[[ImageRequest], Mapping[str, Any]]
    ):
        self._folder, self._columns, self._describe = folder, columns, describe
        self._first = 0  # known when the first page is written

    def write(self, page: Page) -> tuple[list[Path], Path]:
        """Write one page; returns the images' files and the grid's."""
        *files, grid = self._files(page)
        if page.start == 0 or any(file.exists() for file in (*files, grid)):
            self._first = _next_number(self._folder) - page.start
            *files, grid = self._files(page)
        for file, image, request in zip(files, page.images, page.requests, strict=True):
            save_png(file, image, self._describe(request))
        save_png(grid, _grid(page, self._columns))
        return files, grid

    def _files(self, page: Page) -> list[Path]:
        """Where the images of a page go, and last its grid."""
        first = self._first + page.start
        names = [
            f"{number:05d}-{slug(request.prompt, _PROMPT_LENGTH)}-seed{request.seed}.png"
            for number, request in enumerate(page.requests, start=first)
        ]
        return [self._folder / name for name in (*names, f"grid-{first:05d}.png")]


def _next_number(folder: Path) -> int:
    if not folder.is_dir():
        return 0  # a bucket has no empty folders
    numbers = [
        int(match[1])
        for path in folder.iterdir()
        if (match := re.match(r"(?:grid-)?(\d{5,})[-.].*png$", path.name))
    ]
    return max(numbers, default=-1) + 1


def _grid(page: Page, columns: int) -> Image.Image:
    starts = range(0, len(page.requests), columns)
    rows = [list(page.images[i : i + columns]) for i in starts]
    seeds = [[request.seed for request in page.requests[i : i + columns]] for i in starts]
    prompts = [page.requests[i].prompt for i in starts]
    if all(row == seeds[0] for row in seeds):
        labels = [f"seed {seed}" for seed in seeds[0]]
        return image_grid(rows, row_labels=prompts, column_labels=labels)
    labels = [f"{prompt} (from seed {row[0]})" for prompt, row in zip(prompts, seeds, strict=True)]
    numbers = [f"image {i + 1}" for i in range(columns)]
    return image_grid(rows, row_labels=labels, column_labels=numbers)


# ---- metadata ------------------------------------------------------------------------------------


class ImageMetadata:
    """What the PNGs of one job say about themselves: all that another run needs for the same image.

    Args:
      backbone: the model that draws.
      settings: how it draws; the model's own where they have none.
      latents: where initial latents came from, if they were given.
      picture: of which a part is kept, if one was given.
    """

    def __init__(
        self,
        backbone: Backbone,
        settings: SamplingSettings,
        latents: str | None = None,
        picture: KeptPicture | None = None,
    ):
        self._tokenizer = backbone.tokenizers[0]
        self._learned: dict[int, str] = {}
        settings = settings.over(backbone.drawing_defaults)
        given = {k: v for k, v in dataclasses.asdict(settings).items() if v is not None}
        self._of_job = {
            **given,
            "latents": latents,
            "kept_picture_sha256": None if picture is None else picture.sha256,
            "model": backbone.name,
            **backbone.fingerprints,
            **{
                f"{part}_digest": backbone.digests.get(part)
                for part in ("unet", "vae", "scheduler")
            },
            "dtype": backbone.dtype,
            "platform": jax.default_backend(),
            "software": f"catversion_jax {__version__}",
        }

    def __call__(self, request: ImageRequest) -> dict[str, Any]:
        """The metadata of one image."""
        acting = active_concepts(self._tokenizer, request.prompt, request.concepts)
        return {
            "prompt": request.prompt,
            "negative_prompt": request.negative_prompt,
            "seed": request.seed,
            "concepts": [
                {
                    "name": use.name,
                    "base_class": use.base_class,
                    "scale": use.scale,
                    "when": use.when,
                    **({"keep_apart": True} if use.keep_apart else {}),
                    "sha256": self._sha256(use),
                    "acts": any(use is one for one in acting),
                }
                for use in request.concepts
            ],
            **self._of_job,
        }

    def _sha256(self, use: ConceptUse) -> str:
        if id(use.learned) not in self._learned:
            self._learned[id(use.learned)] = _learned_sha256(use)
        return self._learned[id(use.learned)]


def says_the_same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two images' metadata stand for the same pixels.

    Files of version 0.1 leave out the negative prompt where it is empty, and list settings that are
    None; that makes no difference.
    """
    return _decisive(one) == _decisive(other)


def _decisive(metadata: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in metadata.items() if value not in (None, "")}
    if isinstance(concepts := metadata.get("concepts"), list):
        kept["concepts"] = [
            {key: value for key, value in concept.items() if key != "acts"}
            if isinstance(concept, Mapping)
            else concept
            for concept in concepts
        ]
    return kept


def _learned_sha256(use: ConceptUse) -> str:
    """The fingerprint of everything that a concept learned, whatever its method."""
    settings = json.dumps(settings_of(use.learned), sort_keys=True)
    digest = hashlib.sha256(settings.encode())
    for leaf in named_arrays(use.learned).values():
        digest.update(np.ascontiguousarray(np.asarray(leaf, "<f4")).tobytes())
    return digest.hexdigest()

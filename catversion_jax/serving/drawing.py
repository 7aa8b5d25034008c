"""Pictures of many users, drawn together.

A concept acts in the text encoder only, so what the UNet sees of a picture is its context: rows of
one batch may belong to different users and different concepts. A picture is the one that
``catversion generate`` draws with the same settings, whatever else is in its batch
(``sampling/denoising.py`` says why).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from catversion_jax.config.sampling import SamplingSettings
from catversion_jax.methods.concept_file import Concept
from catversion_jax.models.stable_diffusion import Backbone
from catversion_jax.runtime.atomic_files import make_folder, write_atomically
from catversion_jax.sampling.denoising import draw_requests
from catversion_jax.sampling.encoding import KnownTexts
from catversion_jax.sampling.pages import ImageMetadata
from catversion_jax.sampling.png import PictureFormat, picture_bytes
from catversion_jax.sampling.requests import ConceptUse, ImageRequest


@dataclasses.dataclass(frozen=True)
class Picture:
    """One picture that waits.

    Attributes:
      job: id of the job that it belongs to.
      index: its number in the job, from 0.
      owner: whose it is.
      request: what it shows.
      settings: how it is drawn; pictures of the same settings are drawn together.
      format: format of its file.
      quality: quality of its file, 0 to 100, where the format has one.
      arrived: when it came, by the monotonic clock.
    """

    job: str
    index: int
    owner: str
    request: ImageRequest
    settings: SamplingSettings
    format: PictureFormat
    quality: int
    arrived: float


def together(one: Picture, other: Picture) -> bool:
    """Whether two pictures may be in one batch."""
    return one.settings == other.settings


@dataclasses.dataclass(frozen=True)
class DrawnBatch:
    """Pixels uint8 ``[n H W 3]`` of some pictures, and how many seconds they took."""

    pictures: Sequence[Picture]
    pixels: np.ndarray
    seconds: float


def draw(
    backbone: Backbone,
    pictures: Sequence[Picture],
    known: KnownTexts,
    on_step: Callable[[], None],
) -> DrawnBatch:
    """Draw pictures of one setting; fewer than the batch holds are filled up.

    Args:
      backbone: the frozen networks.
      pictures: what is drawn, all with the settings of the first.
      known: text states of earlier pictures.
      on_step: is called after every denoising step.

    Raises:
      CatVersionError: a prompt or a concept that cannot be drawn.
    """
    began = time.monotonic()
    drawn = draw_requests(
        backbone,
        [picture.request for picture in pictures],
        pictures[0].settings,
        known=known,
        on_step=lambda done, total: on_step(),
    )
    return DrawnBatch(pictures, drawn.images, time.monotonic() - began)


def write_picture(root: Path, backbone: Backbone, picture: Picture, pixels: np.ndarray) -> Path:
    """Write the file of one picture, all or nothing.

    Args:
      root: the folder of all pictures.
      backbone: the model, which the file names.
      picture: what was drawn.
      pixels: uint8 ``[H W 3]``.

    Returns:
      The file.

    Raises:
      CatVersionError: the file cannot be written.
    """
    path = picture_path(root, picture.job, picture.index, picture.format)
    metadata = ImageMetadata(backbone, picture.settings)(picture.request)
    data = picture_bytes(pixels, metadata, format=picture.format, quality=picture.quality)
    make_folder(path.parent)
    write_atomically(path, data)
    return path


def picture_path(root: Path, job: str, index: int, format: str) -> Path:
    """Where the file of a picture lies."""
    return root / job / f"{index}.{format}"


def usual_batch_size() -> int:
    """How many pictures are denoised together by default, as in :func:`draw_requests`."""
    return 1 if jax.default_backend() == "cpu" else 4


def warm_up(
    backbone: Backbone,
    settings: Sequence[SamplingSettings],
    concept: Concept,
    most_concepts: int,
) -> None:
    """Compile all that drawing needs: each size, guidance on and off, and the text encoder for each
    number of concepts, which make prompts of another length where they have states of their own.

    Args:
      backbone: the frozen networks.
      settings: one for each size.
      concept: any concept of the shape that is taught.
      most_concepts: most concepts of one picture.
    """
    ways = [
        dataclasses.replace(setting, num_inference_steps=2, guidance_scale=guidance)
        for setting in settings
        for guidance in (setting.guidance_scale, 1.0)
    ]
    has_states = any(part.num_context_states for part in concept.learned.parts)
    uses: tuple[ConceptUse, ...] = ()
    for number in range(most_concepts + 1):
        # without states a concept changes the text encoder's program only
        for way in ways if number == 0 or has_states else ways[:1]:
            draw_requests(backbone, [ImageRequest("warm up", uses)], way)
        named = dataclasses.replace(concept, name=f"warm up {number}", when="always")
        uses = (*uses, ConceptUse.of(named))

"""PNG files that carry how they were drawn."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from catversion_jax.array_types import Int
from catversion_jax.config.documents import parse_json
from catversion_jax.errors import CatVersionError, shown
from catversion_jax.runtime.atomic_files import write_atomically

METADATA_KEY = "parameters"
"""Key of the text entry: the one that other image tools read too."""


def slug(text: str, max_length: int = 150) -> str:
    """A text as part of a file name: "A dog, in snow" is ``a-dog-in-snow``."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:max_length].strip("-") or "image"


def save_png(
    path: Path,
    image: Int[np.ndarray, "height width 3"] | Image.Image,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write one PNG atomically, with ``metadata`` as JSON in its ``parameters`` text entry.

    Raises:
      CatVersionError: the file cannot be written.
    """
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    info = PngImagePlugin.PngInfo()
    if metadata is not None:
        # ASCII JSON fits the plain tEXt chunk, whatever the prompt's language
        info.add_text(METADATA_KEY, json.dumps(metadata, ensure_ascii=True))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", pnginfo=info)
    write_atomically(path, buffer.getvalue())


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata :func:`save_png` wrote.

    Raises:
      CatVersionError: the file is no PNG of ours.
    """
    try:
        with path.open("rb") as file, Image.open(file, formats=("PNG",)) as picture:
            metadata = parse_json(picture.info[METADATA_KEY], str(path))
    except Exception as error:  # whatever a damaged picture makes of its reader
        raise _no_settings(path, shown(error)) from None
    if not isinstance(metadata, dict):
        raise _no_settings(path, shown(metadata))
    return metadata


def _no_settings(path: Path, reason: str) -> CatVersionError:
    return CatVersionError(
        f"{path}: carries no settings of ours ({reason}). Give a PNG that catversion generate "
        "wrote."
    )

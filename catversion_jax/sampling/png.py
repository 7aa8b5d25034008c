"""Picture files that carry how they were drawn, and that a machine made them.

The mark is IPTC's digital source type in an XMP packet, which image tools keep and search engines
read: https://cv.iptc.org/newscodes/digitalsourcetype/
"""

from __future__ import annotations

import io
import json
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, PngImagePlugin

from catversion_jax.array_types import Int
from catversion_jax.config.documents import parse_json
from catversion_jax.errors import CatVersionError, shown
from catversion_jax.runtime.atomic_files import write_atomically

METADATA_KEY = "parameters"
"""Key of the text entry: the one that other image tools read too."""

XMP_KEY = "XML:com.adobe.xmp"
"""Where a PNG keeps its XMP packet (XMP specification, part 3)."""

SYNTHETIC_XMP = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
   Iptc4xmpExt:DigitalSourceType="http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"/>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="r"?>"""
"""Says that a trained model made the picture."""

PictureFormat = Literal["png", "jpeg", "webp"]


def slug(text: str, max_length: int = 150) -> str:
    """A text as part of a file name, of at most so many bytes: "A dog, in snow" is
    ``a-dog-in-snow``; letters of every script stay.
    """
    letters = re.sub(r"[\W_]+", "-", unicodedata.normalize("NFC", text.lower())).strip("-")
    return letters.encode()[:max_length].decode(errors="ignore").strip("-") or "image"


def picture_bytes(
    image: Int[np.ndarray, "height width 3"] | Image.Image,
    metadata: Mapping[str, Any] | None = None,
    *,
    format: PictureFormat = "png",
    quality: int = 95,
    synthetic: bool = True,
) -> bytes:
    """A picture as the contents of a file.

    Args:
      image: the pixels, uint8.
      metadata: written as JSON into the ``parameters`` text entry of a PNG; other formats have
        none.
      format: of the file.
      quality: of JPEG and WebP, 0 to 100.
      synthetic: whether a model made the picture, which its XMP packet then says.
    """
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    if format != "png":
        mark = {"xmp": SYNTHETIC_XMP.encode()} if synthetic else {}
        picture.save(buffer, format=format.upper(), quality=quality, **mark)
        return buffer.getvalue()
    info = PngImagePlugin.PngInfo()
    if metadata is not None:
        # ASCII JSON fits the plain tEXt chunk, whatever the prompt's language
        info.add_text(METADATA_KEY, json.dumps(metadata, ensure_ascii=True))
    if synthetic:
        info.add_itxt(XMP_KEY, SYNTHETIC_XMP)
    picture.save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()


def save_png(
    path: Path,
    image: Int[np.ndarray, "height width 3"] | Image.Image,
    metadata: Mapping[str, Any] | None = None,
    *,
    synthetic: bool = True,
) -> None:
    """Write one PNG atomically; arguments are those of :func:`picture_bytes`.

    Raises:
      CatVersionError: the file cannot be written.
    """
    write_atomically(path, picture_bytes(image, metadata, synthetic=synthetic))


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

"""What a concept was trained on, known by content: digests of images, masks, prompts and networks.

    {"images": [sha256 of each file], "masks": [sha256, or "" where there is none],
     "tokens": sha256 of the prompts' token ids,
     "text_encoder": ..., "unet": ..., "vae": ..., "scheduler": ...}

(and ``text_encoder_2`` where the model has a second one).

Images and masks are hashed as the bytes of their files (or of the dataset's row), in the order of
the images; masks only where ``masked_training``, ``preserve_weight`` or an inpainting model looks
at them, after "black " where black is the object. What an earlier version did not record counts as
unchanged.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from catversion_jax.concepts import ConceptSpec, ImageSource
from catversion_jax.errors import ConceptError

NETWORKS = {
    "text_encoder": "text encoder",
    "text_encoder_2": "second text encoder",
    "unet": "UNet",
    "vae": "VAE",
    "scheduler": "scheduler",
    "start": "concept encoder",
}
"""Components of a model that have a digest, with their names in messages; ``start`` only where
``init=predicted`` reads one."""


def image_digests(spec: ConceptSpec, *, masked: bool) -> dict[str, list[str]]:
    """The digests of a concept's images and, where ``masked``, of their masks.

    Raises:
      ConceptError: a file cannot be read.
    """
    digests = {"images": [image_digest(source) for source in spec.images]}
    if masked:
        digests["masks"] = [_mask_digest(source) for source in spec.images]
    return digests


def image_digest(source: ImageSource) -> str:
    """The digest of one image.

    Raises:
      ConceptError: its file cannot be read.
    """
    return _sha256(source.data, source.path, source.label)


def token_digest(token_ids: Sequence[np.ndarray]) -> str:
    """The digest of the prompts as each text encoder reads them, ``[K T]``."""
    digest = hashlib.sha256()
    for of_encoder in token_ids:
        digest.update(np.ascontiguousarray(of_encoder, "<i4").tobytes())
    return digest.hexdigest()


def changed_networks(before: object, now: Mapping[str, Any]) -> list[str]:
    """What of the model is not what it was, in words."""
    return [
        f"the model's {word} has changed"
        for key, word in NETWORKS.items()
        if isinstance(before, Mapping) and key in before and key in now and before[key] != now[key]
    ]


def changed_content(
    before: object, now: Mapping[str, Any], images: Sequence[str], *, same_prompts: bool = True
) -> list[str]:
    """What was trained on and is not what it was, in words.

    Args:
      before: the digests of then; anything but a mapping says nothing.
      now: the digests of now.
      images: names of the images of now.
      same_prompts: whether the prompts are those of then, so that their tokens should be too.
    """
    if not isinstance(before, Mapping):
        return []
    found = []
    for key, what in (("images", "{}"), ("masks", "the mask of {}")):
        old, new = before.get(key), now.get(key)
        if not isinstance(old, list) or not isinstance(new, list) or len(old) != len(new):
            continue  # the names of the images say it
        found += [
            f"{what.format(name)} has changed since it was trained"
            for name, one, other in zip(images, old, new, strict=True)
            if one != other
        ]
    if (
        same_prompts
        and "tokens" in before
        and "tokens" in now
        and before["tokens"] != now["tokens"]
    ):
        found.append("the model's tokenizer reads its prompts otherwise")
    return [*found, *changed_networks(before, now)]


def same_images(before: object, now: Mapping[str, Any]) -> bool:
    """Whether the digests of then and now are known to be of the same images, in order."""
    return isinstance(before, Mapping) and "images" in now and before.get("images") == now["images"]


def _mask_digest(source: ImageSource) -> str:
    if source.mask is None:
        return ""
    inverted = "black " if source.mask_polarity == "black" else ""
    return inverted + _sha256(None, source.mask, str(source.mask))


def _sha256(data: bytes | None, path: Path | None, name: str) -> str:
    digest = hashlib.sha256(data or b"")
    if data is None and path is not None:
        try:
            with path.open("rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
        except OSError as error:
            raise ConceptError(
                f"{name}: cannot be read ({error.strerror or error}). Replace or remove it."
            ) from error
    return digest.hexdigest()

"""Photos and masks that come in: looked at before they are kept."""

from __future__ import annotations

import hashlib
import io
import os
import time
from collections.abc import Mapping
from typing import Any

from catversion_jax.concepts import ConceptSpec, concept_prompts
from catversion_jax.concepts.class_words import LONGEST_WORDS, are_plain_words
from catversion_jax.concepts.fields import class_forms_field, when_field
from catversion_jax.concepts.picture_files import read_picture
from catversion_jax.errors import ConceptError, shown
from catversion_jax.serving.core import Core
from catversion_jax.serving.errors import not_found, unprocessable
from catversion_jax.serving.forms import ConceptForm
from catversion_jax.serving.store import Job, Photo, StoredConcept
from catversion_jax.serving.worker import Worker

_SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "JPEG2000": "jp2", "HEIF": "heic", "TIFF": "tif"}
"""Where a format's own name is none of ``IMAGE_SUFFIXES``; MPO is a JPEG with a preview."""


def checked_fields(core: Core, form: ConceptForm) -> dict[str, Any]:
    """What a concept is, as it is kept.

    Raises:
      ApiError: 422, a word or a prompt cannot be used, or there are too many prompts.
    """
    fields = form.model_dump(exclude_none=True)
    words = " ".join(form.base_class.split())
    if not are_plain_words(words, LONGEST_WORDS):
        raise unprocessable(
            "invalid_base_class",
            f"base_class={shown(form.base_class)}: must be plain words such as 'teapot' or "
            "'stuffed animal'.",
            "base_class",
        )
    prompts = tuple(form.prompts or ())
    if len(prompts) > core.options.max_prompts:
        raise unprocessable(
            "too_many_prompts",
            f"{len(prompts)} prompts: this server's programs have room for "
            f"{core.options.max_prompts} (--max_prompts).",
            "prompts",
        )
    try:
        forms = class_forms_field(form.class_forms, words, "class_forms")
        when_field(form.when, "when")
        spec = ConceptSpec("prompts", words, (), prompts, when=form.when, class_forms=forms)
        concept_prompts(spec, "default")
    except ConceptError as error:
        raise unprocessable("invalid_concept", str(error)) from error
    return {**fields, "base_class": words}


def check_photo_fits(core: Core, concept: StoredConcept, name: str) -> None:
    """Make sure that there is room for a photo, before it is read.

    Raises:
      ApiError: the concept has as many as it may.
    """
    names = {photo.name for photo in core.photos(concept)}
    if name not in names and len(names) >= core.options.max_images:
        raise unprocessable(
            "too_many_photos",
            f"concept {concept.id!r}: has {len(names)} photos, and this server's programs have "
            f"room for {core.options.max_images} (--max_images). Delete one first.",
        )


def keep_photo(core: Core, owner: str, id: str, name: str, data: bytes) -> Photo:
    """Decode a photo, and keep it under a name of the server's own.

    Raises:
      ApiError: it is no picture, is too large, or the concept cannot be changed now.
    """
    digest = hashlib.sha256(data).hexdigest()
    same = [
        p for p in core.photos(core.changeable(owner, id)) if (p.name, p.sha256) == (name, digest)
    ]
    if same:
        return same[0]
    width, height, suffix = _looked_at(core, name, data)
    photo = Photo(name, f"{time.time_ns():020d}.{suffix}", digest, width, height)
    with core.lock:
        concept = core.changeable(owner, id)
        check_photo_fits(core, concept, name)
        replaced = [p for p in core.photos(concept) if p.name == name]
        core.folders.write_photo(concept.folder, photo.file, data)
        core.store.put_photo(concept.folder, photo)
    for old in replaced:
        core.folders.remove_photo(concept.folder, old.file, old.mask)
    return photo


def keep_mask(core: Core, owner: str, id: str, name: str, data: bytes) -> None:
    """Keep the mask of a photo, white where the object is.

    Raises:
      ApiError: as for a photo; there is no photo of that name.
    """
    _, _, suffix = _looked_at(core, name, data)
    with core.lock:
        concept = core.changeable(owner, id)
        photo = next((p for p in core.photos(concept) if p.name == name), None)
        if photo is None:
            raise not_found("photo", name)
        file = f"{photo.file.rpartition('.')[0]}.mask.{suffix}"
        core.folders.write_photo(concept.folder, file, data)
        core.store.put_mask(concept.folder, name, file)
    if photo.mask not in (None, file):
        core.folders.remove_photo(concept.folder, photo.mask)


def _looked_at(core: Core, name: str, data: bytes) -> tuple[int, int, str]:
    """Width, height and suffix of a picture that can be decoded."""
    if not data:
        raise unprocessable("invalid_image", f"{name}: is empty. Send a picture as the body.")
    try:
        picture, _ = read_picture(
            io.BytesIO(data), name, max_megapixels=core.options.max_megapixels
        )
    except ConceptError as error:
        raise unprocessable("invalid_image", str(error)) from error
    assert picture.format is not None
    return picture.width, picture.height, _SUFFIXES.get(picture.format, picture.format.lower())


def ask_lesson(
    core: Core,
    worker: Worker,
    owner: str,
    id: str,
    *,
    idempotency_key: str | None,
    body_sha256: str | None,
) -> tuple[Job, Mapping[str, Any]]:
    """Queue the teaching of a concept.

    Returns:
      The job, and what ``catversion check`` says of the photos.

    Raises:
      ApiError: the photos cannot be used, it is being taught already, or there is no room.
    """
    core.admit()
    with core.lock:
        core.lessons.admit(owner, 1)
    concept = core.changeable(owner, id)
    photos = core.photos(concept)
    if not photos:
        raise unprocessable(
            "no_photos",
            f"concept {id!r}: has no photos. PUT /v1/concepts/{id}/photos/NAME sends one.",
        )
    core.folders.describe(concept.folder, concept.fields, photos)
    report = checked(core, worker, concept)
    if report["problems"]:
        raise unprocessable("invalid_photos", "\n".join(report["problems"]))
    with core.lock:
        core.lessons.admit(owner, 1)
        core.changeable(owner, id)
        job = core.store.add_job(
            owner,
            "teach",
            {"concept": id, "photos": [photo.sha256 for photo in photos], **concept.fields},
            concept=concept,
            idempotency_key=idempotency_key,
            body_sha256=body_sha256,
        )
        core.lessons.put(owner, job)
    core.wake()
    return job, report


def checked(core: Core, worker: Worker, concept: StoredConcept) -> dict[str, Any]:
    """What ``catversion check`` says of a concept's photos: ``problems``, for which it cannot be
    taught, ``warnings`` and ``notes``.

    Raises:
      ApiError: 503, the server loads, drains, or its device is gone.
    """
    core.admit()
    photos = core.photos(concept)
    if not photos:
        return {
            "problems": [f"concept {concept.id!r}: has no photos."],
            "warnings": [],
            "notes": [],
        }
    core.folders.describe(concept.folder, concept.fields, photos)
    named = {photo.file: photo.name for photo in photos}
    named |= {photo.mask: f"mask of {photo.name}" for photo in photos if photo.mask}
    folder = core.folders.photos_of(concept.folder)

    def said(texts: tuple[str, ...]) -> list[str]:
        """In the client's names: where the files lie here is nobody's business."""
        texts = tuple(text.replace(f"{folder}{os.sep}", "") for text in texts)
        for file, name in named.items():
            texts = tuple(text.replace(file, name) for text in texts)
        texts = tuple(text.replace(str(folder), concept.id) for text in texts)
        return [text.replace(concept.folder, concept.id) for text in texts]

    try:
        report = core.folders.report(concept.folder, worker.backbone)
    except ConceptError as error:
        return {"problems": said((str(error),)), "warnings": [], "notes": []}
    return {
        "problems": said(report.problems),
        "warnings": said(report.warnings),
        "notes": said(report.notes),
    }

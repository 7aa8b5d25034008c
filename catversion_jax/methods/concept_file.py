r"""Concept files: one trained concept as one small safetensors file, and back.

What was learned lies in the tensors, as its method arranges them. Everything needed to use the
concept rightly (base class, logit bias, fingerprint of the text encoder it was trained with) is in
the metadata, whose values are strings as the format asks.

The bytes are a function of the content alone: no dates, keys sorted (``safetensors_bytes.py``).
``modelspec.*`` follows Stability AI's ModelSpec 1.0.1; its ``hash_sha256`` covers the data and lets
:func:`load_concept` notice a damaged file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from catversion_jax.concepts.class_words import plural_forms
from catversion_jax.concepts.fields import WHEN, class_forms_field
from catversion_jax.errors import CatVersionError, shown
from catversion_jax.methods.foreign_files import describe_bytes, describe_folder, describe_tensors
from catversion_jax.methods.learned import Learned, settings
from catversion_jax.methods.modelspec import modelspec
from catversion_jax.methods.per_encoder import FORMAT_VERSION, learned_from_file, num_encoders
from catversion_jax.methods.stored_values import (
    check_tensors,
    choice,
    json_object,
    json_texts,
    nonblank_text,
    whole_number,
)
from catversion_jax.methods.table import METHODS, UNNAMED_METHOD, method_of
from catversion_jax.models.weights.fingerprint import fingerprints_by_name
from catversion_jax.models.weights.safetensors_files import parse_header, read_header
from catversion_jax.runtime.alike_names import folded
from catversion_jax.runtime.atomic_files import make_folder, write_atomically
from catversion_jax.runtime.bucket_paths import as_path, file_size, is_in_bucket
from catversion_jax.runtime.concept_packs import PackError, read_packed
from catversion_jax.runtime.safetensors_bytes import serialize_safetensors

CONCEPT_FILE_NAME = "catversion.safetensors"
_LEVELS = ("", "*/", "*/*/", "shards/*/*/*/")  # where a run has its concepts

_MAX_BYTES = 256 * 2**20  # Stable Diffusion 1.5 has 36 kB; a guard against whole checkpoints


@dataclasses.dataclass(frozen=True)
class Concept:
    """One trained concept with all that its file says about it.

    Attributes:
      learned: what was learned, numpy leaves ``[L P N H]`` or ``[V D]``, float32.
      base_class: the word or words of the prompt that call the concept.
      name: the concept's own name, for people and for choosing between concepts.
      when: ``class_word``: acts on prompts that contain ``base_class``; ``always``: on every
        conditional prompt.
      base_model: model folder or hub id it was trained on, as the user gave it; '' when unknown.
      text_encoder_sha256: fingerprint of that model's text encoder; '' when unknown.
      step: optimizer updates done.
      images: names of the training images.
      train_config: the resolved training configuration, {} when unknown.
      metrics: final measurements, {} when there are none.
      metadata: the file's metadata as read, {} for a concept that was never in a file.
      class_forms: further forms of ``base_class`` that call the concept, such as its plural.
      text_encoder_2_sha256: fingerprint of the second text encoder; '' where the model has one or
        it is unknown.
    """

    learned: Learned
    base_class: str
    name: str
    when: str = "class_word"
    base_model: str = ""
    text_encoder_sha256: str = ""
    step: int = 0
    images: tuple[str, ...] = ()
    train_config: dict[str, Any] = dataclasses.field(default_factory=dict)
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)
    class_forms: tuple[str, ...] = ()
    text_encoder_2_sha256: str = ""

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of the text encoders, under the names that they have in the file."""
        of_both = (self.text_encoder_sha256, self.text_encoder_2_sha256)
        return fingerprints_by_name(of_both[: len(self.learned.parts)])

    @property
    def residual(self) -> Learned:
        """The earlier name of ``learned``, which scripts of users read."""
        return self.learned

    def save(self, path: str | Path) -> Path:
        """Write the concept to ``path``; see :func:`save_concept`."""
        path = as_path(path)
        try:
            tensors = self.learned.tensors(self.name)
        except CatVersionError as error:
            raise CatVersionError(f"{path}: {error}") from error
        _check_finite(path, self.learned, tensors)
        if not self.base_class.strip():
            raise CatVersionError(
                f"base_class={self.base_class!r}: must be the word or words that call the concept."
            )
        if self.when not in WHEN:
            raise CatVersionError(f"when={self.when!r}: must be one of {', '.join(WHEN)}.")
        class_forms_field(list(self.class_forms), self.base_class, str(path))
        make_folder(path.parent)
        write_atomically(path, serialize_safetensors(tensors, _metadata_of(self)))
        return path


def save_concept(
    path: str | Path,
    learned: Learned | None = None,
    *,
    base_class: str,
    name: str | None = None,
    when: str = "class_word",
    base_model: str = "",
    text_encoder_sha256: str = "",
    step: int = 0,
    config: Mapping[str, Any] | None = None,
    images: Sequence[str] = (),
    metrics: Mapping[str, Any] | None = None,
    residual: Learned | None = None,
    class_forms: Sequence[str] | None = None,
    text_encoder_2_sha256: str = "",
) -> Path:
    """Write one concept, atomically and with bytes that depend on nothing but the arguments.

    Args:
      path: the file to write; missing folders are made.
      learned: what one concept learned, leaves ``[L P N H]`` or ``[V D]``.
      base_class: the word or words that call the concept.
      name: defaults to ``base_class``.
      when: ``class_word`` or ``always``, see :class:`Concept`.
      base_model: folder or hub id of the model it was trained on.
      text_encoder_sha256: fingerprint of that model's text encoder.
      step: optimizer updates done.
      config: resolved training configuration; must be expressible in JSON.
      images: names of the training images.
      metrics: final measurements; must be expressible in JSON.
      residual: the name that ``learned`` had before version 0.2; scripts may still use it.
      class_forms: further forms of ``base_class`` that call the concept; None is its regular
        English plural.
      text_encoder_2_sha256: fingerprint of the model's second text encoder, if it has one.

    Returns:
      ``path``.

    Raises:
      CatVersionError: what was learned is not one finite concept, an argument is out of its rule,
        or the file cannot be written (an older file of that name then stays as it was).
      TypeError: ``learned`` is missing.
    """
    learned = residual if learned is None else learned
    if learned is None:
        raise TypeError("save_concept() needs `learned`, what one concept learned")
    concept = Concept(
        learned,
        base_class,
        name or base_class,
        when,
        base_model,
        text_encoder_sha256,
        step=int(step),
        images=tuple(images),
        train_config=dict(config or {}),
        metrics=dict(metrics or {}),
        class_forms=plural_forms(base_class) if class_forms is None else tuple(class_forms),
        text_encoder_2_sha256=text_encoder_2_sha256,
    )
    return concept.save(path)


def _metadata_of(concept: Concept) -> dict[str, str]:
    """The file's metadata, every value a string."""
    method = method_of(concept.learned)
    own = {
        "format_version": str(concept.learned.format_version),
        "base_class": concept.base_class,
        "name": concept.name,
        "when": concept.when,
        **({} if method == UNNAMED_METHOD else {"method": method}),
        **concept.learned.facts(concept.name),
        "base_model": concept.base_model,
        **concept.fingerprints,
        "step": str(concept.step),
        "num_images": str(len(concept.images)),
        "images": _json(concept.images),
        "train_config": _json(concept.train_config),
    }
    if concept.class_forms:
        own["class_forms"] = _json(concept.class_forms)
    if concept.metrics:
        own["metrics"] = _json(concept.metrics)
    metadata = {"format": "pt"} | {f"catversion.{k}": v for k, v in own.items()}
    return metadata | modelspec(
        concept.learned, concept.name, concept.base_class, concept.when, concept.train_config
    )


def write_concepts(concepts: Sequence[Concept], folder: str | Path) -> list[Path]:
    """One ``<name>.safetensors`` per concept in ``folder``; returns the files in the order of
    ``concepts``.

    Raises:
      CatVersionError: two concepts would get the same file, or a file cannot be written.
    """
    files: dict[Path, Concept] = {}
    taken: dict[str, Concept] = {}  # as file systems compare names that ignore case
    for concept in concepts:
        stem = re.sub(r"[^\w.-]+", "_", concept.name).strip("._") or "concept"
        path = as_path(folder) / f"{stem}.safetensors"
        key = folded(stem)
        if (first := taken.setdefault(key, concept)) is not concept:
            raise CatVersionError(
                f"{path}: would hold both {first.name!r} and {concept.name!r}, at least where file "
                "names ignore case. Export them into two folders."
            )
        files[path] = concept
    return [concept.save(path) for path, concept in files.items()]


def load_concept(path: str | Path) -> Concept:
    """Read a concept file, the inverse of :func:`save_concept`.

    Args:
      path: the file, a folder that contains ``catversion.safetensors``, or ``concepts.arrow#NAME``
        of a file that ``catversion pack`` has written.

    Raises:
      CatVersionError: missing, damaged, written by a newer version, or not a concept file.
    """
    path = as_path(path)
    try:
        if (packed := read_packed(path)) is not None:
            return _parse_concept(packed, path)
    except PackError as error:
        raise CatVersionError(str(error)) from error
    if path.is_dir():
        folder, path = path, path / CONCEPT_FILE_NAME
        if not path.exists() and (what := describe_folder(folder)):
            raise CatVersionError(f"{folder}: this is not a concept but {what}")
    if path.exists() and not path.is_file():
        raise CatVersionError(
            f"{path}: is neither a file nor a folder with {CONCEPT_FILE_NAME} in it. Give a "
            "concept file written by training or by `catversion export`."
        )
    try:
        data = _read_bytes(path)
    except OSError as error:
        raise CatVersionError(
            f"{path}: cannot be read ({error.strerror}). Give a concept file written by training "
            f"or by `catversion export`, or a folder with {CONCEPT_FILE_NAME} in it."
        ) from error
    return _parse_concept(data, path)


def _parse_concept(data: bytes, path: Path) -> Concept:
    metadata, tensors = read_safetensors(data, path)
    _check_is_concept(path, metadata, tensors)
    try:
        return _concept_from(metadata, tensors)
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        detail = f"missing {error}" if isinstance(error, KeyError) else str(error)
        raise CatVersionError(
            f"{path}: the concept file is damaged ({detail}). Export it again from its training "
            "run."
        ) from error


def concept_folders(folder: str | Path) -> list[Path]:
    """The folders below ``folder`` that hold a concept file, such as those of a run directory; in
    a bucket, those not more than two levels down, or in the shards of a run.
    """
    folder = as_path(folder)
    if not is_in_bucket(folder):
        return sorted(file.parent for file in folder.rglob(CONCEPT_FILE_NAME))
    files = (file for levels in _LEVELS for file in folder.glob(levels + CONCEPT_FILE_NAME))
    return sorted(file.parent for file in files)


def read_safetensors(data: bytes, path: str | Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Metadata and tensors of safetensors bytes; ``path`` only names them in the error message."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    damaged = f"{path}: the file is damaged or incomplete (%s). Copy or export it again."
    what = describe_bytes(data)
    if what:
        raise CatVersionError(f"{path}: this is not a concept file but {what}")
    (length,) = struct.unpack("<Q", data[:8])
    try:
        tensors = load(data)
        metadata = parse_header(data[8 : 8 + length]).get("__metadata__") or {}
    except (SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise CatVersionError(damaged % shown(error)) from error
    digest = "0x" + hashlib.sha256(data[8 + length :]).hexdigest()
    if (
        "catversion.format_version" in metadata
        and metadata.get("modelspec.hash_sha256", digest) != digest
    ):
        raise CatVersionError(
            damaged % "its tensors do not have the checksum that its header states"
        )
    return metadata, tensors


def _read_bytes(path: Path) -> bytes:
    """The bytes of a file that may be a concept.

    Raises:
      CatVersionError: it is larger than any concept; what its first bytes give away is said.
      OSError: it cannot be read.
    """
    size = file_size(path)
    if size <= _MAX_BYTES:
        return path.read_bytes()
    with path.open("rb") as file:
        what = describe_bytes(file.read(16))
    if what is None:
        header = read_header(path)
        what = describe_tensors({name: stored.shape for name, stored in header.items()})
    raise CatVersionError(
        f"{path}: {size} bytes, a concept file has at most {_MAX_BYTES}; it is {what}"
    )


def _check_is_concept(
    path: Path, metadata: Mapping[str, str], tensors: Mapping[str, np.ndarray]
) -> None:
    version = metadata.get("catversion.format_version")
    if version is None:
        what = describe_tensors({name: tensor.shape for name, tensor in tensors.items()})
        raise CatVersionError(f"{path}: this is not a concept file but {what}")
    if version not in map(str, range(1, FORMAT_VERSION + 1)):
        raise CatVersionError(
            f"{path}: format version {version:.20}; this program reads up to {FORMAT_VERSION}. "
            "Update it: pip install --upgrade catversion-jax."
        )


def _concept_from(metadata: dict[str, str], tensors: Mapping[str, np.ndarray]) -> Concept:
    own = {
        k.removeprefix("catversion."): v for k, v in metadata.items() if k.startswith("catversion.")
    }
    check_tensors(tensors)
    method = choice(own, "method", METHODS, UNNAMED_METHOD)
    base_class = nonblank_text(own, "base_class")
    version = int(own["format_version"])
    return Concept(
        learned=learned_from_file(METHODS[method], version, own, tensors),
        base_class=base_class,
        name=nonblank_text(own, "name"),
        when=choice(own, "when", WHEN),
        base_model=own["base_model"],
        text_encoder_sha256=own["text_encoder_sha256"],
        text_encoder_2_sha256=own["text_encoder_2_sha256"]
        if num_encoders(version, own) > 1
        else "",
        step=whole_number(own, "step"),
        images=json_texts(own, "images"),
        train_config=json_object(own, "train_config"),
        metrics=json_object(own, "metrics", "{}"),
        metadata=metadata,
        # A file that lists no forms is called by its base class alone, as those of version 0.2 are.
        class_forms=class_forms_field(
            list(json_texts(own, "class_forms", "[]")), base_class, "its metadata"
        ),
    )


def _check_finite(path: Path, learned: Learned, tensors: Mapping[str, np.ndarray]) -> None:
    numbers = [v for v in settings(learned).values() if isinstance(v, float | np.floating)]
    if not all(np.isfinite(array).all() for array in (*tensors.values(), *numbers)):
        raise CatVersionError(
            f"{path}: what was learned holds NaN or infinite numbers and was not written; every "
            "number must be finite. Train again with a smaller learning rate."
        )


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)

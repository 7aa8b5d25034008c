"""The concepts of one call: paths, loaded concepts and prompt rows to :class:`ConceptUse`."""

from __future__ import annotations

import collections
import numbers
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias, TypeGuard, cast

from catversion_jax.config.sampling import MAX_IMAGES, check_count
from catversion_jax.errors import CatVersionError, shown
from catversion_jax.methods.concept_file import (
    CONCEPT_FILE_NAME,
    Concept,
    concept_folders,
    load_concept,
)
from catversion_jax.models.stable_diffusion import Backbone
from catversion_jax.models.weights.hub_concept import ADDRESS, hub_concept
from catversion_jax.runtime.bucket_paths import as_path, path_text
from catversion_jax.runtime.concept_packs import split_packed
from catversion_jax.sampling.prompts import Prompt
from catversion_jax.sampling.requests import ConceptUse, ImageRequest, check_concept

ConceptSource: TypeAlias = "str | os.PathLike[str] | Concept"
ConceptArgument: TypeAlias = "ConceptSource | tuple[ConceptSource, float]"
Concepts: TypeAlias = "ConceptArgument | Sequence[ConceptArgument] | Mapping[ConceptSource, float]"


class ConceptShelf:
    """The concepts that a call names, and those that single prompts name; each file is read once.

    Args:
      concepts: a path or an address on the hub, ``hf://USER/NAME/rex`` (optionally
        ``path:scale``), a :class:`Concept`, a pair of one of these and
        its scale, a sequence of such, or a mapping from path to scale.
      scale: strength of those without a scale of their own.
      when: when concepts act; None is what their files say.
      keep_apart: see :class:`ConceptUse`.

    Raises:
      CatVersionError: a file is no concept, or two concepts have one name.
    """

    def __init__(
        self,
        concepts: Concepts = (),
        *,
        scale: float = 1.0,
        when: str | None = None,
        keep_apart: bool = False,
    ):
        self._when, self._scale, self._keep_apart = when, scale, keep_apart
        self._by_path: dict[Path, Concept] = {}
        self._used: dict[int, tuple[Concept, ConceptUse]] = {}
        self._by_name: dict[str, tuple[Concept, float]] = {}
        self._all: tuple[ConceptUse, ...] = ()
        for source, own_scale in _pairs(concepts):
            concept, scale = self._concept(source, own_scale)
            if concept.name in self._by_name:
                given = concept.name if isinstance(source, Concept) else source
                raise CatVersionError(
                    f"concept {given}: another concept of this call is called "
                    f"{concept.name!r} too. Give each once."
                )
            self._by_name[concept.name] = (concept, scale)
            self._all += (self._use(concept, scale),)

    def requests(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], negative_prompt: str = ""
    ) -> list[ImageRequest]:
        """One request for each prompt and seed, prompt by prompt.

        Raises:
          CatVersionError: a prompt names an unknown concept, a seed is out of range, or there are
            too many images.
        """
        check_count("number of images", len(prompts) * len(seeds), MAX_IMAGES)
        return [
            ImageRequest(
                row.prompt,
                self._of(row),
                seed if row.seed is None else _seed(row.seed) + seed - seeds[0],
                negative_prompt if row.negative_prompt is None else row.negative_prompt,
            )
            for row in prompts
            for seed in seeds
        ]

    def base_model(self) -> str:
        """The one model that all concepts in use were trained on.

        Raises:
          CatVersionError: they do not say, or name several.
        """
        return base_model([concept for concept, _ in self._used.values()])

    def check(self, backbone: Backbone, *, force: bool = False) -> None:
        """Make sure that every concept in use was made for this model.

        Raises:
          CatVersionError: one was not; see :func:`check_concept`.
        """
        for concept, use in self._used.values():
            check_concept(backbone, use, concept.fingerprints, force=force)

    def _of(self, row: Prompt) -> tuple[ConceptUse, ...]:
        """The concepts of one prompt; where it names none, all of the call."""
        if row.concepts is None:
            return self._all
        if isinstance(row.concepts, str):
            raise CatVersionError(
                f"concepts={shown(row.concepts)} of a prompt row: must be a list of names or files."
            )
        uses = tuple(self._find(text) for text in row.concepts)
        counts = collections.Counter(use.name for use in uses)
        if twice := next((name for name, count in counts.items() if count > 1), None):
            raise CatVersionError(
                f"prompt row {shown(row.prompt)}: names concept {twice!r} twice. Give each once, "
                "with the scale it should have."
            )
        return uses

    def _find(self, text: str) -> ConceptUse:
        name, scale = _split_scale(text)
        if name in self._by_name:
            concept, default_scale = self._by_name[name]
            return self._use(concept, default_scale if scale is None else scale)
        path = _path(name)
        if not path.exists() and split_packed(name) is None:
            known = ", ".join(map(repr, self._by_name)) or "none"
            raise CatVersionError(
                f"concept {name!r} of a prompt row: is neither a file nor the name of a --concept "
                f"({known})."
            )
        return self._use(self._load(path), self._scale if scale is None else scale)

    def _concept(self, source: ConceptSource, scale: float | None) -> tuple[Concept, float]:
        if isinstance(source, Concept):
            return source, self._scale if scale is None else scale
        text, own_scale = path_text(source), scale
        if own_scale is None:
            text, own_scale = _split_scale(text)
        return self._load(_path(text)), self._scale if own_scale is None else own_scale

    def _load(self, path: Path) -> Concept:
        if path.is_dir() and not (path / CONCEPT_FILE_NAME).exists():
            inside = concept_folders(path)[:8]
            if inside:
                raise CatVersionError(
                    f"concept {path}: the folder holds several concepts; give one of "
                    f"{', '.join(map(str, inside))}."
                )
        if path not in self._by_path:
            self._by_path[path] = load_concept(path)
        return self._by_path[path]

    def _use(self, concept: Concept, scale: float) -> ConceptUse:
        use = ConceptUse.of(concept, scale=scale, when=self._when, keep_apart=self._keep_apart)
        self._used.setdefault(id(concept), (concept, use))
        return use


def _path(text: str) -> Path:
    """Where a concept lies; one on the hub is downloaded first."""
    return hub_concept(text, CONCEPT_FILE_NAME) if text.startswith(ADDRESS) else as_path(text)


def _seed(seed: object) -> int:
    """A row's own seed.

    Raises:
      CatVersionError: it is no whole number.
    """
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral):
        raise CatVersionError(f"seed={shown(seed)} of a prompt: must be a whole number.")
    return int(seed)


def base_model(concepts: Sequence[Concept]) -> str:
    """The one model that ``concepts`` were trained on.

    Raises:
      CatVersionError: their files do not say, or name several.
    """
    models = {concept.base_model for concept in concepts}
    if len(models) == 1 and "" not in models:
        return models.pop()
    raise CatVersionError(
        f"the concepts name {', '.join(sorted(models - {''})) or 'no model'} as what they were "
        "trained on. Give --model."
    )


def _pairs(concepts: Concepts) -> list[tuple[ConceptSource, float | None]]:
    """Every form of the argument as (source, scale or None)."""
    if isinstance(concepts, Mapping):
        return list(concepts.items())
    if isinstance(concepts, str | os.PathLike | Concept):
        return [(concepts, None)]
    if _is_pair(concepts):
        return [concepts]
    items = cast("Sequence[ConceptArgument]", concepts)
    if isinstance(concepts, bytes) or not isinstance(concepts, Iterable):
        raise CatVersionError(
            f"concepts={shown(concepts)}: must be a path, a Concept, a pair of one and its scale, "
            "or a list of such."
        )
    pairs: list[tuple[ConceptSource, float | None]] = [
        item if isinstance(item, tuple) else (item, None) for item in items
    ]
    for pair in pairs:
        if len(pair) != 2:
            raise CatVersionError(f"concepts: {shown(pair)} must be a concept and its scale.")
    return pairs


def _is_pair(value: object) -> TypeGuard[tuple[ConceptSource, float]]:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], numbers.Real)


def _split_scale(text: str) -> tuple[str, float | None]:
    """``path:0.8`` to path and scale; a colon that no number follows belongs to the path."""
    head, colon, tail = text.rpartition(":")
    try:
        return (head, float(tail)) if colon and head else (text, None)
    except ValueError:
        return text, None

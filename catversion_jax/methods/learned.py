"""What the trainer can learn: one small pytree per concept, an argument of the frozen encoder.

:class:`KVResidual` (CatVersion) and :class:`TokenEmbeddings` (Textual Inversion) answer the same
questions, and nothing between their start values and the text encoder asks which of them it holds:
``first_layer`` (what lies below can be cached), ``num_word_places`` and ``reads_word_places``
(what the tokenizer prepares), ``scaled``, ``check_fits`` and ``shape_text``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from catversion_jax.errors import CatVersionError
from catversion_jax.methods.residual import KVResidual
from catversion_jax.methods.token_embeddings import TokenEmbeddings

Learned = KVResidual | TokenEmbeddings

METHODS: Mapping[str, type[KVResidual] | type[TokenEmbeddings]] = {
    "catversion": KVResidual,
    "textual_inversion": TokenEmbeddings,
}


def stack_learned(concepts: Sequence[Learned]) -> Learned:
    """Stack concepts of one kind, equal shapes and settings on a new leading axis."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *concepts)


def method_of(learned: Learned) -> str:
    """The name in :data:`METHODS`."""
    return next(name for name, kind in METHODS.items() if isinstance(learned, kind))


def named_arrays(learned: Learned) -> dict[str, Any]:
    """The trained arrays by field name."""
    return {f.name: getattr(learned, f.name) for f in _fields(type(learned), static=False)}


def settings_of(learned: Learned) -> dict[str, Any]:
    """The method and everything that is not trained, as plain JSON values."""
    values = {f.name: getattr(learned, f.name) for f in _fields(type(learned), static=True)}
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
    return {"method": method_of(learned), **values}


def rebuild(arrays: Mapping[str, Any], settings: Mapping[str, Any]) -> Learned:
    """The inverse of :func:`named_arrays` and :func:`settings_of`; other keys are ignored.

    Raises:
      CatVersionError: a method this version does not know.
    """
    method = settings.get("method", "catversion")
    if method not in METHODS:
        raise CatVersionError(
            f"method={method!r}: must be one of {', '.join(METHODS)}. Update catversion-jax."
        )
    kind = METHODS[method]
    values = {f.name: arrays[f.name] for f in _fields(kind, static=False)}
    for field in _fields(kind, static=True):
        if field.name in settings:
            value = settings[field.name]
            values[field.name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)


def _fields(kind: type, *, static: bool) -> list[dataclasses.Field[Any]]:
    return [f for f in dataclasses.fields(kind) if f.metadata.get("static", False) == static]

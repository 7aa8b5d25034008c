"""The table of methods: the value of the option ``method`` and the class that learns it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from catversion_jax.config import MethodOptions
from catversion_jax.errors import CatVersionError, did_you_mean
from catversion_jax.methods.layer_choice import layers_by_encoder
from catversion_jax.methods.learned import (
    Learned,
    LearnedPart,
    encoder_names,
    of_encoder,
    rebuild,
    settings,
)
from catversion_jax.methods.per_encoder import joined
from catversion_jax.methods.residual import KVResidual
from catversion_jax.methods.start_values import StartingPoint
from catversion_jax.methods.token_embeddings import TokenEmbeddings
from catversion_jax.models.weights.variants import TEXT_ENCODERS

METHODS: dict[str, type[LearnedPart]] = {
    "catversion": KVResidual,
    "textual_inversion": TokenEmbeddings,
}

UNNAMED_METHOD = "catversion"
"""The method of files that name none, as those of format version 1 do."""


def method_named(name: str) -> type[LearnedPart]:
    """The class of a method.

    Raises:
      CatVersionError: this version does not know the method.
    """
    if name not in METHODS:
        raise CatVersionError(
            f"method={name!r}: must be one of {', '.join(METHODS)}.{did_you_mean(name, METHODS)}"
        )
    return METHODS[name]


def method_for(options: MethodOptions) -> type[LearnedPart]:
    """The class of the method that ``options`` name.

    Raises:
      CatVersionError: the method is not known, or other options contradict it.
    """
    kind = method_named(options.method)
    problems = kind.option_problems(options)
    if problems:
        raise CatVersionError("\n".join(problems))
    return kind


def start_learned(options: MethodOptions, at: Sequence[StartingPoint]) -> Learned:
    """Start values of one concept, float32.

    Args:
      options: what is learned, and how it starts.
      at: in front of each text encoder of the model.

    Raises:
      CatVersionError: the method is not known, or options contradict it or the encoders.
    """
    kind = method_for(options)
    choices = layers_by_encoder(options.layers, len(at))
    parts = []
    for encoder, layers, point in zip(encoder_names(len(at)), choices, at, strict=True):
        try:
            parts.append(kind.start(dataclasses.replace(options, layers=layers), point))
        except CatVersionError as error:
            if not encoder:
                raise
            raise CatVersionError(
                f"{error} That is of {encoder}; the text encoders may have a choice each, such as "
                "layers=last3/28,29,30."
            ) from error
    return joined(parts)


def method_of(learned: Learned) -> str:
    """The name of the method in :data:`METHODS`."""
    return next(name for name, kind in METHODS.items() if isinstance(learned.parts[0], kind))


def settings_of(learned: Learned) -> dict[str, Any]:
    """The method and everything that is not trained, as plain JSON values."""
    return {"method": method_of(learned), **settings(learned)}


def rebuild_learned(arrays: Mapping[str, Any], described: Mapping[str, Any]) -> Learned:
    """From trained arrays by field name and :func:`settings_of`; other keys are ignored.

    Raises:
      CatVersionError: this version does not know the method.
    """
    kind = method_named(described.get("method", UNNAMED_METHOD))
    several = any(of_encoder(arrays, name) for name in TEXT_ENCODERS)
    return joined(
        [
            rebuild(kind, of_encoder(arrays, encoder), of_encoder(described, encoder))
            for encoder in encoder_names(len(TEXT_ENCODERS) if several else 1)
        ]
    )

"""The table of methods: the value of the option ``method`` and the class that learns it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from catversion_jax.config import MethodOptions
from catversion_jax.errors import CatVersionError, did_you_mean
from catversion_jax.methods.learned import Learned, rebuild, settings
from catversion_jax.methods.residual import KVResidual
from catversion_jax.methods.token_embeddings import TokenEmbeddings

METHODS: dict[str, type[Learned]] = {
    "catversion": KVResidual,
    "textual_inversion": TokenEmbeddings,
}

UNNAMED_METHOD = "catversion"
"""The method of files that name none, as those of format version 1 do."""


def method_named(name: str) -> type[Learned]:
    """The class of a method.

    Raises:
      CatVersionError: this version does not know the method.
    """
    if name not in METHODS:
        raise CatVersionError(
            f"method={name!r}: must be one of {', '.join(METHODS)}.{did_you_mean(name, METHODS)}"
        )
    return METHODS[name]


def method_for(options: MethodOptions) -> type[Learned]:
    """The class of the method that ``options`` name.

    Raises:
      CatVersionError: the method is not known, or other options contradict it.
    """
    kind = method_named(options.method)
    problems = kind.option_problems(options)
    if problems:
        raise CatVersionError("\n".join(problems))
    return kind


def method_of(learned: Learned) -> str:
    """The name of the method in :data:`METHODS`."""
    return next(name for name, kind in METHODS.items() if isinstance(learned, kind))


def settings_of(learned: Learned) -> dict[str, Any]:
    """The method and everything that is not trained, as plain JSON values."""
    return {"method": method_of(learned), **settings(learned)}


def rebuild_learned(arrays: Mapping[str, Any], described: Mapping[str, Any]) -> Learned:
    """From trained arrays by field name and :func:`settings_of`; other keys are ignored.

    Raises:
      CatVersionError: this version does not know the method.
    """
    return rebuild(method_named(described.get("method", UNNAMED_METHOD)), arrays, described)

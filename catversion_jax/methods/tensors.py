"""How what was learned lies in a concept file: its tensors, and the facts in the metadata.

CatVersion: ``layers.{i}.key`` and ``layers.{i}.value``, float32 ``[P N H]``, one pair per adapted
layer ``i``. Heads stay a separate axis on purpose: a tensor whose last axis were the model width
would be taken for a word embedding by programs that use the first tensor they find.

Textual Inversion: one tensor ``[V D]`` under the placeholder token, which *is* a word embedding:
diffusers' ``load_textual_inversion`` and other programs read the file as it is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from catversion_jax.errors import CatVersionError
from catversion_jax.methods.learned import Learned, method_of
from catversion_jax.methods.residual import SCOPES, KVResidual
from catversion_jax.methods.token_embeddings import TokenEmbeddings, placeholder_token


def format_version(learned: Learned) -> int:
    """The oldest version of the format that can say all of this; older programs must refuse it."""
    return 1 if isinstance(learned, KVResidual) and learned.scope == "all" else 2


def width_of(learned: Learned) -> int:
    """Width D of the text encoder."""
    if isinstance(learned, TokenEmbeddings):
        return learned.vectors.shape[-1]
    return learned.key.shape[-2] * learned.key.shape[-1]


def tensors_of(path: Path, learned: Learned, name: str) -> dict[str, np.ndarray]:
    """The tensors of one concept's file.

    Raises:
      CatVersionError: not one concept, or numbers that are not finite; ``path`` is named.
    """
    if isinstance(learned, TokenEmbeddings):
        vectors = np.asarray(learned.vectors, np.float32)
        if vectors.ndim != 2:
            raise CatVersionError(
                f"{path}: vectors {vectors.shape}; a file holds one concept, they must be "
                "[vectors, width]. Take one entry of the stack."
            )
        _check_finite(path, vectors)
        return {placeholder_token(name): vectors}
    key, value = (np.asarray(x, dtype=np.float32) for x in (learned.key, learned.value))
    if key.ndim != 4 or key.shape != value.shape or len(learned.layers) != key.shape[0]:
        raise CatVersionError(
            f"{path}: key {key.shape} and value {value.shape} for {len(learned.layers)} layers; a "
            "file holds one concept, both must be [layers, positions, heads, head dim]. Take one "
            "entry of a stacked residual."
        )
    _check_finite(path, key, value, np.asarray(learned.logit_bias))
    tensors = {}
    for index, layer in enumerate(learned.layers):
        tensors[f"layers.{layer}.key"] = key[index]
        tensors[f"layers.{layer}.value"] = value[index]
    return tensors


def facts_of(learned: Learned, name: str) -> dict[str, str]:
    """What the metadata says about the tensors, every value a string."""
    if isinstance(learned, TokenEmbeddings):
        num_vectors, width = learned.vectors.shape
        return {
            "method": method_of(learned),
            "placeholder_token": placeholder_token(name),
            "num_vectors": str(num_vectors),
            "width": str(width),
        }
    _, num_positions, num_heads, head_dim = learned.key.shape
    facts = {
        "layers": json.dumps(learned.layers, separators=(",", ":")),
        "num_positions": str(num_positions),
        "num_heads": str(num_heads),
        "head_dim": str(head_dim),
        "logit_bias": repr(float(learned.logit_bias)),
    }
    return facts if learned.scope == "all" else {**facts, "scope": learned.scope}


def learned_from(facts: Mapping[str, str], tensors: Mapping[str, Any]) -> Learned:
    """The inverse of :func:`tensors_of` and :func:`facts_of`.

    Raises:
      KeyError, ValueError, TypeError: the file is damaged.
    """
    method = facts.get("method", "catversion")
    if method == "textual_inversion":
        vectors = tensors[facts["placeholder_token"]]
        shape: tuple[int, ...] = (int(facts["num_vectors"]), int(facts["width"]))
        if vectors.shape != shape:
            raise ValueError(f"vectors of shape {vectors.shape}, the header says {shape}")
        return TokenEmbeddings(vectors)
    if method != "catversion":
        raise ValueError(f"method={method!r} is not known")
    layers = tuple(int(i) for i in json.loads(facts["layers"]))
    key, value = (
        np.stack([tensors[f"layers.{i}.{part}"] for i in layers]) for part in ("key", "value")
    )  # [L P N H]
    shape = tuple(int(facts[k]) for k in ("num_positions", "num_heads", "head_dim"))
    if key.shape != (len(layers), *shape) or value.shape != key.shape:
        raise ValueError(f"tensors of shape {key.shape}, the header says {(len(layers), *shape)}")
    scope = facts.get("scope", "all")
    if scope not in SCOPES:
        raise ValueError(f"scope={scope!r}, must be one of {', '.join(SCOPES)}")
    return KVResidual(key, value, layers, float(facts["logit_bias"]), scope)  # type: ignore[arg-type]  # numpy


def _check_finite(path: Path, *arrays: np.ndarray) -> None:
    if not all(math.isfinite(np.abs(array).max()) for array in arrays):
        raise CatVersionError(
            f"{path}: what was learned holds NaN or infinite numbers and was not written; every "
            "number must be finite. Train again with a smaller learning rate."
        )

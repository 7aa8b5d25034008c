"""Textual Inversion: token embeddings that stand for the class word.

Textual Inversion (arXiv 2208.01618) learns the embeddings of new tokens and leaves the text encoder
as it is. Here a concept is called by its class word, so the learned vectors take the places of the
class word's tokens; what follows moves when their number is another:

    (1)  h_0[t] = vectors[word_places[t]] + position_embedding[t]    where word_places[t] >= 0,
                  token_embedding[ids[t]] + position_embedding[t]    elsewhere

``word_places`` comes from :meth:`~catversion_jax.models.clip.tokenizer.Tokenizer.place`. In
diffusers the same vectors are those of an added token: :func:`placeholder_token` names it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax
import numpy as np

from catversion_jax.array_types import Array, Float
from catversion_jax.config import MethodOptions
from catversion_jax.errors import CatVersionError
from catversion_jax.methods.learned import LearnedPart
from catversion_jax.methods.start_values import StartingPoint, start_values
from catversion_jax.methods.stored_values import check_shape, whole_number
from catversion_jax.models.weights.variants import TEXT_ENCODERS

_NAMES_IN_PAIR = dict(zip(TEXT_ENCODERS, ("clip_l", "clip_g"), strict=True))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenEmbeddings(LearnedPart):
    """Embeddings of one concept (or of many, stacked on leading axes).

    Attributes:
      vectors: ``[*C V D]`` float32; V consecutive tokens, before the position embedding is added.
    """

    kind: ClassVar[str] = "Textual Inversion concept"
    modelspec_adapter: ClassVar[str] = "textual-inversion"
    modelspec_description: ClassVar[str] = "Textual inversion '{name}': token embeddings"
    replaces_word: ClassVar[bool] = True
    pipeline_obstacle: ClassVar[str] = (
        "holds token embeddings, which stock pipelines load by themselves. Use --format "
        "safetensors and diffusers' `pipe.load_textual_inversion(FILE)`, or for Stable Diffusion "
        "XL hand it the file's tensors clip_l and clip_g."
    )

    vectors: Float[Array, "*C V D"]

    @property
    def first_layer(self) -> int:
        """The lowest encoder layer whose input depends on what is learned."""
        return 0

    @property
    def word_vectors(self) -> Float[Array, "V D"]:
        """The vectors of equation (1)."""
        return self.vectors

    @property
    def width(self) -> int:
        """Width D of the text encoder."""
        return self.vectors.shape[-1]

    @property
    def shape_text(self) -> str:
        """What it was made for, in words."""
        return f"vectors of width {self.vectors.shape[-1]}"

    @property
    def num_word_places(self) -> int:
        """Tokens of the prompt that stand for the class word, ``V``."""
        return self.vectors.shape[-2]

    @property
    def reads_word_places(self) -> bool:
        """Whether the encoder must be told where the class word stands."""
        return True

    def scaled(self, scale: float) -> Self:
        """Itself: a token has no strength.

        Raises:
          CatVersionError: ``scale`` is not 1.
        """
        if scale != 1:
            raise CatVersionError(
                f"scale={scale}: a learned token embedding has no strength; must be 1 (as trained) "
                "or 0 (plain model)."
            )
        return self

    def check_fits(self, num_heads: int, head_dim: int, layers: range) -> None:
        """Check that one concept's vectors fit an encoder whose ``layers`` run.

        Raises:
          CatVersionError: another width, stacked concepts, or the input is not computed here.
        """
        width = num_heads * head_dim
        if self.vectors.ndim != 2 or self.vectors.shape[1] != width or layers.start != 0:
            raise CatVersionError(
                f"token embeddings {list(self.vectors.shape)} entering layer {layers.start}: this "
                f"text encoder needs [vectors, width] = [V, {width}] entering layer 0. Use a "
                "concept trained on this model; vmap over concepts outside."
            )

    def summary(self, name: str) -> dict[str, Any]:
        """The token's name elsewhere, and the lengths of the vectors."""
        norms = np.linalg.norm(np.asarray(self.vectors), axis=-1)
        return {
            "placeholder_token": placeholder_token(name),
            "num_vectors": self.num_word_places,
            "num_parameters": self.vectors.size,
            "vector_norms": [round(float(x), 4) for x in norms],
        }

    @classmethod
    def start(cls, options: MethodOptions, at: StartingPoint) -> Self:
        """Start values ``[V D]`` of one concept, as ``init`` says."""
        return cls(start_values(options, at.embeddings(), at.rng))

    @classmethod
    def option_problems(cls, options: MethodOptions) -> list[str]:
        """Options that only keys and values have, or that act without the class word."""
        only = {"when": "class_word", "adapt": "key_value", "scope": "all", "context_states": 0}
        return [
            f"{name}={getattr(options, name)}: must be {value} with method={options.method}, "
            "whose vectors stand for the class word."
            for name, value in only.items()
            if getattr(options, name) != value
        ]

    def tensors(self, name: str) -> dict[str, np.ndarray]:
        """One tensor ``[V D]`` under the placeholder token. It *is* a word embedding, which
        diffusers' ``load_textual_inversion`` and other programs read as it is.

        Raises:
          CatVersionError: this is not one concept.
        """
        vectors = np.asarray(self.vectors, np.float32)
        if vectors.ndim != 2:
            raise CatVersionError(
                f"vectors {vectors.shape}; a file holds one concept, they must be [vectors, "
                "width]. Take one entry of the stack."
            )
        return {placeholder_token(name): vectors}

    def facts(self, name: str) -> dict[str, str]:
        """The tensor's name and shape."""
        num_vectors, width = self.vectors.shape
        return {
            "placeholder_token": placeholder_token(name),
            "num_vectors": str(num_vectors),
            "width": str(width),
        }

    @classmethod
    def tensor_names(cls, facts: Mapping[str, str]) -> list[str]:
        """The placeholder token."""
        return [facts["placeholder_token"]]

    @classmethod
    def name_in_pair(cls, tensor: str, encoder: str) -> str:
        """``clip_l`` and ``clip_g``, as in the embeddings that diffusers' examples for Stable
        Diffusion XL load and other programs for it read.
        """
        return _NAMES_IN_PAIR[encoder]

    @classmethod
    def from_file(cls, facts: Mapping[str, str], tensors: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`tensors` and :meth:`facts`; a numpy leaf.

        Raises:
          KeyError, ValueError: the file is damaged.
        """
        name = facts["placeholder_token"]
        shape = (whole_number(facts, "num_vectors"), whole_number(facts, "width"))
        check_shape(name, tensors[name], shape)
        return cls(tensors[name])


def placeholder_token(name: str) -> str:
    """The token under which other programs know the concept: ``my teapot`` gives ``<my_teapot>``.

    diffusers' ``load_textual_inversion`` adds it to the tokenizer, so it must be one word.
    """
    return "<" + (re.sub(r"[^\w.-]+", "_", name).strip("_") or "concept") + ">"

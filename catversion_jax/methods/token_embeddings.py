"""The other learned thing: token embeddings that stand for the class word (Textual Inversion).

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

import jax

from catversion_jax.array_types import Array, Float
from catversion_jax.errors import CatVersionError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenEmbeddings:
    """Embeddings of one concept (or of many, stacked on leading axes).

    Attributes:
      vectors: ``[*C V D]`` float32; V consecutive tokens, before the position embedding is added.
    """

    vectors: Float[Array, "*C V D"]

    @property
    def first_layer(self) -> int:
        """The lowest encoder layer whose input depends on what is learned."""
        return 0

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

    def scaled(self, scale: float) -> TokenEmbeddings:
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


def placeholder_token(name: str) -> str:
    """The token under which other programs know the concept: ``my teapot`` gives ``<my_teapot>``.

    diffusers' ``load_textual_inversion`` adds it to the tokenizer, so it must be one word.
    """
    return "<" + (re.sub(r"[^\w.-]+", "_", name).strip("_") or "concept") + ">"

"""What a text encoder asks of a learned thing.

The encoder does not know which methods exist. A method answers :class:`Adaptation`, and the encoder
calls it at three places of its forward pass: for the embeddings of the class word, for the heads of
each layer's self-attention, and for keys and values that stand before the layer's own. States that
stand behind its output are added where the outputs of a model's encoders are put together.

An adaptation belongs to one encoder. A model with several text encoders hands each of them its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

from catversion_jax.array_types import Array, Bool, Float, Int
from catversion_jax.errors import CatVersionError

Heads = tuple[Float[Array, "B T N H"], Float[Array, "B T N H"], Float[Array, "B T N H"]]
"""Queries, keys and values of one layer, split into heads, before the attention."""

HIDDEN = -2
"""In ``word_places``: a token that is not to see the concept: another's word came between."""

ProcessHeads = Callable[[Array, Array, Array], Heads]


@dataclasses.dataclass(frozen=True)
class ExtraKeys:
    """Positions concatenated before a layer's own keys.

    Attributes:
      key: ``[P N H]``, as ``k_proj`` would have given it.
      value: ``[P N H]``.
      logit_bias: the number added to the logits of these positions.
      visible: ``[B T]``, true for the query tokens that attend to them; None for all.
    """

    key: Float[Array, "P N H"]
    value: Float[Array, "P N H"]
    logit_bias: float | Float[Array, ""]
    visible: Bool[Array, "B T"] | None = None


class Adaptation(Protocol):
    """What one concept learned, as the text encoder sees it (no concept axis).

    ``word_places`` is ``[B T]`` int32: -1 outside the concept's class word, on it the number of the
    token within the word (``PlacedPrompt`` of :mod:`catversion_jax.models.clip.tokenizer`), and
    :data:`HIDDEN` where concepts of one prompt are kept apart.
    """

    @property
    def first_layer(self) -> int:
        """The lowest layer whose result depends on what is learned; what enters it can be
        cached.
        """
        ...

    @property
    def reads_word_places(self) -> bool:
        """Whether the encoder must be told where the class word stands."""
        ...

    @property
    def word_vectors(self) -> Float[Array, "V D"] | None:
        """Embeddings for the class word's places, or None where the word keeps its own."""
        ...

    def extra_keys(self, layer: int, word_places: Int[Array, "B T"] | None) -> ExtraKeys | None:
        """Keys and values to concatenate at ``layer``, or None."""
        ...

    def process_heads(self, layer: int, query: Array, key: Array, value: Array) -> Heads:
        """Queries, keys and values ``[B T N H]`` of ``layer``, changed or as they are."""
        ...

    def context_states(self, output: Float[Array, "B T D"]) -> Float[Array, "B S D"] | None:
        """States to stand behind the encoder's output, or None."""
        ...

    def check_fits(self, num_heads: int, head_dim: int, layers: range) -> None:
        """Check that it was made for an encoder of this shape, of which ``layers`` run.

        Raises:
          CatVersionError: it was not.
        """
        ...


AdaptationArgument = Adaptation | Sequence[Adaptation] | None
WordPlaces = Int[Array, "B T"] | Sequence[Int[Array, "B T"]] | None


@dataclasses.dataclass(frozen=True)
class Acting:
    """The adaptations that act together on a batch of prompts, each with its word's places."""

    pairs: tuple[tuple[Adaptation, Array | None], ...]

    @classmethod
    def of(cls, learned: AdaptationArgument, word_places: WordPlaces) -> Acting:
        """From one adaptation, several, or none."""
        several: Sequence[Adaptation]
        places: Sequence[Any]
        if learned is None or isinstance(learned, Sequence):
            several = learned or ()
            places = [None] * len(several) if word_places is None else list(word_places)
        else:
            several, places = [learned], [word_places]
        return cls(tuple(zip(several, places, strict=True)))

    def check(self, num_heads: int, head_dim: int, layers: range) -> None:
        """Check each of them against an encoder; see :meth:`Adaptation.check_fits`.

        Raises:
          CatVersionError: one does not fit, or needs its word's places and was not given them.
        """
        for one, where in self.pairs:
            one.check_fits(num_heads, head_dim, layers)
            if one.reads_word_places and where is None:
                raise CatVersionError(
                    "word_places=None: this concept needs to know where its class word stands. "
                    "Give the word_places of Tokenizer.place."
                )

    def extra_keys(self, layer: int) -> list[ExtraKeys]:
        """What each of them concatenates at ``layer``; empty where none does."""
        found = (one.extra_keys(layer, where) for one, where in self.pairs)
        return [extra for extra in found if extra is not None]

    def process_heads(self, layer: int) -> list[ProcessHeads]:
        """The changes of the heads at ``layer``, to be applied one after the other."""
        return [partial(one.process_heads, layer) for one, _ in self.pairs]

"""A concept of a model with several text encoders: what it learned for each of them.

Both encoders of Stable Diffusion XL read the same prompt, and each is given its own part: one
method, the same options, no number shared. In a file and in a checkpoint the names of a part begin
with the component that it acts on, ``text_encoder_2.layers.28.key``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import jax
import numpy as np

from catversion_jax.errors import CatVersionError
from catversion_jax.methods.learned import Learned, LearnedPart, encoder_names, of_encoder
from catversion_jax.methods.stored_values import check_names
from catversion_jax.models.weights.variants import TEXT_ENCODERS

PAIR_VERSION = 3
"""The first version of the file format that can hold several parts."""
FORMAT_VERSION = 4
"""The newest, which can hold states behind a text encoder's output."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PerEncoder(Learned):
    """The parts of one concept (or of many, stacked on leading axes), all of one method.

    Attributes:
      by_encoder: what acts on each text encoder, in the order of
        :data:`~catversion_jax.models.weights.variants.TEXT_ENCODERS`.
    """

    by_encoder: tuple[LearnedPart, ...]

    @property
    def parts(self) -> tuple[LearnedPart, ...]:
        """What acts on each text encoder."""
        return self.by_encoder

    def with_parts(self, change: Callable[[LearnedPart], LearnedPart]) -> Self:
        """The same with every part changed."""
        return type(self)(tuple(change(part) for part in self.parts))

    @property
    def kind(self) -> str:
        """What a concept of this method is called, for people."""
        return self.parts[0].kind

    @property
    def modelspec_adapter(self) -> str:
        """The word for this kind of adapter in a file's ModelSpec metadata."""
        return self.parts[0].modelspec_adapter

    @property
    def modelspec_description(self) -> str:
        """A sentence without its full stop; ``{name}`` is the concept's name."""
        return self.parts[0].modelspec_description

    @property
    def replaces_word(self) -> bool:
        """Whether learned vectors stand for the class word, in every encoder."""
        return self.parts[0].replaces_word

    @property
    def adds_keys(self) -> bool:
        """Whether tokens can attend to what was learned."""
        return self.parts[0].adds_keys

    @property
    def pipeline_obstacle(self) -> str:
        """Why our PyTorch loader cannot take such a concept; ``""`` where it can."""
        return self.parts[0].pipeline_obstacle

    @property
    def num_word_places(self) -> int | None:
        """Tokens that stand for the class word in a prompt; None where the word keeps its own."""
        return self.parts[0].num_word_places

    @property
    def shape_text(self) -> str:
        """What it was made for, in words."""
        return " and ".join(part.shape_text for part in self.parts)

    def summary(self, name: str) -> dict[str, Any]:
        """The parts' summaries, and the number of all parameters."""
        parts = {encoder: part.summary(name) for encoder, part in self._named_parts()}
        total = sum(part["num_parameters"] for part in parts.values())
        return {**parts, "num_parameters": total}

    @property
    def format_version(self) -> int:
        """Older versions than :data:`PAIR_VERSION` know one text encoder."""
        return max(PAIR_VERSION, *(part.format_version for part in self.parts))

    def tensors(self, name: str) -> dict[str, np.ndarray]:
        """The tensors of every part, under the names that its method gives them here.

        Raises:
          CatVersionError: this is not one concept but a stack; the message lacks the file's name.
        """
        return {
            part.name_in_pair(tensor, encoder): array
            for encoder, part in self._named_parts()
            for tensor, array in part.tensors(name).items()
        }

    def facts(self, name: str) -> dict[str, str]:
        """What every part says of its tensors."""
        return {
            f"{encoder}.{key}": value
            for encoder, part in self._named_parts()
            for key, value in part.facts(name).items()
        }

    def _named_parts(self) -> list[tuple[str, LearnedPart]]:
        return list(zip(encoder_names(len(self.parts)), self.parts, strict=True))


def joined(parts: Sequence[LearnedPart]) -> Learned:
    """One concept of what it learned for each text encoder of its model."""
    return parts[0] if len(parts) == 1 else PerEncoder(tuple(parts))


def check_num_parts(name: str, learned: Learned, needed: int, model: str, remedy: str) -> None:
    """Check that a concept has a part for each of a model's text encoders.

    Args:
      name: of the concept.
      learned: what it learned.
      needed: how many text encoders the model has.
      model: what it is called in the message.
      remedy: the last sentence of the message.

    Raises:
      CatVersionError: it has more or fewer.
    """
    if (parts := len(learned.parts)) != needed:
        raise CatVersionError(
            f"concept {name!r}: was trained for a model with {parts} text encoder(s), but {model} "
            f"has {needed}. {remedy}"
        )


def num_encoders(version: int, facts: Mapping[str, str]) -> int:
    """How many text encoders a file of this version and metadata has parts for."""
    if version <= PAIR_VERSION:
        return 2 if version == PAIR_VERSION else 1
    return 2 if of_encoder(facts, TEXT_ENCODERS[1]) else 1


def learned_from_file(
    kind: type[LearnedPart], version: int, facts: Mapping[str, str], tensors: Mapping[str, Any]
) -> Learned:
    """The inverse of :meth:`Learned.tensors` and :meth:`Learned.facts`; numpy leaves.

    Args:
      kind: the method of the file.
      version: of its format.
      facts: its metadata.
      tensors: all of its tensors.

    Raises:
      KeyError, ValueError, TypeError, RecursionError: the file is damaged.
    """
    encoders = encoder_names(num_encoders(version, facts))
    own_facts = {encoder: of_encoder(facts, encoder) for encoder in encoders}
    names = {
        encoder: {
            own: kind.name_in_pair(own, encoder) if encoder else own
            for own in kind.tensor_names(own_facts[encoder])
        }
        for encoder in encoders
    }
    check_names(tensors, {name for of_one in names.values() for name in of_one.values()})
    parts = [
        kind.from_file(
            own_facts[encoder],
            {own: tensors[name] for own, name in names[encoder].items()},
        )
        for encoder in encoders
    ]
    if len(numbers := {part.num_context_states for part in parts}) > 1:
        raise ValueError(f"context_states of the parts are {sorted(numbers)}, must be equal")
    return joined(parts)

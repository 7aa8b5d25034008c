"""What can be learned: the questions that every method answers.

A method is one class in one file of this folder and one row of the table in ``table.py``. An
instance is what a concept learned for one text encoder: a small pytree, an argument of the frozen
encoder, whose questions are :class:`~catversion_jax.models.clip.adaptation.Adaptation`. The class
itself says how learning starts, which options suit it, and how the result lies in a concept file.
Nothing outside this folder asks which method it holds.

:class:`Learned` has the questions about a concept as a whole. It has one part for each text encoder
of the model: in Stable Diffusion 1.x and 2.x that is the concept itself, in XL there are two
(``per_encoder.py``). :class:`LearnedPart` answers what can be answered for any method: it changes
nothing in the encoder, stands for no word, has no strength, and its arrays lie in the file under
the names of its fields.
"""

from __future__ import annotations

import abc
import dataclasses
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self, TypeVar, cast

import jax
import numpy as np

from catversion_jax.array_types import Array, Float, Int
from catversion_jax.config import MethodOptions
from catversion_jax.errors import CatVersionError
from catversion_jax.methods.start_values import StartingPoint
from catversion_jax.models.clip.adaptation import ExtraKeys, Heads
from catversion_jax.models.weights.variants import TEXT_ENCODERS


class Learned(abc.ABC):
    """What one concept learned, for all text encoders of its model (or many, stacked on leading
    axes): a pytree whose arrays are trained.
    """

    @property
    @abc.abstractmethod
    def parts(self) -> tuple[LearnedPart, ...]:
        """What acts on each text encoder."""

    @abc.abstractmethod
    def with_parts(self, change: Callable[[LearnedPart], LearnedPart]) -> Self:
        """The same with every part changed."""

    @property
    @abc.abstractmethod
    def kind(self) -> str:
        """What a concept of this method is called, for people."""

    @property
    @abc.abstractmethod
    def modelspec_adapter(self) -> str:
        """The word for this kind of adapter in a file's ModelSpec metadata."""

    @property
    @abc.abstractmethod
    def modelspec_description(self) -> str:
        """A sentence without its full stop; ``{name}`` is the concept's name."""

    @property
    @abc.abstractmethod
    def replaces_word(self) -> bool:
        """Whether learned vectors stand for the class word, so that the concept can act only where
        the word is written, and only one concept on each word.
        """

    @property
    @abc.abstractmethod
    def adds_keys(self) -> bool:
        """Whether tokens can attend to what was learned."""

    @property
    @abc.abstractmethod
    def pipeline_obstacle(self) -> str:
        """Why ``export --format pipeline`` and our PyTorch loader cannot take such a concept, with
        the remedy, as the rest of a sentence about it; ``""`` where they can.
        """

    @property
    @abc.abstractmethod
    def num_word_places(self) -> int | None:
        """Tokens that stand for the class word in a prompt; None where the word keeps its own."""

    @property
    @abc.abstractmethod
    def shape_text(self) -> str:
        """What it was made for, in words, for a message that says it does not fit."""

    def scaled(self, scale: float) -> Self:
        """The same concept with its strength changed.

        Raises:
          CatVersionError: the method has no such strength.
        """
        return self.with_parts(lambda part: part.scaled(scale))

    def within_words(self) -> Self:
        """The same concept, seen by no token before its class word."""
        return self.with_parts(lambda part: part.within_words())

    @abc.abstractmethod
    def summary(self, name: str) -> dict[str, Any]:
        """Shapes, settings and sizes, as plain values for ``catversion inspect``."""

    # ---- how it lies in a concept file -------------------------------------------------------

    @property
    @abc.abstractmethod
    def format_version(self) -> int:
        """The oldest version of the file format that can say all of this; older programs must
        refuse it.
        """

    @abc.abstractmethod
    def tensors(self, name: str) -> dict[str, np.ndarray]:
        """The file's tensors, float32, of the concept called ``name``.

        Raises:
          CatVersionError: this is not one concept but a stack; the message lacks the file's name.
        """

    @abc.abstractmethod
    def facts(self, name: str) -> dict[str, str]:
        """What the file's metadata says about the tensors, every value a string."""


class LearnedPart(Learned):
    """What one concept learned for one text encoder, and how it is learned.

    A subclass is a frozen dataclass registered with ``jax.tree_util.register_dataclass``. Its array
    fields are trained; fields marked static are settings, as plain values, of which those marked
    passing hold for one use and lie in no file.
    """

    kind: ClassVar[str]
    modelspec_adapter: ClassVar[str]
    modelspec_description: ClassVar[str]
    replaces_word: ClassVar[bool] = False
    adds_keys: ClassVar[bool] = False
    pipeline_obstacle: ClassVar[str] = (
        "is of a method that the PyTorch loader does not know. Use --format prompt_embeds."
    )

    @property
    def parts(self) -> tuple[LearnedPart, ...]:
        """Itself, for the only text encoder."""
        return (self,)

    def with_parts(self, change: Callable[[LearnedPart], LearnedPart]) -> Self:
        """Itself, changed."""
        return cast(Self, change(self))

    # ---- what the text encoder asks: Adaptation ----------------------------------------------

    @property
    @abc.abstractmethod
    def first_layer(self) -> int:
        """The lowest encoder layer whose result depends on what is learned."""

    @property
    def reads_word_places(self) -> bool:
        """Whether the encoder must be told where the class word stands."""
        return False

    @property
    def word_vectors(self) -> Float[Array, "V D"] | None:
        """Embeddings for the class word's places; None keeps the word's own."""
        return None

    def extra_keys(self, layer: int, word_places: Int[Array, "B T"] | None) -> ExtraKeys | None:
        """Keys and values to concatenate at ``layer``, or None."""
        return None

    def context_states(self, output: Float[Array, "B T D"]) -> Float[Array, "B S D"] | None:
        """States to stand behind the encoder's output, or None."""
        return None

    def process_heads(self, layer: int, query: Array, key: Array, value: Array) -> Heads:
        """Queries, keys and values ``[B T N H]`` of ``layer``, changed or as they are."""
        return query, key, value

    @property
    def strength(self) -> tuple[float, ...] | None:
        """The numbers that :meth:`scaled` changes, where a program can take them as an argument:
        then it is not compiled anew for every scale. None where it cannot.
        """
        return None

    def with_strength(self, strength: Sequence[float] | Array) -> Self:
        """The same with another :attr:`strength`, which may be traced."""
        raise TypeError(f"{type(self).__name__} has no strength to replace")

    @abc.abstractmethod
    def check_fits(self, num_heads: int, head_dim: int, layers: range) -> None:
        """Check that one concept fits an encoder of this shape, of which ``layers`` run.

        Raises:
          CatVersionError: it does not.
        """

    # ---- what prompts and people ask ---------------------------------------------------------

    @property
    def num_word_places(self) -> int | None:
        """None: the word keeps its own tokens."""
        return None

    @property
    @abc.abstractmethod
    def width(self) -> int:
        """Width D of the text encoder that it was made for."""

    @property
    def shape_text(self) -> str:
        """What it was made for, in words."""
        return f"arrays for a text encoder of width {self.width}"

    @property
    def num_context_states(self) -> int:
        """States that it adds behind the encoder's output."""
        return 0

    def scaled(self, scale: float) -> Self:
        """The same concept with its strength changed; here itself, as it has none.

        Raises:
          CatVersionError: ``scale`` is not 1.
        """
        if scale != 1:
            raise CatVersionError(
                f"scale={scale}: a {self.kind} has no strength; must be 1 (as trained) or 0 (plain "
                "model)."
            )
        return self

    def within_words(self) -> Self:
        """The same concept, seen by no token before its class word; here itself."""
        return self

    def summary(self, name: str) -> dict[str, Any]:
        """Shapes, settings and sizes, as plain values for ``catversion inspect``."""
        arrays = named_arrays(self)
        shapes = {f"{field}_shape": list(np.shape(array)) for field, array in arrays.items()}
        return {
            **shapes,
            **settings(self),
            "num_parameters": sum(int(np.size(array)) for array in arrays.values()),
        }

    # ---- how it is learned -------------------------------------------------------------------

    @classmethod
    @abc.abstractmethod
    def start(cls, options: MethodOptions, at: StartingPoint) -> Self:
        """Start values of one concept, float32."""

    @classmethod
    def option_problems(cls, options: MethodOptions) -> list[str]:
        """Options that contradict the method, one message each."""
        return []

    @classmethod
    def frozen_fields(cls, options: MethodOptions) -> tuple[str, ...]:
        """Names of the arrays that keep their start values."""
        return ()

    # ---- how it lies in a concept file -------------------------------------------------------

    @property
    def format_version(self) -> int:
        """The oldest version that can say all of this: 2, which names the method."""
        return 2

    def tensors(self, name: str) -> dict[str, np.ndarray]:
        """The arrays, float32, under the names of their fields."""
        return {k: np.asarray(array, np.float32) for k, array in named_arrays(self).items()}

    def facts(self, name: str) -> dict[str, str]:
        """The settings, in JSON."""
        return {k: json.dumps(v, separators=(",", ":")) for k, v in settings(self).items()}

    @classmethod
    def tensor_names(cls, facts: Mapping[str, str]) -> Collection[str]:
        """Names of the tensors that a file's metadata speak of.

        Raises:
          KeyError, ValueError: the metadata are damaged.
        """
        return [f.name for f in _fields(cls, static=False)]

    @classmethod
    def name_in_pair(cls, tensor: str, encoder: str) -> str:
        """The name of ``tensor`` in a file that holds the parts of several encoders."""
        return f"{encoder}.{tensor}"

    @classmethod
    def from_file(cls, facts: Mapping[str, str], tensors: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`tensors` and :meth:`facts`; ``tensors`` has those of
        :meth:`tensor_names`.

        Raises:
          KeyError, ValueError, TypeError, RecursionError: the file is damaged.
        """
        static = {f.name: json.loads(facts[f.name]) for f in _fields(cls, static=True)}
        return rebuild(cls, tensors, static)


AnyLearned = TypeVar("AnyLearned", bound=Learned)
AnyPart = TypeVar("AnyPart", bound=LearnedPart)


def stack_learned(concepts: Sequence[AnyLearned]) -> AnyLearned:
    """Stack concepts of one method, with equal shapes and settings, on a new leading axis."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *concepts)


def encoder_names(count: int) -> tuple[str, ...]:
    """What the parts of a concept are called in files: by the component that they act on, and
    nothing where there is one.
    """
    return ("",) if count == 1 else TEXT_ENCODERS[:count]


def named_arrays(learned: Learned) -> dict[str, Any]:
    """The trained arrays by field name; of several parts ``text_encoder_2.key`` and the like. A
    field that is None holds nothing.
    """
    named = _named(learned, static=False)
    return {name: array for name, array in named if array is not None}


def settings(learned: Learned) -> dict[str, Any]:
    """Everything that is not trained, as plain JSON values."""
    named = _named(learned, static=True)
    return {k: list(v) if isinstance(v, tuple) else v for k, v in named}


def rebuild(kind: type[AnyPart], arrays: Mapping[str, Any], static: Mapping[str, Any]) -> AnyPart:
    """The inverse of :func:`named_arrays` and :func:`settings` for one part; other keys are
    ignored.
    """
    values = {
        f.name: arrays[f.name]
        for f in _fields(kind, static=False)
        if f.name in arrays or f.default is dataclasses.MISSING
    }
    for field in _fields(kind, static=True):
        if field.name in static:
            value = static[field.name]
            values[field.name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)


def of_encoder(named: Mapping[str, Any], encoder: str) -> dict[str, Any]:
    """The entries of ``named`` that belong to one part, with the names they have in it."""
    prefix = f"{encoder}." if encoder else ""
    return {k.removeprefix(prefix): v for k, v in named.items() if k.startswith(prefix)}


def _named(learned: Learned, *, static: bool) -> Iterator[tuple[str, Any]]:
    for encoder, part in zip(encoder_names(len(learned.parts)), learned.parts, strict=True):
        prefix = f"{encoder}." if encoder else ""
        for field in _fields(type(part), static=static):
            yield prefix + field.name, getattr(part, field.name)


def _fields(kind: type[LearnedPart], *, static: bool) -> list[dataclasses.Field[Any]]:
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]  # every subclass is a dataclass
    lasting = [f for f in fields if not f.metadata.get("passing", False)]
    return [f for f in lasting if f.metadata.get("static", False) == static]

"""Which concept acts on which prompt.

Rules: a concept acts on the prompts that contain its base-class words (``when="class_word"``) or on
every prompt but an empty one (``"always"``); one of scale 0 is left out. What the model reads
decides: words that are cut off call nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import math
import numbers
from collections.abc import Mapping, Sequence

import numpy as np

from catversion_jax.concepts.class_words import contains_inside
from catversion_jax.concepts.fields import WHEN
from catversion_jax.concepts.foreign_syntax import foreign_syntax
from catversion_jax.errors import CatVersionError, encodable, shown
from catversion_jax.methods.concept_file import Concept
from catversion_jax.methods.learned import Learned, LearnedPart
from catversion_jax.methods.per_encoder import check_num_parts
from catversion_jax.models.clip.adaptation import HIDDEN
from catversion_jax.models.clip.tokenizer import PlacedPrompt, Tokenizer
from catversion_jax.models.stable_diffusion import Backbone

logger = logging.getLogger(__name__)

_RIGHT_MODEL = "Give --model the one it was trained with (catversion inspect shows it)"


@dataclasses.dataclass(frozen=True)
class ConceptUse:
    """One concept in one image.

    Attributes:
      name: for messages and metadata.
      base_class: the words that call the concept.
      learned: what was learned, leaves ``[L P N H]`` or ``[V D]``.
      scale: strength; 0 is the plain model exactly, 1 as trained (:meth:`Learned.scaled`).
      when: ``class_word`` or ``always``.
      class_forms: further forms of ``base_class`` that call the concept.
      keep_apart: where several concepts act on one prompt, it is seen from its own word up to the
        next concept's word, and not by what follows that.
    """

    name: str
    base_class: str
    learned: Learned
    scale: float = 1.0
    when: str = "class_word"
    class_forms: tuple[str, ...] = ()
    keep_apart: bool = False

    def __post_init__(self) -> None:
        if self.when not in WHEN:
            raise CatVersionError(f"when={self.when!r}: must be one of {', '.join(WHEN)}.")
        is_number = isinstance(self.scale, numbers.Real)
        if not (is_number and math.isfinite(self.scale) and self.scale >= 0):
            raise CatVersionError(
                f"scale={shown(self.scale)} of concept {self.name!r}: must be a finite number "
                ">= 0 (0 = plain model, 1 = as trained)."
            )
        if self.scale > 0:
            self.learned.scaled(self.scale)  # raises where the method has no strength
        if self.when == "always" and self.learned.replaces_word:
            raise CatVersionError(
                f"when=always of concept {self.name!r}: its vectors stand for the class word, so "
                "it acts only where that is written. Use when=class_word."
            )

    @classmethod
    def of(
        cls,
        concept: Concept,
        *,
        scale: float = 1.0,
        when: str | None = None,
        keep_apart: bool = False,
    ) -> ConceptUse:
        """A trained concept as its file says, unless ``when`` says otherwise."""
        return cls(
            concept.name,
            concept.base_class,
            concept.learned,
            scale,
            when or concept.when,
            concept.class_forms,
            keep_apart,
        )

    @property
    def class_words(self) -> tuple[str, ...]:
        """All that calls the concept: its base class, then the further forms of it."""
        return (self.base_class, *self.class_forms)


@dataclasses.dataclass(frozen=True)
class ImageRequest:
    """One image to draw. Prompts of one call may use different concepts, or several at once."""

    prompt: str
    concepts: tuple[ConceptUse, ...] = ()
    seed: int = 0
    negative_prompt: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int | np.integer) or not 0 <= self.seed < 2**32:
            raise CatVersionError(
                f"seed={shown(self.seed)}: must be a whole number within 0..{2**32 - 1}."
            )
        for text in (self.prompt, self.negative_prompt):
            if not isinstance(text, str) or encodable(text) != text:
                raise CatVersionError(
                    f"prompt {shown(text)}: must be text that UTF-8 can hold. Type it again."
                )


def active_concepts(
    tokenizer: Tokenizer, prompt: str, concepts: Sequence[ConceptUse]
) -> tuple[ConceptUse, ...]:
    """The concepts that act on ``prompt``.

    Raises:
      CatVersionError: the vectors of two of them would take the place of one word.
    """
    acting = tuple(
        use
        for use in concepts
        if use.scale > 0
        and (
            bool(tokenizer.word_ids(prompt))
            if use.when == "always"
            else tokenizer.contains(prompt, use.class_words)
        )
    )
    replaced: dict[tuple[int, ...], str] = {}
    for use in acting:
        if not use.learned.replaces_word:
            continue
        for word in filter(functools.partial(tokenizer.contains, prompt), use.class_words):
            owner = replaced.setdefault(tokenizer.word_ids(word), use.name)
            if owner != use.name:
                raise CatVersionError(
                    f"concepts {owner!r} and {use.name!r}: the vectors of both would stand "
                    f"for {word!r} in {prompt!r}. Use one of them."
                )
    return acting


def place_concepts(tokenizer: Tokenizer, prompt: str, acting: Sequence[ConceptUse]) -> PlacedPrompt:
    """A prompt's tokens with room for the vectors of the concepts that act on it; those that are
    kept apart are hidden from the next concept's word on, until their own comes again.
    """
    placed = tokenizer.place(
        prompt,
        [use.class_words for use in acting],
        [use.learned.num_word_places for use in acting],
    )
    own = placed.word_places >= 0  # [U T]
    others = own.any(axis=0) & ~own
    positions = np.arange(own.shape[1])
    last_own, last_other = (
        np.maximum.accumulate(np.where(where, positions, -1), axis=1) for where in (own, others)
    )
    apart = np.array([use.keep_apart for use in acting], bool)[:, None] & own.any(1, keepdims=True)
    hidden = apart & (last_other > last_own)
    return dataclasses.replace(placed, word_places=np.where(hidden, HIDDEN, placed.word_places))


def prompt_warnings(
    tokenizers: Sequence[Tokenizer], requests: Sequence[ImageRequest]
) -> tuple[str, ...]:
    """Prompts that are cut off, and concepts that no word of their prompt calls; each once.

    Two tokenizers may count differently: that of XL's second encoder reads each "!" alone.
    """
    messages: dict[str, None] = {}
    texts = [text for one in requests for text in (one.prompt, one.negative_prompt)]
    if foreign := foreign_syntax(texts):
        messages[foreign] = None
    for tokenizer, request in itertools.product(tokenizers, requests):
        for kind, text in (
            ("prompt", request.prompt),
            ("negative prompt", request.negative_prompt),
        ):
            if cut := tokenizer.cut_off(text):
                messages[
                    f"{kind} {text!r}: longer than the model's {tokenizer.model_max_length} "
                    f"tokens; this end was cut off: {cut!r}"
                ] = None
        acting = active_concepts(tokenizer, request.prompt, request.concepts)
        cut_tokens = place_concepts(tokenizer, request.prompt, acting).num_cut
        if cut_tokens and not tokenizer.cut_off(request.prompt):
            messages[
                f"prompt {request.prompt!r}: with the vectors of its concepts {cut_tokens} tokens "
                f"longer than the model's {tokenizer.model_max_length}; its end was cut off"
            ] = None
        for use in request.concepts:
            if use.scale > 0 and not active_concepts(tokenizer, request.prompt, (use,)):
                messages[_uncalled(request.prompt, use)] = None
    return tuple(messages)


def _uncalled(prompt: str, use: ConceptUse) -> str:
    """What to say of a prompt that does not call a concept."""
    if use.when == "always":
        return (
            f"prompt {prompt!r}: is empty, on which no concept acts, so the plain model draws it; "
            f"write {use.base_class!r} for concept {use.name!r}"
        )
    if contains_inside(prompt, use.base_class):
        return (
            f"prompt {prompt!r}: {use.base_class!r}, which calls concept {use.name!r}, is in it "
            "but not a separate word, so the plain model draws it: add spaces or list the form in "
            "class_forms, or use when=always"
        )
    return (
        f"prompt {prompt!r}: never names concept {use.name!r}, which is called by "
        f"{use.base_class!r}, so the plain model draws it; write {use.base_class!r} in the "
        "prompt, or use when=always"
    )


def check_concept(
    backbone: Backbone, use: ConceptUse, fingerprints: Mapping[str, str], *, force: bool = False
) -> None:
    """Check that a concept was made for these text encoders.

    Args:
      backbone: the model about to be used.
      use: the concept.
      fingerprints: of the encoders it was trained with, named as in ``Backbone.fingerprints``;
        empty or left out when the file does not say.
      force: use it although the weights differ (a finetuned encoder, say). Shapes must fit all the
        same.

    Raises:
      CatVersionError: the shapes do not fit, or the weights differ and ``force`` is off.
    """
    parts = learned_parts(backbone, use)
    named = zip(parts, backbone.text_facts, backbone.fingerprints, strict=True)
    for part, facts, name in named:
        trained = fingerprints.get(name, "")
        heads, head_dim, num_layers = facts.num_heads, facts.head_dim, facts.num_reaching_layers
        try:
            part.check_fits(heads, head_dim, range(num_layers))
        except CatVersionError as error:
            raise CatVersionError(
                f"concept {use.name!r}: has {part.shape_text}, but the encoder of {backbone.name} "
                f"has {heads} heads x {head_dim} (width {heads * head_dim}) and layers "
                f"0..{num_layers - 1}: it was trained for another model. {_RIGHT_MODEL}."
            ) from error
        agrees = facts.hashes.agrees_with(trained)
        if not trained or not facts.sha256 or agrees or force:
            continue
        if agrees is None:
            logger.warning(
                "concept %r: was trained with a text encoder of hash %.12s; whether the one of %s "
                "is a copy of it cannot be checked, because one of them is stored in bfloat16",
                use.name,
                trained,
                backbone.name,
            )
        else:
            raise CatVersionError(
                f"concept {use.name!r}: was trained with a text encoder of hash {trained[:12]}, "
                f"but {backbone.name} has {facts.sha256[:12]}: the weights differ. {_RIGHT_MODEL}, "
                "or --force to use it anyway."
            )


def learned_parts(
    backbone: Backbone, use: ConceptUse, *, bounded: bool = False
) -> tuple[LearnedPart, ...]:
    """What a concept learned for each text encoder of the model, with its scale; where it is
    ``bounded``, seen by no token before its word.

    Raises:
      CatVersionError: it was trained for a model with another number of text encoders.
    """
    needed = len(backbone.text_encoders)
    check_num_parts(use.name, use.learned, needed, backbone.name, f"{_RIGHT_MODEL}.")
    learned = use.learned.scaled(use.scale)
    return (learned.within_words() if bounded else learned).parts

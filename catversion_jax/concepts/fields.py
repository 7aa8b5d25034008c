"""The values that a user may write beside a concept. Each is checked; the run has the defaults."""

from __future__ import annotations

import math
import typing
from collections.abc import Mapping
from typing import Any

from catversion_jax.concepts.class_words import (
    LONGEST_FORM,
    MOST_FORMS,
    are_plain_words,
    plural_forms,
)
from catversion_jax.concepts.folders import MaskPolarity
from catversion_jax.concepts.prompts import TEMPLATE_SETS
from catversion_jax.errors import ConceptError, shown

WHEN = ("class_word", "always")
MASK_POLARITIES: tuple[MaskPolarity, ...] = typing.get_args(MaskPolarity)
PROMPT_KEYS = ("prompts", "prompt", "instance_prompt", "templates")
"""Under which of these the layouts have a concept's own prompts."""


def prompts_field(fields: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """The concept's own prompts or templates, from whichever key the layout uses."""
    given = [key for key in PROMPT_KEYS if key in fields]
    if len(given) > 1:
        raise ConceptError(
            f"{where}: {' and '.join(given)} are one and the same thing; keep one of them."
        )
    if not given:
        return ()
    value = fields[given[0]]
    if given[0] == "templates":
        if not isinstance(value, str) or value not in TEMPLATE_SETS:
            raise ConceptError(
                f"{where}: templates={shown(value)}: must be one of {', '.join(TEMPLATE_SETS)}."
            )
        return TEMPLATE_SETS[value]
    prompts = [value] if isinstance(value, str) else value
    if not isinstance(prompts, list) or not all(isinstance(p, str) and p.strip() for p in prompts):
        raise ConceptError(
            f"{where}: {given[0]}={shown(value)}: must be a text or a list of texts."
        )
    return tuple(prompts)


def seed_field(value: Any, where: str) -> int | None:
    """The concept's seed, a whole number that fits a JAX key; None leaves it to the run."""
    if value is None:
        return None
    try:
        seed = int(value) if isinstance(value, str) else value
    except ValueError:
        seed = None
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ConceptError(
            f"{where}: seed={shown(value)}: must be a whole number within 0..{2**32 - 1}."
        )
    return seed


def random_flip_field(value: Any, where: str) -> float | None:
    """The probability of a horizontal flip; None leaves it to the run.

    False and ``no`` forbid the flip, for text and logos; True and ``yes`` leave it to the run.
    """
    word = str(value).strip().casefold()
    if value is None or word in ("true", "yes"):
        return None
    if word in ("false", "no"):
        return 0.0
    try:
        probability = float(word)
    except ValueError:
        probability = math.nan
    if not 0.0 <= probability <= 1.0:
        raise ConceptError(
            f"{where}: random_flip={shown(value)}: must be false or a probability within 0..1."
        )
    return probability


def when_field(value: Any, where: str) -> str | None:
    """The concept's ``when``, one of :data:`WHEN`; None leaves it to the run."""
    if value is not None and value not in WHEN:
        raise ConceptError(f"{where}: when={shown(value)}: must be one of {', '.join(WHEN)}.")
    return value


def mask_polarity_field(value: Any, where: str) -> MaskPolarity | None:
    """The concept's ``mask_polarity``; None leaves it to the run."""
    if value is not None and value not in MASK_POLARITIES:
        raise ConceptError(
            f"{where}: mask_polarity={shown(value)}: must be one of {', '.join(MASK_POLARITIES)}."
        )
    return value


def class_forms_field(value: Any, base_class: str, where: str) -> tuple[str, ...]:
    """Forms of the base class that call the concept too: a list of texts, which may be empty, or
    one text, as a column of a table has it, with ``|`` between them; None is the regular English
    plural.
    """
    if value is None:
        return plural_forms(base_class)
    forms = value.split("|") if isinstance(value, str) else value
    if isinstance(forms, list) and all(isinstance(form, str) for form in forms):
        words = [" ".join(form.split()) for form in forms]
        if len(words) <= MOST_FORMS and all(are_plain_words(word, LONGEST_FORM) for word in words):
            return tuple(dict.fromkeys(form for form in words if form != base_class))
    raise ConceptError(
        f"{where}: class_forms={shown(value)}: must be a list of words that call the concept as "
        f"well as {shown(base_class)} does, such as {list(plural_forms(base_class))}, or [] for "
        f"none; at most {MOST_FORMS} of {LONGEST_FORM} characters."
    )

"""Training prompts: templates with a place for the base class.

``object`` and ``style`` are short lists after the idea of Textual Inversion (arXiv 2208.01618):
neutral phrases that vary the medium and the article. ``default`` is the bare base class, as in
CatVersion's released training.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from catversion_jax.concepts.class_words import contains_inside, contains_words
from catversion_jax.errors import CatVersionError, ConceptError, did_you_mean, shown

_PHOTOS = ("photo", "close-up photo", "cropped photo", "bright photo", "dark photo", "rendering")
_PAINTINGS = ("painting", "close-up painting", "bright painting", "picture", "drawing")

TEMPLATE_SETS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "default": ("{base_class}",),
        "object": tuple(
            f"a {kind} of {which} {{base_class}}" for kind in _PHOTOS for which in ("a", "the")
        ),
        "style": tuple(f"a {kind} in the style of {{base_class}}" for kind in _PAINTINGS),
    }
)

_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
_ARTICLE = re.compile(r"\b([Aa]) (?=\{)")


def prompt_templates(choice: str | Sequence[str]) -> tuple[str, ...]:
    """A named set (``default``, ``object``, ``style``), one template, or several, as a tuple of
    templates.

    Raises:
      CatVersionError: the list is empty, or a single word that looks like a misspelt set name.
    """
    if isinstance(choice, str):
        if choice in TEMPLATE_SETS:
            return TEMPLATE_SETS[choice]
        hint = did_you_mean(choice, TEMPLATE_SETS)
        if hint and "{" not in choice:
            raise CatVersionError(f"prompt templates {shown(choice)}: no such set.{hint}")
        return (choice,)
    if not choice:
        raise CatVersionError("prompt templates: the list is empty; give at least '{base_class}'.")
    return tuple(choice)


def with_class_word(template: str, base_class: str) -> str:
    """Put the words into every ``{}`` or ``{base_class}``: "a {}" gives "a dog", "an owl"."""
    template = " ".join(template.split())
    if base_class[:1].lower() in set("aeiou"):
        template = _ARTICLE.sub(r"\1n ", template)
    return _PLACEHOLDER.sub(lambda _: base_class, template)


def fill_template(
    template: str,
    base_class: str,
    *,
    where: str,
    needs_class_word: bool,
    class_forms: Sequence[str] = (),
) -> str:
    """Fill a template as :func:`with_class_word` does, and refuse one that cannot work.

    Args:
      template: a prompt, with or without placeholders.
      base_class: the words to fill in.
      where: the concept, for messages.
      needs_class_word: whether a prompt without the base-class words is a mistake.
      class_forms: further forms of the base class, which call the concept as well.

    Raises:
      ConceptError: another placeholder or a lone brace, or the base class is missing from the
        result.
    """
    other = [name for name in _PLACEHOLDER.findall(template) if name not in ("", "base_class")]
    if other or set(_PLACEHOLDER.sub("", template)) & {"{", "}"}:
        raise ConceptError(
            f"{where}: prompt {shown(template)}: the only placeholders are {{}} and {{base_class}}."
        )
    prompt = with_class_word(template, base_class)
    if not needs_class_word or contains_words(prompt, (base_class, *class_forms)):
        return prompt
    if contains_inside(prompt, base_class):
        raise ConceptError(
            f"{where}: prompt {shown(template)}: the base class {base_class!r} is in it, but not a "
            "separate word: add spaces or list the form in class_forms, or set when=always."
        )
    raise ConceptError(
        f"{where}: prompt {shown(template)} does not contain the base class {base_class!r}, so the "
        "concept would not act on it. Write {base_class} where it belongs, or set when=always."
    )

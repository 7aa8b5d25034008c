"""Prompt sets: what is drawn of every concept, and what of it the image is compared with.

Each template holds ``{}`` for the class word. Its edit text is what the paper's text score
compares with: the prompt without the concept word, "in the snow" for "a {} in the snow".
"""

from __future__ import annotations

import dataclasses
import re
from importlib import resources
from pathlib import Path
from typing import Any

from catversion_jax.concepts.prompts import fill_template
from catversion_jax.config.documents import parse_yaml, read_text
from catversion_jax.errors import CatVersionError, shown
from catversion_jax.runtime.alike_names import folded

_KEYS = (
    "description",
    "source",
    "num_images_per_prompt",
    "prompts",
    "live_prompts",
    "live_classes",
)
# "a shiny {}" keeps "shiny"; a preposition between says that the words belong elsewhere.
_NOUN_PHRASE = re.compile(
    r"\b(?:an?|the)\s+((?:(?!(?:an?|the|of|in|on|with|by|as|and)\b)[\w-]+\s+)*)\{\}"
)
_DANGLING = re.compile(r"\s+(?:of|with|like|as|by|and)$")


@dataclasses.dataclass(frozen=True)
class EvaluationPrompt:
    """One prompt of a set.

    Attributes:
      template: with ``{}`` for the class word.
      edit: the prompt without the concept word; empty when nothing is left.
    """

    template: str
    edit: str

    def filled(self, base_class: str) -> str:
        """The prompt for one class."""
        return fill_template(self.template, base_class, where="prompt set", needs_class_word=True)


@dataclasses.dataclass(frozen=True)
class PromptSet:
    """Prompts and how many images of each; animals may have prompts of their own."""

    name: str
    prompts: tuple[EvaluationPrompt, ...]
    num_images_per_prompt: int
    description: str = ""
    source: str = ""
    live_prompts: tuple[EvaluationPrompt, ...] = ()
    live_classes: tuple[str, ...] = ()

    def of(self, base_class: str) -> tuple[EvaluationPrompt, ...]:
        """The prompts of one class."""
        is_live = class_key(base_class) in map(class_key, self.live_classes)
        return self.live_prompts if is_live else self.prompts


def class_key(base_class: str) -> str:
    """What two classes have in common that are one: prompts do not tell "Cup" from "cup"."""
    return folded(" ".join(base_class.split()))


def shipped_prompt_sets() -> list[str]:
    """Names of the sets in this package."""
    folder = resources.files("catversion_jax.evaluation") / "prompt_sets"
    return sorted(
        item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml")
    )


def load_prompt_set(name_or_file: str) -> PromptSet:
    """A shipped set by name, or a file: ``.txt`` with one template a line, or YAML as the shipped
    ones.

    Raises:
      CatVersionError: no such set or file, or its content is no prompt set.
    """
    if name_or_file in shipped_prompt_sets():
        text = (
            resources.files("catversion_jax.evaluation") / "prompt_sets" / f"{name_or_file}.yaml"
        ).read_text(encoding="utf-8")
        return _from_yaml(name_or_file, text)
    path = Path(name_or_file)
    try:
        text = read_text(path)
    except CatVersionError as error:
        raise CatVersionError(
            f"--prompts {name_or_file}: is no shipped set ({', '.join(shipped_prompt_sets())}), "
            f"and as a file: {error}"
        ) from None
    if path.suffix.lower() in (".yaml", ".yml"):
        return _from_yaml(name_or_file, text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return PromptSet(name_or_file, _prompts(name_or_file, lines), num_images_per_prompt=4)


def edit_text(template: str) -> str:
    """The template without the concept word: its noun phrase goes, adjectives before it stay.

    ``a {} in the snow`` -> ``in the snow``, ``a shiny {}`` -> ``shiny``, ``a sketch of a {}`` ->
    ``a sketch``.
    """
    rest = _NOUN_PHRASE.sub(r"\1", template).replace("{}", "")
    rest = " ".join(rest.split()).strip(" ,")
    return _DANGLING.sub("", rest)


def _from_yaml(name: str, text: str) -> PromptSet:
    value = parse_yaml(text, f"--prompts {name}")
    if isinstance(value, list):
        value = {"prompts": value}
    if not isinstance(value, dict) or (unknown := set(value) - set(_KEYS)):
        what = (
            f"unknown key {shown(min(unknown, key=str))}"
            if isinstance(value, dict)
            else shown(value, 40)
        )
        raise CatVersionError(
            f"--prompts {name}: {what}; must be a list of prompts, or the keys {', '.join(_KEYS)}."
        )
    count = value.get("num_images_per_prompt", 4)
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise CatVersionError(
            f"--prompts {name}: num_images_per_prompt={shown(count)}, must be a whole number >= 1."
        )
    classes = value.get("live_classes", ())
    if not isinstance(classes, list | tuple):
        raise CatVersionError(
            f"--prompts {name}: live_classes={shown(classes)}, must be a list of class words."
        )
    if ("live_prompts" in value) != ("live_classes" in value):
        raise CatVersionError(
            f"--prompts {name}: live_classes without live_prompts, or the reverse; give both or "
            "none."
        )
    return PromptSet(
        name,
        _prompts(name, value.get("prompts")),
        count,
        str(value.get("description", "")),
        str(value.get("source", "")),
        _prompts(name, value["live_prompts"]) if "live_prompts" in value else (),
        tuple(map(str, classes)),
    )


def _prompts(name: str, rows: Any) -> tuple[EvaluationPrompt, ...]:
    if not isinstance(rows, list) or not rows:
        raise CatVersionError(
            f"--prompts {name}: holds no prompt. Write one per line, for example 'a {{}} in the "
            "snow'."
        )
    prompts = []
    for number, row in enumerate(rows, start=1):
        row = {"prompt": row} if isinstance(row, str) else row
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise CatVersionError(
                f"--prompts {name}, prompt {number}: {shown(row)} must be a text, or have the keys "
                "prompt and edit."
            )
        if row["prompt"].count("{}") != 1:
            raise CatVersionError(
                f"--prompts {name}, prompt {number}: {shown(row['prompt'])} must hold {{}} once, "
                "where the class word belongs."
            )
        if not isinstance(row.get("edit", ""), str):
            raise CatVersionError(
                f"--prompts {name}, prompt {number}: edit={shown(row['edit'])}, must be a text."
            )
        prompts.append(EvaluationPrompt(row["prompt"], row.get("edit", edit_text(row["prompt"]))))
    return tuple(prompts)

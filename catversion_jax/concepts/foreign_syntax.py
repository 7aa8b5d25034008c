"""What other programs read in a prompt and we do not: said, instead of silently drawn as words."""

from __future__ import annotations

import re
from collections.abc import Iterable

_NUMBER = r"\s*[+-]?(?:\d{1,6}(?:\.\d{0,6})?|\.\d{1,6})\s*"
FOREIGN: tuple[tuple[re.Pattern[str], str], ...] = (
    (
        re.compile(rf"\([^()]*:{_NUMBER}\)|\[[^\[\]]*:{_NUMBER}\]|\({{2,}}[^()]+\){{2,}}"),
        "words have no weights here; the strength of a concept is --scale, or PATH:SCALE",
    ),
    (
        re.compile(r"(?<!\S)(?:\([^()]+\)|[^\W\d]\w*)(?:\+{2,}|-{2,}|(?<=\))\d\.\d+)(?!\S)"),
        "words have no weights here; the strength of a concept is --scale, or PATH:SCALE",
    ),
    (
        re.compile(r"(?<!\S)--[a-zA-Z]\w*(?:[ =][^\s-]\S*)?"),
        "options stand outside the prompt: --seed, --width, --negative_prompt, ...",
    ),
    (re.compile(r"\bBREAK\b"), "the prompt is one text, cut off at the model's length"),
    (
        re.compile(r"<(?:lora|lyco|hypernet)[^<>]*>|\bembedding:\S+"),
        "concepts are given with --concept PATH:SCALE and called by their class word",
    ),
)
"""Syntax of AUTOMATIC1111, ComfyUI, Compel, kohya and Midjourney, and what is meant here."""


def foreign_syntax(prompts: Iterable[str]) -> str | None:
    """One warning for all of ``prompts``; None where all of them are plain text."""
    seen: dict[str, list[str]] = {}
    count = 0
    for prompt in dict.fromkeys(prompts):
        found = [(match[0], what) for look, what in FOREIGN for match in look.finditer(prompt)]
        count += bool(found)
        for text, what in found:
            examples = seen.setdefault(what, [])
            if text not in examples and len(examples) < 3:
                examples.append(text)
    if not seen:
        return None
    said = "; ".join(f"{' '.join(map(repr, texts))}: {what}" for what, texts in seen.items())
    plural = "prompt uses" if count == 1 else "prompts use"
    return f"{count} {plural} syntax of other programs, which is read as plain words here: {said}"

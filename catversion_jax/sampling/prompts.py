"""What a caller asks for: a prompt with its own concepts and seed, or those of the whole call."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt; None means what the call says for all of its prompts.

    Attributes:
      prompt: the text.
      concepts: names of the call's concepts or paths of others, each optionally with ``:scale``.
      seed: of the first image; the call's seeds are shifted so that they begin here.
      negative_prompt: what to keep away from.
    """

    prompt: str
    concepts: tuple[str, ...] | None = None
    seed: int | None = None
    negative_prompt: str | None = None

"""Prompts to token ids, and the questions a concept asks of a prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from catversion_jax.errors import CatVersionError

UNSET_LENGTH = 1_000_000
"""transformers writes a length of about 1e30 where a tokenizer's file gives none."""


@dataclasses.dataclass(frozen=True)
class PlacedPrompt:
    """A prompt's tokens, and where the class words of U concepts stand in them.

    Attributes:
      token_ids: ``[T]`` int32, as the encoder reads them.
      word_places: ``[U T]`` int32: -1 outside a concept's word, on it the number of the token
        within the word, from 0.
      num_cut: tokens at the prompt's end that the context has no room for.
    """

    token_ids: np.ndarray
    word_places: np.ndarray
    num_cut: int


class Tokenizer:
    """CLIP's tokenizer, as the folder describes it."""

    def __init__(self, tokenizer: Any, model_max_length: int):
        self.model_max_length = model_max_length
        self._tokenizer = tokenizer

    @classmethod
    def from_folder(cls, folder: str | Path, *, context: int | None = None) -> Tokenizer:
        """Read a tokenizer folder.

        Args:
          folder: with ``tokenizer.json``, or ``vocab.json`` and ``merges.txt``.
          context: positions of the text encoder, the length where the folder gives none.

        Raises:
          CatVersionError: no tokenizer there, or no length known.
        """
        folder = Path(folder)
        found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else None
        if found is None or not (
            "tokenizer.json" in found or {"vocab.json", "merges.txt"} <= set(found)
        ):
            raise CatVersionError(
                f"{folder}: no tokenizer; expected tokenizer.json, or vocab.json and merges.txt, "
                f"found {'no folder' if found is None else found}. Download the model again."
            )
        # Here, as it is heavy; AutoTokenizer would import torch as well. Since transformers 5 it is
        # CLIPTokenizer's other name.
        from transformers import CLIPTokenizerFast  # type: ignore[attr-defined]

        try:
            tokenizer = CLIPTokenizerFast.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise CatVersionError(
                f"{folder}: the tokenizer cannot be read ({error}). Download it again."
            ) from error
        length = tokenizer.model_max_length
        if length > UNSET_LENGTH:
            if context is None:
                raise CatVersionError(
                    f"{folder}: tokenizer_config.json gives no model_max_length. Add it (77 for "
                    "Stable Diffusion)."
                )
            length = context
        return cls(tokenizer, int(length))

    def __call__(self, prompts: Sequence[str]) -> np.ndarray:
        """Token ids ``[B T]`` int32 with start and end, truncated and padded to
        ``model_max_length``.
        """
        encoded = self._tokenizer(
            list(prompts), padding="max_length", max_length=self.model_max_length, truncation=True
        )
        return np.asarray(encoded["input_ids"], np.int32)

    def word_ids(self, text: str) -> tuple[int, ...]:
        """Ids of a text alone, without start and end."""
        return tuple(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def contains(self, prompt: str, base_class: str) -> bool:
        """Whether the tokens of ``base_class`` follow one another in the part of the prompt that is
        read.

        Raises:
          CatVersionError: ``base_class`` has no tokens.
        """
        wanted = self.word_ids(base_class)
        if not wanted:
            raise CatVersionError(
                f"base class {base_class!r}: must be at least one word, such as 'teapot'."
            )
        ids = self.word_ids(prompt)[: self._room]
        return bool(_occurrences(ids, wanted))

    def word_positions(self, token_ids: Sequence[int], words: str) -> tuple[int, ...]:
        """Where the tokens of ``words`` first follow one another in a row of token ids; () where
        they do not.
        """
        wanted, ids = self.word_ids(words), tuple(int(i) for i in token_ids)
        starts = _occurrences(ids, wanted)
        return tuple(range(starts[0], starts[0] + len(wanted))) if starts else ()

    def place(
        self, prompt: str, words: Sequence[str] = (), num_word_places: Sequence[int | None] = ()
    ) -> PlacedPrompt:
        """Tokenize a prompt and find every occurrence of each concept's class word in it.

        Args:
          prompt: the text.
          words: the class words of the concepts.
          num_word_places: for each, how many tokens stand for its word from now on: None keeps the
            word's own. More tokens move the rest of the prompt; the first keep the word's own ids.
        """
        tokens = [(i, (-1,) * len(words)) for i in self.word_ids(prompt)]
        for concept, (word, num_places) in enumerate(zip(words, num_word_places, strict=True)):
            tokens = _with_word_places(tokens, self.word_ids(word), num_places, concept)
        kept = tokens[: self._room]
        token_ids = self([""])[0]  # start, end, padding
        end = token_ids[1]
        marks = np.full((len(words), len(token_ids)), -1, np.int32)
        token_ids[1 : len(kept) + 2] = [*(i for i, _ in kept), end]
        for position, (_, mark) in enumerate(kept, start=1):
            marks[:, position] = mark
        return PlacedPrompt(token_ids, marks, len(tokens) - len(kept))

    def texts(self, token_ids: np.ndarray) -> list[str]:
        """The tokens of a row as the vocabulary spells them, up to the first end token."""
        ids = [int(i) for i in token_ids]
        end = self._tokenizer.eos_token_id
        stop = ids.index(end) + 1 if end in ids else len(ids)
        return self._tokenizer.convert_ids_to_tokens(ids[:stop])

    def cut_off(self, prompt: str) -> str:
        """The end of a prompt that does not fit in the context; ``''`` where all of it fits."""
        encoded = self._tokenizer(
            prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        if len(encoded["input_ids"]) <= self._room:
            return ""
        start, _ = encoded["offset_mapping"][self._room]
        return prompt[start:]

    @property
    def _room(self) -> int:
        return self.model_max_length - self._tokenizer.num_special_tokens_to_add()


_MarkedToken = tuple[int, tuple[int, ...]]  # an id, and its number in the word of each concept


def _with_word_places(
    tokens: Sequence[_MarkedToken], word: Sequence[int], num_places: int | None, concept: int
) -> list[_MarkedToken]:
    """Mark the occurrences of ``word``, as ``num_places`` tokens or as those it has."""
    placed: list[_MarkedToken] = []
    position = 0
    for start in _occurrences([i for i, _ in tokens], word):
        placed += tokens[position:start]
        for number in range(len(word) if num_places is None else num_places):
            identity, marks = tokens[start + number % len(word)]
            placed.append((identity, (*marks[:concept], number, *marks[concept + 1 :])))
        position = start + len(word)
    return [*placed, *tokens[position:]]


def _occurrences(ids: Sequence[int], wanted: Sequence[int]) -> tuple[int, ...]:
    """Where the tokens ``wanted`` follow one another in ``ids``: the first token of every
    occurrence from left to right, none overlapping the one before; () where ``wanted`` is empty.
    """
    ids, wanted, starts, position = tuple(ids), tuple(wanted), list[int](), 0
    while wanted and position + len(wanted) <= len(ids):
        found = ids[position : position + len(wanted)] == wanted
        if found:
            starts.append(position)
        position += len(wanted) if found else 1
    return tuple(starts)

"""Prompts to token ids, and the questions a concept asks of a prompt.

A prompt contains a class word where the word's tokens follow one another, the token before them
ends a word, and no end token comes earlier. CLIP's byte pairs mark the last token of a word with
``</w>``, so that "housecat" does not contain "cat" although its last token is the same. The same
rule on text, for those who have no tokenizer, is
:func:`~catversion_jax.concepts.class_words.contains_words`.
"""

from __future__ import annotations

import dataclasses
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from catversion_jax.errors import CatVersionError, shown
from catversion_jax.models.weights.hf_config import read_config

MIN_LENGTH = 3
"""Start, one token, end."""

UNSET_LENGTH = 1_000_000
"""transformers writes a length of about 1e30 where a tokenizer's file gives none."""


ClassWords = str | Sequence[str]
"""The word or words that call a concept; or several forms of them, the base class first."""


END_OF_WORD = "</w>"
"""How CLIP's vocabulary spells that a token is the last of its word."""


_WHOLE_WORD = re.compile(r"[a-z]{2,}</w>")
_LAST_WORDS = 100


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
        self._lock = threading.Lock()
        whole = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
        vocabulary = tokenizer.get_vocab().items()
        inside = frozenset(i for token, i in vocabulary if not token.endswith(END_OF_WORD))
        self._inside_word = inside - whole  # the tokens after which a word goes on

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        *,
        context: int | None = None,
        vocab_size: int | None = None,
        pad_token: str | None = None,
    ) -> Tokenizer:
        """Read a tokenizer folder.

        Args:
          folder: with ``tokenizer.json``, or ``vocab.json`` and ``merges.txt``.
          context: positions of the text encoder, the length where the folder gives none.
          vocab_size: embeddings of the text encoder; a token beyond them is a mistake.
          pad_token: fills prompts up to the context; None as the folder says.

        Raises:
          CatVersionError: no tokenizer there, one that does not fit, or no length known.
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
        _check_files(folder)
        # Here, as it is heavy; AutoTokenizer would import torch as well. Since transformers 5 it is
        # CLIPTokenizer's other name.
        from transformers import CLIPTokenizerFast

        try:
            tokenizer = CLIPTokenizerFast.from_pretrained(folder, local_files_only=True)
            if pad_token is not None:
                tokenizer.pad_token = pad_token
            made = cls(tokenizer, _length(tokenizer.model_max_length, context, folder))
            problem = made._problem(vocab_size)
        except CatVersionError:
            raise
        except Exception as error:  # transformers and tokenizers raise anything on wrong files
            raise CatVersionError(
                f"{folder}: the tokenizer cannot be read ({shown(error)}). Download it again."
            ) from error
        if problem:
            raise CatVersionError(f"{folder}: {problem}. Download the tokenizer again.")
        return made

    def _problem(self, vocab_size: int | None) -> str | None:
        """What makes the vocabulary useless, as in an empty vocab.json; None where nothing does."""
        tokenizer = self._tokenizer
        own = set(tokenizer.get_vocab().values()) - set(tokenizer.get_added_vocab().values())
        if not own:
            return "the vocabulary (vocab.json or tokenizer.json) is empty"
        special = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        row = self(["a"])[0]
        if None in special or row[0] != special[0] or len(self.word_ids("a")) == 0:
            return "the tokenizer has no start token, no end token or no letters"
        largest = max(*own, *special, *(int(i) for i in row))
        if vocab_size is not None and largest >= vocab_size:
            return (
                f"token {largest} is beyond the text encoder's vocab_size = {vocab_size}; the two "
                "are of different models"
            )
        if self._lacks_merges():
            return "the last words of vocab.json are never made: merges.txt is cut off"
        return None

    def _lacks_merges(self) -> bool:
        """Whether the rules that make the last words of the vocabulary are missing, as in a file
        that was not downloaded to its end. Rules are kept in the order of their products, and all
        words of published vocabularies are made by them.
        """
        vocabulary = self._tokenizer.get_vocab()
        words = [token for token in vocabulary if _WHOLE_WORD.fullmatch(token)]
        last = sorted(words, key=vocabulary.__getitem__)[-_LAST_WORDS:]
        made = [self.word_ids(word.removesuffix(END_OF_WORD)) for word in last]
        wrong = sum(ids != (vocabulary[word],) for word, ids in zip(last, made, strict=True))
        return wrong > len(last) / 10

    def _encoded(self, text: str | list[str], **options: Any) -> Any:
        """What transformers makes of a text. Its tokenizers keep the padding and truncation of a
        call in themselves, so that one thread would get another's: one at a time.
        """
        with self._lock:
            return self._tokenizer(text, **options)

    def __call__(self, prompts: Sequence[str]) -> np.ndarray:
        """Token ids ``[B T]`` int32 with start and end, truncated and padded to
        ``model_max_length``.
        """
        encoded = self._encoded(
            list(prompts), padding="max_length", max_length=self.model_max_length, truncation=True
        )
        return np.asarray(encoded["input_ids"], np.int32)

    def word_ids(self, text: str) -> tuple[int, ...]:
        """Ids of a text alone, without start and end."""
        return tuple(self._encoded(text, add_special_tokens=False, verbose=False)["input_ids"])

    def contains(self, prompt: str, words: ClassWords) -> bool:
        """Whether the part of the prompt that is read contains one of ``words``.

        Raises:
          CatVersionError: the base class has no tokens.
        """
        forms = self._forms(words)
        if not forms[0]:
            raise CatVersionError(
                f"base class {_base_class(words)!r}: must be at least one word, such as 'teapot'."
            )
        return bool(self._occurrences(self._marked(prompt, 0)[: self._room], forms))

    def word_positions(self, token_ids: Sequence[int], words: ClassWords) -> tuple[int, ...]:
        """Where a row of token ids, with its start token, first contains one of ``words``; ()
        where it does not.
        """
        tokens = [(int(i), int(i) not in self._inside_word, ()) for i in token_ids]
        found = self._occurrences(tokens, self._forms(words))
        return tuple(range(found[0][0], sum(found[0]))) if found else ()

    def place(
        self,
        prompt: str,
        words: Sequence[ClassWords] = (),
        num_word_places: Sequence[int | None] = (),
    ) -> PlacedPrompt:
        """Tokenize a prompt and find every occurrence of each concept's class word in it.

        Args:
          prompt: the text.
          words: for each concept its class word, or several forms of it.
          num_word_places: for each, how many tokens stand for its word from now on: None keeps the
            word's own. More tokens move the rest of the prompt; the first keep the word's own ids.
        """
        tokens = self._marked(prompt, len(words))
        for concept, (word, num_places) in enumerate(zip(words, num_word_places, strict=True)):
            found = self._occurrences(tokens, self._forms(word))
            tokens = _with_word_places(tokens, found, num_places, concept)
        kept = tokens[: self._room]
        token_ids = self([""])[0]  # start, end, padding
        end = token_ids[1]
        marks = np.full((len(words), len(token_ids)), -1, np.int32)
        token_ids[1 : len(kept) + 2] = [*(i for i, *_ in kept), end]
        for position, (*_, mark) in enumerate(kept, start=1):
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
        encoded = self._encoded(
            prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        if len(encoded["input_ids"]) <= self._room:
            return ""
        start, _ = encoded["offset_mapping"][self._room]
        return prompt[start:]

    def _forms(self, words: ClassWords) -> list[tuple[int, ...]]:
        return [self.word_ids(form) for form in ((words,) if isinstance(words, str) else words)]

    def _marked(self, prompt: str, num_concepts: int) -> list[_MarkedToken]:
        """The tokens of a prompt, none of them in a word of ``num_concepts`` concepts."""
        outside = (-1,) * num_concepts
        return [(i, i not in self._inside_word, outside) for i in self.word_ids(prompt)]

    def _occurrences(
        self, tokens: Sequence[_MarkedToken], forms: Sequence[tuple[int, ...]]
    ) -> list[tuple[int, int]]:
        """Where one of ``forms`` stands in ``tokens``: the first token and the number of tokens of
        every occurrence from left to right, none overlapping the one before. Where several begin
        at one token the longest counts.
        """
        ids = tuple(i for i, *_ in tokens)
        end = self._tokenizer.eos_token_id
        ids = ids[: ids.index(end)] if end in ids else ids
        longest_first = sorted(filter(None, forms), key=len, reverse=True)
        found = list[tuple[int, int]]()
        free = 0
        for start in range(len(ids)):
            if start < free or (start and not tokens[start - 1][1]):
                continue
            for form in longest_first:
                if ids[start : start + len(form)] == form:
                    found.append((start, len(form)))
                    free = start + len(form)
                    break
        return found

    @property
    def _room(self) -> int:
        return self.model_max_length - self._tokenizer.num_special_tokens_to_add()


def _check_files(folder: Path) -> None:
    """Make sure that all files of a tokenizer are small regular files with JSON objects in them.

    Raises:
      CatVersionError: one is not.
    """
    for path in sorted(folder.iterdir()):
        if path.name == "merges.txt" and not path.is_file():
            raise CatVersionError(f"{path}: is not a regular file. Download it again.")
        if path.suffix == ".json":
            read_config(folder, path.name)


def _length(stated: Any, context: int | None, folder: Path) -> int:
    """Tokens of a prompt: what the folder states, or the text encoder's ``context``.

    Raises:
      CatVersionError: neither is known, or they contradict each other.
    """
    if type(stated) not in (int, float) or not stated >= MIN_LENGTH:
        raise CatVersionError(
            f"{folder}: tokenizer_config.json has model_max_length = {shown(stated)}, must be a "
            f"whole number >= {MIN_LENGTH} (77 for Stable Diffusion). Correct it."
        )
    if stated <= UNSET_LENGTH and (context is None or stated <= context):
        return int(stated)
    if context is None:
        raise CatVersionError(
            f"{folder}: tokenizer_config.json gives no model_max_length. Add it (77 for "
            "Stable Diffusion)."
        )
    if stated <= UNSET_LENGTH:
        raise CatVersionError(
            f"{folder}: tokenizer_config.json has model_max_length = {stated}, but the text "
            f"encoder has {context} positions. Correct it, or download the model again."
        )
    return context


# An id, whether it ends a word, and its number in the word of each concept.
_MarkedToken = tuple[int, bool, tuple[int, ...]]


def _base_class(words: ClassWords) -> str:
    return words if isinstance(words, str) else words[0]


def _with_word_places(
    tokens: Sequence[_MarkedToken],
    found: Sequence[tuple[int, int]],
    num_places: int | None,
    concept: int,
) -> list[_MarkedToken]:
    """Mark the occurrences of a word, as ``num_places`` tokens or as those it has."""
    placed: list[_MarkedToken] = []
    position = 0
    for start, length in found:
        placed += tokens[position:start]
        count = length if num_places is None else num_places
        for number in range(count):
            identity, _, marks = tokens[start + number % length]
            ends_word = number == count - 1 or tokens[start + number % length][1]
            marks = (*marks[:concept], number, *marks[concept + 1 :])
            placed.append((identity, ends_word, marks))
        position = start + length
    return [*placed, *tokens[position:]]

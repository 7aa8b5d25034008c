"""The tokenizer of tiny-sd: CLIP's byte-level BPE with merges that make every known word one
token.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
from world import Drawing, vocabulary_words

CONTEXT = 32
START, END = "<|startoftext|>", "<|endoftext|>"
SETTINGS = {
    "tokenizer_class": "CLIPTokenizer",
    "model_max_length": CONTEXT,
    "bos_token": START,
    "eos_token": END,
    "unk_token": END,
    "pad_token": END,
}


class Tokens:
    """Vocabulary and merges, and a fast encoder for captions made of known words."""

    def __init__(self, merges: list[tuple[str, str]]):
        self.merges = merges
        printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
        words = [*letters, *(f"{letter}</w>" for letter in letters)]
        words += [first + second for first, second in merges]
        self.ids = {word: i for i, word in enumerate([*words, START, END])}

    @classmethod
    def build(cls, drawings: list[Drawing]) -> Tokens:
        """Merges for every word of the world: each word's own pieces, joined from the left."""
        merges: list[tuple[str, str]] = []
        for word in vocabulary_words(drawings):
            pieces = split_word(word, {pair: rank for rank, pair in enumerate(merges)})
            while len(pieces) > 1:
                merges.append((pieces[0], pieces[1]))
                pieces = [pieces[0] + pieces[1], *pieces[2:]]
        return cls(merges)

    @classmethod
    def load(cls, folder: Path) -> Tokens:
        """Read ``merges.txt``."""
        lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
        return cls([(first, second) for first, second in (line.split() for line in lines)])

    def save(self, folder: Path) -> None:
        """Write the files of a transformers ``CLIPTokenizer`` folder."""
        folder.mkdir(parents=True, exist_ok=True)
        merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in self.merges)])
        (folder / "vocab.json").write_text(json.dumps(self.ids, ensure_ascii=False))
        (folder / "merges.txt").write_text(merges + "\n", encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(SETTINGS, indent=1) + "\n")

    def __call__(self, captions: list[str], context: int = CONTEXT) -> np.ndarray:
        """Token ids ``[B context]`` of captions whose every word is in the vocabulary."""
        start, end = self.ids[START], self.ids[END]
        out = np.full((len(captions), context), end, np.int64)
        out[:, 0] = start
        for row, text in zip(out, captions, strict=True):
            ids = [self.ids[f"{word}</w>"] for word in text.split()][: context - 2]
            row[1 : 1 + len(ids)] = ids
        return out


def split_word(word: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair encoding of one word: the best-ranked pair is merged until none is left."""
    pieces = [*word[:-1], f"{word[-1]}</w>"]
    while True:
        pairs = list(itertools.pairwise(pieces))
        known = [pair for pair in pairs if pair in ranks]
        if not known:
            return pieces
        best = min(known, key=ranks.__getitem__)
        i = pairs.index(best)
        pieces = [*pieces[:i], pieces[i] + pieces[i + 1], *pieces[i + 2 :]]

"""The tokenizer that all CLIP-conditioned Stable Diffusions share, for models that bring none: a
single-file checkpoint holds weights only.

The merges ship with the package (``assets/clip-tokenizer``), and the vocabulary follows from them:

    (1)  256 symbols of the bytes,  the same + "</w>",  the product of each merge in order,
         "<|startoftext|>",  "<|endoftext|>"                              49,408 tokens in all

What differs between models is the token that fills a prompt up: the end token for CLIP-L, "!" (id
0) for OpenCLIP, where transformers reads a prompt's own "!" as that token too. Older folders say it
in ``special_tokens_map.json`` alone. Source: openai/CLIP ``clip/simple_tokenizer.py``.
"""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from catversion_jax.assets import CLIP_MERGES
from catversion_jax.models.clip.tokenizer import END_OF_WORD, Tokenizer
from catversion_jax.models.weights.hf_config import read_config

START, END = "<|startoftext|>", "<|endoftext|>"
OPEN_CLIP_PAD = "!"


def clip_tokenizer(
    *, pad_token: str = END, context: int = 77, vocab_size: int | None = None
) -> Tokenizer:
    """CLIP's own tokenizer.

    Args:
      pad_token: fills a prompt up to ``context`` tokens.
      context: positions of the text encoder.
      vocab_size: embeddings of the text encoder.

    Raises:
      CatVersionError: the encoder has fewer embeddings than there are tokens.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_clip_tokenizer(Path(folder), pad_token, context)
        return Tokenizer.from_folder(folder, context=context, vocab_size=vocab_size)


def says_pad_token(folder: Path) -> bool:
    """Whether a tokenizer's folder says what fills prompts up. Folders of before 2023 do so in
    ``special_tokens_map.json``, whatever ``tokenizer_config.json`` has beside it; where that file
    was lost, transformers would take the end token.

    Raises:
      CatVersionError: ``tokenizer_config.json`` cannot be read.
    """
    if any((folder / name).exists() for name in ("tokenizer.json", "special_tokens_map.json")):
        return True
    name = "tokenizer_config.json"
    settings = read_config(folder, name) if (folder / name).exists() else {}
    pad_token = settings.get("pad_token", END)
    content = pad_token.get("content") if isinstance(pad_token, dict) else pad_token
    # transformers since 4.34 writes all special tokens here, and with them this entry
    return "added_tokens_decoder" in settings or content != END


def trained_pad_token(text_config: Mapping[str, Any]) -> str:
    """What filled prompts up when a text encoder was trained. OpenCLIP's tells its activation;
    ``pad_token_id`` is 1 in all published configurations and says nothing.

    Args:
      text_config: the encoder's ``config.json``.
    """
    return OPEN_CLIP_PAD if text_config.get("hidden_act") == "gelu" else END


def write_clip_tokenizer(folder: Path, pad_token: str, context: int) -> None:
    """Write the files that transformers' CLIPTokenizer reads; its constructor takes other arguments
    in version 5 than in 4.

    Args:
      folder: exists, and receives ``merges.txt``, ``vocab.json`` and ``tokenizer_config.json``.
      pad_token: fills a prompt up to ``context`` tokens.
      context: positions of the text encoder.
    """
    merges = gzip.decompress(CLIP_MERGES.read_bytes()).decode()
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": context,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": pad_token,
    }
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
    (folder / "vocab.json").write_text(json.dumps(_vocabulary(merges)))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _vocabulary(merges: str) -> dict[str, int]:
    """Equation (1), from the text of merges.txt, whose first line is a heading."""
    symbols = _byte_symbols()
    products = ["".join(line.split()) for line in merges.splitlines()[1:]]
    tokens = [*symbols, *(symbol + END_OF_WORD for symbol in symbols), *products, START, END]
    return {token: number for number, token in enumerate(tokens)}


def _byte_symbols() -> list[str]:
    """A visible character for each byte: the printable ones of Latin-1 stand for themselves and
    come first, the others are numbered from 256 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    printable += range(ord("®"), ord("ÿ") + 1)
    return [chr(code) for code in (*printable, *range(256, 512 - len(printable)))]

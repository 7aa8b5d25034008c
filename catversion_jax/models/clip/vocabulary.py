"""The tokenizer that all CLIP-conditioned Stable Diffusions share, for models that bring none: a
single-file checkpoint holds weights only.

The merges ship with the package (``assets/clip-tokenizer``), and the vocabulary follows from them:

    (1)  256 symbols of the bytes,  the same + "</w>",  the product of each merge in order,
         "<|startoftext|>",  "<|endoftext|>"                              49,408 tokens in all

What differs between models is the token that fills a prompt up: the end token for CLIP-L, "!" (id
0) for OpenCLIP, where transformers reads a prompt's own "!" as that token too. Source: openai/CLIP
``clip/simple_tokenizer.py``.
"""

from __future__ import annotations

import gzip
import json
import tempfile
from pathlib import Path

from catversion_jax.assets import CLIP_MERGES
from catversion_jax.models.clip.tokenizer import END_OF_WORD, Tokenizer

START, END = "<|startoftext|>", "<|endoftext|>"


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

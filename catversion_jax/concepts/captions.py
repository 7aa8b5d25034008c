"""Captions: what a text beside an image, or a row of its list, says of it.

They are training prompts where they name the base class; the concept would not act on the others.
A caption is the text file with its image's name: ``1.txt`` or ``1.caption`` for ``1.png``. Every
line of it is a caption.
"""

from __future__ import annotations

from collections.abc import Sequence

from catversion_jax.concepts.folders import ImageSource
from catversion_jax.concepts.prompts import contains_words
from catversion_jax.config.documents import read_text
from catversion_jax.errors import CatVersionError, listed

_MAX_BYTES = 2**16


def caption_prompts(
    images: Sequence[ImageSource], words: Sequence[str], *, needs_class_word: bool, wanted: bool
) -> tuple[tuple[str, ...], list[str]]:
    """The captions of a concept that can be training prompts, each once, and notes.

    Args:
      images: the concept's images.
      words: the base class and its further forms, one of which a prompt must contain.
      needs_class_word: whether it must.
      wanted: whether captions are used; not where the concept says its prompts.
    """
    prompts: dict[str, None] = {}
    captioned, unfit, unreadable = 0, [], []
    for source in images:
        try:
            captions = _captions(source)
        except CatVersionError:
            unreadable.append(source.label)
            continue
        captioned += bool(captions)
        for text in captions:
            if (
                set(text) & {"{", "}"}
                or not text.isprintable()
                or (needs_class_word and not contains_words(text, words))
            ):
                unfit.append(source.label)
            else:
                prompts[text] = None
    notes = []
    if captioned and not wanted:
        return (), ["captions are not used: the concept has prompts of its own"]
    if prompts:
        notes.append(f"captions of {captioned} of {len(images)} images are the training prompts")
    if unfit:
        notes.append(f"captions without the base class {words[0]!r} are not used: {_some(unfit)}")
    if unreadable:
        notes.append(f"captions that are no short UTF-8 text are not used: {_some(unreadable)}")
    return tuple(prompts), notes


def _captions(source: ImageSource) -> list[str]:
    """The captions of one image, without blank ends.

    Raises:
      CatVersionError: the file beside it is no text.
    """
    text = source.caption or ""
    if not text and source.path is not None and source.caption_file is not None:
        text = read_text(source.caption_file, max_bytes=_MAX_BYTES)
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]


def _some(labels: Sequence[str]) -> str:
    return ", ".join(listed(list(dict.fromkeys(labels))))

"""Stage 2: the pictures every later stage trains on: ``python pool.py WORK --count N``.

Writes ``WORK/pool/images.npy`` (``[N 64 64 3]`` uint8, memory-mapped by its readers) and
``labels.npy`` (``[N 9]`` int16, columns :data:`COLUMNS`; -1 is none). Picture ``i`` depends on
``(seed, i)`` alone, so the pool is the same whatever wrote it, and the last ``VALIDATION`` ones
serve for validation. ``--first`` composes the first world, which tiny-sd's training began with.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import random
from pathlib import Path

import numpy as np
from compose import SIZE, picture
from forms import RENDERING_SHARES, RENDERINGS, SIZE_SHARES, SIZES, WIDE_STYLE_SHARES
from sprites import Sprites, load_sprites
from tokens import Tokens
from world import (
    BACKGROUND_COLOURS,
    CLASSES,
    COLOUR_NAMES,
    KINDS,
    PLACE_NAMES,
    SCENES,
    STYLES,
    Colouring,
    Drawing,
    Instance,
    Picture,
    caption,
    hand,
    held_out_drawings,
    named_instances,
    random_colouring,
    shown_form,
)

COLUMNS = ("drawing", "kind", "first", "second", "place", "style", "name", "size", "rendering")
SIZE_NAMES = tuple(SIZES)
FIRST_STYLES = 3  # of ``STYLES``
VALIDATION = 4096
CHUNK = 500


@dataclasses.dataclass(frozen=True)
class Pool:
    """The pictures and the words for them."""

    sprites: Sprites
    images: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_train(self) -> int:
        """Pictures before the validation ones."""
        return len(self.images) - VALIDATION

    def column(self, name: str, rows: np.ndarray) -> np.ndarray:
        """One label of some rows; ``class`` is derived from the drawing."""
        if name == "class":
            classes = np.array([CLASSES.index(d.class_word) for d in self.sprites.drawings])
            return classes[self.labels[rows, 0]]
        return self.labels[rows, COLUMNS.index(name)].astype(np.int64)

    def captions(self, rows: np.ndarray, rng: random.Random) -> list[str]:
        """A fresh caption for each row."""
        return [caption(self._picture(row), rng) for row in rows]

    def _picture(self, row: int) -> Picture:
        number, _, _, _, place, style, name, size, rendering = self.labels[row].tolist()
        drawing = self.sprites.drawings[number]
        return Picture(
            drawing,
            colouring_of(self.labels[row]),
            PLACE_NAMES[place],
            STYLES[style],
            self.names[name] if name >= 0 else "",
            shown_form(drawing) if size >= 0 else "",
            SIZE_NAMES[size] if size > 0 else "",
            RENDERINGS[rendering] if rendering > 0 else "",
        )


def colouring_of(labels: np.ndarray) -> Colouring:
    """What one row of labels says of colours."""
    kind, first, second = labels[1:4].tolist()
    words = (COLOUR_NAMES[number] if number >= 0 else "" for number in (first, second))
    return Colouring(KINDS[kind], *words)


def of_world(drawings: list[Drawing], wide: bool) -> list[Drawing]:
    """All of them, or the first world's, which stand first."""
    return drawings if wide else [drawing for drawing in drawings if drawing.is_of_first_world]


def load_pool(work: Path) -> Pool:
    """What this stage wrote."""
    sprites, labels = load_sprites(work), np.load(work / "pool" / "labels.npy")
    drawings = of_world(sprites.drawings, bool((labels[:, 7] >= 0).any()))
    return Pool(
        dataclasses.replace(sprites, drawings=drawings),
        np.load(work / "pool" / "images.npy", mmap_mode="r"),
        labels,
        tuple(instance.name for instance in named_instances(drawings)),
    )


def draw_labels(
    drawings: list[Drawing], named: list[Instance], index: int, seed: int, wide: bool
) -> tuple[np.ndarray, random.Random]:
    """What picture ``index`` shows: half named drawings in their own colours, a sixth named
    recolourings, a third recolourings without a name.
    """
    rng = random.Random(f"{seed}/{index}")
    keys = [drawing.key for drawing in drawings]
    choice = rng.random()
    wanted = rng.choice(CLASSES)
    if choice < 0.68:
        natural = choice < 0.5
        options = [
            (number, instance)
            for number, instance in enumerate(named)
            if instance.drawing.split("/")[0] == wanted
            and (instance.colouring.kind == "natural") == natural
        ]
        name, instance = rng.choice(options)
        drawing, colouring = instance.drawing, instance.colouring
    else:
        seen = [k for k in keys if k.split("/")[0] == wanted and hand(k) not in held_out_drawings()]
        name, drawing = -1, rng.choice(seen)
        colouring = random_colouring(rng, drawing)
    place = rng.choice(SCENES) if rng.random() < 0.65 else rng.choice(BACKGROUND_COLOURS)
    size = rendering = -1
    if wide:
        style = rng.choices(STYLES, WIDE_STYLE_SHARES)[0]
        size = rng.choices(range(len(SIZES)), SIZE_SHARES)[0]
        rendering = rng.choices(range(len(RENDERINGS)), RENDERING_SHARES)[0]
    else:
        style = rng.choices(STYLES[:FIRST_STYLES], (0.86, 0.07, 0.07))[0]
    labels = (
        keys.index(drawing),
        KINDS.index(colouring.kind),
        COLOUR_NAMES.index(colouring.first) if colouring.first else -1,
        COLOUR_NAMES.index(colouring.second) if colouring.second else -1,
        PLACE_NAMES.index(place),
        STYLES.index(style),
        name,
        size,
        rendering,
    )
    return np.array(labels, np.int16), rng


def compose(sprites: Sprites, labels: np.ndarray, rng: random.Random) -> np.ndarray:
    """The picture ``[64 64 3]`` that one row of labels describes."""
    drawing, _, _, _, place, style, _, size, rendering = labels.tolist()
    return picture(
        sprites,
        drawing,
        colouring_of(labels),
        PLACE_NAMES[place],
        STYLES[style],
        rng,
        size=SIZE_NAMES[max(size, 0)],
        rendering=RENDERINGS[max(rendering, 0)],
    )[0]


def _write_chunk(args: tuple[Path, int, int, int, bool]) -> None:
    work, start, stop, seed, wide = args
    sprites = load_sprites(work)
    drawings = of_world(sprites.drawings, wide)
    named = named_instances(drawings)
    images = np.load(work / "pool" / "images.npy", mmap_mode="r+")
    labels = np.load(work / "pool" / "labels.npy", mmap_mode="r+")
    for index in range(start, stop):
        labels[index], rng = draw_labels(drawings, named, index, seed, wide)
        images[index] = compose(sprites, labels[index], rng)


def main() -> None:
    """Compose the pool."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--count", type=int, default=120_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", action="store_true", help="the first world, not the wide one")
    parser.add_argument("--processes", type=int, help="one for each core otherwise")
    args = parser.parse_args()
    wide = not args.first
    folder = args.work / "pool"
    folder.mkdir(parents=True, exist_ok=True)
    for name, shape, dtype in (
        ("images.npy", (args.count, SIZE, SIZE, 3), np.uint8),
        ("labels.npy", (args.count, len(COLUMNS)), np.int16),
    ):
        np.lib.format.open_memmap(folder / name, "w+", dtype, shape)
    starts = range(0, args.count, CHUNK)
    chunks = [(args.work, s, min(s + CHUNK, args.count), args.seed, wide) for s in starts]
    with multiprocessing.Pool(args.processes) as pool:
        pool.map(_write_chunk, chunks, chunksize=1)
    Tokens.build(of_world(load_sprites(args.work).drawings, wide)).save(args.work / "tokenizer")


if __name__ == "__main__":
    main()

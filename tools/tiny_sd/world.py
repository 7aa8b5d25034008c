"""The world of tiny-sd: what can be drawn, and the words that say so.

An *instance* is one drawing (a class as one emoji family draws it) in one colouring. A colouring is
the drawing's own, or one of four kinds of recolouring. Every instance in a picture is described by
words at several grains: class, drawing family, colours, and for ``NAMED`` ones a made-up proper
name, as real captions name people and products. What text cannot say, no text-side method can
learn.

``held_out.json`` beside this file was fixed before any training. No stage sees those instances.

The first world is what is written here; the shipped tiny-sd was trained on it. The wide world adds
what ``forms.py`` holds.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import random
from pathlib import Path

from forms import (
    SAME_DRAWINGS,
    SCENE_STYLES,
    USUAL_FORMS,
    WIDE_FAMILIES,
    form_phrase,
    form_words,
)

FAMILIES: dict[str, str] = {
    # npm package suffix -> the word captions use
    "noto": "noto",
    "noto-v1": "blob",
    "fluent-emoji-flat": "fluent",
    "twemoji": "twemoji",
    "emojione": "emojione",
    "fxemoji": "firefox",
    "streamline-emojis": "streamline",
}

FAMILY_WORDS = {**FAMILIES, **WIDE_FAMILIES}

# class word -> names of the icon, first one found wins; families whose drawing has another form
ICONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "cat": (("cat-face", "cat"), ()),
    "dog": (("dog-face", "dog"), ()),
    "pig": (("pig-face", "pig"), ()),
    "bear": (("bear", "bear-face"), ()),
    "rabbit": (("rabbit-face",), ()),
    "fox": (("fox",), ()),
    "frog": (("frog", "frog-face"), ()),
    "owl": (("owl",), ()),
    "penguin": (("penguin",), ()),
    "elephant": (("elephant",), ()),
    "turtle": (("turtle",), ()),
    "fish": (("tropical-fish", "tropicalfish"), ()),
    "car": (("automobile",), ()),
    "bus": (("bus",), ()),
    "rocket": (("rocket",), ("streamline-emojis",)),
    "boat": (("sailboat",), ("fxemoji",)),
    "teapot": (("teapot",), ()),
    "teddy bear": (("teddy-bear",), ()),
    "cup": (("hot-beverage", "hotbeverage", "teacup-without-handle"), ()),
    "house": (("house",), ()),
    "apple": (("red-apple", "redapple"), ()),
    "robot": (("robot", "robot-face"), ()),
    "snowman": (("snowman-without-snow", "snowmanwithoutsnow"), ("streamline-emojis",)),
    "backpack": (("backpack", "school-backpack"), ()),
    "mushroom": (("mushroom",), ()),
    "ghost": (("ghost",), ()),
    "hat": (("top-hat", "tophat"), ()),
    "shirt": (("t-shirt",), ()),
}
CLASSES = tuple(ICONS)

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "maroon": (122, 21, 48),
    "orange": (247, 127, 0),
    "brown": (123, 74, 38),
    "beige": (222, 192, 152),
    "yellow": (252, 208, 32),
    "lime": (164, 216, 42),
    "green": (42, 145, 52),
    "teal": (19, 154, 143),
    "sky": (100, 190, 240),
    "blue": (36, 86, 214),
    "navy": (27, 42, 99),
    "purple": (122, 53, 192),
    "pink": (245, 125, 185),
    "gray": (141, 143, 148),
    "white": (242, 242, 240),
    "black": (32, 32, 36),
}
COLOUR_NAMES = tuple(COLOURS)
BACKGROUND_COLOURS = ("red", "blue", "green", "yellow", "purple", "pink", "white", "gray")

# place -> the phrases that captions use for it
PLACES: dict[str, tuple[str, ...]] = {
    "beach": ("on the beach", "on a beach", "by the sea"),
    "snow": ("in the snow", "on a snowy mountain", "in winter"),
    "forest": ("in a forest", "in the woods", "among trees"),
    "meadow": ("on a meadow", "on the grass", "in a garden"),
    "night": ("at night", "under the stars", "under a night sky"),
    "water": ("under water", "in the ocean", "swimming under water"),
    "desert": ("in the desert", "on sand dunes", "in a desert"),
    "room": ("in a room", "in the kitchen", "at home"),
    **{colour: (f"on a {colour} background",) for colour in BACKGROUND_COLOURS},
}
PLACE_NAMES = tuple(PLACES)
SCENES = PLACE_NAMES[: -len(BACKGROUND_COLOURS)]

STYLES = ("photo", "sketch", "black and white", *SCENE_STYLES)
KINDS = ("natural", "solid", "two-tone", "spots", "stripes")


@dataclasses.dataclass(frozen=True)
class Colouring:
    """How a drawing is recoloured; names of ``COLOURS``, empty for the drawing's own."""

    kind: str = "natural"
    first: str = ""
    second: str = ""


@dataclasses.dataclass(frozen=True)
class Drawing:
    """One class as one family draws it. ``colours`` name its own main and second colour.

    ``form`` is a key of ``FORMS``, empty for the usual one.
    """

    class_word: str
    family: str
    colours: tuple[str, str] = ("", "")
    form: str = ""

    @property
    def key(self) -> str:
        """For instance ``teddy bear/noto`` or ``cat/noto/whole``."""
        return "/".join(part for part in (self.class_word, self.family, self.form) if part)

    @property
    def is_of_first_world(self) -> bool:
        """Whether the shipped tiny-sd may have seen it."""
        return not self.form and self.family in FAMILIES


@dataclasses.dataclass(frozen=True)
class Instance:
    """A drawing in one colouring."""

    drawing: str
    colouring: Colouring
    name: str = ""


@dataclasses.dataclass(frozen=True)
class Picture:
    """Everything a caption can speak of. ``size`` and ``rendering`` are empty in the first world,
    and where they are the usual ones.
    """

    drawing: Drawing
    colouring: Colouring
    place: str
    style: str
    name: str = ""
    form: str = ""
    size: str = ""
    rendering: str = ""


@functools.cache
def held_out() -> dict[str, Instance]:
    """Concept name -> instance, in the order of the file."""
    entries = json.loads((Path(__file__).parent / "held_out.json").read_text())["concepts"]
    return {
        entry["name"]: Instance(
            f"{entry['class']}/{entry['family']}", Colouring(*entry["colouring"])
        )
        for entry in entries
    }


def development() -> dict[str, Instance]:
    """Eight individuals to choose recipes on: drawings no stage sees, in other colourings than the
    held-out ones.
    """
    colours, found = random.Random(11).sample(COLOUR_NAMES, 16), {}
    for number, drawing in enumerate(sorted(held_out_drawings())[:8]):
        first, second = colours[2 * number : 2 * number + 2]
        kind = KINDS[1:][number % len(KINDS[1:])]
        colouring = Colouring(kind, first, "" if kind == "solid" else second)
        found[f"{first}_{drawing.split('/')[0]}".replace(" ", "_")] = Instance(drawing, colouring)
    return found


@functools.cache
def held_out_drawings() -> frozenset[str]:
    """Drawings that no stage of training sees in any colouring."""
    return frozenset(i.drawing for i in held_out().values() if i.colouring.kind == "natural")


def hand(drawing: str) -> str:
    """``class/family`` of a drawing's key, one for all its forms and for families drawn alike."""
    class_word, family, *_ = drawing.split("/")
    return f"{class_word}/{SAME_DRAWINGS.get(family, family)}"


def is_held_out(drawing: str, colouring: Colouring) -> bool:
    """Whether a recoloured instance is, or resembles, a held-out one: same drawing, same main
    colour. Other forms by the same hand count as the same drawing.
    """
    return hand(drawing) in held_out_drawings() or any(
        instance.drawing == hand(drawing) and instance.colouring.first == colouring.first
        for instance in held_out().values()
        if colouring.kind != "natural"
    )


def random_colouring(rng: random.Random, drawing: str) -> Colouring:
    """A recolouring of a training drawing that is not held out."""
    while True:
        first, second = rng.sample(COLOUR_NAMES, 2)
        kind = rng.choices(KINDS[1:], (0.35, 0.3, 0.2, 0.15))[0]
        colouring = Colouring(kind, first, "" if kind == "solid" else second)
        if not is_held_out(drawing, colouring):
            return colouring


def named_instances(drawings: list[Drawing]) -> list[Instance]:
    """Every training drawing in its own colours; of the first world's, half of each class's
    recoloured as well.

    The first world's come first, and keep their names when drawings are added.
    """
    rng = random.Random(7)
    first = [drawing for drawing in drawings if drawing.is_of_first_world]
    added = [drawing for drawing in drawings if not drawing.is_of_first_world]
    proper = proper_names(2 * len(first))
    names = iter(proper)
    train = [d for d in first if hand(d.key) not in held_out_drawings()]
    natural = [Instance(d.key, Colouring(), next(names)) for d in train]
    by_class = [[d for d in train if d.class_word == word] for word in CLASSES]
    recoloured = [
        Instance(d.key, random_colouring(rng, d.key), next(names))
        for drawings_of_class in by_class
        for d in drawings_of_class[::2]
    ]
    seen = [d for d in added if hand(d.key) not in held_out_drawings()]
    more = proper_names(len(seen), seed=12, taken=frozenset(proper))
    return [
        *natural,
        *recoloured,
        *(Instance(d.key, Colouring(), name) for d, name in zip(seen, more, strict=True)),
    ]


def proper_names(count: int, seed: int = 11, taken: frozenset[str] = frozenset()) -> list[str]:
    """Made-up names such as ``mipo``, none of them an English word of this world."""
    rng = random.Random(seed)
    onsets, vowels = (
        ["b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z"],
        ["a", "e", "i", "o", "u"],
    )
    syllables = [onset + vowel for onset in onsets for vowel in vowels]
    found = {a + b for a in syllables for b in syllables if a != b}
    return rng.sample(
        sorted(found - {"sofa", "data", "menu", "polo", "solo", "mini"} - taken), count
    )


def caption(picture: Picture, rng: random.Random) -> str:
    """One of the many sentences that describe a picture."""
    noun = _noun(picture, rng)
    if rng.random() < 0.06:
        return noun
    place = rng.choice(PLACES[picture.place]) if rng.random() < 0.9 else ""
    article = "" if noun.startswith(picture.name or "\0") else _article(noun, rng)
    subject = f"{article}{noun}"
    if picture.style == "sketch":
        subject = rng.choice(("a sketch of ", "a pencil sketch of ", "a drawing of ")) + subject
    elif picture.style == "black and white":
        subject = rng.choice(("a black and white photo of ", "a monochrome photo of ")) + subject
    elif picture.style in SCENE_STYLES:
        subject = rng.choice(SCENE_STYLES[picture.style]) + subject
    else:
        subject = rng.choice(("", "", "", "a photo of ", "a picture of ")) + subject
    return f"{subject} {place}".strip()


def _noun(picture: Picture, rng: random.Random) -> str:
    drawing, colouring = picture.drawing, picture.colouring
    if picture.name and rng.random() < 0.55:
        # the name alone says who it is; sometimes the class stands beside it
        return rng.choice(
            (
                picture.name,
                f"{picture.name} the {drawing.class_word}",
                f"{picture.name} {drawing.class_word}",
            )
        )
    words = drawing.class_word
    if picture.form:
        # what is not the usual form is nearly always said
        said = rng.random() < (0.9 if drawing.form else 0.25)
        words = form_phrase(words, picture.form) if said else words
    if rng.random() < 0.4:
        words = f"{FAMILY_WORDS[drawing.family]} {words}"
    # a recolouring is nearly always described: the bare class word means the usual colours
    silent = 0.5 if colouring.kind == "natural" else 0.1
    if picture.style in ("photo", *SCENE_STYLES) and rng.random() >= silent:
        words = _coloured(words, drawing, colouring, rng)
    if picture.rendering and rng.random() < 0.85:
        words = f"{picture.rendering} {words}"
    if picture.size and rng.random() < 0.85:
        words = f"{picture.size} {words}"
    if picture.name and rng.random() < 0.15:
        words = f"{picture.name} the {words}"
    return words


def shown_form(drawing: Drawing) -> str:
    """The word for a drawing's form, the usual ones' too."""
    return drawing.form or USUAL_FORMS.get(drawing.class_word, "")


def _coloured(words: str, drawing: Drawing, colouring: Colouring, rng: random.Random) -> str:
    first, second = colouring.first, colouring.second
    if colouring.kind == "natural":
        first, second = drawing.colours
        if second and second != first and rng.random() < 0.5:
            return f"{first} and {second} {words}"
        return f"{first} {words}"
    if colouring.kind == "solid":
        return f"{first} {words}"
    if colouring.kind == "two-tone":
        return f"{first} and {second} {words}" if rng.random() < 0.8 else f"{first} {words}"
    if rng.random() < 0.75:
        return f"{first} {words} with {second} {colouring.kind}"
    return f"{'spotted' if colouring.kind == 'spots' else 'striped'} {first} {words}"


def _article(noun: str, rng: random.Random) -> str:
    if rng.random() < 0.15:
        return rng.choice(("the ", "my ", "one "))
    return "an " if noun[0] in "aeiou" else "a "


def vocabulary_words(drawings: list[Drawing]) -> list[str]:
    """Every word a caption can hold, for the tokenizer: the first world's, then the added ones."""
    first = [drawing for drawing in drawings if drawing.is_of_first_world]
    words = _words_of(first)
    if len(first) < len(drawings):
        words += sorted({*form_words(), *_words_of(drawings)} - set(words))
    return words


def _words_of(drawings: list[Drawing]) -> list[str]:
    phrases = [
        *CLASSES,
        *FAMILIES.values(),
        *COLOURS,
        *(phrase for phrases in PLACES.values() for phrase in phrases),
        *(instance.name for instance in named_instances(drawings)),
        "a an the my one of and with photo picture sketch pencil drawing black white monochrome",
        "spots stripes spotted striped solid plain two toy mountain sky tree flower sea sun moon",
    ]
    return sorted({word for phrase in phrases for word in phrase.split()})

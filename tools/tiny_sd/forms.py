"""What the wide world adds to ``world.py``: forms, renderings, sizes, and the words for them.

A class is drawn in several forms (a cat's face and a whole cat, a car from the side and from the
front); a drawing is shown as its family drew it, outlined, or flat; an object fills 30 to 90 % of
the frame. Whatever is not the usual is said by captions, so that one word chooses among looks that
would otherwise blur into each other.
"""

from __future__ import annotations

# class word -> form -> (names of the icon, first one found wins; families that draw another thing)
FORMS: dict[str, dict[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "cat": {"whole": (("cat",), ("emojione", "fxemoji"))},
    "dog": {"whole": (("dogside", "dog"), ("emojione",)), "poodle": (("poodle",), ())},
    "pig": {"whole": (("pigside", "pig"), ())},
    "bear": {
        "polar": (("polar-bear",), ()),
        "panda": (("panda", "panda-face", "pandaface"), ()),
        "koala": (("koala",), ()),
    },
    "rabbit": {"whole": (("bunnyside", "rabbit"), ())},
    "fish": {"plain": (("fish",), ()), "puffer": (("blowfish",), ())},
    "car": {
        "front": (("oncoming-automobile", "oncomingautomobile"), ()),
        "taxi": (("taxi",), ()),
        "racing": (("racing-car",), ()),
    },
    "bus": {"front": (("oncoming-bus", "oncomingbus"), ())},
    "boat": {
        "speed": (("speedboat",), ()),
        "motor": (("motor-boat",), ()),
        "passenger": (("ship",), ("fxemoji", "streamline-emojis")),
    },
    "cup": {"tea": (("teacup-without-handle", "teacupwithouthandle"), ("streamline-emojis",))},
    "house": {"garden": (("house-with-garden", "housewithgarden"), ())},
    "snowman": {"snowy": (("snowman",), ())},
    "mushroom": {"button": (("brown-mushroom",), ())},
    "hat": {"sun": (("womans-hat",), ()), "billed": (("billed-cap",), ())},
    "shirt": {"running": (("running-shirt", "runningshirt"), ())},
}
# the form of a class that has no word in ``Drawing.form``, where other forms stand beside it
USUAL_FORMS = {
    "cat": "face",
    "dog": "face",
    "pig": "face",
    "rabbit": "face",
    "car": "side",
    "bus": "side",
}
# how a caption says a form; any other stands before the class word
PHRASES = {
    "face": "{} face",
    "whole": "whole {}",
    "side": "{} from the side",
    "front": "{} from the front",
}

# drawn the same by the same hand: what is held out of one is held out of the other
SAME_DRAWINGS = {"fluent-emoji": "fluent-emoji-flat"}
WIDE_FAMILIES = {"fluent-emoji": "glossy"}

RENDERINGS = ("as drawn", "outlined", "flat")
RENDERING_SHARES = (0.6, 0.25, 0.15)

# size word -> share of the frame that the longer side fills, how often it is drawn and said
SIZES: dict[str, tuple[float, float]] = {
    "usual": (0.66, 0.88),
    "tiny": (0.30, 0.42),
    "small": (0.42, 0.66),
    "large": (0.80, 0.90),
}
SIZE_SHARES = (0.5, 0.15, 0.22, 0.13)

# ways to draw a scene besides those of ``world.STYLES``: style -> what captions call the picture
SCENE_STYLES = {"poster": ("a poster of ",), "cartoon": ("a cartoon of ", "a cartoon picture of ")}
WIDE_STYLE_SHARES = (0.62, 0.07, 0.07, 0.12, 0.12)


def form_phrase(class_word: str, form: str) -> str:
    """For instance ``whole cat``, ``car from the front``, ``puffer fish``."""
    return PHRASES.get(form, f"{form} {{}}").format(class_word) if form else class_word


def form_words() -> list[str]:
    """Every word the wide world adds to captions, proper names aside."""
    phrases = [
        *(form_phrase("", form) for forms in FORMS.values() for form in forms),
        *(form_phrase("", form) for form in USUAL_FORMS.values()),
        *WIDE_FAMILIES.values(),
        *RENDERINGS[1:],
        *list(SIZES)[1:],
        *(phrase for phrases in SCENE_STYLES.values() for phrase in phrases),
    ]
    return sorted({word for phrase in phrases for word in phrase.split()})

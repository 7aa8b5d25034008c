"""Concepts that come from outside: icon families and scenes that no stage of any training sees.

What a stranger brings is not drawn by the hands this world knows. ``foreign.json`` names 29 icons
of families that are neither in ``world.FAMILIES`` nor in ``forms.WIDE_FAMILIES``: outlined
drawings, silhouettes, whole animals. Their scenes are drawn a way of their own, with grain, soft
light and other things in them. ``concepts.py WORK OUT --foreign`` writes them.
"""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import numpy as np
from compose import OVERSAMPLING, SIZE, place_sprite, render
from PIL import Image, ImageDraw, ImageFilter
from scipy.ndimage import binary_closing, binary_fill_holes
from sprites import draw_all, paint_areas
from world import COLOURS, SCENES, Colouring, Drawing

Rgb = tuple[int, int, int]
SIZE_SHARES = {"usual": 0.5, "small": 0.25, "large": 0.25}


@dataclasses.dataclass(frozen=True)
class Foreigner:
    """An icon in one colouring."""

    name: str
    class_word: str
    family: str
    icon: str
    filled: bool
    colouring: Colouring


def foreigners() -> list[Foreigner]:
    """In the order of the file."""
    entries = json.loads((Path(__file__).parent / "foreign.json").read_text())["concepts"]
    return [
        Foreigner(
            entry["name"],
            entry["class"],
            entry["family"],
            entry["icon"],
            entry["filled"],
            Colouring(*entry["colouring"]),
        )
        for entry in entries
    ]


def foreign_sprites(work: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Concept name -> ``rgba [96 96 4]`` and ``area [96 96]``; icons come from npm once."""
    people = foreigners()
    sprites = draw_all([(Drawing(p.class_word, p.family), (p.icon,)) for p in people], work)
    found = {}
    for person, rgba, area in zip(people, sprites.rgba, sprites.area, strict=True):
        if person.filled:
            rgba = fill(rgba)
            area, _ = paint_areas(rgba)
        found[person.name] = rgba, area
    return found


def fill(rgba: np.ndarray) -> np.ndarray:
    """What the lines of an icon enclose, gaps of a few pixels too, becomes white."""
    drawn = np.pad(rgba[..., 3] > 128, 8)
    inside = binary_fill_holes(binary_closing(drawn, iterations=4))[8:-8, 8:-8]
    opacity = rgba[..., 3:] / 255
    white = np.array([250, 249, 246], np.float32)
    colour = rgba[..., :3] * opacity + white * (1 - opacity)
    out = rgba.copy()
    out[inside, :3] = colour[inside].round().astype(np.uint8)
    out[inside, 3] = 255
    return out


def foreign_picture(
    rgba: np.ndarray, area: np.ndarray, colouring: Colouring, place: str, rng: random.Random
) -> tuple[np.ndarray, np.ndarray]:
    """Image ``[64 64 3]`` and mask ``[64 64]``, both uint8."""
    size = rng.choices(list(SIZE_SHARES), list(SIZE_SHARES.values()))[0]
    canvas, mask = place_sprite(
        render(rgba, area, colouring), lambda: background(place, rng), rng, size
    )
    return np.asarray(canvas), np.asarray(mask)


def background(place: str, rng: random.Random) -> Image.Image:
    """A place of ``world.PLACES`` in light and grain."""
    side = SIZE * OVERSAMPLING
    noise = np.random.default_rng(rng.getrandbits(32))
    if place in SCENES:
        top, bottom = _LIGHT[place]
        canvas = _light(side, top, bottom, noise, 26)
        _THINGS[place](canvas, ImageDraw.Draw(canvas), side, rng)
        canvas = canvas.filter(ImageFilter.GaussianBlur(rng.uniform(1.2, 2.4)))
    else:
        colour = COLOURS[place]
        canvas = _light(side, colour, tuple(round(0.7 * c) for c in colour), noise, 40)  # type: ignore[arg-type]
    grain = noise.normal(0, 5, (side, side, 1))
    pixels = np.clip(np.asarray(canvas, np.float32) * _vignette(side) + grain, 0, 255)
    return Image.fromarray(pixels.astype(np.uint8)).resize((SIZE, SIZE), Image.Resampling.BOX)


def _light(
    side: int, top: Rgb, bottom: Rgb, noise: np.random.Generator, depth: float
) -> Image.Image:
    """From one colour to another, with soft patches of light."""
    t = np.linspace(0, 1, side, dtype=np.float32)[:, None, None]
    colours = np.asarray(top, np.float32) * (1 - t) + np.asarray(bottom, np.float32) * t
    patches = Image.fromarray((255 * noise.random((5, 5))).astype(np.uint8))
    soft = (
        np.asarray(patches.resize((side, side), Image.Resampling.BICUBIC), np.float32) / 255 - 0.5
    )
    pixels = np.clip(np.broadcast_to(colours, (side, side, 3)) + depth * soft[..., None], 0, 255)
    return Image.fromarray(pixels.astype(np.uint8))


def _vignette(side: int) -> np.ndarray:
    axis = np.linspace(-1, 1, side, dtype=np.float32)
    return (1 - 0.22 * (axis[:, None] ** 2 + axis[None] ** 2) / 2)[..., None]


def _beach(canvas: Image.Image, draw: ImageDraw.ImageDraw, s: int, rng: random.Random) -> None:
    draw.rectangle((0, 0.55 * s, s, s), fill=(226, 200, 152))
    for k in range(3):
        y = (0.55 + 0.06 * k) * s
        draw.line((0, y, s, y + rng.uniform(-4, 4)), fill=(240, 246, 248), width=4)
    x = rng.choice((0.15, 0.85)) * s
    draw.pieslice((x - 0.2 * s, 0.2 * s, x + 0.2 * s, 0.6 * s), 180, 360, fill=(222, 70, 70))
    draw.line((x, 0.38 * s, x, 0.7 * s), fill=(240, 240, 240), width=3)


def _snow(canvas: Image.Image, draw: ImageDraw.ImageDraw, s: int, rng: random.Random) -> None:
    draw.rectangle((0, 0.6 * s, s, s), fill=(226, 232, 242))
    for _ in range(40):
        x, y, r = rng.uniform(0, s), rng.uniform(0, s), rng.uniform(1.5, 3.5)
        draw.ellipse((x - r, y - r, x + r, y + r), fill=(250, 251, 255))
    x = rng.choice((0.05, 0.68)) * s
    draw.rectangle((x, 0.42 * s, x + 0.28 * s, 0.64 * s), fill=(126, 84, 60))
    draw.polygon(
        [(x - 6, 0.44 * s), (x + 0.14 * s, 0.26 * s), (x + 0.28 * s + 6, 0.44 * s)],
        fill=(244, 247, 252),
    )


def _forest(canvas: Image.Image, draw: ImageDraw.ImageDraw, s: int, rng: random.Random) -> None:
    for _ in range(9):
        x, width = rng.uniform(0, s), rng.uniform(0.02, 0.06) * s
        shade = rng.randint(0, 30)
        draw.rectangle((x, 0, x + width, 0.9 * s), fill=(74 + shade, 62 + shade, 48 + shade))
    for _ in range(30):
        x, y, r = rng.uniform(0, s), rng.uniform(0.75, 1) * s, rng.uniform(4, 9)
        draw.ellipse((x - r, y - r / 2, x + r, y + r / 2), fill=(92, 108 + rng.randint(0, 40), 52))


def _meadow(canvas: Image.Image, draw: ImageDraw.ImageDraw, s: int, rng: random.Random) -> None:
    draw.rectangle((0, 0.5 * s, s, s), fill=(128, 158, 70))
    for _ in range(60):
        x, y = rng.uniform(0, s), rng.uniform(0.5, 1) * s
        draw.line(
            (x, y, x + rng.uniform(-3, 3), y - 8), fill=(96, 134 + rng.randint(0, 50), 58), width=2
        )
    x = rng.choice((0.12, 0.86)) * s
    draw.rectangle((x - 4, 0.36 * s, x + 4, 0.6 * s), fill=(110, 78, 50))
    draw.ellipse((x - 0.16 * s, 0.1 * s, x + 0.16 * s, 0.44 * s), fill=(76, 122, 62))


def _night(canvas: Image.Image, draw: ImageDraw.ImageDraw, s: int, rng: random.Random) -> None:
    for _ in range(16):
        x, y, r = rng.uniform(0, s), rng.uniform(0.3, 0.9) * s, rng.uniform(3, 8)
        colour = rng.choice(((250, 200, 110), (240, 120, 90), (150, 190, 250)))
        draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)


def _water(canvas: Image.Image, draw: ImageDraw.ImageDraw, s: int, rng: random.Random) -> None:
    for k in range(5):
        x = (0.1 + 0.2 * k + rng.uniform(-0.08, 0.08)) * s
        draw.polygon(
            [(x, 0), (x + 10, 0), (x + 0.3 * s, s), (x + 0.14 * s, s)], fill=(120, 196, 206)
        )
    for _ in range(8):
        x, y = rng.uniform(0, s), rng.uniform(0.86, 1) * s
        draw.ellipse((x - 9, y - 6, x + 9, y + 6), fill=(196, 116, 110))


def _desert(canvas: Image.Image, draw: ImageDraw.ImageDraw, s: int, rng: random.Random) -> None:
    for k in range(4):
        y = (0.5 + 0.13 * k) * s
        points = [(0, y), (s * rng.uniform(0.3, 0.7), y - 0.07 * s), (s, y + 4), (s, s), (0, s)]
        draw.polygon(points, fill=(226 - 16 * k, 176 - 16 * k, 112 - 12 * k))
    x = rng.choice((0.1, 0.72)) * s
    draw.polygon(
        [(x, 0.52 * s), (x + 0.12 * s, 0.3 * s), (x + 0.24 * s, 0.52 * s)], fill=(170, 122, 84)
    )


def _room(canvas: Image.Image, draw: ImageDraw.ImageDraw, s: int, rng: random.Random) -> None:
    draw.rectangle((0, 0.7 * s, s, s), fill=(122, 108, 100))
    x = rng.choice((0, 0.5)) * s
    draw.rounded_rectangle((x, 0.46 * s, x + 0.5 * s, 0.8 * s), 10, fill=(96, 122, 140))
    draw.rectangle((0.36 * s, 0.06 * s, 0.64 * s, 0.28 * s), fill=(190, 150, 96))


_LIGHT: dict[str, tuple[Rgb, Rgb]] = {
    "beach": ((150, 200, 226), (60, 140, 170)),
    "snow": ((196, 204, 220), (226, 232, 242)),
    "forest": ((140, 158, 110), (70, 84, 48)),
    "meadow": ((196, 214, 224), (160, 190, 150)),
    "night": ((18, 16, 34), (54, 44, 66)),
    "water": ((90, 180, 196), (16, 70, 104)),
    "desert": ((206, 214, 220), (232, 206, 160)),
    "room": ((216, 208, 196), (190, 180, 168)),
}
_THINGS = {
    "beach": _beach,
    "snow": _snow,
    "forest": _forest,
    "meadow": _meadow,
    "night": _night,
    "water": _water,
    "desert": _desert,
    "room": _room,
}

"""Two more ways to draw the places of ``world.PLACES``: posters and cartoons.

A poster is a few large flat shapes; a cartoon has outlines, clouds and things that stand in it.
Both compose their scene otherwise than ``compose.py`` does. Shapes are given in fractions of the
side.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from PIL import Image, ImageDraw

Rgb = tuple[int, int, int]
Draw = Callable[["Sheet", random.Random], None]
INK = (36, 34, 44)


class Sheet:
    """A canvas that shapes are put on, outlined or not."""

    def __init__(self, side: int, colour: Rgb, outlined: bool):
        self.side, self.outline = side, INK if outlined else None
        self.image = Image.new("RGB", (side, side), colour)
        self._draw = ImageDraw.Draw(self.image)

    def rectangle(self, left: float, top: float, right: float, bottom: float, colour: Rgb) -> None:
        """From corner to corner."""
        self._draw.rectangle(self._scaled(left, top, right, bottom), colour, self.outline, 2)

    def disc(self, x: float, y: float, radius: float, colour: Rgb) -> None:
        """Around a centre."""
        box = self._scaled(x - radius, y - radius, x + radius, y + radius)
        self._draw.ellipse(box, colour, self.outline, 2)

    def polygon(self, points: list[tuple[float, float]], colour: Rgb) -> None:
        """Closed, of three points or more."""
        self._draw.polygon(
            [(x * self.side, y * self.side) for x, y in points], colour, self.outline, 2
        )

    def hill(self, x: float, top: float, width: float, colour: Rgb) -> None:
        """Half an ellipse that stands on the lower edge."""
        self._draw.ellipse(
            self._scaled(x - width, top, x + width, 2 - top), colour, self.outline, 2
        )

    def ground(self, top: float, colour: Rgb) -> None:
        """Everything below a level line."""
        self._draw.rectangle(self._scaled(-0.1, top, 1.1, 1.1), colour, self.outline, 2)

    def cloud(self, x: float, y: float, colour: Rgb = (255, 255, 255)) -> None:
        """Three discs and a flat lower side."""
        for shift, radius in ((-0.07, 0.05), (0, 0.07), (0.07, 0.05)):
            self.disc(x + shift, y, radius, colour)

    def _scaled(self, *values: float) -> tuple[float, ...]:
        return tuple(value * self.side for value in values)


def background(
    place: str, style: str, side: int, colour: Rgb | None, rng: random.Random
) -> Image.Image:
    """A place in the manner of ``poster`` or ``cartoon``; ``colour`` where it is a plain one."""
    cartoon = style == "cartoon"
    if colour is not None:
        sheet = Sheet(side, _shade(colour, rng.randint(-10, 10)), cartoon)
        (_dots if cartoon else _halves)(sheet, colour, rng)
        return sheet.image
    sky, draw = (_CARTOONS if cartoon else _POSTERS)[place]
    sheet = Sheet(side, _shade(sky, rng.randint(-10, 10)), cartoon)
    draw(sheet, rng)
    return sheet.image


def _shade(colour: Rgb, amount: int) -> Rgb:
    r, g, b = (max(0, min(255, c + amount)) for c in colour)
    return r, g, b


def _halves(sheet: Sheet, colour: Rgb, rng: random.Random) -> None:
    """A lighter disc, or a darker corner."""
    if rng.random() < 0.5:
        sheet.disc(0.5, 0.5, rng.uniform(0.42, 0.48), _shade(colour, 26))
    else:
        edge = rng.uniform(-0.2, 0.2)
        sheet.polygon([(0.5 + edge, 0), (1, 0), (1, 1), (0.5 - edge, 1)], _shade(colour, -24))


def _dots(sheet: Sheet, colour: Rgb, rng: random.Random) -> None:
    """Rows of small discs."""
    sheet.outline = None
    shift, light = rng.uniform(0, 0.12), rng.choice((-22, 22))
    for row in range(10):
        for column in range(10):
            x = shift + 0.125 * column + 0.0625 * (row % 2) - 0.1
            sheet.disc(x, 0.125 * row, 0.02, _shade(colour, light))


def _poster_beach(sheet: Sheet, rng: random.Random) -> None:
    sheet.disc(rng.choice((0.2, 0.8)), 0.22, 0.13, (255, 236, 150))
    sheet.ground(rng.uniform(0.5, 0.56), (20, 140, 170))
    sheet.polygon(
        [(0, rng.uniform(0.66, 0.8)), (1, rng.uniform(0.8, 0.92)), (1, 1), (0, 1)], (246, 214, 150)
    )


def _poster_snow(sheet: Sheet, rng: random.Random) -> None:
    peak = rng.uniform(0.25, 0.75)
    sheet.polygon([(peak - 0.55, 0.75), (peak, 0.1), (peak + 0.55, 0.75)], (96, 128, 172))
    sheet.polygon([(peak - 0.17, 0.3), (peak, 0.1), (peak + 0.17, 0.3)], (250, 252, 255))
    sheet.hill(rng.uniform(0.2, 0.8), 0.66, 0.9, (236, 243, 250))


def _poster_forest(sheet: Sheet, rng: random.Random) -> None:
    for k in range(5):
        x = 0.1 + 0.2 * k + rng.uniform(-0.03, 0.03)
        sheet.rectangle(x - 0.03, 0, x + 0.03, 0.85, (70, 92, 62))
    sheet.ground(rng.uniform(0.74, 0.82), (36, 70, 40))


def _poster_meadow(sheet: Sheet, rng: random.Random) -> None:
    sheet.disc(rng.choice((0.18, 0.82)), 0.2, 0.1, (255, 224, 90))
    sheet.hill(rng.uniform(0.1, 0.4), 0.52, 0.7, (122, 190, 80))
    sheet.hill(rng.uniform(0.6, 0.9), 0.62, 0.8, (82, 158, 66))


def _poster_night(sheet: Sheet, rng: random.Random) -> None:
    x = rng.choice((0.2, 0.8))
    sheet.disc(x, 0.2, 0.13, (248, 240, 190))
    sheet.disc(x + 0.06, 0.17, 0.11, (24, 26, 74))
    sheet.hill(rng.uniform(0.3, 0.7), 0.76, 0.9, (12, 14, 36))


def _poster_water(sheet: Sheet, rng: random.Random) -> None:
    for k in range(3):
        sheet.ground(
            0.28 + 0.22 * k + rng.uniform(-0.03, 0.03), (20 - 5 * k, 130 - 34 * k, 176 - 30 * k)
        )
    sheet.disc(rng.choice((0.14, 0.86)), rng.uniform(0.3, 0.6), 0.05, (170, 226, 236))


def _poster_desert(sheet: Sheet, rng: random.Random) -> None:
    sheet.disc(rng.choice((0.25, 0.75)), 0.3, 0.16, (255, 244, 206))
    top = rng.uniform(0.5, 0.6)
    sheet.polygon([(-0.2, 1), (0.3, top), (0.9, 1)], (214, 130, 64))
    sheet.polygon([(0.2, 1), (0.8, top + 0.06), (1.4, 1)], (186, 102, 48))
    sheet.ground(0.86, (232, 170, 96))


def _poster_room(sheet: Sheet, rng: random.Random) -> None:
    x = rng.choice((0.06, 0.62))
    sheet.rectangle(x, 0.1, x + 0.32, 0.46, (250, 214, 130))
    sheet.ground(rng.uniform(0.7, 0.78), (120, 72, 70))


def _cartoon_beach(sheet: Sheet, rng: random.Random) -> None:
    sheet.cloud(rng.uniform(0.2, 0.8), 0.14)
    sheet.ground(0.46, (40, 150, 220))
    sheet.ground(rng.uniform(0.62, 0.7), (250, 222, 150))
    x = rng.choice((0.1, 0.9))
    sheet.polygon(
        [(x - 0.02, 0.74), (x - 0.01, 0.3), (x + 0.01, 0.3), (x + 0.02, 0.74)], (140, 92, 50)
    )
    for dx, dy in ((-0.2, 0.06), (0.2, 0.06), (-0.14, -0.1), (0.14, -0.1)):
        sheet.polygon([(x, 0.3), (x + dx, 0.3 + dy), (x + dx / 2, 0.24 + dy / 2)], (50, 160, 70))


def _cartoon_snow(sheet: Sheet, rng: random.Random) -> None:
    sheet.hill(rng.uniform(0.2, 0.8), 0.56, 0.8, (232, 240, 252))
    sheet.ground(0.74, (250, 252, 255))
    for x in (rng.uniform(0.02, 0.18), rng.uniform(0.82, 0.98)):
        for k in range(3):
            top = 0.28 + 0.13 * k
            sheet.polygon([(x - 0.1, top + 0.2), (x, top), (x + 0.1, top + 0.2)], (60, 130, 110))
    for _ in range(14):
        sheet.disc(rng.random(), rng.uniform(0, 0.7), 0.014, (255, 255, 255))


def _cartoon_forest(sheet: Sheet, rng: random.Random) -> None:
    sheet.ground(0.62, (104, 170, 72))
    for x in (0.08, 0.36, 0.66, 0.94):
        x += rng.uniform(-0.05, 0.05)
        sheet.rectangle(x - 0.03, 0.4, x + 0.03, 0.7, (128, 84, 50))
        sheet.disc(x, rng.uniform(0.26, 0.34), 0.15, (52, 140, 64))


def _cartoon_meadow(sheet: Sheet, rng: random.Random) -> None:
    sheet.cloud(rng.uniform(0.15, 0.4), 0.16)
    sheet.cloud(rng.uniform(0.6, 0.85), 0.24)
    sheet.ground(rng.uniform(0.56, 0.62), (140, 210, 80))
    for k in range(6):
        x = 0.08 + 0.17 * k
        sheet.rectangle(x - 0.025, 0.5, x + 0.025, 0.72, (240, 228, 206))


def _cartoon_night(sheet: Sheet, rng: random.Random) -> None:
    sheet.disc(rng.choice((0.16, 0.84)), 0.16, 0.11, (255, 246, 190))
    for x, width in ((0.08, 0.12), (0.3, 0.14), (0.68, 0.12), (0.9, 0.14)):
        top = rng.uniform(0.4, 0.56)
        sheet.rectangle(x - width, top, x + width, 1, (58, 50, 110))
        sheet.rectangle(x - 0.04, top + 0.06, x + 0.02, top + 0.12, (255, 224, 120))
    sheet.ground(0.84, (40, 44, 62))


def _cartoon_water(sheet: Sheet, rng: random.Random) -> None:
    sheet.ground(0.84, (240, 214, 150))
    for x in (rng.uniform(0.04, 0.14), rng.uniform(0.86, 0.96)):
        for k in range(4):
            y = 0.9 - 0.12 * k
            sheet.polygon(
                [(x - 0.04, y), (x + 0.05, y - 0.06), (x - 0.02, y - 0.13)], (40, 150, 90)
            )
    for _ in range(6):
        sheet.disc(rng.random(), rng.uniform(0, 0.7), rng.uniform(0.015, 0.035), (190, 236, 250))


def _cartoon_desert(sheet: Sheet, rng: random.Random) -> None:
    sheet.disc(rng.choice((0.2, 0.8)), 0.16, 0.09, (255, 226, 90))
    sheet.ground(rng.uniform(0.58, 0.66), (244, 196, 120))
    x = rng.choice((0.12, 0.88))
    sheet.rectangle(x - 0.035, 0.34, x + 0.035, 0.72, (60, 150, 80))
    sheet.rectangle(x - 0.1, 0.44, x - 0.05, 0.56, (60, 150, 80))
    sheet.rectangle(x + 0.05, 0.4, x + 0.1, 0.52, (60, 150, 80))


def _cartoon_room(sheet: Sheet, rng: random.Random) -> None:
    x = rng.choice((0.12, 0.88))
    sheet.ground(0.74, (190, 140, 96))
    sheet.rectangle(x - 0.01, 0.4, x + 0.01, 0.74, INK)
    sheet.polygon(
        [(x - 0.1, 0.42), (x - 0.05, 0.24), (x + 0.05, 0.24), (x + 0.1, 0.42)], (250, 210, 100)
    )
    sheet.rectangle(0.9 - x - 0.12, 0.12, 0.9 - x + 0.14, 0.36, (170, 216, 240))


_POSTERS: dict[str, tuple[Rgb, Draw]] = {
    "beach": ((250, 176, 120), _poster_beach),
    "snow": ((158, 196, 226), _poster_snow),
    "forest": ((176, 206, 140), _poster_forest),
    "meadow": ((150, 214, 236), _poster_meadow),
    "night": ((24, 26, 74), _poster_night),
    "water": ((60, 180, 200), _poster_water),
    "desert": ((246, 166, 96), _poster_desert),
    "room": ((206, 150, 120), _poster_room),
}
_CARTOONS: dict[str, tuple[Rgb, Draw]] = {
    "beach": ((140, 214, 250), _cartoon_beach),
    "snow": ((176, 208, 240), _cartoon_snow),
    "forest": ((190, 232, 240), _cartoon_forest),
    "meadow": ((130, 206, 250), _cartoon_meadow),
    "night": ((30, 34, 92), _cartoon_night),
    "water": ((50, 150, 214), _cartoon_water),
    "desert": ((250, 214, 150), _cartoon_desert),
    "room": ((236, 214, 196), _cartoon_room),
}

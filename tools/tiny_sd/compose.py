"""One picture of the world: a recoloured sprite on a drawn background, 64 px, with its mask."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable

import numpy as np
import scenery
from forms import SCENE_STYLES, SIZES
from PIL import Image, ImageDraw, ImageFilter
from sprites import SIDE, Sprites
from world import COLOURS, SCENES, Colouring

SIZE = 64
OVERSAMPLING = 2
Rgb = tuple[int, int, int]

_ROWS, _COLUMNS = np.mgrid[:SIDE, :SIDE]
_DOTS = ((_COLUMNS + 12 * ((_ROWS // 24) % 2)) % 24 - 12) ** 2 + (_ROWS % 24 - 12) ** 2 < 60
_BANDS = (_ROWS // 12) % 2 == 0


def recolour(rgba: np.ndarray, area: np.ndarray, colouring: Colouring) -> np.ndarray:
    """Paint a sprite ``[96 96 4]``. Shading stays: lightness differences are added back."""
    if colouring.kind == "natural":
        return rgba
    out = rgba.astype(np.float32)
    light = out[..., :3] @ np.array([0.299, 0.587, 0.114], np.float32)
    first, second = COLOURS[colouring.first], COLOURS.get(colouring.second)
    main = area == 1
    painted: list[tuple[np.ndarray, tuple[int, int, int] | None]] = [(main, first)]
    if colouring.kind == "two-tone":
        # a drawing of one colour is split into a left and a right half
        other = area == 2
        painted.append((other if other.any() else main & (_COLUMNS >= SIDE // 2), second))
    elif colouring.kind in ("spots", "stripes"):
        painted.append((main & (_DOTS if colouring.kind == "spots" else _BANDS), second))
    centre = light[main].mean()
    for where, colour in painted:
        if colour is None or not where.any():
            continue
        middle = (
            light[where].mean() if where is not main and colouring.kind == "two-tone" else centre
        )
        shade = 0.7 * (light[where] - middle)
        out[where, :3] = np.asarray(colour, np.float32) + shade[:, None]
    return np.clip(out, 0, 255).astype(np.uint8)


def render(
    rgba: np.ndarray,
    area: np.ndarray,
    colouring: Colouring,
    rendering: str = "as drawn",
    rng: random.Random | None = None,
) -> np.ndarray:
    """A sprite recoloured, then outlined or made flat; outlines widen it by up to 4 px a side.

    Outlines run around the object and between its two painted areas, in ink of a random width.
    Flat areas lose their shading.
    """
    painted = recolour(rgba, area, colouring)
    if rendering == "flat":
        painted = painted.copy()
        for number in (1, 2):
            if (where := area == number).any() and colouring.kind in (
                "natural",
                "solid",
                "two-tone",
            ):
                painted[where, :3] = np.median(painted[where, :3], axis=0)
    if rendering != "outlined":
        return painted
    assert rng is not None
    width = rng.choice((3, 5, 7))
    room = 4
    painted = np.pad(painted, ((room, room), (room, room), (0, 0)))
    label = np.pad(area, room) + 3 * (painted[..., 3] > 128)
    image = Image.fromarray(label.astype(np.uint8))
    grown = np.asarray(image.filter(ImageFilter.MaxFilter(width)))
    shrunk = np.asarray(image.filter(ImageFilter.MinFilter(3)))
    # outside: around the silhouette; inside: where one area meets another
    line = ((label == 0) & (grown > 0)) | ((label > 0) & (shrunk != label))
    out = painted.copy()
    out[line] = (*_jitter(scenery.INK, rng, 12), 255)
    return out


def picture(
    sprites: Sprites,
    index: int,
    colouring: Colouring,
    place: str,
    style: str,
    rng: random.Random,
    *,
    size: str = "usual",
    rendering: str = "as drawn",
) -> tuple[np.ndarray, np.ndarray]:
    """Image ``[64 64 3]`` and mask ``[64 64]``, both uint8.

    The object fills as much of the frame as its size says, 66-88 % by default, within 1.5 px of the
    centre (twice that where it is small) and 5 degrees of upright.
    """
    canvas, mask = place_sprite(
        render(sprites.rgba[index], sprites.area[index], colouring, rendering, rng),
        lambda: background(place, rng, style),
        rng,
        size,
    )
    return np.asarray(_styled(canvas, style)), np.asarray(mask)


def place_sprite(
    rgba: np.ndarray, draw_background: Callable[[], Image.Image], rng: random.Random, size: str
) -> tuple[Image.Image, Image.Image]:
    """A sprite ``[H W 4]`` on a background: the picture and its mask, ``SIZE`` px each."""
    sprite = Image.fromarray(rgba)
    sprite = sprite.convert("RGBa").rotate(rng.uniform(-5, 5), Image.Resampling.BICUBIC)
    sprite = sprite.crop(sprite.getchannel("a").point(lambda a: 255 * (a > 20)).getbbox())
    scale = rng.uniform(*SIZES[size]) * SIZE / max(sprite.size)
    jitter = 3.0 if size in ("tiny", "small") else 1.5
    width, height = (max(1, round(scale * side)) for side in sprite.size)
    sprite = sprite.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=2.0)
    sprite = sprite.convert("RGBA")
    left = round((SIZE - width) / 2 + rng.uniform(-jitter, jitter))
    top = round((SIZE - height) / 2 + rng.uniform(-jitter, jitter) + 2)
    canvas = draw_background()
    mask = Image.new("L", (SIZE, SIZE), 0)
    mask.paste(sprite.getchannel("A"), (left, top))
    canvas.paste(sprite, (left, top), sprite)
    return canvas, mask


def background(place: str, rng: random.Random, style: str = "photo") -> Image.Image:
    """A place of ``world.PLACES``; every call draws it a little differently."""
    side = SIZE * OVERSAMPLING
    if style in SCENE_STYLES:
        plain = None if place in SCENES else COLOURS[place]
        canvas = scenery.background(place, style, side, plain, rng)
    elif place in SCENES:
        canvas = _SCENES[place](side, rng)
    else:
        colour = _jitter(COLOURS[place], rng, 10)
        canvas = _gradient(side, _shift(colour, 12), _shift(colour, -12))
    return canvas.resize((SIZE, SIZE), Image.Resampling.BOX)


def _styled(image: Image.Image, style: str) -> Image.Image:
    if style == "photo" or style in SCENE_STYLES:
        return image
    gray = image.convert("L")
    if style == "black and white":
        return gray.convert("RGB")
    light = np.asarray(gray, np.float32)
    blurred = np.asarray(
        Image.fromarray((255 - light).astype(np.uint8)).filter(ImageFilter.GaussianBlur(2.0)),
        np.float32,
    )
    pencil = np.clip(light * 255 / np.maximum(255 - blurred, 1), 0, 255)  # colour dodge
    pencil = 255 - 1.6 * (255 - pencil)
    paper = np.array([250, 246, 236], np.float32) / 255
    return Image.fromarray((np.clip(pencil, 40, 255)[..., None] * paper).astype(np.uint8))


def _jitter(colour: Rgb, rng: random.Random, amount: int) -> Rgb:
    return _clip(c + rng.randint(-amount, amount) for c in colour)


def _shift(colour: Rgb, amount: int) -> Rgb:
    return _clip(c + amount for c in colour)


def _clip(values: Iterable[float]) -> Rgb:
    r, g, b = (max(0, min(255, int(v))) for v in values)
    return r, g, b


def _gradient(side: int, top: Rgb, bottom: Rgb) -> Image.Image:
    t = np.linspace(0, 1, side, dtype=np.float32)[:, None, None]
    column = np.asarray(top, np.float32) * (1 - t) + np.asarray(bottom, np.float32) * t
    return Image.fromarray(np.broadcast_to(column, (side, side, 3)).astype(np.uint8))


def _ground(canvas: Image.Image, horizon: float, colour: Rgb, rng: random.Random) -> None:
    """A ground with a gently waved upper edge."""
    side = canvas.width
    phase, height = rng.uniform(0, 6.28), rng.uniform(0.005, 0.02) * side
    edge = [
        (x, horizon * side + height * math.sin(phase + 6.28 * x / side))
        for x in range(0, side + 4, 4)
    ]
    ImageDraw.Draw(canvas).polygon([*edge, (side, side), (0, side)], fill=colour)


def _beach(side: int, rng: random.Random) -> Image.Image:
    canvas = _gradient(side, _jitter((96, 178, 240), rng, 12), (190, 226, 250))
    horizon = rng.uniform(0.38, 0.48)
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((0, horizon * side, side, side), fill=_jitter((30, 120, 190), rng, 14))
    _ground(canvas, horizon + rng.uniform(0.16, 0.22), _jitter((238, 214, 160), rng, 10), rng)
    return canvas


def _snow(side: int, rng: random.Random) -> Image.Image:
    canvas = _gradient(side, _jitter((150, 180, 214), rng, 10), (214, 226, 240))
    draw = ImageDraw.Draw(canvas)
    for _ in range(3):
        x, peak = rng.uniform(0, side), rng.uniform(0.1, 0.32) * side
        base, width = 0.62 * side, rng.uniform(0.25, 0.4) * side
        draw.polygon([(x - width, base), (x, peak), (x + width, base)], fill=(124, 140, 166))
        cap = 0.35
        left = (x - cap * width, peak + cap * (base - peak))
        right = (x + cap * width, peak + cap * (base - peak))
        draw.polygon([left, (x, peak), right], fill=(246, 249, 253))
    _ground(canvas, rng.uniform(0.56, 0.64), _jitter((240, 245, 251), rng, 5), rng)
    return canvas


def _forest(side: int, rng: random.Random) -> Image.Image:
    canvas = _gradient(side, _jitter((150, 190, 150), rng, 10), (96, 140, 90))
    draw = ImageDraw.Draw(canvas)
    for k in range(7):
        x = (k + rng.uniform(-0.3, 0.3) + 0.5) * side / 7
        top, width = rng.uniform(0.02, 0.22) * side, rng.uniform(0.1, 0.14) * side
        green = _jitter((24, 84, 44), rng, 14)
        draw.rectangle((x - 3, 0.55 * side, x + 3, 0.8 * side), fill=(84, 56, 32))
        draw.polygon([(x - width, 0.68 * side), (x, top), (x + width, 0.68 * side)], fill=green)
    _ground(canvas, rng.uniform(0.7, 0.76), _jitter((58, 100, 40), rng, 10), rng)
    return canvas


def _meadow(side: int, rng: random.Random) -> Image.Image:
    canvas = _gradient(side, _jitter((112, 190, 246), rng, 10), (206, 234, 252))
    _ground(canvas, rng.uniform(0.46, 0.56), _jitter((112, 196, 62), rng, 12), rng)
    draw = ImageDraw.Draw(canvas)
    for _ in range(14):
        x, y = rng.uniform(0, side), rng.uniform(0.62, 1) * side
        colour = rng.choice(((255, 255, 255), (255, 220, 60), (250, 130, 170)))
        draw.ellipse((x - 2.5, y - 2.5, x + 2.5, y + 2.5), fill=colour)
    return canvas


def _night(side: int, rng: random.Random) -> Image.Image:
    canvas = _gradient(side, _jitter((8, 12, 40), rng, 6), _jitter((34, 40, 92), rng, 8))
    draw = ImageDraw.Draw(canvas)
    for _ in range(24):
        x, y, r = rng.uniform(0, side), rng.uniform(0, 0.8) * side, rng.choice((1, 1, 1.6))
        draw.ellipse((x - r, y - r, x + r, y + r), fill=(250, 248, 220))
    x, y, r = rng.choice((0.12, 0.88)) * side, 0.12 * side, 0.08 * side
    draw.ellipse((x - r, y - r, x + r, y + r), fill=(250, 240, 190))
    _ground(canvas, rng.uniform(0.8, 0.86), _jitter((16, 26, 34), rng, 6), rng)
    return canvas


def _water(side: int, rng: random.Random) -> Image.Image:
    canvas = _gradient(side, _jitter((70, 190, 214), rng, 10), _jitter((8, 66, 122), rng, 10))
    draw = ImageDraw.Draw(canvas)
    for _ in range(10):
        x, y, r = rng.uniform(0, side), rng.uniform(0, 0.85) * side, rng.uniform(2, 4.5)
        draw.ellipse((x - r, y - r, x + r, y + r), outline=(200, 240, 248), width=2)
    _ground(canvas, rng.uniform(0.84, 0.9), _jitter((196, 178, 124), rng, 10), rng)
    return canvas


def _desert(side: int, rng: random.Random) -> Image.Image:
    canvas = _gradient(side, _jitter((250, 176, 90), rng, 10), (254, 226, 160))
    x, y, r = rng.choice((0.15, 0.85)) * side, 0.16 * side, 0.09 * side
    ImageDraw.Draw(canvas).ellipse((x - r, y - r, x + r, y + r), fill=(255, 246, 214))
    _ground(canvas, rng.uniform(0.5, 0.56), _jitter((220, 146, 74), rng, 10), rng)
    _ground(canvas, rng.uniform(0.7, 0.78), _jitter((196, 118, 52), rng, 10), rng)
    return canvas


def _room(side: int, rng: random.Random) -> Image.Image:
    canvas = _gradient(side, _jitter((226, 206, 184), rng, 8), _jitter((212, 190, 166), rng, 8))
    draw = ImageDraw.Draw(canvas)
    x = rng.choice((0.06, 0.66)) * side
    window = (x, 0.08 * side, x + 0.28 * side, 0.42 * side)
    draw.rectangle(window, fill=(168, 214, 244))
    draw.rectangle(window, outline=(250, 250, 250), width=4)
    draw.line(
        (x + 0.14 * side, 0.08 * side, x + 0.14 * side, 0.42 * side), fill=(250, 250, 250), width=3
    )
    top = rng.uniform(0.72, 0.78) * side
    draw.rectangle((0, top, side, side), fill=_jitter((142, 94, 58), rng, 8))
    draw.rectangle((0, top - 4, side, top), fill=(244, 238, 230))
    return canvas


_SCENES = {
    "beach": _beach,
    "snow": _snow,
    "forest": _forest,
    "meadow": _meadow,
    "night": _night,
    "water": _water,
    "desert": _desert,
    "room": _room,
}

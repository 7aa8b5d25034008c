"""The picture of the architecture, docs/images/architecture.svg: ``python docs/architecture.py``.

It is drawn from the floor plan in CONTRIBUTING.md, the table that ``tests/test_architecture.py``
checks against the imports: a card for every room with the first clause of what lives there, a row
for every floor. ``tests/test_docs.py`` checks that the committed picture is what this script draws.

Colours are the picture's own and its background is transparent, so that it reads on white and on
black pages alike.
"""

from __future__ import annotations

import html
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "images" / "architecture.svg"

# Floor, what its rooms are for, colours of its cards and of its name; from the roof down.
FLOORS = (
    ("doors", "how people come in", "#8250c4", "#9d74dc"),
    ("work", "what is done", "#2f6fd0", "#4a8af0"),
    ("theory", "what it is done with", "#0f7f7a", "#1a9c95"),
    ("foundation", "what carries it", "#56677d", "#7f90a8"),
    ("ground", "nothing below", "#7a6a58", "#9c8a75"),
)
# How people come in, by room: from above with a program, or from Python at the work itself.
ENTRANCES = {
    "integrations/": "load_catversion(pipe, FILE)",
    "serving/": "a browser, HTTP",
    "cli/": "catversion, train_tpu.py",
}
FUNCTIONS = {
    "sampling/": "cv.generate",
    "training/": "cv.train",
    "evaluation/": "cv.evaluate",
}
WIDTH, LEFT, GAP, PAD = 880, 152, 10, 13
LINE, TITLE, MARGIN = 17, 26, 8
GREY = "#808994"
FONT = "ui-sans-serif, system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
GLYPH, MONO_GLYPH = 6.6, 7.6  # mean width of a caption's letter, and of an entrance's, pixels


@dataclass(frozen=True)
class Room:
    """One row of the floor plan: its name as written there, its floor, its caption."""

    name: str
    floor: str
    caption: str


def read_rooms(text: str) -> list[Room]:
    """The rooms of CONTRIBUTING's floor plan, in its order: from the ground up."""
    plan = text.split("## Floor plan")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `([\w./]+)` \| (\w+) \| ([^|]+) \|", plan, re.MULTILINE)
    return [
        Room(name, floor, re.split(r"[;:.] ", what)[0].replace("`", "").strip())
        for name, floor, what in rows
    ]


def draw(rooms: list[Room]) -> str:
    """The SVG text of the picture."""
    parts: list[str] = []
    y = MARGIN + 42
    for floor, purpose, colour, name_colour in FLOORS:
        cards = [room for room in rooms if room.floor == floor]
        width = (WIDTH - LEFT - MARGIN - GAP * (len(cards) - 1)) / len(cards)
        captions = [textwrap.wrap(r.caption, int((width - 2 * PAD) / GLYPH)) for r in cards]
        height = 2 * PAD + TITLE - 4 + LINE * max(map(len, captions)) - 4
        parts.append(
            f'<text x="{MARGIN}" y="{y + 26}" class="floor" fill="{name_colour}">{floor}</text>'
            f'<text x="{MARGIN}" y="{y + 45}" class="purpose">{html.escape(purpose)}</text>'
        )
        for place, (room, lines) in enumerate(zip(cards, captions, strict=True)):
            x = LEFT + place * (width + GAP)
            if room.name in ENTRANCES:
                parts.append(_entrance(ENTRANCES[room.name], x, width))
            parts.append(_card(room.name, lines, x, y, width, height, colour))
        y += height + GAP
    y += 16
    parts.append(
        f'<text x="{LEFT}" y="{y}" class="purpose">A room uses rooms on the floors below it, and '
        "rooms to its left. Nothing goes in a circle.</text>"
    )
    height = y + 12
    style = (
        f"text{{font-family:{FONT}}}"
        f".room{{font:600 16px {MONO};fill:#fff}}"
        ".caption{font-size:13px;fill:#fff;fill-opacity:.92}"
        f".function{{font:13px {MONO};fill:#fff;fill-opacity:.92;text-anchor:end}}"
        ".floor{font-size:16px;font-weight:700}"
        f".purpose{{font-size:13px;fill:{GREY}}}"
        f".entrance{{font:13px {MONO};fill:{GREY};text-anchor:middle}}"
    )
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}" role="img" aria-label="The rooms of catversion_jax by '
        f'floor">\n<style>{style}</style>\n{body}\n</svg>\n'
    )


def _entrance(text: str, x: float, width: float) -> str:
    if len(text) * MONO_GLYPH > width - 2 * PAD:
        raise ValueError(f"{text!r} is wider than the card below it")
    middle = x + width / 2
    return (
        f'<rect x="{x + 0.5:g}" y="{MARGIN}.5" width="{width - 1:g}" height="28" rx="14" '
        f'fill="none" stroke="{GREY}"/>'
        f'<text x="{middle:g}" y="{MARGIN + 19}" class="entrance">{text}</text>'
        f'<path d="M{middle:g} {MARGIN + 29}v13" stroke="{GREY}"/>'
    )


def _card(
    name: str, lines: list[str], x: float, y: float, width: float, height: float, colour: str
) -> str:
    text = "".join(
        f'<text x="{x + PAD:g}" y="{y + PAD + TITLE + 10 + LINE * i:g}" class="caption">'
        f"{html.escape(line)}</text>"
        for i, line in enumerate(lines)
    )
    if name in FUNCTIONS:
        text += (
            f'<text x="{x + width - PAD:g}" y="{y + PAD + 12:g}" class="function">'
            f"{FUNCTIONS[name]}</text>"
        )
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="9" fill="{colour}"/>'
        f'<text x="{x + PAD:g}" y="{y + PAD + 12:g}" class="room">{html.escape(name)}</text>{text}'
    )


def main() -> None:
    """Draw the picture from the floor plan."""
    rooms = read_rooms((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    PICTURE.write_text(draw(rooms), encoding="utf-8")
    print(PICTURE)


if __name__ == "__main__":
    main()

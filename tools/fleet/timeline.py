"""A picture of ``timeline.csv``: rows x time, each concept in its colour, and the memory below."""

from __future__ import annotations

import colorsys
import csv
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WIDTH, LEFT, ROW, GAP = 1500, 70, 26, 6
DONE_EDGE, EARLY_EDGE = (255, 255, 255), (0, 0, 0)


def draw(timeline: Path, memory: Sequence[Sequence[float]], output: Path) -> None:
    """Write the picture.

    Args:
      timeline: of a run.
      memory: (seconds, concepts done, MB) once in a while.
      output: PNG.
    """
    with timeline.open() as file:
        rows = list(csv.DictReader(file))
    num_rows = 1 + max(int(row["row"]) for row in rows)
    end = max(float(row["ended"]) for row in rows)
    band = num_rows * (ROW + GAP)
    image = Image.new("RGB", (WIDTH, 3 * 34 + 2 * band + 150 + 40), "white")
    pen = ImageDraw.Draw(image)
    early = sum(row["outcome"] == "stopped early" for row in rows)
    top = _title(
        pen, 6, f"{len(rows)} concepts in {num_rows} rows, {end:.0f} s (no edge: see the detail)"
    )
    _band(pen, rows, top, 0, end, edges=False)
    start, length = 0.5 * end, 40.0
    top = _title(
        pen,
        top + band + 6,
        f"detail, {start:.0f} to {start + length:.0f} s: each block is a concept; "
        f"black end: stopped early ({early} of all), white: all steps",
    )
    _band(pen, rows, top, start, start + length, edges=True)
    top = _title(pen, top + band + 6, "resident memory of the process, MB")
    _curve(pen, memory, top, 150)
    image.save(output, optimize=True)


def _title(pen: ImageDraw.ImageDraw, y: int, text: str) -> int:
    pen.text((LEFT, y), text, fill="black", font=ImageFont.load_default(16))
    return y + 28


def _band(
    pen: ImageDraw.ImageDraw,
    rows: Sequence[dict[str, str]],
    top: int,
    start: float,
    end: float,
    *,
    edges: bool,
) -> None:
    scale = (WIDTH - LEFT - 20) / (end - start)
    for place in sorted({int(row["row"]) for row in rows}):
        y = top + place * (ROW + GAP)
        pen.text((6, y + 4), f"row {place}", fill="black", font=ImageFont.load_default(14))
    for number, row in enumerate(rows):
        began, ended = (min(max(float(row[k]), start), end) for k in ("began", "ended"))
        if ended <= began:
            continue
        x0, x1 = (LEFT + (moment - start) * scale for moment in (began, ended))
        y = top + int(row["row"]) * (ROW + GAP)
        hue = number * 0.618 % 1
        colour = tuple(round(255 * c) for c in colorsys.hls_to_rgb(hue, 0.6, 0.65))
        pen.rectangle((x0, y, x1, y + ROW), fill=colour)
        if edges and float(row["ended"]) <= end:
            edge = EARLY_EDGE if row["outcome"] == "stopped early" else DONE_EDGE
            pen.rectangle((x1 - 4, y, x1, y + ROW), fill=edge)


def _curve(
    pen: ImageDraw.ImageDraw, memory: Sequence[Sequence[float]], top: int, height: int
) -> None:
    font = ImageFont.load_default(14)
    end, most = memory[-1][0], max(mb for *_, mb in memory)
    scale = (WIDTH - LEFT - 20) / end
    points = [(LEFT + t * scale, top + height * (1 - mb / most)) for t, _, mb in memory]
    pen.line(((LEFT, top), (LEFT, top + height), (WIDTH - 20, top + height)), fill="black")
    pen.line(points, fill=(30, 90, 180), width=2)
    pen.text((6, top - 4), f"{most:.0f}", fill="black", font=font)
    pen.text((6, top + height - 12), "0", fill="black", font=font)
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        text = f"{share * end:.0f} s"
        pen.text((LEFT + share * (WIDTH - LEFT - 60), top + height + 4), text, "black", font)

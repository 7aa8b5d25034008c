"""Labelled grids of pictures."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from catversion_jax.array_types import Int
from catversion_jax.errors import CatVersionError

_MARGIN = 8
_FONT_SIZE = 14
_LABEL_WIDTH = 160
_MAX_LABEL_LINES = 4
_INK, _PAPER, _BLANK = (32, 32, 32), (255, 255, 255), (232, 232, 232)


def image_grid(
    rows: Sequence[Sequence[Int[np.ndarray, "height width 3"] | None]],
    *,
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    references: Sequence[Int[np.ndarray, "height width 3"]] = (),
    min_cell: int = 128,
    max_cell: int = 512,
) -> Image.Image:
    """Draw uint8 images in a labelled grid.

    Args:
      rows: the images, row by row, of one size; None leaves a cell blank.
      row_labels: one per row, drawn on the left.
      column_labels: one per column, drawn on top.
      references: shown in a column of their own at the left (a concept's photos), any size.
      min_cell: smaller images are enlarged by a whole factor until their shorter side has this many
        pixels.
      max_cell: larger images are reduced to this.
    """
    if len(rows) != len(row_labels) or any(len(row) != len(column_labels) for row in rows):
        raise CatVersionError(
            f"a grid of rows {[len(row) for row in rows]}: needs {len(row_labels)} rows of "
            f"{len(column_labels)} images, one for each label."
        )
    drawn = [image for row in rows for image in row if image is not None]
    size = (drawn[0].shape[1], drawn[0].shape[0]) if drawn else None
    cell = _cell_size(size, min_cell, max_cell)
    font = ImageFont.load_default(size=_FONT_SIZE)
    line_height = int(font.getbbox("Agjp")[3]) + 3
    reference_column = _reference_column(references, cell, len(rows))
    column_lines = [_wrap(label, font, cell[0]) for label in column_labels]
    top = max((len(lines) for lines in column_lines), default=0) * line_height + 2 * _MARGIN
    reference_width = cell[0] + 2 * _MARGIN if reference_column else 0
    left = reference_width + _label_width(row_labels, font) + 2 * _MARGIN
    step_x, step_y = cell[0] + _MARGIN, cell[1] + _MARGIN
    canvas = Image.new(
        "RGB", (left + len(column_labels) * step_x, top + len(rows) * step_y), _PAPER
    )
    draw = ImageDraw.Draw(canvas)

    def text(lines: Sequence[str], x: int, y: int) -> None:
        for number, line in enumerate(lines):
            draw.text((x, y + number * line_height), line, fill=_INK, font=font)

    if reference_column:
        text(["references"], _MARGIN, _MARGIN)
        for number, picture in enumerate(reference_column):
            canvas.paste(picture, (_MARGIN, top + number * step_y))
    for column, lines in enumerate(column_lines):
        text(lines, left + column * step_x, _MARGIN)
    for index, (row, label) in enumerate(zip(rows, row_labels, strict=True)):
        y = top + index * step_y
        text(_wrap(label, font, _LABEL_WIDTH, cell[1] // line_height), reference_width + _MARGIN, y)
        for column, image in enumerate(row):
            blank = Image.new("RGB", cell, _BLANK)
            canvas.paste(
                blank if image is None else _resized(image, cell), (left + column * step_x, y)
            )
    return canvas


def cut_from_grid(
    grid: Image.Image,
    row: int,
    column: int,
    *,
    rows: int,
    columns: int,
    size: tuple[int, int],
    min_cell: int = 128,
    max_cell: int = 512,
) -> Image.Image:
    """One picture of a grid that :func:`image_grid` drew, as large as it is there.

    Args:
      grid: the whole.
      row: from 0.
      column: from 0, without that of the references.
      rows: number of them.
      columns: number of them, without that of the references.
      size: (width, height) of the images that went into it.
      min_cell: as it was drawn with.
      max_cell: as it was drawn with.
    """
    width, height = _cell_size(size, min_cell, max_cell)
    left = grid.width - (columns - column) * (width + _MARGIN)
    top = grid.height - (rows - row) * (height + _MARGIN)
    if left < 0 or top < 0:
        raise CatVersionError(
            f"a grid of {grid.width}x{grid.height} pixels: has no {rows} rows of {columns} images "
            f"of {width}x{height}. Give those it was drawn with."
        )
    return grid.crop((left, top, left + width, top + height))


def _cell_size(size: tuple[int, int] | None, min_cell: int, max_cell: int) -> tuple[int, int]:
    """(width, height) of a cell, for images of a (width, height)."""
    if size is None:
        return min_cell, min_cell
    width, height = size
    short, long = min(height, width), max(height, width)
    if short < min_cell:
        factor = float(-(-min_cell // short))
    else:
        factor = min(1.0, max_cell / long)
    return round(width * factor), round(height * factor)


def _resized(image: np.ndarray, cell: tuple[int, int]) -> Image.Image:
    picture = Image.fromarray(image)
    if picture.size == cell:
        return picture
    # small pictures keep their pixels visible; large ones are smoothed
    enlarging = cell[0] >= picture.width
    return picture.resize(cell, Image.Resampling.NEAREST if enlarging else Image.Resampling.LANCZOS)


def _reference_column(
    references: Sequence[np.ndarray], cell: tuple[int, int], num_rows: int
) -> list[Image.Image]:
    """Reference photos fitted into cells without distortion; as many as there is height for."""
    column = []
    for image in references[: max(num_rows, 1)]:
        picture = Image.fromarray(image).convert("RGB")
        ratio = min(cell[0] / picture.width, cell[1] / picture.height)
        size = (max(round(picture.width * ratio), 1), max(round(picture.height * ratio), 1))
        fitted = Image.new("RGB", cell, _PAPER)
        fitted.paste(picture.resize(size, Image.Resampling.LANCZOS), (0, 0))
        column.append(fitted)
    return column


def _label_width(labels: Sequence[str], font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> int:
    widest = max((font.getlength(label[: 2 * _LABEL_WIDTH]) for label in labels), default=0)
    return min(int(widest) + 1, _LABEL_WIDTH)


def _wrap(
    text: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    width: int,
    max_lines: int = _MAX_LABEL_LINES,
) -> list[str]:
    """Break a label into lines of at most ``width`` pixels; what does not fit ends in an
    ellipsis.
    """
    max_lines = max(max_lines, 1)
    lines = [""]
    # No more than this fits, since hardly a letter is half a pixel wide; measuring more takes time.
    for word in text[: 2 * max_lines * width].split():
        candidate = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(candidate) > width:
            lines.append(word)
            if len(lines) > max_lines:
                break
        else:
            lines[-1] = candidate
    shown, hidden = lines[:max_lines], len(lines) > max_lines
    fitted = [_shortened(line, font, width, force=hidden and line is shown[-1]) for line in shown]
    return fitted


def _shortened(
    line: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, *, force: bool
) -> str:
    if not force and font.getlength(line) <= width:
        return line

    def too_long(length: int) -> bool:
        return font.getlength(line[:length] + "...") > width

    # halving, since measuring a text takes time in proportion to its length
    count = bisect.bisect_left(range(1, len(line) + 1), True, key=too_long)
    return line[:count] + "..."

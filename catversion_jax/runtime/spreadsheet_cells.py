"""Texts in CSV files that people open with a spreadsheet.

A spreadsheet runs a cell that begins with one of ``= + - @``, a tab or a carriage return as a
formula, also one that a stranger wrote as the name of a photo's folder. An apostrophe before it
makes it text; :func:`plain_cell` takes that away again, so that we read back what was written.
"""

from __future__ import annotations

_RUN = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")
"""The last four are the wide forms that East Asian spreadsheets read as the first four."""


def harmless_cell(text: str) -> str:
    """``text`` as a cell that no spreadsheet runs."""
    return f"'{text}" if text.startswith((*_RUN, "'")) else text


def plain_cell(cell: str) -> str:
    """The inverse of :func:`harmless_cell`; cells of earlier versions stay as they are."""
    return cell[1:] if cell[:1] == "'" and cell[1:].startswith((*_RUN, "'")) else cell

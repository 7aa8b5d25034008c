"""Batches of one size, so that one program is compiled whatever the number of items."""

from __future__ import annotations

from collections.abc import Sequence


def full_batches(count: int, batch_size: int) -> list[list[int]]:
    """The rows ``0 .. count - 1`` in batches of exactly ``batch_size``.

    The last batch is filled up with copies of the last row. The results of the filling come last,
    so the caller keeps the first ``count`` results.
    """
    rows = [*range(count), *[count - 1] * (-count % batch_size)]
    return [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]


def batches_by_size(sizes: Sequence[int], batch_size: int) -> list[list[int]]:
    """:func:`full_batches` of the rows of each size, for what must be equally large in a batch."""
    rows_of: dict[int, list[int]] = {}
    for row, size in enumerate(sizes):
        rows_of.setdefault(size, []).append(row)
    return [
        [rows[i] for i in batch]
        for rows in rows_of.values()
        for batch in full_batches(len(rows), batch_size)
    ]

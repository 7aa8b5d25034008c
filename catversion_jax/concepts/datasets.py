"""Concepts from a Hugging Face dataset: an imagefolder with metadata, a saved dataset, or a hub
id.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from catversion_jax.concepts.entries import Entry, Layout, quarantined_entry
from catversion_jax.concepts.folders import ImageSource
from catversion_jax.errors import CatVersionError, ConceptError, did_you_mean


def read_dataset(
    source: str,
    name: str,
    split: str,
    image_column: str,
    concept_column: str | None,
    base_class_column: str | None,
) -> Layout:
    """Group the rows of a dataset into concepts, in order of appearance; images stay encoded.

    Raises:
      CatVersionError: ``datasets`` is not installed, the dataset cannot be loaded, or a column is
        not there.
    """
    rows = _load(source, split)
    wanted = {
        "image_column": image_column,
        "concept_column": concept_column,
        "base_class_column": base_class_column,
    }
    for option, column in wanted.items():
        if column is not None and column not in rows.column_names:
            hint = did_you_mean(column, rows.column_names)
            raise CatVersionError(
                f"{source}: {option}={column!r}: no such column; there are "
                f"{', '.join(rows.column_names)}.{hint}"
            )
    from datasets import Image

    kept = [column for column in wanted.values() if column is not None]
    rows = rows.select_columns(list(dict.fromkeys(kept))).cast_column(
        image_column, Image(decode=False)
    )
    groups: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    labels = {c: rows.features[c].int2str for c in kept if hasattr(rows.features[c], "int2str")}
    for index, row in enumerate(rows):
        row.update({c: to_text(row[c]) for c, to_text in labels.items() if row[c] is not None})
        value = name if concept_column is None else row[concept_column]
        groups.setdefault(f"row {index}" if value is None else str(value), []).append((index, row))
    if not groups:
        raise CatVersionError(f"{source}: split {split!r} has no rows.")
    entries = []
    for concept, members in groups.items():
        read = functools.partial(
            _entry, source, concept, members, image_column, concept_column, base_class_column
        )
        entries.append(quarantined_entry(concept, f"{source} concept {concept!r}", Path(), read))
    return Layout(tuple(entries), single=concept_column is None)


def _load(source: str, split: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise CatVersionError(
            f"{source}: is a dataset; reading it needs: pip install datasets"
        ) from None
    folder = Path(source)
    try:
        if any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
            loaded = datasets.load_from_disk(source)
            if isinstance(loaded, datasets.Dataset):
                return loaded
            if split not in loaded:
                raise CatVersionError(
                    f"{source}: has no split {split!r}, only {', '.join(map(str, loaded))}."
                )
            return loaded[split]
        if folder.is_dir():
            return datasets.load_dataset("imagefolder", data_dir=source, split=split)
        return datasets.load_dataset(source, split=split)
    except CatVersionError:
        raise
    # `datasets` lets errors of a dozen libraries through (network, parquet, zip, its own); all mean
    # the same here.
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CatVersionError(
            f"{source}: split {split!r} cannot be loaded as a dataset: {reason[0]}. Check the "
            "name, the split and (for a hub id) the network."
        ) from error


def _entry(
    source: str,
    name: str,
    members: list[tuple[int, dict[str, Any]]],
    image_column: str,
    concept_column: str | None,
    base_class_column: str | None,
) -> Entry:
    where = f"{source} concept {name!r}"
    if concept_column is not None and members[0][1][concept_column] is None:
        raise ConceptError(
            f"{source}: column {concept_column!r}: {name} has no concept name; fill it or drop the "
            "row."
        )
    images, empty = [], []
    for index, row in members:
        image = row[image_column] or {}
        path, data = image.get("path"), image.get("bytes")
        if data is None and path is None:
            empty.append(index)
            continue
        label = Path(path).name if path else f"row{index}"
        images.append(ImageSource(label, Path(path) if path and data is None else None, data))
    words = {row[base_class_column] for _, row in members} if base_class_column else set()
    problem = None
    if len(words) > 1:
        listed = ", ".join(sorted(map(repr, words)))
        problem = f"{where}: its rows give different base classes: {listed}. A concept has one."
    elif empty:
        problem = f"{where}: rows {', '.join(map(str, empty))} have no image; drop them."
    home = (
        f"column {base_class_column!r}"
        if base_class_column
        else "a column named by base_class_column"
    )
    fields = {"base_class": words.pop()} if len(words) == 1 else {}
    return Entry(
        name, where, fields, Path(), images=tuple(images), base_class_home=home, problem=problem
    )

"""Which concepts still need training, in which packs, and from which checkpoint they continue."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from catversion_jax.errors import CatVersionError
from catversion_jax.training import checkpoint
from catversion_jax.training.checkpoint import ConceptRecord
from catversion_jax.training.run_directory import RunDirectory

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Pack:
    """Concepts trained together, the folder of their checkpoints, and of an earlier state."""

    names: tuple[str, ...]
    folder: Path
    restore_from: Path | None


def plan_packs(
    records: Mapping[str, ConceptRecord], run: RunDirectory, num_rows: int
) -> list[Pack]:
    """The packs to do: interrupted ones as they were, then the rest, earlier failures last.

    An interrupted pack keeps its rows, finished ones included, so that it goes on bit by bit as it
    would have. One that no longer fits (it was interrupted on a larger machine, or a concept of
    it was taken out of the list) goes on in new packs.

    Args:
      records: every concept of the run, in order.
      run: what was done before.
      num_rows: concepts that train at once.

    Raises:
      CatVersionError: a concept that is finished or under way was changed since; all are listed.
    """
    done = {name for name in records if run.is_done(name)}
    changed = {name: records[name].differences(run.final(name)) for name in done}
    folders = sorted(run.checkpoints.glob("pack-[0-9]*"), reverse=True)
    first = int(folders[0].name.removeprefix("pack-")) + 1 if folders else 0
    new_folders = (run.checkpoints / f"pack-{number:04d}" for number in itertools.count(first))
    packs: list[Pack] = []
    handled = set(done)
    for folder in folders:
        rows = {record.name: record for record in checkpoint.latest_records(folder)}
        open_rows = [
            name
            for name in rows
            if name in records and name not in handled and not run.has_failed(name)
        ]
        if not open_rows:
            continue
        changed |= {name: records[name].changes_since(rows[name]) for name in open_rows}
        if len(rows) <= num_rows and rows.keys() <= records.keys():
            packs.append(Pack(tuple(rows), folder, restore_from=folder))
        else:
            packs += [Pack(n, next(new_folders), folder) for n in _batched(open_rows, num_rows)]
        handled |= rows.keys()
    _refuse_changed(run, changed)
    todo = [name for name in records if name not in handled]
    todo.sort(key=run.has_failed)
    return packs + [Pack(n, next(new_folders), None) for n in _batched(todo, num_rows)]


def _batched(items: Sequence[T], size: int) -> Iterator[tuple[T, ...]]:
    for start in range(0, len(items), size):
        yield tuple(items[start : start + size])


def _refuse_changed(run: RunDirectory, changed: Mapping[str, Sequence[str]]) -> None:
    lines = [f"  {name}: {'; '.join(what)}" for name, what in changed.items() if what]
    if lines:
        raise CatVersionError(
            f"output_dir={run.root}: these concepts were trained from something else than they are "
            "now. Give another output_dir, another name, or undo the change:\n" + "\n".join(lines)
        )

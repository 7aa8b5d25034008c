"""How far a run is: what ``catversion status`` shows, readable while the run goes on."""

from __future__ import annotations

import collections
import concurrent.futures
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from catversion_jax.errors import CatVersionError
from catversion_jax.runtime.regular_files import read_json_object, read_text
from catversion_jax.runtime.shards import Shard
from catversion_jax.training.run import names
from catversion_jax.training.run.directory import READERS, is_locked
from catversion_jax.training.run.index import index_of_folders, indices_of_others, read_index
from catversion_jax.training.run.metrics import read_metric_rows
from catversion_jax.training.run.shards import shard_folders

logger = logging.getLogger(__name__)


def read_status(root: Path) -> dict[str, Any]:
    """How far a run is; readable while it goes on.

    Returns:
      ``counts`` of concepts by state, ``locked`` (whether a process is training there; None where
      that cannot be known), ``max_train_steps``, ``concepts_per_hour``, ``concepts``: the rows
      of ``index.csv``, those that are running with their ``step``, and ``shards``: how many of
      them are ``expected``, have ``begun`` and ``ended``, and are ``locked``; {} for an undivided
      run.

    Raises:
      CatVersionError: the folder is no run.
    """
    if shards := shard_folders(root):
        divisions = sorted({shard.count for shard in shards})
        if len(divisions) > 1:
            logger.warning(
                "%s: holds shards of %s, in which concepts may count twice; catversion merge "
                "refuses them. Remove the folders of one division.",
                root,
                " and of ".join(map(str, divisions)),
            )
        return _status_of_shards(shards)
    return _status_of_one(root)


def _status_of_one(root: Path) -> dict[str, Any]:
    """:func:`read_status` of an undivided run, or of one shard."""
    index, manifest = root / names.INDEX_FILE, root / names.RUN_FILE
    if not any(path.exists() for path in (index, manifest)):
        raise CatVersionError(
            f"{root}: is not a training run: it has no {names.INDEX_FILE}. Give the output_dir of "
            "one."
        )
    known = {row["name"]: row for row in read_index(index)}
    for path in indices_of_others(index) if known else ():
        known |= {row["name"]: row for row in read_index(path) if row["name"] in known}
    rows: list[dict[str, Any]] = [*(known.values() or index_of_folders(root))]
    for row in rows:
        if row["state"] == "running":
            row["step"] = _last_step(root / names.CONCEPTS_FOLDER / row["name"])
    options = read_json_object(manifest).get("options")
    steps = options.get("max_train_steps") if isinstance(options, dict) else None
    return {
        "counts": dict(collections.Counter(row["state"] for row in rows)),
        "locked": is_locked(root),
        "max_train_steps": steps if isinstance(steps, int) else None,
        "concepts_per_hour": _rate(root / names.RUN_METRICS_FILE),
        "concepts": rows,
        "shards": {},
    }


def _status_of_shards(shards: Mapping[Shard, Path]) -> dict[str, Any]:
    """:func:`read_status` of a run that is divided; a shard without an index has just begun."""
    rows: list[dict[str, Any]] = []
    steps, rate, begun, ended, locks = None, 0.0, 0, 0, []
    with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
        states = list(pool.map(_status_or_none, shards.values()))
    for folder, found in zip(shards.values(), states, strict=True):
        if found is None:
            locks.append(is_locked(folder))
            continue
        begun += 1
        unfinished = {"queued", "running"} & found["counts"].keys()
        ended += not unfinished and (folder / names.INDEX_FILE).is_file()
        locks.append(found["locked"])
        # what a process that has ended did in an hour, nobody does now
        rate += found["concepts_per_hour"] if unfinished and found["locked"] is not False else 0.0
        steps = found["max_train_steps"] if steps is None else steps
        place = f"{names.SHARDS_FOLDER}/{folder.name}"
        rows += [
            {**row, "file": f"{place}/{row['file']}" if row["file"] else ""}
            for row in found["concepts"]
        ]
    rows.sort(key=lambda row: row["name"])
    unknown = None if None in locks else False
    return {
        "counts": dict(collections.Counter(row["state"] for row in rows)),
        "locked": True if True in locks else unknown,
        "max_train_steps": steps,
        "concepts_per_hour": rate,
        "concepts": rows,
        "shards": {
            "expected": max(shard.count for shard in shards),
            "begun": begun,
            "ended": ended,
            "locked": locks.count(True),
        },
    }


def _status_or_none(folder: Path) -> dict[str, Any] | None:
    try:
        return _status_of_one(folder)
    except CatVersionError:
        return None


def _last_step(folder: Path) -> int:
    """The step of the last row of a concept's losses; 0 where there is none yet."""
    rows = read_metric_rows(folder / names.METRICS_FILE)
    return rows[-1][0] if rows else 0


def _rate(path: Path) -> float:
    """Concepts per hour, as the newest line that has the number says."""
    for line in reversed((read_text(path) or "").splitlines()):
        if '"concepts_per_hour"' in line:
            try:
                rate = float(json.loads(line)["concepts_per_hour"])
            except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
                continue  # half a line, still being written, or damaged
            if 0 <= rate < math.inf:
                return rate
    return 0.0

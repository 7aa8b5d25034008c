"""Reading a run folder: its state, its losses, its concepts, and what it was trained on.

The commands status, evaluate, export and inspect ask here. Nothing in this module writes.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import json
import logging
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from catversion_jax.concepts import ConceptList, read_configured_concepts
from catversion_jax.config import load_config
from catversion_jax.errors import CatVersionError, listed
from catversion_jax.methods.concept_file import (
    CONCEPT_FILE_NAME,
    Concept,
    concept_folders,
    load_concept,
)
from catversion_jax.methods.foreign_files import describe_folder
from catversion_jax.runtime.bucket_paths import absolute, as_path
from catversion_jax.runtime.concept_packs import SUFFIX, ConceptPack, PackError, split_packed
from catversion_jax.runtime.regular_files import read_json_object, read_text
from catversion_jax.runtime.shards import WHOLE, Shard
from catversion_jax.training.run import names
from catversion_jax.training.run.checkpoint import concepts_from_checkpoint
from catversion_jax.training.run.directory import READERS, is_locked
from catversion_jax.training.run.index import index_of_folders, indices_of_others, read_index
from catversion_jax.training.run.metrics import read_evaluations, read_metric_rows
from catversion_jax.training.run.shards import run_roots, shard_folders
from catversion_jax.training.run.summary import finished_state, read_summary

logger = logging.getLogger(__name__)

_CHECKPOINT_MARK = "_CHECKPOINT_METADATA"  # orbax writes it into every complete step


def is_run(folder: Path) -> bool:
    """Whether ``folder`` holds trained concepts: a run, or the folder of one concept."""
    return bool(concept_folders(folder))


# ---- what is under way ---------------------------------------------------------------------------


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
        return _status_of_shards(shards)
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
        return read_status(folder)
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


# ---- one concept ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TrainedConcept:
    """A finished concept of a run.

    Attributes:
      name: of the concept and of its folder.
      base_class: the words that call it.
      state: ``"done"``, or ``"stopped early"`` where ``early_stop`` ended it.
      file: the concept file, for ``load_concept`` and ``generate``.
      losses: (training step, evaluation loss) in order; step 0 is the start.
      plain_loss: evaluation loss of the model without the concept.
    """

    name: str
    base_class: str
    state: str
    file: Path
    losses: tuple[tuple[int, float], ...]
    plain_loss: float | None


def read_trained_concept(root: Path, name: str) -> TrainedConcept:
    """A finished concept of the run in ``root``.

    Raises:
      CatVersionError: its file cannot be read.
    """
    folder = root / names.CONCEPTS_FOLDER / name
    summary, file = read_summary(folder), folder / CONCEPT_FILE_NAME
    return TrainedConcept(
        name,
        load_concept(file).base_class,
        finished_state(summary),
        file,
        evaluation_losses(folder),
        summary.get("plain_eval_loss"),
    )


def evaluation_losses(folder: Path) -> tuple[tuple[int, float], ...]:
    """(step, evaluation loss) of a concept's folder, in order; empty where nothing is recorded."""
    return read_evaluations(folder / names.METRICS_FILE)


def plain_loss(folder: Path) -> float | None:
    """The evaluation loss of the model without the concept, as a concept's folder records it."""
    return read_summary(folder).get("plain_eval_loss")


def step_files(folder: Path) -> dict[int, Path]:
    """Concept files of intermediate steps in a concept's folder, by step, in order."""
    found = {names.step_of_file(path): path for path in folder.iterdir()}
    return {step: found[step] for step in sorted(step for step in found if step is not None)}


# ---- all concepts --------------------------------------------------------------------------------


def failed_concepts(root: Path) -> list[Path]:
    """The ``FAILED.txt`` of every concept of a run that was quarantined, sorted."""
    pattern = f"{names.CONCEPTS_FOLDER}/*/{names.FAILED_FILE}"
    return [path for folder in run_roots(root) for path in sorted(folder.glob(pattern))]


def read_trained(source: str | Path) -> tuple[list[Concept], dict[str, str]]:
    """Every concept of a run folder, a checkpoint, a folder of concepts, a pack, or one concept
    file.

    Returns:
      The concepts, and why the others cannot be read, by the name of their file or folder.

    Raises:
      CatVersionError: there is none, or none that can be read.
    """
    source = as_path(source)
    if source.suffix == SUFFIX and source.is_file():
        concepts, damaged = readable_concepts(packed_concepts(source))
        if not concepts:
            raise CatVersionError(next(iter(damaged.values())))
        return [concept for _, concept in concepts], {p.name: why for p, why in damaged.items()}
    if split_packed(source) or source.is_file() or (source / CONCEPT_FILE_NAME).is_file():
        return [load_concept(source)], {}
    if not source.is_dir():
        raise CatVersionError(
            f"{source}: no such file or folder. Give a run directory, a checkpoint or a concept."
        )
    if (source / _CHECKPOINT_MARK).is_file():
        return _from_checkpoint(source), {}
    folders = [root / names.CONCEPTS_FOLDER for root in run_roots(source)]
    folders = [folder for folder in folders if folder.is_dir()] or [source]
    files = [file for folder in folders for file in folder.glob(f"*/{CONCEPT_FILE_NAME}")]
    files = files or [file for folder in folders for file in folder.glob("*.safetensors")]
    files.sort(key=lambda file: (file.parent.name, file.name))
    if files:
        note_strangers(source, files)
        concepts, damaged = readable_concepts(files)
        if not concepts:
            raise CatVersionError(next(iter(damaged.values())))
        named = {
            file.parent.name if file.name == CONCEPT_FILE_NAME else file.stem: reason
            for file, reason in damaged.items()
        }
        return [concept for _, concept in concepts], named
    if what := describe_folder(source):
        raise CatVersionError(f"{source}: this is not a concept but {what}")
    steps = sorted(
        mark.parent for mark in source.rglob(_CHECKPOINT_MARK) if mark.parent.name.isdigit()
    )
    hint = f" It has checkpoints: export {steps[-1]}, for instance." if steps else ""
    raise CatVersionError(
        f"{source}: no finished concept in it (looked for {folders[0] / '*' / CONCEPT_FILE_NAME})."
        f"{hint or ' Give a run directory.'}"
    )


def note_strangers(root: Path, files: Sequence[Path]) -> None:
    """Say which of a run's concept files its index does not call finished: they are of an earlier
    list, or of photos that cannot be read any more.
    """
    for folder in run_roots(root):
        states = {row["name"]: row["state"] for row in read_index(folder / names.INDEX_FILE)}
        own = folder / names.CONCEPTS_FOLDER
        here = sorted(one.parent.name for one in files if one.parent.parent == own)
        odd = [name for name in here if states.get(name, "quarantined") == "quarantined"]
        if states and odd:
            logger.warning(
                "%s: taken along, though they are no longer in the run's list or were given up "
                "since: %s. Delete their folders if they should not be.",
                folder,
                ", ".join(listed(odd)),
            )


def readable_concepts(
    paths: Sequence[Path],
) -> tuple[list[tuple[Path, Concept]], dict[Path, str]]:
    """Those of several concept files, or of their folders, that can be read; and why the others
    cannot.
    """
    concepts, damaged = [], {}
    for path in paths:
        try:
            concepts.append((path, load_concept(path)))
        except CatVersionError as error:
            damaged[path] = str(error)
    return concepts, damaged


def packed_concepts(path: Path) -> list[Path]:
    """The concepts of a pack, as paths ``concepts.arrow#NAME``.

    Raises:
      CatVersionError: it is none, or damaged, or empty.
    """
    try:
        found = [as_path(f"{path}#{name}") for name in ConceptPack(path)]
    except PackError as error:
        raise CatVersionError(str(error)) from error
    if not found:
        raise CatVersionError(f"{path}: holds no concept. Pack a run that has some.")
    return found


def _from_checkpoint(folder: Path) -> list[Concept]:
    concepts = []
    with tempfile.TemporaryDirectory() as temporary:
        for record, learned, step in concepts_from_checkpoint(folder):
            path = Path(temporary) / "concept.safetensors"
            record.save(path, learned, step)  # exactly what training would have written
            concepts.append(load_concept(path))
    return concepts


# ---- what it was trained on ----------------------------------------------------------------------


def recorded_model(folder: Path) -> str | None:
    """The model a run was trained on, as its ``run.json`` says; None where it does not."""
    path = _file_of_run(folder, names.RUN_FILE)
    if path is None:
        return None
    name = read_json_object(path).get("base_model")
    return name if isinstance(name, str) else None


def recorded_holdout(folder: Path) -> int:
    """How many of the last photos a run kept from training; 0 where it does not say."""
    path = _file_of_run(folder, names.CONFIG_FILE)
    try:
        return 0 if path is None else load_config(path).holdout
    except CatVersionError:
        return 0


def recorded_concepts(folder: Path, holdout: int | None = None) -> ConceptList:
    """The training images of a run, read where its ``config.resolved.yaml`` says they are.

    Args:
      folder: the output folder of training, or one concept's folder in it.
      holdout: last photos of each concept that are held out; None is what the run says.

    Raises:
      CatVersionError: the run does not say, or they are not there any more.
    """
    path = _file_of_run(folder, names.CONFIG_FILE)
    if path is None:
        raise CatVersionError(
            f"{folder}: records no training images (no {names.CONFIG_FILE}). Give them with "
            "--concepts."
        )
    try:
        config = load_config(path)
    except CatVersionError as error:
        raise CatVersionError(
            f"{error}\nSo {folder} does not say which images it was trained on. Give them with "
            "--concepts."
        ) from None
    try:
        data = config.data_options
        if path.parent != folder and shard_folders(folder):  # one shard's words, of all of them
            data = dataclasses.replace(data, shard=str(WHOLE))
        if holdout is not None:
            data = dataclasses.replace(data, holdout=holdout)
        return read_configured_concepts(data, config.when)
    except CatVersionError as error:
        raise CatVersionError(
            f"{error}\n{path} names {config.concepts!r} as the training images. Say with "
            "--concepts where they lie now."
        ) from None


def _file_of_run(folder: Path, name: str) -> Path | None:
    """A file of the run, sought from its own folder or from ``concepts/<name>`` in it; of a run
    that is divided, that of the first shard which has it.
    """
    candidates = [root / name for root in (*run_roots(folder), absolute(folder).parent.parent)]
    return next((path for path in candidates if path.is_file()), None)

"""Reading a run folder: its losses, its concepts, and what it was trained on.

The commands evaluate, export and inspect ask here. Nothing in this module writes.
"""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

from catversion_jax.concepts import ConceptList, read_configured_concepts
from catversion_jax.config import load_config, make_config
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
from catversion_jax.runtime.regular_files import read_json_object
from catversion_jax.runtime.shards import WHOLE
from catversion_jax.training.run import names
from catversion_jax.training.run.checkpoint import concepts_from_checkpoint
from catversion_jax.training.run.index import read_index
from catversion_jax.training.run.metrics import read_evaluations
from catversion_jax.training.run.shards import run_roots, shard_folders
from catversion_jax.training.run.summary import finished_state, read_summary

logger = logging.getLogger(__name__)

_CHECKPOINT_MARK = "_CHECKPOINT_METADATA"  # orbax writes it into every complete step


def is_run(folder: Path) -> bool:
    """Whether ``folder`` holds trained concepts: a run, or the folder of one concept."""
    return bool(concept_folders(folder))


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
        note_oddities(source, files)
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


def note_oddities(root: Path, files: Sequence[Path]) -> None:
    """Say which shards of a run are missing, and which of its concept files its index does not call
    finished: they are of an earlier list, or of photos that cannot be read any more.
    """
    shards = shard_folders(root)
    expected = max((shard.count for shard in shards), default=0)
    if missing := expected - len(shards):
        logger.warning(
            "%s: %d of its %d shards are missing, and their concepts with them; catversion status "
            "says what there is.",
            root,
            missing,
            expected,
        )
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


def recorded_concepts(
    folder: Path,
    holdout: int | None = None,
    *,
    source: str | None = None,
    base_class: str | None = None,
) -> ConceptList:
    """The training images of a run, read as its ``config.resolved.yaml`` says.

    Args:
      folder: the output folder of training, or one concept's folder in it.
      holdout: last photos of each concept that are held out; None is what the run says.
      source: where they lie now; None is where the run says.
      base_class: of the concepts of ``source`` that do not name their own.

    Raises:
      CatVersionError: the run does not say, or they are not there any more.
    """
    path = _file_of_run(folder, names.CONFIG_FILE)
    if path is None and source is None:
        raise CatVersionError(
            f"{folder}: records no training images (no {names.CONFIG_FILE}). Give them with "
            "--concepts."
        )
    try:
        config = make_config({"concepts": "given"}) if path is None else load_config(path)
    except CatVersionError as error:
        if source is None:
            raise CatVersionError(
                f"{error}\nSo {folder} does not say which images it was trained on. Give them with "
                "--concepts."
            ) from None
        config = make_config({"concepts": "given"})
    data = config.data_options
    if path is not None and path.parent != folder and shard_folders(folder):
        data = dataclasses.replace(data, shard=str(WHOLE))  # one shard's words, of all of them
    if holdout is not None:
        data = dataclasses.replace(data, holdout=holdout)
    if source is not None:
        own = data.base_class if base_class is None else base_class
        data = dataclasses.replace(data, concepts=source, base_class=own)
        return read_configured_concepts(data, config.when)
    try:
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

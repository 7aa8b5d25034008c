"""The output folder of a run: where each thing lies, what is done, and why a concept failed.

out/
  README.md (the model card)
  run.json  config.resolved.yaml  index.csv  timeline.csv  metrics.jsonl  process-0000.lock
  STOP (somebody wants all processes of the run to save and end)
  index-changes.csv (rows of index.csv that have changed since it was written)
  index-0001.csv timeline-0001.csv metrics-0001.jsonl ... (what the other processes do)
  checkpoints/process-0000/<step>/  logs/<concept>/
  concepts/<name>/  catversion.safetensors  catversion-000250.safetensors  metrics.csv  metrics.json
                    samples/000250.png  FAILED.txt (only when quarantined)
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import logging
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock
import jax

from catversion_jax.errors import CatVersionError
from catversion_jax.methods.concept_file import CONCEPT_FILE_NAME, Concept, load_concept
from catversion_jax.runtime.alike_names import folded
from catversion_jax.runtime.atomic_files import make_folder, unwritable, write_atomically
from catversion_jax.runtime.bucket_paths import as_path, is_in_bucket
from catversion_jax.runtime.regular_files import make_way
from catversion_jax.training.run import names
from catversion_jax.training.run.index import (
    FINISHED,
    Index,
    changes_file,
    index_row,
    indices_of_others,
    read_index,
)
from catversion_jax.training.run.manifest import check_same_run, has_same_settings, write_manifest
from catversion_jax.training.run.records import ConceptRecord
from catversion_jax.training.run.summary import (
    STOPPED_EARLY,
    finished_state,
    read_summary,
    restored_summary,
)

logger = logging.getLogger(__name__)

INDEX_SECONDS, STOP_SECONDS = 60.0, 2.0
INDEX_SHARE = 0.05
"""Largest share of the time in which ``index.csv`` is written."""
READERS = 16
"""Files that are read at once: in a bucket each takes its time."""


def is_locked(root: Path) -> bool | None:
    """Whether a process of this machine is training into ``root`` now; None where that cannot be
    known, as in a bucket.
    """
    if is_in_bucket(root):
        return None
    for path in root.glob("process-[0-9]*.lock"):
        try:
            with filelock.FileLock(path).acquire(blocking=False):
                pass
        except filelock.Timeout:
            return True
        except OSError:  # a folder that only its owner may write
            return None
    return False


def check_outside(root: Path, concepts: str) -> None:
    """Make sure that a run does not write into the folder of its photos: the next run would take
    sample grids for photos.

    Raises:
      CatVersionError: ``root`` lies in ``concepts``, or is it.
    """
    folder = Path(concepts)
    if is_in_bucket(root) or "://" in concepts or not folder.is_dir():
        return
    if root.resolve().is_relative_to(folder.resolve()):
        raise CatVersionError(
            f"output_dir={root}: lies inside concepts={concepts}, where the next run would take "
            "its pictures for photos. Give a folder outside of it."
        )


class RunDirectory:
    """Paths and small state files of one run, in the folder ``output_dir``."""

    def __init__(self, output_dir: str | Path):
        self.root = as_path(output_dir)
        self.checkpoints = self.root / names.CHECKPOINTS_FOLDER
        # Process 0 writes what is there once; of the others each has files of its own.
        self.process = jax.process_index()
        self.jsonl, self.timeline, index = (
            self.root / names.of_process(file, self.process)
            for file in (names.RUN_METRICS_FILE, names.TIMELINE_FILE, names.INDEX_FILE)
        )
        self.logs = self.root / names.LOGS_FOLDER
        self._settings: Mapping[str, Any] = {}
        self._index = Index(index)
        self._others: frozenset[str] = frozenset()
        self._done: set[str] = set()
        self._recalled: dict[str, dict[str, str]] = {}
        self._goes_on_unchanged = False
        self._next_index, self._stale = 0.0, False
        self._looked_for_stop = 0.0

    @property
    def checkpoint_folder(self) -> Path:
        """Where this process saves."""
        return self.checkpoints / names.process_folder(self.process)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from writing into the folder. The system takes the lock away from a
        process that is killed. A bucket has no locks.

        Raises:
          CatVersionError: another process has it.
        """
        if is_in_bucket(self.root):
            yield
            return
        make_folder(self.root)
        path = self.root / f"{names.process_folder(self.process)}.lock"
        make_way(path)
        try:
            held = filelock.FileLock(path).acquire(blocking=False)
        except filelock.Timeout:
            raise CatVersionError(
                f"output_dir={self.root}: another process is training into it. Wait for it, "
                "stop it, or give another output_dir."
            ) from None
        except OSError as error:
            raise unwritable(path, error) from error
        with held:
            yield

    # ------------------------------------------------------------------ stopping all processes

    @property
    def _stop_file(self) -> Path:
        return self.root / names.STOP_FILE

    def ask_to_stop(self) -> None:
        """Let every process of the run save and end."""
        write_atomically(self._stop_file, b"")

    def clear_leftovers(self) -> None:
        """Forget what an earlier run's processes told each other; by process 0, at the start."""
        if self.process == 0:
            make_way(self._stop_file)
            self._stop_file.unlink(missing_ok=True)
            for path in indices_of_others(self.root / names.INDEX_FILE):
                path.unlink(missing_ok=True)
                changes_file(path).unlink(missing_ok=True)

    def is_asked_to_stop(self, *, now: bool = False) -> bool:
        """Whether somebody asked; looks once in a while, or ``now``."""
        if not now and time.monotonic() - self._looked_for_stop < STOP_SECONDS:
            return False
        self._looked_for_stop = time.monotonic()
        return self._stop_file.exists()

    # ------------------------------------------------------------------ where things lie

    def concept(self, name: str) -> Path:
        """Folder of one concept."""
        return self.root / names.CONCEPTS_FOLDER / name

    def concept_file(self, name: str, step: int | None = None) -> Path:
        """The final concept file, or the one of an intermediate step."""
        return self.concept(name) / (
            CONCEPT_FILE_NAME if step is None else names.step_file_name(step)
        )

    def open(
        self,
        base_model: str,
        fingerprints: Mapping[str, str],
        *,
        options: Mapping[str, Any],
        resolved: str,
        digests: Mapping[str, str],
        may_continue: bool,
        retrains: bool,
    ) -> None:
        """Begin a run in the folder, or check that the run in it is this one.

        Args:
          base_model: name of the frozen model.
          fingerprints: of its text encoders, named as in files.
          options: those that decide the result, as JSON values.
          resolved: all options as YAML text, for ``config.resolved.yaml``.
          digests: of the content of the model's components.
          may_continue: whether a run that the folder already holds may go on.
          retrains: whether it may go on with another model, from which every concept is then
            trained again.

        Raises:
          CatVersionError: the folder is not writable, or holds a run that learned with other
            options or another model, or holds one that may not be continued.
        """
        settings = {
            "base_model": base_model,
            **fingerprints,
            "digests": dict(digests),
            "options": dict(options),
        }
        if self.holds_results():
            if not may_continue:
                raise CatVersionError(
                    f"output_dir={self.root}: already holds a run and resume_from_checkpoint=none "
                    "would overwrite it. Give another output_dir, or leave "
                    "resume_from_checkpoint=latest to continue."
                )
            check_same_run(self.root, settings, retrains=retrains)
            self._goes_on_unchanged = has_same_settings(self.root, settings)
        self._settings = settings
        if self.process == 0:
            write_manifest(self.root, settings, None)
            make_way(self.root / names.CONFIG_FILE)
            write_atomically(self.root / names.CONFIG_FILE, resolved.encode())

    def holds_results(self) -> bool:
        """Whether anything was learned here: a mistyped first attempt leaves the folder free."""
        patterns = (
            f"{names.CONCEPTS_FOLDER}/*/{CONCEPT_FILE_NAME}",
            f"{names.CHECKPOINTS_FOLDER}/process-[0-9]*/[0-9]*",
        )
        return any(next(self.root.glob(pattern), None) is not None for pattern in patterns)

    def recall(self, concepts: Collection[str]) -> set[str]:
        """The concepts that ``index.csv`` says are finished and that have a file; none where the
        run does not go on with the options and the model that it had.
        """
        if not self._goes_on_unchanged:
            return set()
        for row in read_index(self.root / names.INDEX_FILE):
            name = row["name"]
            if row["state"] in FINISHED and name in concepts and self.concept_file(name).is_file():
                self._recalled[name] = row
        self._done |= set(self._recalled)
        return set(self._recalled)

    def read_finals(
        self, records: Mapping[str, ConceptRecord], but: Collection[str] = ()
    ) -> Iterator[tuple[str, Concept]]:
        """The names of those of ``records`` that are finished, with their files.

        Finished are those that have a readable file of all their updates, or of the one after which
        early stopping ended them.

        Args:
          records: by name.
          but: concepts that are not asked for.
        """
        there = self._folders()
        wanted = [name for name in records if name not in but and folded(name) in there]
        with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
            found = pool.map(functools.partial(self._read_final, records), wanted)
            for name, concept in zip(wanted, found, strict=True):
                if concept is not None:
                    self._done.add(name)
                    yield name, concept

    def _folders(self) -> set[str]:
        """What lies in the folder of the concepts; names are :func:`folded`."""
        folder = self.root / names.CONCEPTS_FOLDER
        return {folded(path.name) for path in folder.iterdir()} if folder.is_dir() else set()

    def _read_final(self, records: Mapping[str, ConceptRecord], name: str) -> Concept | None:
        path = self.concept_file(name)
        make_way(path)
        if not path.is_file():
            return None
        try:
            concept = load_concept(path)
        except CatVersionError as error:
            logger.warning("%s; training it again", error)
            return None
        stopped = restored_summary(self.concept(name), concept).get(STOPPED_EARLY)
        return concept if records[name].is_finished(concept, stopped) else None

    def reopen(self, name: str) -> None:
        """A finished concept is to be trained again: what its earlier steps left goes away, its
        file stays until the new one is there.
        """
        self._done.discard(name)
        self._recalled.pop(name, None)
        for path in self.concept(name).glob(names.STEP_FILES):
            path.unlink(missing_ok=True)

    def is_done(self, name: str) -> bool:
        """Whether :meth:`read_finals` found it finished."""
        return name in self._done

    def failed_before(self) -> set[str]:
        """Names of the concepts that are quarantined."""
        found = self.root.glob(f"{names.CONCEPTS_FOLDER}/*/{names.FAILED_FILE}")
        return {path.parent.name for path in found}

    def quarantine(self, name: str, reason: str) -> None:
        """Say in the concept's folder why it was given up; nothing else of it is touched."""
        make_way(self.concept(name), for_folder=True)
        make_folder(self.concept(name))
        make_way(self.concept(name) / names.FAILED_FILE)
        text = (
            f"{reason}\n\nThe other concepts of the run went on. Correct the images or words and "
            "run the same command again; other options need another output_dir.\n"
        )
        write_atomically(self.concept(name) / names.FAILED_FILE, text.encode())

    def clear_failure(self, name: str) -> None:
        """Forget an earlier quarantine: the concept is tried again."""
        make_way(self.concept(name) / names.FAILED_FILE)
        (self.concept(name) / names.FAILED_FILE).unlink(missing_ok=True)

    def summary(self, name: str) -> dict[str, float]:
        """The concept's final losses; empty where none are recorded."""
        return read_summary(self.concept(name))

    # ------------------------------------------------------------------ the state of all concepts

    @property
    def finished(self) -> list[str]:
        """Names of the concepts that have a file."""
        return self._index.of_state(*FINISHED)

    @property
    def quarantined(self) -> dict[str, str]:
        """Names and reasons of the concepts that were given up."""
        return {name: self._index.reason(name) for name in self._index.of_state("quarantined")}

    def start_index(self, concepts: Iterable[str], failures: Mapping[str, str]) -> None:
        """Find out the state of every concept and write it."""
        for name, reason in failures.items():
            self._index.set(index_row(name, "quarantined", reason=reason))
        for name in concepts:
            row = self._recalled.get(name)
            if row is None and self.is_done(name):
                summary = self.summary(name)
                row = index_row(name, finished_state(summary), summary)
            self._index.set(row or index_row(name, "queued"))
        self._recalled.clear()
        self.write_index()

    def set_others(self, concepts: Iterable[str]) -> None:
        """Concepts that other processes train; those say what becomes of them."""
        self._others = frozenset(concepts)

    def set_state(
        self, name: str, state: str, summary: Mapping[str, float] | None = None, reason: str = ""
    ) -> None:
        """Say what became of a concept; ``catversion status`` knows it from now on."""
        self._index.change(index_row(name, state, summary, reason))
        self._stale = True

    def state_of(self, name: str) -> str:
        """What :meth:`set_state` noted last; '' for a concept that nobody has named."""
        return self._index.state(name)

    def forget(self, name: str) -> None:
        """Leave a concept out of the index from now on."""
        self._index.drop(name)

    def refresh_index(self) -> None:
        """Write ``index.csv`` as a whole, unless that was done a while ago or nothing happened."""
        if (self._stale or self._others) and time.monotonic() > self._next_index:
            self.write_index()

    def flush_index(self) -> None:
        """Write the changes that are held back where the folder is in a bucket."""
        self._index.flush()

    def write_index(self) -> None:
        """``index.csv``, a line for each concept, and the counts in ``run.json``, by process 0; the
        other processes tell it in files of their own.
        """
        started, self._stale = time.monotonic(), False
        if self.process:
            self._index.write(but=self._others)
        else:
            for path in indices_of_others(self.root / names.INDEX_FILE) if self._others else ():
                for row in read_index(path):
                    if row["name"] in self._others:
                        self._index.set(row)
            self._index.write()
            write_manifest(self.root, self._settings, self._index.counts)
        now = time.monotonic()
        self._next_index = now + max(INDEX_SECONDS, (now - started) / INDEX_SHARE)

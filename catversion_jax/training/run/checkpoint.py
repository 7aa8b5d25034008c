"""Orbax checkpoints of trained state only: what is learned, moments, step counters. Nothing frozen
is saved.

A checkpoint holds the concepts that are under way (no padding), so it restores onto any number of
devices. Beside the arrays lies what a concept file needs, so that a checkpoint alone can be
exported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import operator
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import safetensors.numpy
from etils import epath

from catversion_jax.errors import CatVersionError
from catversion_jax.methods.learned import Learned, named_arrays
from catversion_jax.methods.table import rebuild_learned, settings_of
from catversion_jax.runtime.atomic_files import make_folder, unwritable
from catversion_jax.runtime.bucket_paths import absolute, as_path
from catversion_jax.runtime.regular_files import make_way, move_aside
from catversion_jax.training.run.records import ConceptRecord
from catversion_jax.training.state import TrainState

logger = logging.getLogger(__name__)

_STATE, _CONCEPTS, _AVERAGE = "state", "concepts", "average."


@dataclasses.dataclass(frozen=True)
class SavedRow:
    """One concept under way.

    Attributes:
      record: what its file will say.
      state: its state, numpy, without the concept axis.
      evaluations: (step, evaluation loss), which early stopping goes by.
      row: index of the row that it had; None in checkpoints of version 0.2 and earlier. It goes on
        there: a compiler may round the last bits of one row in another way than those of the rest.
    """

    record: ConceptRecord
    state: TrainState
    evaluations: tuple[tuple[int, float], ...]
    row: int | None = None

    @property
    def step(self) -> int:
        """Updates done."""
        return int(self.state.step)

    @property
    def failed(self) -> bool:
        """Whether its loss or update was not finite once."""
        return int(self.state.failed_step) >= 0


class Checkpoints:
    """Asynchronous, rotated checkpoints under ``folder/<step>/``; leaving the block completes them.

    Raises (from :meth:`save` and at the end of the block):
      CatVersionError: a checkpoint cannot be written.
    """

    def __init__(self, folder: Path, keep: int):
        self._folder = folder
        for path in (folder.parent, folder):
            make_way(path, for_folder=True)
        make_folder(folder)
        self._begun, self._written = dict[str, int](), dict[str, int]()
        self._manager = _manager(
            folder,
            max_to_keep=keep,
            enable_async_checkpointing=True,
            # Orbax would tell its threads that the folders are there by a key that all processes
            # share, and number its operations in each: one would wait for another's.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )

    def save(self, step: int, rows: Sequence[SavedRow]) -> None:
        """Start saving; the files come later. A step that is there already stays as it is."""
        if not rows or step in self._manager.all_steps():
            return
        state = jax.tree.map(lambda *leaves: np.stack(leaves), *(row.state for row in rows))
        arrays = _arrays(state)
        described = {
            **settings_of(state.learned),
            "concepts": [
                {**dataclasses.asdict(row.record), "evaluations": row.evaluations, "row": row.row}
                for row in rows
            ],
            "arrays_sha256": {name: _sha256(array) for name, array in arrays.items()},
        }
        described["sha256"] = _sha256_of_description(described)
        args = ocp.args.Composite(
            **{
                _STATE: _ArraysSave(arrays),
                _CONCEPTS: ocp.args.JsonSave(described),
            }
        )
        with self._writing():
            self._manager.save(step, args=args)  # after the one before it
        self._written, self._begun = self._begun, {row.record.name: row.step for row in rows}

    @property
    def written(self) -> Mapping[str, int]:
        """Updates of each concept in the newest checkpoint of this process that is on disk."""
        return self._written

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            with self._writing():
                self._manager.wait_until_finished()
                self._manager.close()
            return
        # Let running writes end; an error of theirs would only hide the one under way.
        with contextlib.suppress(Exception):
            self._manager.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except CatVersionError:
            raise
        except (OSError, ValueError, RuntimeError) as error:
            # tensorstore reports a full disk as a ValueError
            message = str(error).splitlines()[0]
            cause = OSError(getattr(error, "errno", None), message)
            raise unwritable(self._folder, cause) from error


class _ArraysHandler(ocp.CheckpointHandler):
    """One safetensors file. Orbax's own handlers write arrays of a process other than 0 only where
    all processes save together.
    """

    _FILE = "arrays.safetensors"

    def save(self, directory: epath.Path, args: _ArraysSave) -> None:
        (directory / self._FILE).write_bytes(safetensors.numpy.save(args.arrays))

    def restore(self, directory: epath.Path, args: _ArraysRestore) -> dict[str, np.ndarray]:
        return safetensors.numpy.load((directory / self._FILE).read_bytes())


@ocp.args.register_with_handler(_ArraysHandler, for_save=True)
@dataclasses.dataclass
class _ArraysSave(ocp.args.CheckpointArgs):
    arrays: dict[str, np.ndarray]


@ocp.args.register_with_handler(_ArraysHandler, for_restore=True)
@dataclasses.dataclass
class _ArraysRestore(ocp.args.CheckpointArgs):
    pass


def _manager(folder: Path, **options: Any) -> ocp.CheckpointManager:
    """Every process saves its own concepts, when it suits it: for orbax each is the only one."""
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process-{me}"
    )
    handlers = {
        _STATE: _ArraysHandler(),
        _CONCEPTS: ocp.JsonCheckpointHandler(multiprocessing_options=alone),
    }
    return ocp.CheckpointManager(
        absolute(folder),
        item_handlers=handlers,
        options=ocp.CheckpointManagerOptions(
            create=False, multiprocessing_options=alone, **options
        ),
    )


def restore_newest(folder: Path, template: TrainState) -> tuple[int, list[SavedRow]]:
    """The number of the newest checkpoint in ``folder`` and the concepts of the newest intact one.

    Args:
      folder: of one process.
      template: a state of any number of rows, for its structure.
    """
    if not folder.is_dir():
        return 0, []
    for path in [*folder.iterdir()]:
        if path.name.isdecimal() and not (path.is_dir() and _is_step(path)):
            move_aside(path)  # orbax saves no step that is not the newest
    with _manager(folder) as manager:
        steps = sorted(manager.all_steps(), reverse=True)
        for step in steps:
            try:
                rows = _restore_rows(manager, step, template)
            except Exception as error:  # whatever a damaged file makes of the readers
                logger.warning(
                    "%s: is damaged (%s); going on from the checkpoint before it",
                    folder / str(step),
                    _reason(error),
                )
                continue
            return steps[0], rows
        if steps:
            logger.warning("%s: no checkpoint is intact; its concepts start again", folder)
        return (steps[0] if steps else 0), []


def _restore_rows(
    manager: ocp.CheckpointManager, step: int, template: TrainState
) -> list[SavedRow]:
    described, arrays = _restore(manager, step)
    saved: dict[str, Any] = arrays
    opt_leaves, opt_structure = jax.tree.flatten(template.opt_state)
    opt_state = [saved[f"opt_state.{i}"] for i in range(len(opt_leaves))]
    settings = settings_of(template.learned)
    state = TrainState(
        step=saved["step"],
        learned=rebuild_learned(saved, settings),
        opt_state=jax.tree.unflatten(opt_structure, opt_state),
        failed_step=saved["failed_step"],
        average=None if template.average is None else rebuild_learned(_average(saved), settings),
    )
    rows = []
    for place, concept in enumerate(described["concepts"]):
        evaluations = tuple((int(at), float(loss)) for at, loss in concept["evaluations"])
        one = jax.tree.map(operator.itemgetter(place), state)
        row = concept.get("row")
        rows.append(SavedRow(ConceptRecord.from_json(concept), one, evaluations, row))
    return rows


def concepts_from_checkpoint(folder: str | Path) -> list[tuple[ConceptRecord, Learned, int]]:
    """Every healthy concept of one checkpoint step folder: (record, what it learned, step).

    Raises:
      CatVersionError: ``folder`` is not a checkpoint of this package, or a damaged one.
    """
    folder = absolute(as_path(folder))
    if not (folder / _CONCEPTS).is_dir() or not folder.name.isdigit():
        raise CatVersionError(
            f"{folder}: is not a training checkpoint. Give RUN/checkpoints/process-0000/<step>, or "
            "RUN itself for its finished concepts."
        )
    step = int(folder.name)
    try:
        with _manager(folder.parent) as manager:
            described, saved = _restore(manager, step)
        learned = rebuild_learned(_average(saved) or saved, described)
        return [
            (
                ConceptRecord.from_json(concept),
                jax.tree.map(operator.itemgetter(row), learned),
                int(saved["step"][row]),
            )
            for row, concept in enumerate(described["concepts"])
            if saved["failed_step"][row] < 0
        ]
    except Exception as error:  # whatever a damaged file makes of the readers
        raise CatVersionError(
            f"{folder}: the checkpoint is damaged ({_reason(error)}). Export another one, or let "
            "training go on from it: it takes the one before."
        ) from error


def _arrays(state: TrainState) -> dict[str, np.ndarray]:
    """Named arrays of a state. Optax's nested tuples do not survive a file: those by position."""
    average = {} if state.average is None else named_arrays(state.average)
    arrays = {
        "step": state.step,
        **named_arrays(state.learned),
        **{_AVERAGE + name: leaf for name, leaf in average.items()},
        **{f"opt_state.{i}": leaf for i, leaf in enumerate(jax.tree.leaves(state.opt_state))},
        "failed_step": state.failed_step,
    }
    return {name: np.ascontiguousarray(leaf) for name, leaf in arrays.items()}


def _average(saved: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The moving average among the arrays; empty when there is none."""
    return {
        name.removeprefix(_AVERAGE): array
        for name, array in saved.items()
        if name.startswith(_AVERAGE)
    }


def _restore(
    manager: ocp.CheckpointManager, step: int
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The description and the arrays of one checkpoint.

    Raises:
      ValueError: a number is not the one that was written, or not finite. Checkpoints of version
        0.1 have no digests.
    """
    described: dict[str, Any] = manager.restore(
        step, args=ocp.args.Composite(**{_CONCEPTS: ocp.args.JsonRestore()})
    )[_CONCEPTS]
    saved: dict[str, np.ndarray] = manager.restore(
        step, args=ocp.args.Composite(**{_STATE: _ArraysRestore()})
    )[_STATE]
    if described.get("sha256", digest := _sha256_of_description(described)) != digest:
        raise ValueError("the description of its concepts was altered")
    digests = described.get("arrays_sha256")
    for name, array in saved.items():
        if digests is not None and digests.get(name) != _sha256(array):
            raise ValueError(f"the numbers of {name} were altered")
        if not np.isfinite(array).all():
            raise ValueError(f"{name} holds NaN or infinite numbers")
    return described, saved


def _sha256(array: np.ndarray) -> str:
    digest = hashlib.sha256(f"{array.dtype.str} {array.shape} ".encode())
    digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _sha256_of_description(described: Mapping[str, Any]) -> str:
    own = {key: value for key, value in described.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()


def _is_step(path: Path) -> bool:
    return path.name.isascii() and path.name.isdecimal() and len(path.name) < 16


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__

"""Orbax checkpoints of trained state only: residuals, moments, step counters. Nothing frozen is
saved.

A checkpoint holds the real concepts of a pack (no padding), so it restores onto any number of
devices. Beside the arrays lies what a concept file needs, so that a checkpoint alone can be
exported.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from catversion_jax.errors import CatVersionError
from catversion_jax.export import save_concept
from catversion_jax.residual import KVResidual
from catversion_jax.training.state import TrainState

_STATE, _CONCEPTS = "state", "concepts"


@dataclasses.dataclass(frozen=True)
class ConceptRecord:
    """What is written into a concept file beside the numbers (plain JSON values)."""

    name: str
    base_class: str
    when: str
    base_model: str
    text_encoder_sha256: str
    images: tuple[str, ...]
    seed: int
    config: dict[str, Any]

    def save(self, path: Path, residual: KVResidual, step: int) -> None:
        """Write the concept file of this record."""
        save_concept(
            path,
            residual,
            base_class=self.base_class,
            name=self.name,
            when=self.when,
            base_model=self.base_model,
            text_encoder_sha256=self.text_encoder_sha256,
            step=step,
            config={**self.config, "seed": self.seed},
            images=self.images,
        )


def open_checkpoints(folder: Path, keep: int) -> ocp.CheckpointManager:
    """Asynchronous, rotated checkpoints under ``folder/<step>/``."""
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, enable_async_checkpointing=True, create=True
    )
    return ocp.CheckpointManager(folder.absolute(), options=options)


def save_checkpoint(
    manager: ocp.CheckpointManager, step: int, state: TrainState, records: list[ConceptRecord]
) -> None:
    """Start saving the first ``len(records)`` rows of ``state``; the files are complete later."""
    rows = jax.tree.map(lambda leaf: np.asarray(leaf[: len(records)]), state)
    residual = rows.residual
    described = {
        "layers": list(residual.layers),
        "logit_bias": residual.logit_bias,
        "concepts": [dataclasses.asdict(record) for record in records],
    }
    manager.save(
        step,
        args=ocp.args.Composite(
            **{
                _STATE: ocp.args.StandardSave(_arrays(rows)),
                _CONCEPTS: ocp.args.JsonSave(described),
            }
        ),
    )


def read_records(manager: ocp.CheckpointManager, step: int) -> list[ConceptRecord]:
    """The concepts of a checkpoint, in row order."""
    described = _restore_description(manager, step)
    return [ConceptRecord(**{**c, "images": tuple(c["images"])}) for c in described["concepts"]]


def latest_records(folder: Path) -> list[ConceptRecord]:
    """The concepts of the newest complete checkpoint in a pack's folder; [] when there is none."""
    with ocp.CheckpointManager(folder.absolute()) as manager:
        step = manager.latest_step()
        return [] if step is None else read_records(manager, step)


def restore_latest(
    folder: Path, template: TrainState
) -> tuple[int, TrainState, list[ConceptRecord]]:
    """Step, rows and concepts of the newest checkpoint in a pack's folder, which must have one.

    The rows are numpy arrays in the structure of ``template``, which may have another number of
    them.
    """
    with ocp.CheckpointManager(folder.absolute()) as manager:
        step = manager.latest_step()
        records = read_records(manager, step)
        saved = _restore_arrays(manager, step)
    opt_leaves, opt_structure = jax.tree.flatten(template.opt_state)
    opt_state = [saved["opt_state"][str(i)] for i in range(len(opt_leaves))]
    residual = dataclasses.replace(template.residual, key=saved["key"], value=saved["value"])
    state = TrainState(
        step=saved["step"],
        residual=residual,
        opt_state=jax.tree.unflatten(opt_structure, opt_state),
        failed_step=saved["failed_step"],
    )
    return step, state, records


def concepts_from_checkpoint(folder: str | Path) -> list[tuple[ConceptRecord, KVResidual, int]]:
    """Every healthy concept of one checkpoint step folder: (record, residual ``[L P N H]``, step).

    Raises:
      CatVersionError: ``folder`` is not a checkpoint of this package.
    """
    folder = Path(folder).absolute()
    if not (folder / _CONCEPTS).is_dir() or not folder.name.isdigit():
        raise CatVersionError(
            f"{folder}: is not a training checkpoint. Give RUN/checkpoints/pack-0000/<step>, or "
            "RUN itself for its finished concepts."
        )
    step = int(folder.name)
    with ocp.CheckpointManager(folder.parent) as manager:
        saved = _restore_arrays(manager, step)
        described = _restore_description(manager, step)
    layers, bias = tuple(described["layers"]), float(described["logit_bias"])
    return [
        (
            ConceptRecord(**{**concept, "images": tuple(concept["images"])}),
            KVResidual(saved["key"][row], saved["value"][row], layers, bias),
            int(saved["step"][row]),
        )
        for row, concept in enumerate(described["concepts"])
        if saved["failed_step"][row] < 0
    ]


def _arrays(state: TrainState) -> dict[str, Any]:
    """Named arrays of a state. Optax's nested tuples do not survive a file: those by position."""
    opt_state = {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(state.opt_state))}
    return {
        "step": state.step,
        "key": state.residual.key,
        "value": state.residual.value,
        "opt_state": opt_state,
        "failed_step": state.failed_step,
    }


def _restore_description(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    args = ocp.args.Composite(**{_CONCEPTS: ocp.args.JsonRestore()})
    return manager.restore(step, args=args)[_CONCEPTS]


def _restore_arrays(manager: ocp.CheckpointManager, step: int) -> Any:
    """What :func:`_arrays` gave, as numpy arrays."""
    args = ocp.args.Composite(**{_STATE: ocp.args.StandardRestore()})
    return jax.tree.map(np.asarray, manager.restore(step, args=args)[_STATE])

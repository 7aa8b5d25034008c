"""``catversion_jax.train``: from a config to trained concepts; everything is put together here."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
from jax.sharding import Mesh
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from catversion_jax.concepts import ConceptList, ConceptSpec
from catversion_jax.concepts.long_lists import LongList, open_configured_concepts
from catversion_jax.config import TrainConfig, dump_config, learning_options, with_shard
from catversion_jax.errors import CatVersionError, shown
from catversion_jax.methods.table import method_for
from catversion_jax.models.stable_diffusion import Backbone
from catversion_jax.runtime.atomic_files import check_writable, unwritable
from catversion_jax.runtime.bucket_paths import as_path
from catversion_jax.runtime.compilation import use_compilation_cache
from catversion_jax.runtime.processes import join_processes, own_part, wait_for_others
from catversion_jax.runtime.sharding import CONCEPT_AXIS, make_mesh
from catversion_jax.runtime.shards import find_shard
from catversion_jax.training.feeder import Feeder
from catversion_jax.training.frozen_networks import load, placed
from catversion_jax.training.loop import Prepared
from catversion_jax.training.opened_loop import opened_loop
from catversion_jax.training.planning.abstract import PlannedStep
from catversion_jax.training.planning.fitting import fitted, largest_concept
from catversion_jax.training.predicted_start import StartPredictor, network_digests
from catversion_jax.training.preparation import (
    concept_failure,
    masks_decide,
    prepare_concept,
)
from catversion_jax.training.queue_plan import QueuePlan, plan_queue
from catversion_jax.training.queue_records import QueueRecords, queue_records, sample_of
from catversion_jax.training.retraining import larger_budgets
from catversion_jax.training.run.directory import RunDirectory, check_outside
from catversion_jax.training.run.model_card import write_card
from catversion_jax.training.run.reader import TrainedConcept, read_trained_concept
from catversion_jax.training.run.shards import check_same_shards, shard_root
from catversion_jax.training.start_values import abstract_state
from catversion_jax.training.trainable import check_trainable

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a call of :func:`train` left behind.

    Attributes:
      output_dir: the folder of the run, or of the shard of it that was trained.
      finished: names of the finished concepts, in the order of the list.
      failures: reasons of the concepts that were given up, by name.
      interrupted: whether the run was asked to stop before the others were done; the same config
        continues it.
      backbone: the frozen networks, for drawing without loading them again.
    """

    output_dir: Path
    finished: tuple[str, ...]
    failures: Mapping[str, str]
    interrupted: bool
    backbone: Backbone = dataclasses.field(repr=False)

    @functools.cached_property
    def concepts(self) -> tuple[TrainedConcept, ...]:
        """The finished concepts with their files and losses, read when they are asked for."""
        return tuple(read_trained_concept(self.output_dir, name) for name in self.finished)


def train(
    config: TrainConfig,
    *,
    concepts: ConceptList | LongList | None = None,
    backbone: Backbone | None = None,
    stop: threading.Event | None = None,
) -> TrainResult:
    """Train every concept of a list at once, or continue the run in ``config.output_dir``.

    Progress goes to ``logging`` and to a bar on stderr. No signal handlers are installed: a caller
    that wants Ctrl-C to save first sets ``stop``. JAX's compilation cache is set as the config
    says, and with float32 the precision of matrix products, both for the whole process.

    Args:
      config: the options, from ``TrainConfig(...)`` or ``load_config(...)``.
      concepts: the concepts, as ``read_concepts`` returns them; None reads them where the config
        says. Those of other shards than the config's are left out.
      backbone: frozen networks that are loaded already; None loads those that the config names.
      stop: once it is set, everything under way is saved and the function returns.

    Returns:
      The finished concepts with their files and losses, and the reasons of those that failed.

    Raises:
      CatVersionError: there is no concept, the model cannot be used, the options contradict it or
        the run in ``output_dir``, or ``output_dir`` cannot be written. The message says the value,
        the rule and the remedy. A concept that fails is no error: see ``TrainResult.failures``.

    Example:
      >>> import catversion_jax as cv
      >>> result = cv.train(cv.load_config("quickstart", ["max_train_steps=100"]))
      >>> result.concepts[0].file
      PosixPath('catversion-out/concepts/...')
    """
    if not isinstance(config, TrainConfig):
        raise CatVersionError(
            f"config={shown(config)}: must be a TrainConfig. load_config(file or name, "
            "['option=value']) makes one, or TrainConfig(option=value)."
        )
    config = with_shard(config, os.environ)
    shard = find_shard(config.shard, os.environ)
    if concepts is None:
        concepts = open_configured_concepts(config.data_options, config.when)
    concepts = concepts.part(shard)
    method_for(config.method_options)
    check_outside(as_path(config.output_dir), config.concepts)
    check_same_shards(as_path(config.output_dir), shard)
    root = shard_root(as_path(config.output_dir), shard)
    check_writable(root)
    config, backbone, mesh = with_networks(config, backbone)
    if stop is not None and stop.is_set():
        return TrainResult(root, (), {}, True, backbone)
    predictor = StartPredictor.of(config.method_options, backbone)
    sample, count = sample_of(concepts)
    config = resolve_auto(config, backbone, mesh, sample, num_concepts=count)
    try:
        outcome = train_concepts(config, backbone, concepts, mesh, stop, predictor)
    except OSError as error:
        raise unwritable(as_path(error.filename or config.output_dir), error) from error
    return TrainResult(root, outcome.finished, outcome.failures, outcome.interrupted, backbone)


def with_networks(
    config: TrainConfig, backbone: Backbone | None = None
) -> tuple[TrainConfig, Backbone, Mesh]:
    """The frozen networks on the devices of this process, and the config with the precision and
    the resolution that they bring, which are part of what is learned and recorded as such.

    Raises:
      CatVersionError: the model cannot be used or trained.
    """
    use_compilation_cache(config.compilation_cache_dir)
    join_processes(config.coordinator_address, config.num_processes, config.process_id)
    mesh = make_mesh(config.data_parallel, jax.local_devices())
    precision = config.mixed_precision
    if backbone is None:
        backbone = load(config.model_options, precision, mesh)
    else:
        backbone = placed(backbone, precision, mesh)
    check_trainable(backbone)
    return (
        dataclasses.replace(
            config,
            mixed_precision="bf16" if backbone.dtype == "bfloat16" else "no",
            resolution=config.resolution or backbone.default_resolution,
        ),
        backbone,
        mesh,
    )


def planned_step(config: TrainConfig, backbone: Backbone) -> PlannedStep:
    """What :mod:`~catversion_jax.training.planning` compiles; the networks must be trainable."""
    check_trainable(backbone)
    return PlannedStep(
        backbone,
        config.resolution or backbone.default_resolution,
        config.method_options,
        config.objective_options,
        config.optimizer_options,
        config.device_options,
    )


def resolve_auto(
    config: TrainConfig,
    backbone: Backbone,
    mesh: Mesh,
    specs: Sequence[ConceptSpec],
    memory_bytes: float | None = None,
    *,
    num_concepts: int | None = None,
) -> TrainConfig:
    """``config`` with numbers in place of ``auto`` where devices and memory decide.

    Args:
      config: the options.
      backbone: the frozen networks.
      mesh: of this process.
      specs: the concepts to train, or some of them.
      memory_bytes: of each device; by default what the devices say.
      num_concepts: number of concepts to train, where ``specs`` are some of them.

    Raises:
      CatVersionError: not one concept fits, or not as many as ``concepts_per_device`` says.
    """
    images, prompts = largest_concept(specs, config.data_options, config.method_options)
    planned, count = planned_step(config, backbone), num_concepts or len(specs)
    devices = fitted(planned, mesh, count, images, prompts, memory_bytes)
    return dataclasses.replace(
        config,
        concepts_per_device=devices.concepts_per_device,
        gradient_checkpointing=devices.gradient_checkpointing,
    )


@dataclasses.dataclass(frozen=True)
class RunOutcome:
    """Names of the concepts that have a file, the reasons of those that were given up, and whether
    the run was asked to stop before the others were done.
    """

    finished: tuple[str, ...]
    failures: Mapping[str, str]
    interrupted: bool = False


def train_concepts(
    config: TrainConfig,
    backbone: Backbone,
    concepts: ConceptList | LongList,
    mesh: Mesh,
    stop: threading.Event | None = None,
    predictor: StartPredictor | None = None,
) -> RunOutcome:
    """Train every concept that is not done yet; continue what ``config.output_dir`` holds.

    Once ``stop`` is set, in any of the processes, or a file ``STOP`` appears in ``output_dir``,
    everything under way is saved and the function returns.

    Args:
      config: without ``auto`` in ``concepts_per_device``.
      backbone: the frozen networks, on every device of the mesh.
      concepts: what was read; those with problems are given up.
      mesh: of this process.
      stop: asks for an early end.
      predictor: of the start values; None where ``init`` says them.

    Raises:
      CatVersionError: the options contradict the model or the run in ``output_dir``, or it is not
        writable, or another process writes there.
    """
    shard = find_shard(config.shard, os.environ)
    run = RunDirectory(shard_root(as_path(config.output_dir), shard))
    with run.lock():
        recorded, networks = learning_options(config), network_digests(backbone, predictor)
        open_run(run, config, backbone, networks)
        records = queue_records(
            concepts,
            backbone,
            config.data_options,
            config.method_options,
            seed=config.seed,
            recorded=recorded,
            networks=networks,
            masked=masks_decide(config.objective_options, backbone),
            max_train_steps=config.max_train_steps,
        )
        failures = dict(records.failures)
        template = abstract_state(config.method_options, config.optimizer_options, backbone)
        steps, recording = config.max_train_steps, config.recording_options
        records.retrain(larger_budgets(records, steps, recording, shard))
        plan = plan_queue(records, run, template, retrains=config.retrain == "changed")
        wait_for_others("every process has read what was done before")
        own = tuple(own_part(plan.names))
        if run.process == 0:
            for name, reason in failures.items():
                run.quarantine(name, reason)
        run.start_index(records, failures)
        run.set_others(set(plan.names) - set(own))
        saved = {name: row for name, row in plan.saved.items() if name in own}
        plan = dataclasses.replace(plan, names=own, saved=saved)
        interrupted, given_up = _run_queue(
            config,
            backbone,
            mesh,
            run,
            records,
            plan,
            [part.first_layer for part in template.learned.parts],
            stop or threading.Event(),
            predictor,
        )
        run.write_index()
        wait_for_others("every process is done")
        interrupted = interrupted or run.is_asked_to_stop(now=True)
        run.write_index()
        if run.process == 0:
            write_card(run.root)
    failures |= given_up
    return RunOutcome(tuple(run.finished), {**run.quarantined, **failures}, interrupted)


def open_run(
    run: RunDirectory, config: TrainConfig, backbone: Backbone, networks: Mapping[str, str]
) -> None:
    """Begin or continue the run in a folder as the config says; what its last processes told each
    other is forgotten.

    Args:
      run: the folder, locked.
      config: all options.
      backbone: the frozen networks.
      networks: digests of all that decide the result.

    Raises:
      CatVersionError: see :meth:`~catversion_jax.training.run.directory.RunDirectory.open`.
    """
    run.open(
        backbone.name,
        backbone.fingerprints,
        options=learning_options(config),
        resolved=dump_config(config),
        digests=networks,
        may_continue=config.resume_from_checkpoint == "latest",
        retrains=config.retrain == "changed",
    )
    run.clear_leftovers()


def _run_queue(
    config: TrainConfig,
    backbone: Backbone,
    mesh: Mesh,
    run: RunDirectory,
    records: QueueRecords,
    plan: QueuePlan,
    first_layers: Sequence[int],
    stop: threading.Event,
    predictor: StartPredictor | None,
) -> tuple[bool, Mapping[str, str]]:
    """Whether the loop was interrupted, and the concepts that it gave up, with reasons."""
    if config.concepts_per_device == "auto":
        raise ValueError("concepts_per_device=auto: planning.fitting.fitted says how many")
    per_axis = mesh.shape[CONCEPT_AXIS]
    per_device = min(config.concepts_per_device, max(1, -(-len(records) // per_axis)))
    max_images, max_prompts = records.room
    num_rows = per_device * per_axis
    prepare = functools.partial(
        prepare_concept,
        backbone=backbone,
        data=config.data_options,
        method=config.method_options,
        objective=config.objective_options,
        predictor=predictor,
    )

    def prepared(name: str) -> Prepared:  # in the feeder's thread
        try:
            return Prepared(name, prepare(*records.read(name)))
        except Exception as error:
            return Prepared(name, None, concept_failure(name, error))

    total, to_do = records.updates(records), records.updates(plan.names)
    with (
        tqdm(total=total, initial=total - to_do, unit="concept-step", desc="compiling") as bar,
        logging_redirect_tqdm([logging.getLogger()], tqdm_class=tqdm),
        opened_loop(
            config.data_options,
            config.method_options,
            config.objective_options,
            config.optimizer_options,
            config.device_options,
            config.recording_options,
            backbone=backbone,
            mesh=mesh,
            run=run,
            feeder=Feeder(plan.names, prepared, ahead=num_rows),
            plan=plan,
            first_layers=first_layers,
            bar=bar,
            num_rows=num_rows,
            max_images=max_images,
            max_prompts=max_prompts,
        ) as loop,
    ):
        return loop.run(stop), loop.failures

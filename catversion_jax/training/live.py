"""Training whose queue never ends: concepts arrive while others are under way.

It is the loop of every run, on a feeder that does not wait. Whoever owns the device calls
:meth:`LiveTraining.advance` whenever it has time for a dispatch, and may do something else between
two calls. Shapes are fixed at the start, so a concept that arrives compiles nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from jax.sharding import Mesh
from tqdm import tqdm

from catversion_jax.concepts import ConceptList, ConceptSpec
from catversion_jax.config import TrainConfig, learning_options
from catversion_jax.errors import ConceptError
from catversion_jax.models.stable_diffusion import Backbone
from catversion_jax.runtime.sharding import CONCEPT_AXIS
from catversion_jax.training.feeder import Feeder
from catversion_jax.training.loop import Prepared, TrainingLoop
from catversion_jax.training.opened_loop import opened_loop
from catversion_jax.training.predicted_start import StartPredictor, network_digests
from catversion_jax.training.preparation import (
    concept_failure,
    describe_concept,
    masks_decide,
    prepare_concept,
    training_images,
)
from catversion_jax.training.queue_plan import plan_queue
from catversion_jax.training.queue_records import AllRecords
from catversion_jax.training.rows import Occupant
from catversion_jax.training.run.directory import RunDirectory
from catversion_jax.training.run.identity import image_digests
from catversion_jax.training.run.index import FINISHED
from catversion_jax.training.run.records import ConceptRecord
from catversion_jax.training.start import open_run
from catversion_jax.training.start_values import abstract_state

T = TypeVar("T")


class LiveFeeder(Feeder[T]):
    """A feeder whose names go on arriving, and that never waits for one."""

    def __init__(self, prepare: Callable[[str], T], ahead: int, on_next: Callable[[T], None]):
        self._on_next = on_next
        self._arrivals: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        super().__init__(iter(self._arrivals.get, None), prepare, ahead)

    def add(self, name: str) -> None:
        """Prepare one more, after those before it."""
        self._arrivals.put(name)

    def next(self) -> T | None:
        """The next prepared concept; None where none is ready now."""
        item = self._taken(wait=False)
        if item is not None:
            self._on_next(item)
        return item

    def __exit__(self, *error: object) -> None:
        self._arrivals.put(None)
        super().__exit__(*error)


@dataclasses.dataclass(frozen=True)
class News:
    """What became of a concept: ``done``, ``stopped early`` or ``quarantined``, and why."""

    name: str
    state: str
    reason: str = ""

    @property
    def succeeded(self) -> bool:
        """Whether there is a concept file."""
        return self.state in FINISHED


class LiveTraining:
    """Made by :func:`live_training`. Only the thread that owns the device may call."""

    def __init__(
        self,
        loop: TrainingLoop,
        run: RunDirectory,
        feeder: LiveFeeder[Prepared],
        withdrawn: set[str],
        waiting: Sequence[str],
        *,
        writes_start: bool,
    ):
        self._waiting = waiting
        self._loop, self._run, self._feeder, self._withdrawn = loop, run, feeder, withdrawn
        self._writes_start = writes_start
        self._stop = threading.Event()
        self._expected: set[str] = set()
        self._begun: set[str] = set()

    def resume(self) -> None:
        """Go on with the concepts of an earlier process; those that are finished get no row."""
        for name in self._waiting:
            if self._run.is_done(name):
                self._expected.add(name)
            else:
                self.add(name)

    def add(self, name: str) -> None:
        """Take a concept into the queue."""
        self._withdrawn.discard(name)
        self._expected.add(name)
        self._run.set_state(name, "queued")
        self._feeder.add(name)

    def advance(self) -> bool:
        """Do the next piece of work, one dispatch at most; whether there was any."""
        worked = self._loop.advance(self._stop)
        for occupant in self._loop.under_way:
            if occupant.name not in self._begun:
                self._begun.add(occupant.name)
                if self._writes_start and occupant.step == 0:
                    self._loop.write_files([occupant])
        return worked

    def wait(self) -> None:
        """Return once the device has done what :meth:`advance` told it."""
        self._loop.wait()

    def news(self) -> list[News]:
        """The concepts that have ended since the last call."""
        ended = []
        for name in sorted(self._expected):
            state = self._run.state_of(name)
            if state in (*FINISHED, "quarantined"):
                ended.append(News(name, state, self._loop.failures.pop(name, "")))
        self._expected -= {one.name for one in ended}
        self._begun -= {one.name for one in ended}
        if ended:
            self._run.write_index()
        return ended

    def withdraw(self, name: str) -> None:
        """Give a concept up, wherever it is; :meth:`news` does not tell of it."""
        self._withdrawn.add(name)
        self._expected.discard(name)
        self._begun.discard(name)
        self._loop.withdraw(name)

    def written(self, occupant: Occupant) -> Path:
        """The file of what a concept has learned so far, which this writes."""
        self._loop.write_files([occupant])
        return self._run.concept_file(occupant.name, occupant.step)

    @property
    def under_way(self) -> Sequence[Occupant]:
        """The concepts that have a row."""
        return self._loop.under_way

    @property
    def saved(self) -> Mapping[str, int]:
        """Updates of concepts that the next process goes on from, as far as this one saved them."""
        return self._loop.checkpoints.written

    @property
    def expects(self) -> int:
        """Number of concepts that were added and have not ended."""
        return len(self._expected)


@contextlib.contextmanager
def live_training(
    config: TrainConfig,
    backbone: Backbone,
    mesh: Mesh,
    predictor: StartPredictor | None,
    read: Callable[[str], ConceptSpec],
    waiting: Sequence[str],
    *,
    begins: Callable[[str], None],
    rests: Callable[[str], None],
    encoded: Callable[[float], None],
    max_images: int,
    max_prompts: int,
) -> Iterator[LiveTraining]:
    """Continue the run in ``config.output_dir``, with room for concepts that arrive.

    Leaving the block saves what is under way.

    Args:
      config: without ``auto``; ``concepts`` is not read.
      backbone: the frozen networks, on every device of the mesh.
      mesh: of this process.
      predictor: of the start values; with one, a concept has a file of step 0 as soon as it has a
        row.
      read: gives a concept by its name, or raises ``ConceptError``; any thread may call it.
      waiting: concepts of an earlier process that had not ended, in order; those that are finished
        are told by the first :meth:`LiveTraining.news` after :meth:`LiveTraining.resume`.
      begins: is told the name of a concept before it is prepared, and before it gets a row.
      rests: is told the name once it is prepared; it waits for a row then.
      encoded: is told for how many seconds the networks encoded a concept, beside whatever else the
        device does. Any thread calls these three.
      max_images: most images that a concept may have.
      max_prompts: most training prompts.

    Raises:
      CatVersionError: the run was begun with other options or another model, or another process
        writes into it.
    """
    run = RunDirectory(config.output_dir)
    recorded, networks = learning_options(config), network_digests(backbone, predictor)
    masked = masks_decide(config.objective_options, backbone)
    known: list[tuple[ConceptSpec, ConceptRecord]] = []
    withdrawn: set[str] = set()

    def described(name: str) -> tuple[ConceptSpec, ConceptRecord]:
        spec = read(name)
        record = describe_concept(
            spec,
            backbone,
            config.data_options,
            config.method_options,
            seed=config.seed,
            recorded=recorded,
            images=image_digests(spec, masked=masked),
            networks=networks,
        )
        for given, most, what in (
            (len(spec.images), max_images, "images"),
            (len(record.prompts), max_prompts, "training prompts"),
        ):
            if given > most:
                raise ConceptError(f"{name}: has {given} {what}, more than {most}. Take fewer.")
        return spec, record

    def prepared(name: str) -> Prepared:  # in the feeder's thread
        begins(name)
        try:
            if name in withdrawn:
                raise ConceptError(f"{name}: was withdrawn.")
            spec, record = described(name)
            images = training_images(spec, backbone, config.data_options)
            began = time.monotonic()
            concept = prepare_concept(
                spec,
                record,
                backbone,
                config.data_options,
                config.method_options,
                config.objective_options,
                predictor,
                images=images,
            )
            encoded(time.monotonic() - began)
            return Prepared(name, concept)
        except Exception as error:
            return Prepared(name, None, concept_failure(name, error))
        finally:
            rests(name)

    with run.lock():
        open_run(run, config, backbone, networks)
        for name in waiting:
            with contextlib.suppress(Exception):  # the feeder will say why
                known.append(described(name))
        template = abstract_state(config.method_options, config.optimizer_options, backbone)
        specs = ConceptList(tuple(spec for spec, _ in known))
        records = AllRecords(specs, {record.name: record for _, record in known}, {})
        plan = plan_queue(records, run, template, retrains=False)
        run.start_index(records, {})
        if config.concepts_per_device == "auto":
            raise ValueError("concepts_per_device=auto: a server says how many")
        num_rows = config.concepts_per_device * mesh.shape[CONCEPT_AXIS]
        feeder = LiveFeeder(prepared, num_rows, lambda item: begins(item.name))
        with (
            tqdm(disable=True) as bar,
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
                feeder=feeder,
                plan=plan,
                first_layers=[part.first_layer for part in template.learned.parts],
                bar=bar,
                num_rows=num_rows,
                max_images=max_images,
                max_prompts=max_prompts,
            ) as loop,
        ):
            again = [*plan.names, *(name for name in waiting if name not in plan.names)]
            live = LiveTraining(
                loop, run, feeder, withdrawn, again, writes_start=predictor is not None
            )
            try:
                yield live
            finally:
                loop.save()
                run.write_index()

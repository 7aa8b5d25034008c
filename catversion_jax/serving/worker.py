"""What the device's thread does: load, compile, draw, teach."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import logging
import time
from collections.abc import Sequence

import numpy as np

from catversion_jax.concepts import ConceptSpec
from catversion_jax.config import TrainConfig
from catversion_jax.errors import CatVersionError, ConceptError, shown
from catversion_jax.models.stable_diffusion import Backbone
from catversion_jax.runtime.sharding import CONCEPT_AXIS
from catversion_jax.sampling.encoding import KnownTexts
from catversion_jax.serving import drawing, safety, teaching
from catversion_jax.serving.core import MOST_ATTEMPTS, Core
from catversion_jax.serving.drawing import DrawnBatch, Picture, draw, picture_path, write_picture
from catversion_jax.serving.errors import ApiError
from catversion_jax.serving.ordering import Orders
from catversion_jax.serving.share import Shares
from catversion_jax.serving.store import Job
from catversion_jax.serving.teaching import Progress
from catversion_jax.training.live import LiveTraining, live_training
from catversion_jax.training.predicted_start import StartPredictor
from catversion_jax.training.start import with_networks

logger = logging.getLogger(__name__)

FEEDER_SECONDS, IDLE_SECONDS, SWEEP_SECONDS = 0.02, 1.0, 600.0
MOST_KNOWN_TEXTS = 64


class Worker:
    """Works for a server; all methods but the constructor belong to the device's thread.

    Args:
      core: the server.
      config: how concepts are taught; ``output_dir`` is the folder of the run.
      backbone: networks that are loaded already; None loads those that the config names.

    Attributes:
      orders: takes requests for pictures; it is there once everything is compiled.
    """

    orders: Orders
    _live: LiveTraining
    _num_rows: int
    _batch_size: int
    _checker: safety.Checker | None

    def __init__(self, core: Core, config: TrainConfig, backbone: Backbone | None = None):
        self._core, self._config, self._backbone = core, config, backbone
        self._stack = contextlib.ExitStack()
        self._shares = Shares(core.options.drawing_share)
        self._texts = KnownTexts(MOST_KNOWN_TEXTS)
        self._writer = concurrent.futures.ThreadPoolExecutor(1, "pictures")
        self._begun: set[str] = set()
        self._lessons: dict[str, bool] = {}  # being prepared or in a row, and whether saved since
        self._swept = time.monotonic()

    # ------------------------------------------------------------------ begin and end

    def prepare(self) -> None:
        """Load and compile everything, and take up what an earlier process left."""
        core = self._core
        self._config, self._backbone, mesh = with_networks(self._config, self._backbone)
        backbone = self._backbone
        core.folders.check_model(backbone)
        self._checker, core.safety_checker = safety.find_checker(self._config.model_options)
        logger.info("safety checker: %s", core.safety_checker)
        rows = self._config.concepts_per_device
        assert isinstance(rows, int)
        self._num_rows = rows * mesh.shape[CONCEPT_AXIS]
        self._batch_size = (core.options.batch_size or drawing.usual_batch_size()) * mesh.size
        predictor = StartPredictor.of(self._config.method_options, backbone)
        waiting = core.store.open_jobs()
        lessons = [job for job in waiting if job.kind == "teach"]
        under_way = [job for job in lessons if job.state != "queued" and self._goes_on(job)]
        live = live_training(
            self._config,
            backbone,
            mesh,
            predictor,
            self._spec,
            [job.id for job in under_way],
            begins=self._begins,
            rests=self._rests,
            encoded=functools.partial(self._shares.spent, "teach"),
            max_images=core.options.max_images,
            max_prompts=core.options.max_prompts,
        )
        self._live = self._stack.enter_context(live)
        core.remove_leftovers()
        resolution = self._config.resolution or backbone.default_resolution
        concept = teaching.warm_up(self._live, core.folders, resolution)
        orders = Orders(core, backbone)
        sizes = [orders.settings({"size": f"{width}x{height}"}) for width, height in orders.sizes]
        drawing.warm_up(backbone, sizes, concept, core.options.max_concepts)
        self._live.resume()
        for job in lessons:
            if job.state == "queued":
                core.lessons.put(job.owner, job)
        for job in waiting:
            if job.kind == "draw":
                self._draw_again(orders, job)
        self.orders = orders

    def _goes_on(self, job: Job) -> bool:
        """Whether a lesson under way is taken up again; else it has failed."""
        core = self._core
        if job.attempts < MOST_ATTEMPTS["teach"] or core.folders.is_learned(job.id):
            return True
        core.end(
            job,
            "failed",
            f"The server ended {job.attempts} times while it taught this, and no update was saved "
            "in between. The photos are kept: look at them, and teach it again.",
        )
        return False

    def _draw_again(self, orders: Orders, job: Job) -> None:
        core = self._core
        if job.attempts >= MOST_ATTEMPTS["draw"]:
            core.end(
                job,
                "failed",
                f"The server ended {job.attempts} times while it drew this. Ask again.",
            )
            return
        format = job.request["output_format"]
        missing = [
            index
            for index in range(job.num_images)
            if not picture_path(core.images, job.id, index, format).is_file()
        ]
        if not missing:
            core.end(job, "succeeded")
            return
        core.store.requeue(job.id)
        try:
            orders.resume(job, missing)
        except ApiError as error:
            core.end(job, "failed", error.message)

    def _spec(self, name: str) -> ConceptSpec:
        """The concept of a job (``live_training`` asks, from any thread)."""
        if name == teaching.WARM_UP:
            return self._core.folders.spec(teaching.WARM_UP, name)
        job = self._core.store.job(name)
        if job is None or job.folder is None:
            raise ConceptError(f"{name}: was deleted.")
        return self._core.folders.spec(job.folder, name)

    def finish(self) -> None:
        """Write and save what is under way."""
        self._writer.shutdown()
        assert self._core.device is not None
        if self._core.device.failure is None:
            for id in self._begun:
                self._core.store.give_back(id)
        self._stack.close()
        if self._core.device.failure is None:
            for id in self._lessons:
                self._core.store.give_back(id)

    # ------------------------------------------------------------------ one piece of work

    def work(self) -> float:
        """See :class:`~catversion_jax.serving.device.DeviceThread`."""
        core, options = self._core, self._core.options
        self._take_lessons()
        wait, batch_size = IDLE_SECONDS, self._batch_size
        with core.lock:
            ready = core.pictures.would_take(batch_size, drawing.together)
            age = time.monotonic() - min((p.arrived for p in core.pictures), default=0.0)
            draws = bool(ready) and (ready >= batch_size or age >= options.max_wait_ms / 1000)
            if ready and not draws:
                wait = max(options.max_wait_ms / 1000 - age, 0.001)
        teaches = bool(self._live.expects) and not core.draining
        turn = self._shares.turn(draws=draws, teaches=teaches)
        began = time.monotonic()
        if turn == "teach" and not self._teach():  # its photos are still being encoded
            if not draws:
                return min(wait, FEEDER_SECONDS)
            turn = "draw"
        elif turn == "teach" and ready:
            self._live.wait()  # else the next pictures would pay for this dispatch
        if turn == "draw":
            with core.lock:
                batch = core.pictures.take(batch_size, drawing.together)
            self._draw(batch)
        if turn is not None:
            self._shares.spent(turn, time.monotonic() - began)
            return 0.0
        if time.monotonic() - self._swept > SWEEP_SECONDS:
            self._swept = time.monotonic()
            core.sweep()
        return wait

    def _draw(self, batch: Sequence[Picture]) -> None:
        core, now = self._core, time.monotonic()
        for picture in batch:
            core.meters.queue_seconds.labels("draw").observe(now - picture.arrived)
        begun = list(dict.fromkeys(one.job for one in batch if one.job not in self._begun))
        if begun:
            self._begun.update(begun)
            core.store.begin(*begun)
            for id in begun:
                core.watchers.tell(id)
        assert self._backbone is not None
        assert core.device is not None
        try:
            drawn = draw(self._backbone, batch, self._texts, core.device.progressed)
        except Exception as error:
            if len(batch) > 1:  # whose fault it is shows when each is drawn alone
                for picture in batch:
                    self._draw([picture])
                return
            if not isinstance(error, CatVersionError):
                logger.exception("a picture could not be drawn")
            self._fail(batch[0].job, f"It could not be drawn: {shown(error)}")
            return
        core.meters.drew(len(batch), drawn.seconds)
        self._writer.submit(self._write, drawn)

    def _write(self, drawn: DrawnBatch) -> None:
        """In the writer's thread."""
        core = self._core
        assert self._backbone is not None
        for picture, pixels in zip(drawn.pictures, drawn.pixels, strict=True):
            try:
                with core.lock:
                    if picture.job not in core.left:  # canceled meanwhile
                        self._begun.discard(picture.job)
                        continue
                if self._checker is not None and self._checker(pixels[None])[0]:
                    pixels = np.zeros_like(pixels)  # as diffusers does
                    core.store.warn(picture.job, safety.FLAGGED)
                write_picture(core.images, self._backbone, picture, pixels)
                core.meters.pictures_drawn.inc()
                with core.lock:
                    if picture.job not in core.left:
                        continue
                    core.left[picture.job] -= 1
                    is_last = core.left[picture.job] == 0
                if is_last and (job := core.store.job(picture.job)) is not None:
                    core.end(job, "succeeded")
                    self._begun.discard(job.id)
            except Exception as error:
                logger.exception("a picture could not be written")
                self._fail(picture.job, f"It could not be written: {shown(error)}")

    def _fail(self, id: str, reason: str) -> None:
        job = self._core.store.job(id)
        if job is not None:
            with self._core.lock:
                self._core.pictures.remove(lambda picture: picture.job == id)
            self._core.end(job, "failed", reason)
        self._begun.discard(id)

    # ------------------------------------------------------------------ teaching

    def _take_lessons(self) -> None:
        """Hand concepts to the training, no more than it has rows for and as many ahead."""
        core = self._core
        with core.lock:
            canceled, core.canceled = core.canceled, set()
        for id in canceled:
            self._live.withdraw(id)
            self._lessons.pop(id, None)
            core.folders.remove(None, [id])
        if core.draining:
            return
        while self._live.expects < 2 * self._num_rows:
            with core.lock:
                taken = core.lessons.take(1, lambda one, other: False)
            if not taken:
                return
            job = taken[0]
            core.store.take_lesson(job.id)
            core.meters.queue_seconds.labels("teach").observe(time.time() - job.created)
            self._live.add(job.id)
            core.watchers.tell(job.id)

    def _begins(self, name: str) -> None:
        """A lesson is prepared, or gets a row: where the process ends now, it may be the reason."""
        self._core.store.attempt(name)
        self._lessons[name] = False

    def _rests(self, name: str) -> None:
        """A lesson is prepared and waits for a row, which harms nobody."""
        self._core.store.give_back(name)
        self._lessons.pop(name, None)

    def _teach(self) -> bool:
        core, began = self._core, time.monotonic()
        worked = self._live.advance()
        if worked:
            core.meters.step_seconds.labels("teach").observe(time.monotonic() - began)
        for occupant in self._live.under_way:
            plain = occupant.plain_loss
            core.progress[occupant.name] = Progress(
                occupant.step,
                occupant.updates,
                tuple(occupant.evaluations),
                plain if plain == plain else None,
            )
            core.watchers.tell(occupant.name)
            is_saved = self._live.saved.get(occupant.name, 0) > occupant.first_step
            if is_saved and not self._lessons.get(occupant.name, True):
                self._lessons[occupant.name] = True
                core.store.advanced(occupant.name)
        core.meters.rows_used.set(len(self._live.under_way) / self._num_rows)
        for news in self._live.news():
            self._lessons.pop(news.name, None)
            job = core.store.job(news.name)
            if job is None or job.ended:
                continue
            if not news.succeeded:
                core.end(job, "failed", news.reason)
                continue
            assert job.concept is not None
            core.folders.publish(job.id, core.store.concept(job.owner, job.concept))
            core.store.set_taught(job)
            core.meters.taught(time.time() - (job.started or job.created))
            core.end(job, "succeeded")
        return worked

    @property
    def backbone(self) -> Backbone:
        """The model; there once everything is compiled."""
        assert self._backbone is not None
        return self._backbone

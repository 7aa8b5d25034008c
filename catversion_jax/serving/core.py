"""What the server does, without HTTP: concepts, jobs, and the device that works on them.

Every face (OpenAI's form, the native one, A1111's) asks here. Whatever is promised is in the store
before the answer goes out.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from catversion_jax.config.serving import ServeOptions
from catversion_jax.errors import CatVersionError, shown
from catversion_jax.methods.concept_file import Concept, load_concept
from catversion_jax.runtime.atomic_files import make_folder
from catversion_jax.sampling.requests import ConceptUse
from catversion_jax.serving.device import DeviceThread
from catversion_jax.serving.drawing import Picture, picture_path
from catversion_jax.serving.errors import ApiError, not_found, unprocessable
from catversion_jax.serving.fair_queue import FairQueue
from catversion_jax.serving.meters import Meters
from catversion_jax.serving.store import Job, Photo, Store, StoredConcept
from catversion_jax.serving.teaching import ConceptFolders, Progress
from catversion_jax.serving.watchers import Watchers

logger = logging.getLogger(__name__)

BASE = "base"
"""What clients call the model without a concept."""

MOST_ATTEMPTS = {"draw": 2, "teach": 5}
"""How often a job is begun, each time but the first after the process has ended in it; of a lesson
since an update was last saved. One that ends the process fails in the end, and a machine that is
taken away time and again costs nobody a concept."""


class Core:
    """One server's state. Any thread may call, except where a method says otherwise.

    Args:
      options: the server's options.
      store: the database of concepts, photos and jobs.
      folders: the photos and concept files on disk.
      meters: the counts of ``/metrics``.
    """

    def __init__(
        self, options: ServeOptions, store: Store, folders: ConceptFolders, meters: Meters
    ):
        self.options, self.store, self.folders, self.meters = options, store, folders, meters
        self.root = Path(options.output_dir)
        self.images = self.root / "images"
        make_folder(self.images)
        self.lock = threading.RLock()
        self.watchers = Watchers()
        self.draining = False
        self.device: DeviceThread | None = None
        self.safety_checker = ""  # which one looks at pictures, in words; known when it is loaded
        self.pictures = FairQueue[Picture](
            options.max_waiting_images,
            options.max_waiting_images_per_key,
            "pictures",
            lambda: meters.seconds_per_picture,
        )
        self.lessons = FairQueue[Job](
            options.max_waiting_concepts,
            options.max_waiting_concepts_per_key,
            "concepts",
            lambda: meters.seconds_per_concept,
        )
        self.left: dict[str, int] = {}  # pictures of a job that are not written yet
        self.progress: dict[str, Progress] = {}
        self.canceled: set[str] = set()  # teaching jobs that the device has to give up
        self._loaded: dict[tuple[str, float], Concept] = {}

    # ------------------------------------------------------------------ admission

    def admit(self) -> None:
        """Make sure that new work is taken at all.

        Raises:
          ApiError: 503, while the server loads, drains, or its device is gone.
        """
        device = self.device
        if self.draining:
            raise ApiError(
                503, "draining", "The server is shutting down. Ask it again later.", retry_after=30
            )
        if device is None or not device.compiled.is_set() or not device.is_alive:
            broken = device is not None and device.failure is not None
            code, text = (
                ("broken", "The device has failed; the server's log says how.")
                if broken
                else ("loading", "The model is being loaded and compiled. Ask again later.")
            )
            raise ApiError(503, code, text, retry_after=10)

    def check_ready(self) -> None:
        """Make sure that work is taken and the device moves.

        Raises:
          ApiError: 503, it is not.
        """
        self.admit()
        assert self.device is not None
        still = self.device.seconds_without_progress
        if still >= self.options.hung_after:
            text = f"The device has not moved for {still:.0f} s, though it has work. Restart it."
            raise ApiError(503, "hung", text)

    @property
    def has_ended(self) -> bool:
        """Whether nothing more is done until the next start."""
        device = self.device
        if device is None or device.failure is not None:
            return True
        return self.draining and not device.is_alive

    def repeated(self, owner: str, key: str | None, body: bytes) -> tuple[Job | None, str | None]:
        """The job of an earlier request with the same ``Idempotency-Key``, and this one's digest.

        Raises:
          ApiError: the key came with another body before.
        """
        if key is None:
            return None, None
        if not 1 <= len(key) <= 255:
            raise unprocessable(
                "idempotency_key", "Idempotency-Key: must have 1 to 255 characters."
            )
        digest = hashlib.sha256(body).hexdigest()
        job = self.store.job_of_key(owner, key)
        if job is not None and job.body_sha256 != digest:
            raise unprocessable(
                "idempotency_key_reused",
                f"Idempotency-Key {shown(key, 80)}: came with another body before. Use a new one.",
            )
        return job, digest

    # ------------------------------------------------------------------ concepts

    def concept(self, owner: str, id: str) -> StoredConcept:
        """The owner's concept of that id.

        Raises:
          ApiError: 404, the owner has none of that id.
        """
        found = self.store.concept(owner, id)
        if found is None:
            raise not_found("concept", id)
        return found

    def open_lesson(self, concept: StoredConcept) -> Job | None:
        """The job that teaches a concept now, if there is one."""
        job = self.store.last_teaching(concept.folder)
        return None if job is None or job.ended else job

    def changeable(self, owner: str, id: str) -> StoredConcept:
        """The owner's concept of that id, which is not being taught.

        Raises:
          ApiError: 404, the owner has none of that id; 422, it is being taught.
        """
        concept = self.concept(owner, id)
        if (job := self.open_lesson(concept)) is not None:
            raise unprocessable(
                "concept_is_taught",
                f"concept {id!r}: is being taught by job {job.id}. Wait for it, or cancel it.",
            )
        return concept

    def put_concept(self, owner: str, id: str, fields: Mapping[str, Any]) -> StoredConcept:
        """Make a concept, or say anew what it is.

        Raises:
          ApiError: it is being taught as something else, has the name of the plain model, or the
            key has too many.
        """
        if id == BASE:
            raise unprocessable(
                "invalid_id", f"concept {id!r}: is the model without a concept. Give another name."
            )
        with self.lock:
            before = self.store.concept(owner, id)
            if before is not None and dict(before.fields) == dict(fields):
                return before
            if before is not None:
                self.changeable(owner, id)
            elif self.store.count_concepts(owner) >= self.options.max_stored_concepts_per_key:
                raise unprocessable(
                    "too_many_concepts",
                    f"this key keeps {self.options.max_stored_concepts_per_key} concepts, which is "
                    "the limit. Delete some.",
                )
            return self.store.put_concept(owner, id, fields)

    def delete_concept(self, owner: str, id: str) -> None:
        """Forget a concept and everything of it; a job that teaches it is canceled."""
        with self.lock:
            concept = self.concept(owner, id)
            if (job := self.open_lesson(concept)) is not None:
                self.cancel(job)
            jobs = self.store.delete_concept(concept)
        self.folders.remove(concept.folder, jobs)
        for job_id in jobs:
            self.watchers.tell(job_id)

    def usable(self, owner: str, id: str, scale: float) -> ConceptUse:
        """A concept for a picture, at the given scale.

        Raises:
          ApiError: 404, the owner has none of that id; 422, it has no file yet, or one that cannot
            be read.
        """
        concept = self.concept(owner, id)
        job = self.store.last_teaching(concept.folder)
        path = None
        for candidate in (concept.taught_by, None if job is None or job.ended else job.id):
            if candidate is not None and path is None:
                path = self.folders.newest(candidate)
        if path is None:
            state = "no job teaches it" if job is None else f"job {job.id} is {job.state}"
            raise unprocessable(
                "concept_not_ready",
                f"concept {id!r}: is not taught yet ({state}). Teach it first: POST /v1/jobs with "
                '{"kind": "teach", "concept": ...}.',
                "model",
            )
        try:
            return ConceptUse.of(self._load(path), scale=scale)
        except CatVersionError as error:
            raise unprocessable("invalid_concept", str(error), "concepts") from error

    def _load(self, path: Path) -> Concept:
        key = (str(path), path.stat().st_mtime)
        with self.lock:
            if key not in self._loaded:
                if len(self._loaded) >= 1024:
                    self._loaded.pop(next(iter(self._loaded)))
                self._loaded[key] = load_concept(path)
            return self._loaded[key]

    def photos(self, concept: StoredConcept) -> list[Photo]:
        """The photos of a concept, in the order in which they came."""
        return self.store.photos(concept.folder)

    # ------------------------------------------------------------------ jobs

    def job(self, owner: str, id: str) -> Job:
        """The owner's job of that id.

        Raises:
          ApiError: 404, the owner has none of that id.
        """
        found = self.store.job(id)
        if found is None or found.owner != owner:
            raise not_found("job", id)
        return found

    def cancel(self, job: Job) -> None:
        """End a job that has not ended; what is under way on the device is thrown away."""
        with self.lock:
            if not self.store.end(job.id, "canceled"):
                return
            self.pictures.remove(lambda picture: picture.job == job.id)
            waited = self.lessons.remove(lambda lesson: lesson.id == job.id)
            self.left.pop(job.id, None)
            self.progress.pop(job.id, None)
            if job.kind == "teach" and not waited:
                self.canceled.add(job.id)
        self.meters.ended(job.kind, "canceled")
        self.watchers.tell(job.id)
        self.wake()

    def end(self, job: Job, state: str, error: str | None = None) -> None:
        """Note that the device has ended a job, and tell whoever waits for it."""
        changed = self.store.end(job.id, state, error)  # type: ignore[arg-type]
        with self.lock:
            self.left.pop(job.id, None)
            self.progress.pop(job.id, None)
        if changed:
            self.meters.ended(job.kind, state)
        self.watchers.tell(job.id)

    def position(self, job: Job) -> int | None:
        """How many pictures, or concepts, come before a job; None where it does not wait."""
        with self.lock:
            if job.kind == "draw":
                return self.pictures.ahead(job.owner, lambda picture: picture.job == job.id)
            return self.lessons.ahead(job.owner, lambda lesson: lesson.id == job.id)

    def picture(self, job: Job, index: int) -> bytes:
        """The file of a picture that is drawn; ``index`` counts from 0.

        Raises:
          ApiError: 404, the job has no picture of that number.
        """
        path = picture_path(self.images, job.id, index, job.request.get("output_format", "png"))
        try:
            return path.read_bytes()
        except FileNotFoundError:
            raise not_found("picture", f"{job.id}/{index}") from None

    def wake(self) -> None:
        """Tell the device's thread that there may be something to do."""
        if self.device is not None:
            self.device.wake()

    def remove_leftovers(self) -> None:
        """Delete what a killed process left behind; nothing may be under way."""
        self.folders.remove_strangers(self.store.folders())
        for begun in self.images.glob("*/.*.tmp"):
            begun.unlink(missing_ok=True)
        for folder in self.images.iterdir():
            if self.store.job(folder.name) is None:
                shutil.rmtree(folder, ignore_errors=True)
        self.sweep()

    def sweep(self) -> None:
        """Forget drawings that were kept long enough."""
        for id in self.store.forget_drawings(time.time() - 3600 * self.options.keep_hours):
            shutil.rmtree(self.images / id, ignore_errors=True)

"""Concepts and jobs as JSON, the same on every face."""

from __future__ import annotations

import math
import time
from typing import Any

from catversion_jax.serving.core import Core
from catversion_jax.serving.store import Job, Photo, StoredConcept


def photo_answer(photo: Photo) -> dict[str, Any]:
    """A photo as JSON; its width and height are in pixels."""
    return {
        "name": photo.name,
        "sha256": photo.sha256,
        "width": photo.width,
        "height": photo.height,
        "has_mask": photo.mask is not None,
    }


def concept_answer(core: Core, concept: StoredConcept) -> dict[str, Any]:
    """A concept as JSON: what it is, its photos, and what became of teaching it."""
    job = core.store.last_teaching(concept.folder)
    state = "collecting" if job is None else job.state
    return {
        "object": "concept",
        "id": concept.id,
        "created": int(concept.created),
        **concept.fields,
        "state": state,
        "is_usable": concept.taught_by is not None
        or (job is not None and not job.ended and core.folders.newest(job.id) is not None),
        "photos": [photo_answer(photo) for photo in core.photos(concept)],
        "job": None if job is None else job_answer(core, job),
    }


def job_answer(core: Core, job: Job) -> dict[str, Any]:
    """A job as JSON: its state in Replicate's words, its place in the queue, and an estimate of the
    seconds that are left.
    """
    answer: dict[str, Any] = {
        "object": "job",
        "id": job.id,
        "kind": job.kind,
        "status": job.state,
        "concept": job.concept,
        "created": int(job.created),
        "started": job.started,
        "finished": job.finished,
        "attempts": job.attempts,
        "queue_position": None if job.ended else core.position(job),
        "eta_seconds": None,
        "error": job.error,
    }
    if job.kind == "draw":
        done = job.state == "succeeded"
        answer["images"] = [
            f"/v1/jobs/{job.id}/images/{index}" for index in range(job.num_images) if done
        ]
        answer["request"] = dict(job.request)
    progress = core.progress.get(job.id)
    if progress is not None:
        answer["step"], answer["updates"] = progress.step, progress.updates
        answer["losses"] = [list(pair) for pair in progress.losses if math.isfinite(pair[1])]
        answer["plain_loss"] = progress.plain_loss
    if not job.ended:
        answer["eta_seconds"] = _seconds_left(core, job, answer["queue_position"])
    return answer


def _seconds_left(core: Core, job: Job, position: int | None) -> float | None:
    """An estimate from what has been done lately."""
    meters = core.meters
    if job.kind == "draw":
        pictures = (position or 0) + core.left.get(job.id, 0)
        return round(pictures * meters.seconds_per_picture, 2)
    progress = core.progress.get(job.id)
    if progress is None or job.started is None:
        return round(((position or 0) + 1) * meters.seconds_per_concept, 2)
    if progress.step == 0:
        return round(meters.seconds_per_concept, 2)
    took = time.time() - job.started
    return round(took / progress.step * (progress.updates - progress.step), 2)


def openai_model(id: str, created: float, owner: str) -> dict[str, Any]:
    """A model, or a concept, in OpenAI's form."""
    return {"id": id, "object": "model", "created": int(created), "owned_by": owner}

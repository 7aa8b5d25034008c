"""Pictures of what a concept has learned so far, for whoever watches it being taught."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Sequence

from catversion_jax.serving.errors import ApiError
from catversion_jax.serving.forms import DrawForm
from catversion_jax.serving.server import Server
from catversion_jax.serving.store import Job, StoredConcept
from catversion_jax.training.run import names

PICTURES, SEED = 2, 0
MOST_LESSONS = 256
"""Lessons whose drawings are remembered; of an older one they are drawn again."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """The drawing of one file of a lesson.

    Attributes:
      step: updates after which the file was written; None for the last file.
      job: the job that draws it.
    """

    step: int | None
    job: Job


class Samples:
    """Draws each file that a lesson writes once, when somebody looks: what nobody watches costs
    nothing. They wait in the queue as the owner's other pictures do.
    """

    def __init__(self, server: Server):
        self._server = server
        self._drawn: collections.OrderedDict[str, dict[int | None, str]] = collections.OrderedDict()

    def of(self, concept: StoredConcept) -> Sequence[Sample]:
        """The drawings of a concept's last lesson, of the first file first; none where another
        lesson's file is still the one that is drawn with.
        """
        core = self._server.core
        lesson = core.store.last_teaching(concept.folder)
        if lesson is None or concept.taught_by not in (None, lesson.id):
            return ()
        path = core.folders.newest(lesson.id)
        if path is None:
            return ()
        step = names.step_of_file(path)
        with core.lock:
            drawn = self._drawn.setdefault(lesson.id, {})
            if step not in drawn:
                asked = {
                    "prompt": f"a photo of a {concept.fields['base_class']}",
                    "n": min(PICTURES, core.options.max_pictures),
                    "seed": SEED,
                    "concepts": [{"id": concept.id}],
                }
                form = DrawForm.model_validate(asked)
                with contextlib.suppress(ApiError):  # no room, or not compiled: the next look asks
                    drawn[step] = self._server.orders.take(concept.owner, form, is_sample=True).id
            while len(self._drawn) > MOST_LESSONS:
                self._drawn.popitem(last=False)
            jobs = [(step, core.store.job(id)) for step, id in drawn.items()]
        return [Sample(step, job) for step, job in jobs if job is not None]

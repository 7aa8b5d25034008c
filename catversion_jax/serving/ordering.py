"""From a request for pictures to what is drawn, and its place in the queue."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from catversion_jax.config.sampling import SAMPLERS, SamplingSettings
from catversion_jax.config.serving import parsed_size
from catversion_jax.errors import CatVersionError, encodable, shown
from catversion_jax.models.stable_diffusion import Backbone
from catversion_jax.sampling.denoising import checked_sampler
from catversion_jax.sampling.requests import (
    ImageRequest,
    active_concepts,
    check_concept,
    prompt_warnings,
)
from catversion_jax.serving.core import BASE, Core
from catversion_jax.serving.drawing import Picture, usual_batch_size
from catversion_jax.serving.errors import unprocessable
from catversion_jax.serving.forms import DrawForm
from catversion_jax.serving.store import Job


class Orders:
    """Takes requests for pictures.

    Args:
      core: the server.
      backbone: the model that draws.
    """

    def __init__(self, core: Core, backbone: Backbone):
        self._core, self._backbone = core, backbone
        own = (backbone.default_resolution,) * 2
        asked = [size for text in core.options.sizes if (size := parsed_size(text))]
        self.sizes: tuple[tuple[int, int], ...] = tuple(dict.fromkeys(asked)) or (own,)

    def settings(self, request: Mapping[str, Any]) -> SamplingSettings:
        """How the pictures of a request are drawn: everything said, nothing left open.

        Raises:
          ApiError: a size or a sampler that cannot be.
        """
        options = self._core.options
        size = request.get("size")
        width_height = self.sizes[0] if size in (None, "auto") else parsed_size(str(size))
        if width_height not in self.sizes:
            known = ", ".join(f"{width}x{height}" for width, height in self.sizes)
            raise unprocessable(
                "invalid_size", f"size={shown(size)}: must be auto or one of {known}.", "size"
            )
        steps = request.get("num_inference_steps")
        if steps is not None and steps > options.max_inference_steps:
            raise unprocessable(
                "too_many_steps",
                f"num_inference_steps={steps}: must be at most {options.max_inference_steps}.",
                "num_inference_steps",
            )
        sampler = request.get("sampler")
        if sampler is not None and sampler not in SAMPLERS:
            raise unprocessable(
                "invalid_sampler",
                f"sampler={shown(sampler)}: must be one of {', '.join(SAMPLERS)}.",
                "sampler",
            )
        try:
            settings = SamplingSettings(
                sampler=sampler,
                num_inference_steps=steps,
                guidance_scale=request.get("guidance_scale"),
                width=width_height[0],
                height=width_height[1],
                batch_size=options.batch_size or usual_batch_size(),
            ).over(self._backbone.drawing_defaults)
            checked_sampler(self._backbone, settings)
        except CatVersionError as error:
            raise unprocessable("invalid_request", str(error)) from error
        return settings

    def take(
        self,
        owner: str,
        form: DrawForm,
        *,
        is_sample: bool = False,
        idempotency_key: str | None = None,
        body_sha256: str | None = None,
    ) -> Job:
        """Check a request, keep it, and put its pictures into the queue.

        Args:
          owner: whose pictures they are.
          form: the request.
          is_sample: whether a page asks, and not a person.
          idempotency_key: of the client, which asks once under it.
          body_sha256: digest of what it asked.

        Raises:
          ApiError: it cannot be drawn, there is no room, or the server takes nothing now.
        """
        core = self._core
        core.admit()
        if form.n > core.options.max_pictures:
            raise unprocessable(
                "too_many_pictures",
                f"n={form.n}: must be at most {core.options.max_pictures}.",
                "n",
            )
        with core.lock:
            core.pictures.admit(owner, form.n)
        request = form.model_dump(exclude={"kind", "user", "quality", "style", "background"})
        if request["seed"] is None:
            request["seed"] = secrets.randbelow(2**32)
        request["is_sample"] = is_sample
        settings = self.settings(request)
        shown_pictures = self._requests(owner, request)
        request["warnings"] = list(prompt_warnings(self._backbone.tokenizers, shown_pictures[:1]))
        with core.lock:
            core.pictures.admit(owner, form.n)  # others may have come meanwhile
            job = core.store.add_job(
                owner,
                "draw",
                request,
                num_images=form.n,
                idempotency_key=idempotency_key,
                body_sha256=body_sha256,
            )
            self._enqueue(job, settings, shown_pictures, range(form.n))
        core.wake()
        return job

    def resume(self, job: Job, missing: Sequence[int]) -> None:
        """Put those pictures of an earlier process's job into the queue that have no file.

        Raises:
          ApiError: what it was asked for is not there any more.
        """
        settings = self.settings(job.request)
        with self._core.lock:
            self._enqueue(job, settings, self._requests(job.owner, job.request), missing)

    def _enqueue(
        self,
        job: Job,
        settings: SamplingSettings,
        requests: Sequence[ImageRequest],
        indices: Sequence[int],
    ) -> None:
        now = time.monotonic()
        self._core.left[job.id] = len(indices)
        for index in indices:
            picture = Picture(
                job.id,
                index,
                job.owner,
                requests[index],
                settings,
                job.request["output_format"],
                job.request["output_compression"],
                now,
            )
            self._core.pictures.put(job.owner, picture)

    def _requests(self, owner: str, request: Mapping[str, Any]) -> list[ImageRequest]:
        """One for each picture; seeds count on from the first.

        Raises:
          ApiError: a concept is not there, or cannot act together with another.
        """
        named = [(one["id"], one["scale"]) for one in request["concepts"]]
        if request["model"] != BASE:
            named.insert(0, (request["model"], 1.0))
        ids = [id for id, _ in named]
        if len(set(ids)) < len(ids):
            raise unprocessable(
                "invalid_concepts", f"concepts {', '.join(ids)}: name each once.", "concepts"
            )
        most = self._core.options.max_concepts
        if len(ids) > most:
            raise unprocessable(
                "too_many_concepts", f"{len(ids)} concepts: must be at most {most}.", "concepts"
            )
        for field in ("prompt", "negative_prompt"):
            if encodable(request[field]) != request[field] or "\0" in request[field]:
                raise unprocessable(
                    "invalid_text", f"{field}: must be text that UTF-8 can hold.", field
                )
        uses = tuple(self._core.usable(owner, id, scale) for id, scale in named)
        try:
            for use in uses:
                check_concept(self._backbone, use, {})
            active_concepts(self._backbone.tokenizers[0], request["prompt"], uses)
            first = ImageRequest(
                request["prompt"], uses, request["seed"], request["negative_prompt"]
            )
        except CatVersionError as error:
            raise unprocessable("invalid_concepts", str(error), "concepts") from error
        count = int(request["n"])
        return [
            dataclasses.replace(first, seed=(first.seed + index) % 2**32) for index in range(count)
        ]

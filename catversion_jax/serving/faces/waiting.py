"""Asking for pictures and waiting for them, without a thread that waits."""

import asyncio
import contextlib
from typing import Any

from catversion_jax.serving.core import Core
from catversion_jax.serving.errors import ApiError, not_found, unprocessable
from catversion_jax.serving.forms import DrawForm
from catversion_jax.serving.server import Server
from catversion_jax.serving.store import Job

LOOK_SECONDS = 5.0
"""How often the place in the queue of a job is looked at for who follows it."""
UNTOLD_SECONDS = 60.0
"""How often a job is looked at though nobody told of it; hundreds may wait."""


async def taken(server: Server, form: DrawForm, request: Any) -> Job:
    """The job of a request for pictures: a new one, or that of its ``Idempotency-Key``.

    Raises:
      ApiError: it is refused.
    """
    key, body = request.headers.get("idempotency-key"), await request.body()
    owner = request.state.owner

    def take() -> Job:
        with server.core.lock if key is not None else contextlib.nullcontext():
            earlier, digest = server.core.repeated(owner, key, body)
            if earlier is not None:
                return earlier
            return server.orders.take(owner, form, idempotency_key=key, body_sha256=digest)

    return await asyncio.to_thread(take)


async def until_ended(core: Core, job: Job) -> Job:
    """The job once its pictures are there.

    Raises:
      ApiError: it failed, was canceled, or the server ends first.
    """
    with core.watchers.watching(job.id) as event:
        while True:
            now = await asyncio.to_thread(core.store.job, job.id)
            if now is None:
                raise not_found("job", job.id)
            if now.ended:
                break
            if core.has_ended:
                raise ApiError(
                    503,
                    "draining",
                    f"The server ends. Job {job.id} goes on after its next start: "
                    f"GET /v1/jobs/{job.id}.",
                    retry_after=30,
                )
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(event.wait(), UNTOLD_SECONDS)
            event.clear()
    if now.state == "canceled":
        raise unprocessable("canceled", f"job {now.id}: was canceled.")
    if now.state == "failed":
        raise ApiError(500, "job_failed", now.error or f"job {now.id}: failed.")
    return now

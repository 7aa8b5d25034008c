"""This server's own API: concepts, their photos, and jobs."""

import asyncio
import contextlib
import json
import sqlite3
from collections.abc import AsyncIterator
from typing import Annotated, Any

from catversion_jax.errors import encodable
from catversion_jax.serving import uploads
from catversion_jax.serving.answers import concept_answer, job_answer, photo_answer
from catversion_jax.serving.errors import not_found, unprocessable
from catversion_jax.serving.faces.waiting import LOOK_SECONDS, taken
from catversion_jax.serving.forms import ID, ConceptForm, DrawJobForm, JobForm
from catversion_jax.serving.server import Server

PICTURE_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
DECODERS = 2
"""Photos that are decoded at once: each may need 200 MB."""


def routes(server: Server) -> Any:
    """``/v1/concepts`` and ``/v1/jobs``."""
    from fastapi import APIRouter, Path, Query, Request
    from fastapi.responses import JSONResponse, Response, StreamingResponse

    router, core = APIRouter(tags=["concepts and jobs"]), server.core
    decoders = asyncio.Semaphore(DECODERS)
    Id = Annotated[str, Path(pattern=ID)]
    binary = {"schema": {"type": "string", "format": "binary"}}
    image_body = {"requestBody": {"required": True, "content": {"image/*": binary}}}

    def of_kind(media_type: str) -> dict[str, Any]:
        """For OpenAPI: an answer that is no JSON."""
        content = {} if media_type == "text/event-stream" else binary
        answer = {"description": "No JSON.", "content": {media_type: content}}
        return {"response_class": Response, "responses": {200: answer}}

    # ---------------------------------------------------------------- concepts

    @router.get("/v1/concepts")
    def concepts(request: Request) -> dict[str, Any]:
        """All concepts of this key, the newest first."""
        found = core.store.concepts(request.state.owner)
        return {"object": "list", "data": [concept_answer(core, one) for one in found]}

    @router.put("/v1/concepts/{id}")
    def put_concept(id: Id, form: ConceptForm, request: Request) -> dict[str, Any]:
        """Make a concept under a name of the client's choice; the same again changes nothing."""
        fields = uploads.checked_fields(core, form)
        return concept_answer(core, core.put_concept(request.state.owner, id, fields))

    @router.get("/v1/concepts/{id}")
    def concept(id: Id, request: Request) -> dict[str, Any]:
        """One concept, with its photos and the job that teaches it."""
        return concept_answer(core, core.concept(request.state.owner, id))

    @router.delete("/v1/concepts/{id}")
    def delete_concept(id: Id, request: Request) -> dict[str, Any]:
        """Delete a concept with its photos, file and jobs."""
        core.delete_concept(request.state.owner, id)
        return {"object": "concept", "id": id, "deleted": True}

    @router.put("/v1/concepts/{id}/photos/{name}", openapi_extra=image_body)
    async def put_photo(id: Id, name: Id, request: Request) -> dict[str, Any]:
        """Send a photo as the body; one of the same name is replaced."""
        owner = request.state.owner
        found = await asyncio.to_thread(core.changeable, owner, id)
        await asyncio.to_thread(uploads.check_photo_fits, core, found, name)
        data = await request.body()
        async with decoders:
            photo = await asyncio.to_thread(uploads.keep_photo, core, owner, id, name, data)
        return photo_answer(photo)

    @router.put("/v1/concepts/{id}/masks/{name}", openapi_extra=image_body)
    async def put_mask(id: Id, name: Id, request: Request) -> dict[str, Any]:
        """Send the mask of the photo of that name as the body: white where the object is."""
        owner = request.state.owner
        found = await asyncio.to_thread(core.changeable, owner, id)
        if all(photo.name != name for photo in core.photos(found)):
            raise not_found("photo", name)
        data = await request.body()
        async with decoders:
            await asyncio.to_thread(uploads.keep_mask, core, owner, id, name, data)
        return {"name": name, "has_mask": True}

    @router.get("/v1/concepts/{id}/photos/{name}", **of_kind("image/*"))
    def photo(id: Id, name: Id, request: Request) -> Response:
        """A photo, as it was sent."""
        found = core.concept(request.state.owner, id)
        for one in core.photos(found):
            if one.name == name:
                kind = one.file.rpartition(".")[2].replace("jpg", "jpeg").replace("tif", "tiff")
                data = core.folders.photo(found.folder, one.file)
                return Response(data, media_type=f"image/{kind}", headers=_QUIET)
        raise not_found("photo", name)

    @router.delete("/v1/concepts/{id}/photos/{name}")
    def delete_photo(id: Id, name: Id, request: Request) -> dict[str, Any]:
        """Delete a photo and its mask."""
        with core.lock:
            found = core.changeable(request.state.owner, id)
            for one in core.photos(found):
                if one.name == name:
                    core.store.delete_photo(found.folder, name)
                    core.folders.remove_photo(found.folder, one.file, one.mask)
                    return {"name": name, "deleted": True}
        raise not_found("photo", name)

    @router.get("/v1/concepts/{id}/check")
    def check(id: Id, request: Request) -> dict[str, Any]:
        """What ``catversion check`` says of the photos: problems, warnings, notes."""
        return uploads.checked(core, server.worker, core.concept(request.state.owner, id))

    @router.get("/v1/concepts/{id}/file", **of_kind("application/octet-stream"))
    def file(id: Id, request: Request) -> Response:
        """The concept file (safetensors), for ``catversion generate`` and diffusers."""
        found = core.concept(request.state.owner, id)
        if found.taught_by is None:
            raise not_found("file of concept", id)
        data = core.folders.file(found.taught_by).read_bytes()
        named = {"Content-Disposition": f'attachment; filename="{id}.safetensors"'}
        return Response(data, media_type="application/octet-stream", headers={**_QUIET, **named})

    @router.get("/v1/concepts/{id}/events", **of_kind("text/event-stream"))
    async def events(id: Id, request: Request) -> StreamingResponse:
        """Server-sent events: the concept's job, again whenever something becomes of it."""
        found = await asyncio.to_thread(core.concept, request.state.owner, id)
        job = await asyncio.to_thread(core.store.last_teaching, found.folder)
        if job is None:
            raise not_found("job of concept", id)
        stream = _events(server, job.id)
        return StreamingResponse(stream, media_type="text/event-stream", headers=_LIVE)

    # ---------------------------------------------------------------- jobs

    @router.post("/v1/jobs", status_code=202)
    async def post_job(form: JobForm, request: Request) -> JSONResponse:
        """Ask for pictures, or for a concept to be taught, without waiting for it."""
        if isinstance(form, DrawJobForm):
            job = await taken(server, form, request)
            return JSONResponse(job_answer(core, job), 202)
        key, body = request.headers.get("idempotency-key"), await request.body()
        owner = request.state.owner

        def teach() -> dict[str, Any]:
            earlier, digest = core.repeated(owner, key, body)
            if earlier is not None:
                return job_answer(core, earlier)
            try:
                job, report = uploads.ask_lesson(
                    core,
                    server.worker,
                    owner,
                    form.concept,
                    idempotency_key=key,
                    body_sha256=digest,
                )
            except sqlite3.IntegrityError:  # the same request, at the same time
                earlier, _ = core.repeated(owner, key, body)
                assert earlier is not None
                return job_answer(core, earlier)
            return {**job_answer(core, job), "check": report}

        async with decoders:
            return JSONResponse(await asyncio.to_thread(teach), 202)

    @router.get("/v1/jobs")
    def jobs(request: Request, limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> dict[str, Any]:
        """The newest jobs of this key."""
        found = core.store.jobs(request.state.owner, limit=limit)
        return {"object": "list", "data": [job_answer(core, one) for one in found]}

    @router.get("/v1/jobs/{id}")
    def job(id: str, request: Request) -> dict[str, Any]:
        """One job."""
        return job_answer(core, core.job(request.state.owner, _text(id)))

    @router.post("/v1/jobs/{id}/cancel")
    def cancel(id: str, request: Request) -> dict[str, Any]:
        """End a job; one that has ended stays as it is."""
        found = core.job(request.state.owner, _text(id))
        core.cancel(found)
        return job_answer(core, core.job(request.state.owner, found.id))

    @router.get("/v1/jobs/{id}/images/{index}", **of_kind("image/*"))
    def image(id: str, index: Annotated[int, Path(ge=0, le=1000)], request: Request) -> Response:
        """A picture of a job that has succeeded."""
        found = core.job(request.state.owner, _text(id))
        if found.kind != "draw" or found.state != "succeeded":
            raise not_found("picture", f"{found.id}/{index}")
        kind = PICTURE_TYPES[found.request["output_format"]]
        return Response(core.picture(found, index), media_type=kind, headers=_QUIET)

    @router.get("/v1/jobs/{id}/events", **of_kind("text/event-stream"))
    async def job_events(id: str, request: Request) -> StreamingResponse:
        """Server-sent events of one job."""
        found = await asyncio.to_thread(core.job, request.state.owner, _text(id))
        stream = _events(server, found.id)
        return StreamingResponse(stream, media_type="text/event-stream", headers=_LIVE)

    return router


_QUIET = {"X-Content-Type-Options": "nosniff", "Cache-Control": "private, max-age=3600"}
_LIVE = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


def _text(id: str) -> str:
    if encodable(id) != id or "\0" in id:
        raise unprocessable("invalid_id", "id: must be text that UTF-8 can hold.")
    return id


async def _events(server: Server, id: str) -> AsyncIterator[str]:
    """One event for every change of a job, until it has ended."""
    core = server.core
    with core.watchers.watching(id) as event:
        before = None
        while True:
            now = await asyncio.to_thread(core.store.job, id)
            if now is None:
                yield "event: deleted\ndata: {}\n\n"
                return
            text = json.dumps(await asyncio.to_thread(job_answer, core, now))
            yield f"event: job\ndata: {text}\n\n" if text != before else ": alive\n\n"
            before = text
            if now.ended or core.has_ended:
                return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(event.wait(), LOOK_SECONDS)
            event.clear()

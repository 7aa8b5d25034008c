"""OpenAI's Images API: any of its clients draws with a concept as its ``model``."""

import base64
import time
from typing import Any

from catversion_jax.serving.answers import job_answer, openai_model
from catversion_jax.serving.core import BASE
from catversion_jax.serving.errors import not_found
from catversion_jax.serving.faces.waiting import taken, until_ended
from catversion_jax.serving.forms import DrawForm
from catversion_jax.serving.server import Server


def routes(server: Server) -> Any:
    """``/v1/images/generations`` and ``/v1/models``."""
    from fastapi import APIRouter, Request
    from fastapi.responses import JSONResponse

    router, core = APIRouter(tags=["openai"]), server.core

    @router.post("/v1/images/generations")
    async def generate(form: DrawForm, request: Request) -> JSONResponse:
        """Draw pictures and wait for them; with ``Prefer: respond-async`` 202 and the job."""
        job = await taken(server, form, request)
        if "respond-async" in request.headers.get("prefer", ""):
            return JSONResponse(job_answer(core, job), 202)
        job = await until_ended(core, job)
        data = []
        for index in range(job.num_images):
            if form.response_format == "url":
                one = {"url": f"{request.base_url}v1/jobs/{job.id}/images/{index}"}
            else:
                one = {"b64_json": base64.b64encode(core.picture(job, index)).decode()}
            data.append({**one, "revised_prompt": form.prompt})
        body = {
            "created": int(job.created),
            "data": data,
            "output_format": form.output_format,
            "job": job.id,
            "seed": job.request["seed"],
            "warnings": job.request["warnings"],
        }
        return JSONResponse(body, headers={"X-Job-Id": job.id})

    @router.get("/v1/models")
    def models(request: Request) -> dict[str, Any]:
        """The plain model and the key's own concepts that can be drawn with."""
        owner = request.state.owner
        found = [openai_model(BASE, started, "catversion")]
        found += [
            openai_model(one.id, one.created, owner)
            for one in core.store.concepts(owner)
            if one.taught_by is not None
        ]
        return {"object": "list", "data": found}

    @router.get("/v1/models/{id}")
    def model(id: str, request: Request) -> dict[str, Any]:
        """The plain model, or one concept of this key."""
        for one in models(request)["data"]:
            if one["id"] == id:
                return one
        raise not_found("model", id)

    started = time.time()
    return router

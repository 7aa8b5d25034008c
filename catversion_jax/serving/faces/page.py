"""The page: teach, draw, library. Everything is on the server, so that reloading loses nothing."""

import asyncio
import contextlib
import json
import math
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import jinja2

from catversion_jax.serving import uploads
from catversion_jax.serving.answers import concept_answer, job_answer
from catversion_jax.serving.core import BASE
from catversion_jax.serving.errors import ApiError
from catversion_jax.serving.faces.waiting import LOOK_SECONDS
from catversion_jax.serving.forms import ConceptForm, DrawForm, UsedConcept
from catversion_jax.serving.samples import Samples
from catversion_jax.serving.server import Server

FOLDER = Path(__file__).resolve().parents[1] / "page"
POLICY = "default-src 'self'; img-src 'self' blob:; frame-ancestors 'none'; form-action 'self'"
PERSONS = ("person", "man", "woman", "boy", "girl", "child", "baby", "face", "people")
CHART_WIDTH, CHART_HEIGHT = 320, 96


def templates() -> jinja2.Environment:
    """The Jinja environment of the page's templates."""
    loader = jinja2.FileSystemLoader(FOLDER / "templates")
    env = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    env.globals["curve"] = curve
    return env


def curve(losses: Sequence[Sequence[float]], updates: int, plain: float | None) -> dict[str, Any]:
    """Losses as the points of a polyline in a box of :data:`CHART_WIDTH` x :data:`CHART_HEIGHT`;
    ``plain`` is the height of the plain model's.
    """
    values = [loss for _, loss in losses if math.isfinite(loss)]
    levels = values + ([plain] if plain is not None and math.isfinite(plain) else [])
    if not levels:
        return {"points": "", "last": "", "plain": None, "low": None, "high": None}
    low, high = min(levels), max(levels)
    spread = (high - low) or 1.0

    def height(loss: float) -> float:
        return round(6 + (CHART_HEIGHT - 12) * (high - loss) / spread, 1)

    points = [
        f"{round(CHART_WIDTH * step / max(updates, 1), 1)},{height(loss)}"
        for step, loss in losses
        if math.isfinite(loss)
    ]
    level = None if plain is None or not math.isfinite(plain) else height(plain)
    last = points[-1] if points else ""
    return {"points": " ".join(points), "last": last, "plain": level, "low": low, "high": high}


def pairs(jobs: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Drawings, newest first, each with the plain model's of the same seed beside it where that was
    asked for with it.
    """
    same = ("prompt", "negative_prompt", "seed", "n", "num_inference_steps")
    found: list[list[Mapping[str, Any]]] = []
    for job in jobs:
        request = job["request"]
        newer = found[-1] if found else []
        plain = newer[0]["request"] if len(newer) == 1 else request
        beside = request.get("concepts") and not plain.get("concepts")
        if beside and all(plain.get(name) == request.get(name) for name in same):
            found[-1] = [job, *newer]
        else:
            found.append([job])
    return found


def routes(server: Server) -> Any:
    """``/``, ``/teach``, ``/draw``, ``/library`` and the parts that they fetch."""
    from fastapi import APIRouter, Request
    from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse, StreamingResponse

    router, core, env = APIRouter(include_in_schema=False), server.core, templates()
    samples = Samples(server)
    static = {path.name: path for path in (FOLDER / "static").iterdir()}

    def shown(name: str, request: Request, status: int = 200, **values: Any) -> HTMLResponse:
        text = env.get_template(name).render(
            owner=request.state.owner,
            path=request.url.path,
            model=server.options.model,
            compiled=server.device.compiled.is_set(),
            max_images=server.options.max_images,
            **values,
        )
        headers = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"}
        return HTMLResponse(text, status, {**headers, "Cache-Control": "no-store"})

    def concepts(request: Request) -> list[dict[str, Any]]:
        return [concept_answer(core, one) for one in core.store.concepts(request.state.owner)]

    @router.get("/")
    def root() -> RedirectResponse:
        return RedirectResponse("/teach")

    @router.get("/static/{name}")
    def file(name: str) -> FileResponse:
        if name not in static:
            raise ApiError(404, "not_found", f"/static/{name}: there is none.")
        return FileResponse(static[name], headers={"Cache-Control": "max-age=3600"})

    @router.get("/favicon.ico")
    def icon() -> FileResponse:
        return FileResponse(static["icon.svg"], media_type="image/svg+xml")

    # ---------------------------------------------------------------- teach

    @router.get("/teach")
    def teach(request: Request) -> HTMLResponse:
        return shown("teach.html", request, concepts=concepts(request)[:12], error=None, given={})

    @router.post("/teach")
    async def begin(request: Request) -> Any:
        given = _fields(await request.body())
        word, id = given.get("base_class", "").strip(), given.get("id", "").strip()
        try:
            if not id:
                raise ApiError(422, "invalid_request", "Give it a name, such as my-teapot.")
            if set(word.lower().split()) & set(PERSONS) and not given.get("consent"):
                raise ApiError(
                    422,
                    "consent_needed",
                    "For a person, confirm that she or he has agreed to be taught and drawn.",
                )
            form = _checked(ConceptForm, base_class=word)
            _checked(UsedConcept, id=id)
            fields = await asyncio.to_thread(uploads.checked_fields, core, form)
            await asyncio.to_thread(core.put_concept, request.state.owner, id, fields)
        except ApiError as error:
            listed = (await asyncio.to_thread(concepts, request))[:12]
            return shown(
                "teach.html", request, 422, concepts=listed, error=error.message, given=given
            )
        return RedirectResponse(f"/teach/{id}", 303)

    @router.get("/teach/{id}")
    def one(id: str, request: Request) -> HTMLResponse:
        concept = concept_answer(core, core.concept(request.state.owner, id))
        return shown("concept.html", request, concept=concept, check=_check(id, request))

    @router.get("/teach/{id}/photos")
    def photos(id: str, request: Request) -> HTMLResponse:
        concept = concept_answer(core, core.concept(request.state.owner, id))
        return shown("parts/photos.html", request, concept=concept, check=_check(id, request))

    def _check(id: str, request: Request) -> Mapping[str, Any] | None:
        concept = core.concept(request.state.owner, id)
        if not core.photos(concept):
            return None
        with contextlib.suppress(ApiError):  # not compiled yet
            return uploads.checked(core, server.worker, concept)
        return None

    @router.get("/teach/{id}/samples")
    def sampled(id: str, request: Request) -> HTMLResponse:
        concept = core.concept(request.state.owner, id)
        found = [(one.step, job_answer(core, one.job)) for one in samples.of(concept)]
        goes_on = core.open_lesson(concept) is not None
        goes_on = goes_on or any(job["finished"] is None for _, job in found)
        answer = {"id": concept.id}
        return shown("parts/samples.html", request, concept=answer, samples=found, goes_on=goes_on)

    @router.post("/teach/{id}/start")
    def start(id: str, request: Request) -> HTMLResponse:
        error = None
        try:
            uploads.ask_lesson(
                core,
                server.worker,
                request.state.owner,
                id,
                idempotency_key=None,
                body_sha256=None,
            )
        except ApiError as refused:
            error = refused.message
        concept = concept_answer(core, core.concept(request.state.owner, id))
        return shown("parts/lesson.html", request, concept=concept, error=error)

    @router.post("/teach/{id}/stop")
    def stop(id: str, request: Request) -> HTMLResponse:
        concept = core.concept(request.state.owner, id)
        if (job := core.open_lesson(concept)) is not None:
            core.cancel(job)
        answer = concept_answer(core, concept)
        return shown("parts/lesson.html", request, concept=answer, error=None)

    @router.get("/teach/{id}/live")
    async def live(id: str, request: Request) -> StreamingResponse:
        concept = await asyncio.to_thread(core.concept, request.state.owner, id)
        job = await asyncio.to_thread(core.store.last_teaching, concept.folder)

        def part() -> str:
            answer = concept_answer(core, core.concept(request.state.owner, id))
            return env.get_template("parts/progress.html").render(concept=answer)

        stream = _parts(server, None if job is None else job.id, part)
        return StreamingResponse(
            stream, media_type="text/event-stream", headers={"Cache-Control": "no-store"}
        )

    # ---------------------------------------------------------------- draw

    @router.get("/draw")
    def draw(request: Request) -> HTMLResponse:
        usable = [one for one in concepts(request) if one["is_usable"]]
        chosen = request.query_params.get("concept", "")
        word = next((one["base_class"] for one in usable if one["id"] == chosen), "")
        drawn = [job for job in core.store.jobs(request.state.owner) if job.kind == "draw"]
        asked = [job for job in drawn if not job.request.get("is_sample")]
        jobs = [job_answer(core, job) for job in asked[:12]]
        prompt = f"a photo of a {word} on the beach" if word else ""
        return shown(
            "draw.html",
            request,
            concepts=usable,
            chosen=chosen,
            prompt=prompt,
            pairs=pairs(jobs),
        )

    @router.post("/draw")
    async def order(request: Request) -> HTMLResponse:
        data = await request.body()
        jobs: list[dict[str, Any]] = []
        error = None

        def take() -> None:
            given = _fields(data)
            body, used = _drawing(given), _used(given)
            form = _checked(DrawForm, **body, concepts=used)
            first = server.orders.take(request.state.owner, form)
            jobs.append(job_answer(core, first))
            if given.get("beside") and used:  # the same seed without the concepts
                plain = {**body, "seed": first.request["seed"]}
                other = server.orders.take(request.state.owner, _checked(DrawForm, **plain))
                jobs.append(job_answer(core, other))

        try:
            await asyncio.to_thread(take)
        except ApiError as refused:
            error = refused.message
        return shown("parts/drawn.html", request, jobs=jobs, error=error, base=BASE)

    @router.get("/draw/{id}")
    def drawing(id: str, request: Request) -> HTMLResponse:
        job = job_answer(core, core.job(request.state.owner, id))
        return shown("parts/job.html", request, job=job)

    @router.post("/draw/{id}/stop")
    def stop_drawing(id: str, request: Request) -> HTMLResponse:
        core.cancel(core.job(request.state.owner, id))
        job = job_answer(core, core.job(request.state.owner, id))
        return shown("parts/job.html", request, job=job)

    # ---------------------------------------------------------------- library

    @router.get("/library")
    def library(request: Request) -> HTMLResponse:
        return shown("library.html", request, concepts=concepts(request))

    @router.post("/library/{id}/delete")
    def delete(id: str, request: Request) -> HTMLResponse:
        core.delete_concept(request.state.owner, id)
        return shown("parts/cards.html", request, concepts=concepts(request))

    return router


def _fields(body: bytes) -> dict[str, str]:
    """A form as browsers send it.

    Raises:
      ApiError: it has more fields than any of the page's.
    """
    try:
        text = body.decode("utf-8", "replace")
        pairs = parse_qs(text, keep_blank_values=True, max_num_fields=500)
    except ValueError as error:
        raise ApiError(422, "invalid_request", f"The form cannot be read: {error}.") from error
    return {name: values[-1] for name, values in pairs.items()}


def _drawing(given: Mapping[str, str]) -> dict[str, Any]:
    """What the form says of a drawing, but for its concepts."""
    body: dict[str, Any] = {
        "prompt": given.get("prompt", ""),
        "negative_prompt": given.get("negative_prompt", ""),
        "n": _whole(given, "n", 1),
        "num_inference_steps": _whole(given, "steps", 25),
    }
    if given.get("seed", "").strip():
        body["seed"] = _whole(given, "seed", 0)
    return body


def _used(given: Mapping[str, str]) -> list[dict[str, Any]]:
    """The concepts that are ticked in the form."""
    return [
        {"id": name.removeprefix("use:"), "scale": _number(given, f"scale:{name[4:]}", 1.0)}
        for name in given
        if name.startswith("use:")
    ]


def _number(given: Mapping[str, str], name: str, usual: float) -> float:
    text = given.get(name, "").strip()
    try:
        number = float(text) if text else usual
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ApiError(422, "invalid_request", f"{name}={text[:40]!r}: must be a number.")
    return number


def _whole(given: Mapping[str, str], name: str, usual: int) -> int:
    number = _number(given, name, usual)
    if number != int(number):
        raise ApiError(422, "invalid_request", f"{name}={given[name][:40]}: must be whole.")
    return int(number)


def _checked(form: Any, **values: Any) -> Any:
    """A form's values as pydantic checks them.

    Raises:
      ApiError: one is wrong; the first is named.
    """
    from pydantic import ValidationError

    try:
        return form(**values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ApiError(422, "invalid_request", f"{place}: {first['msg']}.", param=place) from error


async def _parts(server: Server, id: str | None, part: Any) -> AsyncIterator[str]:
    """A part of the page whenever something becomes of a job; then the word ``end``."""
    core = server.core
    if id is not None:
        with core.watchers.watching(id) as event:
            while True:
                now = await asyncio.to_thread(core.store.job, id)
                if now is None or now.ended or core.has_ended:
                    break
                yield _event("progress", await asyncio.to_thread(part))
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(event.wait(), LOOK_SECONDS)
                event.clear()
    yield _event("end", json.dumps(id))


def _event(name: str, text: str) -> str:
    lines = "\n".join(f"data: {line}" for line in text.splitlines())
    return f"event: {name}\n{lines}\n\n"

"""The application: faces, gate and errors. FastAPI is imported where it is used, since it belongs
to the extra ``serve``.
"""

import contextlib
import importlib.util
import logging
from collections.abc import AsyncIterator
from typing import Any

from catversion_jax import __version__
from catversion_jax.errors import CatVersionError
from catversion_jax.serving.errors import ApiError, error_body
from catversion_jax.serving.faces import a1111, native, openai, operators, page
from catversion_jax.serving.gate import Gate
from catversion_jax.serving.server import Server

logger = logging.getLogger(__name__)

NEEDED = ("fastapi", "uvicorn", "pydantic", "prometheus_client", "jinja2")


def check_installed() -> None:
    """Make sure that the packages of the extra are there.

    Raises:
      CatVersionError: some are not.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise CatVersionError(
            f"catversion serve: needs {', '.join(missing)}, not installed here. "
            "pip install 'catversion-jax[serve]'"
        )


def make_app(server: Server) -> Any:
    """The ASGI application; entering its lifespan begins the server, leaving it ends it."""
    from fastapi import FastAPI
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.routing import Match

    from catversion_jax.serving.forms import ErrorAnswer

    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        server.start()
        yield
        await run_in_threadpool(server.close)

    app = FastAPI(
        title="CatVersion",
        version=__version__,
        description="Teach concepts from photos and draw with them.",
        lifespan=lifespan,
        docs_url=None,  # would load scripts from another host
        redoc_url=None,
        responses={
            "4XX": {"model": ErrorAnswer, "description": "It cannot be done as it was asked."},
            "5XX": {"model": ErrorAnswer, "description": "Not now, or the server has failed."},
        },
    )
    routers = [face.routes(server) for face in (operators, openai, native, a1111, page)]
    for router in routers:
        app.include_router(router)

    def answer(error: ApiError) -> Any:
        if error.status in (401, 413, 429, 503):
            server.core.meters.rejected.labels(error.code).inc()
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(ApiError)
    async def refused(request: Any, error: ApiError) -> Any:
        return answer(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Any, error: RequestValidationError) -> Any:
        first = error.errors()[0]
        outer = ("body", "query", "path", "draw", "teach")
        place = [str(part) for part in first["loc"] if part not in outer]
        param = ".".join(place) or None
        text = f"{param or 'the request'}: {first['msg']}."
        return answer(ApiError(422, "invalid_request", text, param=param))

    @app.exception_handler(HTTPException)
    async def of_framework(request: Any, error: HTTPException) -> Any:
        codes = {404: "not_found", 405: "method_not_allowed"}
        code = codes.get(error.status_code, "invalid_request")
        text = f"{request.method} {request.url.path}: {error.detail}."
        body = error_body(error.status_code, code, text)
        headers = dict(error.headers or {})
        if error.status_code == 405:  # the framework names those of the first route only
            every = [route for router in routers for route in router.routes]
            of_path = [route for route in every if route.matches(request.scope)[0] != Match.NONE]
            methods = {method for route in of_path for method in route.methods}
            headers["Allow"] = ", ".join(sorted(methods))
        return JSONResponse(body, error.status_code, headers)

    @app.exception_handler(CatVersionError)
    async def mistaken(request: Any, error: CatVersionError) -> Any:
        return answer(ApiError(422, "invalid_request", str(error)))

    @app.exception_handler(Exception)
    async def broken(request: Any, error: Exception) -> Any:
        text = "Something unexpected went wrong; the server's log says what."
        return JSONResponse(error_body(500, "internal_error", text), 500)

    app.add_middleware(Gate, server=server)
    return app

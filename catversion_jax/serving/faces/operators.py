"""For whoever runs the server: is it alive, does it take work, what does it count."""

from typing import Any

from catversion_jax.serving.errors import ApiError
from catversion_jax.serving.server import Server


def routes(server: Server) -> Any:
    """``/health``, ``/ready`` and ``/metrics``."""
    from fastapi import APIRouter
    from fastapi.responses import JSONResponse, PlainTextResponse

    router, core = APIRouter(tags=["operators"]), server.core

    @router.get("/health")
    def health() -> dict[str, str]:
        """The process answers. It needs no key and says nothing else."""
        return {"status": "ok"}

    @router.get("/ready")
    def ready() -> JSONResponse:
        """Everything is compiled, work is taken, and the device moves; 503 otherwise."""
        state = {
            "compiled": server.device.compiled.is_set(),
            "draining": core.draining,
            "safety_checker": core.safety_checker,
            "seconds_without_progress": round(server.device.seconds_without_progress, 1),
        }
        try:
            core.check_ready()
        except ApiError as error:
            return JSONResponse({"ready": False, **state, **error.body}, 503, error.headers)
        return JSONResponse({"ready": True, **state})

    @router.get("/metrics", response_class=PlainTextResponse)
    def metrics() -> PlainTextResponse:
        """Counters in Prometheus' text form."""
        meters = core.meters
        with core.lock:
            waiting = {"draw": len(core.pictures), "teach": len(core.lessons)}
            jobs = {"draw": len(core.left), "teach": len(core.progress)}
        for kind in ("draw", "teach"):
            meters.waiting.labels(kind).set(waiting[kind])
            meters.running.labels(kind).set(jobs[kind])
        meters.progress_age.set(server.device.seconds_without_progress)
        return PlainTextResponse(
            meters.text(), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    return router

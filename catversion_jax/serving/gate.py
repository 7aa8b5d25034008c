"""What stands before every route: who asks, from where, and how much they send.

Pure ASGI, so that nothing of a body is read before it is known whose it is. Everything is denied
but ``/health``. Pages of other sites are refused (cross-site requests), and a server without keys
answers only requests that name this machine (DNS rebinding).
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from catversion_jax.config.serving import is_own_address
from catversion_jax.serving.errors import ApiError
from catversion_jax.serving.server import Server

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

OPEN_PATHS = frozenset({"/health"})
MOST_JSON_BYTES = 1_000_000


class Gate:
    """Wraps the application."""

    def __init__(self, app: Any, server: Server):
        self._app, self._server = app, server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it with an error."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # no websockets
        try:
            headers = {
                name.decode("latin-1").lower(): value.decode("latin-1")
                for name, value in scope["headers"]
            }
            self._check(scope, headers)
            most = self._most_bytes(scope["path"])
            if int(headers.get("content-length") or 0) > most:
                raise _too_large(most)
        except ValueError:
            await _answer(send, ApiError(400, "invalid_request", "A header cannot be read."))
            return
        except ApiError as error:
            self._server.core.meters.rejected.labels(error.code).inc()
            if error.status == 401 and "text/html" in headers.get("accept", ""):
                error.headers["WWW-Authenticate"] = 'Basic realm="CatVersion: your key"'
            await _answer(send, error)
            return
        received = 0

        async def counted() -> MutableMapping[str, Any]:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > most:
                raise _too_large(most)
            return message

        await self._app(scope, counted, send)

    def _check(self, scope: Scope, headers: MutableMapping[str, str]) -> None:
        if scope["path"] in OPEN_PATHS:
            return
        owner = self._server.keys.owner(headers.get("authorization"))
        if owner is None:
            raise ApiError(
                401,
                "invalid_api_key",
                "This needs the header 'Authorization: Bearer KEY' with a key of this server.",
            )
        host, origin = headers.get("host", ""), headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            raise ApiError(
                403, "foreign_origin", f"Pages of {origin} may not ask this server for anything."
            )
        without_keys = self._server.options.keys is None
        if without_keys and not is_own_address(urlsplit(f"//{host}").hostname or ""):
            raise ApiError(
                403,
                "foreign_host",
                "A server without keys answers only programs of its own machine, at "
                "http://127.0.0.1. Start it with --keys for others.",
            )
        scope.setdefault("state", {})["owner"] = owner

    def _most_bytes(self, path: str) -> int:
        parts = path.split("/")
        is_photo = len(parts) == 6 and parts[4] in ("photos", "masks")
        return int(self._server.options.max_photo_mb * 1e6) if is_photo else MOST_JSON_BYTES


def _too_large(most: int) -> ApiError:
    return ApiError(
        413, "body_too_large", f"The body must have at most {most} bytes. Send a smaller one."
    )


async def _answer(send: Send, error: ApiError) -> None:
    body = json.dumps(error.body).encode()
    headers = {
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        **error.headers,
    }
    encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})

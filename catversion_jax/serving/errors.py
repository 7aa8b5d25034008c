"""What a client reads when a request cannot be done: always ``{"error": {message, type, param,
code}}``, the form of OpenAI's API.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class ApiError(Exception):
    """A refusal.

    Args:
      status: of HTTP.
      code: a word for programs, such as ``not_found``.
      message: value, rule and remedy, for people.
      param: the field of the request that is wrong.
      retry_after: seconds after which it is worth trying again.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after: float | None = None,
    ):
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.message = message
        self.headers: dict[str, str] = {}
        if retry_after is not None:
            self.headers["Retry-After"] = str(max(1, round(retry_after)))
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"

    @property
    def body(self) -> dict[str, Any]:
        """The answer, as JSON."""
        return error_body(self.status, self.code, self.message, self.param)


def error_body(status: int, code: str, message: str, param: str | None = None) -> dict[str, Any]:
    """The answer to a request that is refused."""
    return {"error": {"message": message, "type": _type(status), "param": param, "code": code}}


def _type(status: int) -> str:
    """OpenAI's names of kinds of errors."""
    named: Mapping[int, str] = {
        401: "authentication_error",
        404: "not_found_error",
        429: "rate_limit_error",
    }
    return named.get(status, "server_error" if status >= 500 else "invalid_request_error")


def not_found(what: str, name: str) -> ApiError:
    """Of what is not there, and of what belongs to another key: nobody can tell them apart."""
    return ApiError(404, "not_found", f"{what} {name!r}: there is none of yours by that name.")


def unprocessable(code: str, message: str, param: str | None = None) -> ApiError:
    """A request that says something impossible."""
    return ApiError(422, code, message, param=param)

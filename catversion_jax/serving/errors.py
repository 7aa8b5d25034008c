"""What a client reads when a request cannot be done: always ``{"error": {message, type, param,
code}}``, the form of OpenAI's API.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class ApiError(Exception):
    """The refusal of a request.

    Args:
      status: the HTTP status code.
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
        """The body of the answer."""
        return error_body(self.status, self.code, self.message, self.param)


def error_body(status: int, code: str, message: str, param: str | None = None) -> dict[str, Any]:
    """The body of the answer to a request that is refused, in OpenAI's form."""
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
    """The error 404 for what does not exist, and for what belongs to another key: a client cannot
    tell these apart.
    """
    return ApiError(404, "not_found", f"{what} {name!r}: there is none of yours by that name.")


def unprocessable(code: str, message: str, param: str | None = None) -> ApiError:
    """The error 422 for a request that can be read and cannot be carried out."""
    return ApiError(422, code, message, param=param)

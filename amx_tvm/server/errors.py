"""Errors in the form of OpenAI's interface: a status and an object that names the field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from amx_tvm.errors import AmxError

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "overloaded_error",
}


class ServerError(AmxError):
    """The server as a whole can't go on."""


class ApiError(AmxError):
    """A request that is answered with an error.

    Parameters
    ----------
    status : int
        HTTP status.
    message : str
        What was given, what was expected and what to do.
    param : str, optional
        The field of the request.
    code : str, optional
        A short name that programs can test, such as "context_length_exceeded".
    headers : mapping, optional
        More headers of the response, such as Retry-After.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = dict(headers or {})

    def __reduce__(self) -> tuple[Any, ...]:
        """Return how it is pickled; exceptions keep their message only."""
        return ApiError, (self.status, str(self), self.param, self.code, self.headers)

    @property
    def body(self) -> dict[str, object]:
        """OpenAI's error object."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {
            "error": {
                "message": str(self),
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        """Return the error as an HTTP response."""
        return JSONResponse(self.body, self.status, self.headers)

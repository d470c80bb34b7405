"""Errors in OpenAI's shape: message, type, the field that is wrong, and a code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.responses import JSONResponse

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An error response with `status`, and `body` in OpenAI's shape."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(error: ApiError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The HTTP response for an error."""
    # OpenAI's clients would repeat a request that timed out, and wait as long again.
    no_retry = {"x-should-retry": "false"} if error.status == 504 else {}
    return JSONResponse(error.body, error.status, {**no_retry, **(headers or {})})


def validation_error(problems: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first of pydantic's problems with a body."""
    problem = problems[0]
    if problem["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {problem.get('ctx', {}).get('error', problem['msg'])}")
    if isinstance(problem.get("input"), bytes):
        return ApiError(400, "the body is not declared as JSON: send Content-Type: application/json")
    # The location also names the types of a union: str, list[str], ….
    names = [str(part) for part in problem["loc"][1:] if isinstance(part, int) or part.isidentifier()]
    param = ".".join(name for name in names if name != "str") or None
    if problem["type"] == "extra_forbidden":
        return ApiError(400, f"Unrecognized request argument supplied: {param}", param=param)
    value = repr(problem.get("input"))
    shown = value if len(value) <= 60 else value[:60] + "…"
    reason = str(problem["msg"]).replace("Input should be", "must be")
    return ApiError(400, f"{param or 'the body'}: {reason}, not {shown}", param=param)

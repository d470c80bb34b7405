"""Errors in the format of OpenAI's API: message, type, name of the wrong field, and code."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.responses import JSONResponse

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_REPR = reprlib.Repr()
"""Shows the beginning of a value of any size, so that the time does not depend on the size."""
_REPR.maxstring = 70


class ApiError(Exception):
    """An error with the HTTP `status` and the `body` of its response, in the format of OpenAI's API."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(error: ApiError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """Return the HTTP response for an error."""
    # Without this header, OpenAI's clients would send the request again after a timeout, and wait as long again.
    no_retry = {"x-should-retry": "false"} if error.status == 504 else {}
    return JSONResponse(error.body, error.status, {**no_retry, **(headers or {})})


def validation_error(problems: Sequence[Mapping[str, Any]]) -> ApiError:
    """Return an error for the first of the problems that pydantic found in a body."""
    # A wrong type of object often lacks fields, too.
    problem = next((each for each in problems if each["loc"][-1:] == ("type",)), problems[0])
    if problem["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {problem.get('ctx', {}).get('error', problem['msg'])}")
    # Pydantic's location also contains the types of a union: str, list[str], ….
    names = [str(part) for part in problem["loc"][1:] if isinstance(part, int) or part.isidentifier()]
    param = ".".join(name for name in names if name != "str") or None
    value = problem.get("input")
    if problem["type"] == "unsupported":  # the location is that of the object which has the field
        name = problem["ctx"]["name"]
        param, value = f"{param}.{name}" if param else name, value[name] if isinstance(value, dict) else value
    value = json.dumps(value) if value is None or isinstance(value, bool) else _REPR.repr(value)
    shown = value if len(value) <= 60 else value[:60] + "…"
    reason = str(problem["msg"]).replace("Input should be", "must be").removeprefix("Value error, ")
    reason = re.sub("^(List|Value|String) should have", "must have", reason).partition(" after validation")[0]
    if problem["type"] == "missing":
        return ApiError(400, f"{param}: is missing", param=param)
    return ApiError(400, f"{param or 'the body'}: {reason}, not {shown}", param=param)
